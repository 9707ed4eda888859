//! The keys to buckets: in variables, or in the files that `aws configure` writes.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

use rusty_s3::Credentials;

use crate::error::KeysError;

/// What a profile may have instead of keys, each a way to get some.
const WAYS: [&str; 6] =
    ["credential_process", "role_arn", "source_profile", "sso_session", "sso_start_url", "web_identity_token_file"];

/// Where keys are looked for. Files are read when they are needed.
#[derive(Clone, Default)]
pub struct Keys {
    given: Option<Credentials>,
    profile: Option<String>,
    /// `credentials`, in which a section is called as its profile.
    credentials: Option<PathBuf>,
    /// `config`, in which it is called `profile NAME`.
    config: Option<PathBuf>,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { profile, credentials, config, given: _ } = self;
        let named = (profile, credentials, config);
        f.debug_struct("Keys").field("named", &named).finish_non_exhaustive()
    }
}

impl Keys {
    /// As the variables of AWS say: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
    /// `AWS_SESSION_TOKEN`, or `AWS_PROFILE`, `AWS_SHARED_CREDENTIALS_FILE` and `AWS_CONFIG_FILE`.
    pub fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let filled = |name: &str| variable(name).filter(|value| !value.is_empty());
        let text = |name: &str| filled(name).and_then(|value| value.into_string().ok());
        let given = text("AWS_ACCESS_KEY_ID").zip(text("AWS_SECRET_ACCESS_KEY"));
        let file = |name: &str, usual: &str| {
            let named = filled(name).map(PathBuf::from);
            named.or_else(|| Some(PathBuf::from(filled("HOME")?).join(".aws").join(usual)))
        };
        Self {
            given: given.map(|(key, secret)| match text("AWS_SESSION_TOKEN") {
                Some(token) => Credentials::new_with_token(key, secret, token),
                None => Credentials::new(key, secret),
            }),
            profile: text("AWS_PROFILE"),
            credentials: file("AWS_SHARED_CREDENTIALS_FILE", "credentials"),
            config: file("AWS_CONFIG_FILE", "config"),
        }
    }

    /// Those of a profile that somebody wants; or those of the environment, or of its profile.
    pub(super) fn of(&self, wanted: Option<&str>) -> Result<Option<Credentials>, KeysError> {
        if wanted.is_none() && self.given.is_some() {
            return Ok(self.given.clone());
        }
        let named = wanted.or(self.profile.as_deref());
        let profile = named.unwrap_or("default");
        let (mut entries, mut files) = (Vec::new(), Vec::new());
        let in_config = if profile == "default" { profile.to_owned() } else { format!("profile {profile}") };
        for (file, section) in [(&self.credentials, profile), (&self.config, &in_config)] {
            let Some(file) = file else { continue };
            match std::fs::read_to_string(file) {
                Ok(text) => entries.extend(section_of(&text, section)),
                Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
                Err(source) => return Err(KeysError::File { path: file.clone(), source }),
            }
            files.push(file.clone());
        }
        let get = |wanted: &str| entries.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str());
        let profile = profile.to_owned();
        match (get("aws_access_key_id"), get("aws_secret_access_key")) {
            (Some(key), Some(secret)) => Ok(Some(match get("aws_session_token") {
                Some(token) => Credentials::new_with_token(key, secret, token),
                None => Credentials::new(key, secret),
            })),
            (Some(_), None) => Err(KeysError::Half { profile }),
            (None, _) => match WAYS.into_iter().find(|way| get(way).is_some()) {
                Some(way) => Err(KeysError::Way { profile, way: way.to_owned() }),
                None if named.is_some() => Err(KeysError::NoProfile { profile, files }),
                None => Ok(None),
            },
        }
    }
}

/// What a file says in one of its sections: `name = value`, a line each.
fn section_of(text: &str, wanted: &str) -> Vec<(String, String)> {
    let (mut found, mut inside) = (Vec::new(), false);
    for line in text.lines().map(str::trim) {
        if let Some(section) = line.strip_prefix('[') {
            let words: Vec<&str> = section.split(']').next().unwrap_or_default().split_whitespace().collect();
            inside = words.join(" ") == wanted;
        } else if inside
            && !line.starts_with(['#', ';'])
            && let Some((name, value)) = line.split_once('=')
        {
            found.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles() {
        let dir = tempfile::tempdir().unwrap();
        let (credentials, config) = (dir.path().join("credentials"), dir.path().join("config"));
        std::fs::write(
            &credentials,
            "[default]\naws_access_key_id=one\naws_secret_access_key = s1 # no\n[other]\n# aws_access_key_id = no\n\
             aws_access_key_id = two\naws_secret_access_key = s2\naws_session_token = t2\n[half]\naws_access_key_id = 3",
        )
        .unwrap();
        std::fs::write(
            &config,
            "[default]\nregion = x\n[ profile  third ]\nAWS_ACCESS_KEY_ID = three\naws_secret_access_key = s3\n\
             [profile sso]\nsso_session = x\n[profile empty]\nregion = y\n[fourth]\naws_access_key_id = no\n",
        )
        .unwrap();
        let named = |more: &[(&'static str, &'static str)]| {
            let more = more.to_vec();
            let files = [("AWS_SHARED_CREDENTIALS_FILE", &credentials), ("AWS_CONFIG_FILE", &config)];
            let files = files.map(|(name, file)| (name, OsString::from(file)));
            Keys::from_variables(move |wanted| {
                let given = more.iter().find(|(name, _)| *name == wanted).map(|(_, value)| OsString::from(*value));
                given.or_else(|| files.iter().find(|(name, _)| *name == wanted).map(|(_, value)| value.clone()))
            })
        };
        let key = |keys: &Keys, profile| {
            keys.of(profile).map(|found| found.map(|found| found.key().to_owned())).map_err(|error| error.to_string())
        };
        let plain = named(&[]);
        let with_keys = named(&[("AWS_ACCESS_KEY_ID", "env"), ("AWS_SECRET_ACCESS_KEY", "s")]);
        let half = named(&[("AWS_ACCESS_KEY_ID", "env"), ("AWS_SECRET_ACCESS_KEY", "")]);
        let with_profile = named(&[("AWS_PROFILE", "other")]);
        for (keys, profile, expected) in [
            (&plain, None, "one"),
            (&plain, Some("other"), "two"),
            (&plain, Some("third"), "three"),
            (&with_keys, None, "env"),
            (&with_keys, Some("other"), "two"),
            (&half, None, "one"),
            (&with_profile, None, "two"),
        ] {
            assert_eq!(key(keys, profile), Ok(Some(expected.to_owned())), "{profile:?}");
        }
        assert_eq!(plain.of(Some("other")).unwrap().unwrap().token(), Some("t2"));
        for (profile, text) in [
            ("half", "has no 'aws_secret_access_key'"),
            ("sso", "gets its keys by 'sso_session'"),
            ("empty", "is in no file ('"),
            ("fourth", "is in no file"),
            ("nowhere", "the profile 'nowhere' is in no file"),
        ] {
            let error = key(&plain, Some(profile)).unwrap_err();
            assert!(error.contains(text), "{profile}: {error}");
        }
        // Nobody has said that there are keys.
        assert_eq!(key(&Keys::default(), None), Ok(None));
        std::fs::remove_file(&credentials).unwrap();
        assert_eq!(key(&plain, None), Ok(None));
        std::fs::create_dir(&credentials).unwrap();
        assert!(key(&plain, None).unwrap_err().starts_with("cannot read '"));
    }
}
