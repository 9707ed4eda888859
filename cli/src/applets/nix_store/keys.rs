//! `--generate-binary-cache-key`.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use larder_core::signature::{SecretKey, SignatureError};
use rustix::fs::{Mode, OFlags};

use crate::args::shown;

/// Why no key was made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum KeyError {
    #[error("a key cannot be called '{name}': a name is printable ASCII without blanks and colons")]
    Name {
        name: String,
        #[source]
        source: SignatureError,
    },
    #[error("opening file '{}'", shown(path.as_os_str()))]
    Open { path: PathBuf, source: io::Error },
    #[error("writing to file '{}'", shown(path.as_os_str()))]
    Write { path: PathBuf, source: io::Error },
    #[error("the system gives no random numbers")]
    Random(#[source] getrandom::Error),
}

/// Makes a key pair and writes its files, without a final newline, as Nix does.
///
/// A file that is there already is written over. The secret file is readable by its owner alone
/// before the secret is in it, also if it was there with another mode.
pub(super) fn generate(name: &str, secret: &Path, public: &Path) -> Result<(), KeyError> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(KeyError::Random)?;
    let key = SecretKey::from_seed(name, &seed).map_err(|source| KeyError::Name { name: name.to_owned(), source })?;
    write(public, &key.public().to_string(), Mode::from_raw_mode(0o666))?;
    write(secret, &key.to_file_text(), Mode::RUSR | Mode::WUSR)
}

fn write(path: &Path, text: &str, mode: Mode) -> Result<(), KeyError> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
    let opened = rustix::fs::open(path, flags, mode);
    let file = opened.map_err(|source| KeyError::Open { path: path.to_owned(), source: source.into() })?;
    let put = || -> io::Result<()> {
        let mut file = File::from(file);
        let found = file.metadata()?;
        if mode == Mode::RUSR | Mode::WUSR && found.is_file() {
            rustix::fs::fchmod(&file, mode)?;
        }
        file.write_all(text.as_bytes())
    };
    put().map_err(|source| KeyError::Write { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use larder_core::signature::PublicKey;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn keys_are_a_pair_and_the_secret_one_is_secret() {
        let dir = tempfile::tempdir().unwrap();
        let (secret, public) = (dir.path().join("s"), dir.path().join("p"));
        std::fs::write(&secret, "an older key that is longer than the new one".repeat(9)).unwrap();
        generate("cache.example-1", &secret, &public).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&secret), 0o600);
        let text = std::fs::read_to_string(&secret).unwrap();
        assert!(text.starts_with("cache.example-1:") && !text.ends_with('\n'));
        let key = SecretKey::parse(&text).unwrap();
        let read: PublicKey = std::fs::read_to_string(&public).unwrap().parse().unwrap();
        assert_eq!(key.public(), read);
    }

    #[test]
    fn bad_names_and_places() {
        let dir = tempfile::tempdir().unwrap();
        let (secret, nowhere) = (dir.path().join("s"), dir.path().join("no/p"));
        for name in ["", "a b", "a:b", "é"] {
            assert!(matches!(generate(name, &secret, &secret), Err(KeyError::Name { .. })), "{name}");
        }
        assert!(matches!(generate("k", &secret, &nowhere), Err(KeyError::Open { .. })));
        assert!(!secret.exists(), "nothing is left behind");
    }
}
