//! How to go about requests: what settings and the environment say.

use std::ffi::OsString;
use std::io;
use std::num::NonZeroU64;
use std::time::Duration;

use larder_core::settings::Settings;

use crate::error::{DownloadError, SharedError};
use crate::s3::Keys;
use crate::uri::host;

/// Proxies by the scheme of what is fetched.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Proxies {
    pub http: Option<String>,
    pub https: Option<String>,
    pub all: Option<String>,
    /// Hosts that are spoken to directly, separated by commas; `*` for all.
    pub none: Option<String>,
}

impl Proxies {
    /// As the variables `http_proxy`, `https_proxy`, `all_proxy` and `no_proxy` say. All but the
    /// first are known in upper case too.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Self {
        let filled = |name: &str| variable(name).filter(|value| !value.is_empty());
        Self {
            http: filled("http_proxy"),
            https: filled("https_proxy").or_else(|| filled("HTTPS_PROXY")),
            all: filled("all_proxy").or_else(|| filled("ALL_PROXY")),
            none: filled("no_proxy").or_else(|| filled("NO_PROXY")),
        }
    }

    /// The proxy for a URL.
    pub fn of(&self, url: &str) -> Option<&str> {
        let host = host(url);
        let excluded = self.none.as_deref().is_some_and(|list| {
            let names = list.split(',').map(|name| name.trim().trim_start_matches('.'));
            names.filter(|name| !name.is_empty()).any(|name| {
                name == "*" || host == name || host.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
            })
        });
        let own = if url.starts_with("https:") { &self.https } else { &self.http };
        own.as_deref().or(self.all.as_deref()).filter(|_| !excluded)
    }
}

/// How to go about requests.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    pub user_agent_suffix: String,
    /// Requests at once; 0: as many as are made.
    pub connections: usize,
    /// Are servers offered HTTP/2?
    pub http2: bool,
    /// No time: as long as the system waits.
    pub connect_timeout: Option<Duration>,
    /// How long less than a byte a second may come.
    pub stall_timeout: Option<Duration>,
    /// Bytes a second that one answer may come at, if there is a limit.
    pub speed: Option<NonZeroU64>,
    /// How often something is tried; at least once.
    pub attempts: u32,
    pub authorities: Authorities,
    pub checks_certificates: bool,
    /// The text of a netrc file.
    pub netrc: Option<String>,
    pub proxies: Proxies,
    /// Where keys for buckets of S3 come from.
    pub keys: Keys,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            user_agent_suffix: String::new(),
            connections: 25,
            http2: true,
            connect_timeout: None,
            stall_timeout: Some(Duration::from_mins(5)),
            speed: None,
            attempts: 5,
            authorities: Authorities::default(),
            checks_certificates: true,
            netrc: None,
            proxies: Proxies::default(),
            keys: Keys::default(),
        }
    }
}

impl ClientOptions {
    /// As the settings and some environment say. Files with passwords and certificates are read
    /// now; those that cannot be are done without.
    pub fn of(settings: &Settings, variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let text = |name: &str| variable(name).and_then(|value| value.into_string().ok());
        let seconds = |n: u64| (n > 0).then(|| Duration::from_secs(n));
        Self {
            user_agent_suffix: settings.user_agent_suffix.clone(),
            connections: usize::try_from(settings.http_connections).unwrap_or(0),
            http2: settings.http2,
            connect_timeout: seconds(settings.connect_timeout),
            stall_timeout: seconds(settings.stalled_download_timeout),
            speed: NonZeroU64::new(settings.download_speed.saturating_mul(1024)),
            attempts: settings.download_attempts.max(1),
            authorities: Authorities::find(&settings.ssl_cert_file, &variable),
            checks_certificates: settings.verify_https_binary_caches,
            netrc: std::fs::read_to_string(&settings.netrc_file).ok(),
            proxies: Proxies::from_variables(text),
            keys: Keys::from_variables(variable),
        }
    }
}

/// The files that systems have their certificates in.
const USUAL: [&str; 2] = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];

/// Who vouches for servers.
#[derive(Debug, Clone, Default)]
pub struct Authorities {
    /// Their certificates, as PEM; those of Mozilla if there are none.
    pub pem: Option<String>,
    /// Why there are none: the file that was named for them cannot be used.
    pub refused: Option<SharedError>,
}

impl Authorities {
    /// Those of the file that the setting `ssl-cert-file` or the environment names, or else those
    /// that this machine trusts. A file that was named and cannot be read is no reason to trust
    /// others instead: nobody is trusted then.
    pub fn find(named: &str, variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let named = Some(OsString::from(named)).filter(|file| !file.is_empty());
        let named = named.or_else(|| variable("NIX_SSL_CERT_FILE")).or_else(|| variable("SSL_CERT_FILE"));
        let Some(file) = named.filter(|file| !file.is_empty()) else {
            return Self { pem: USUAL.iter().find_map(|file| std::fs::read_to_string(file).ok()), refused: None };
        };
        let without = |pem: String| match super::certificates(&pem) {
            found if found.is_empty() => Err(io::Error::new(io::ErrorKind::InvalidData, "it holds no certificate")),
            _ => Ok(pem),
        };
        match std::fs::read_to_string(&file).and_then(without) {
            Ok(pem) => Self { pem: Some(pem), refused: None },
            Err(error) => {
                let text = format!("cannot take certificates from '{}': {error}", file.to_string_lossy());
                Self { pem: None, refused: Some(SharedError(text.into())) }
            }
        }
    }

    /// Can they be asked?
    pub(super) fn check(&self) -> Result<(), DownloadError> {
        self.refused.clone().map_or(Ok(()), |source| Err(DownloadError::Authorities { source }))
    }
}
