//! How to go about requests: what settings and the environment say.

use std::ffi::OsString;
use std::time::Duration;

use larder_core::settings::Settings;

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
    /// No time: as long as the system waits.
    pub connect_timeout: Option<Duration>,
    /// How long less than a byte a second may come.
    pub stall_timeout: Option<Duration>,
    /// How often something is tried; at least once.
    pub attempts: u32,
    /// Certificates to trust, as PEM; those of Mozilla if there are none.
    pub certificates: Option<String>,
    pub checks_certificates: bool,
    /// The text of a netrc file.
    pub netrc: Option<String>,
    pub proxies: Proxies,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            user_agent_suffix: String::new(),
            connections: 25,
            connect_timeout: None,
            stall_timeout: Some(Duration::from_mins(5)),
            attempts: 5,
            certificates: None,
            checks_certificates: true,
            netrc: None,
            proxies: Proxies::default(),
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
            connect_timeout: seconds(settings.connect_timeout),
            stall_timeout: seconds(settings.stalled_download_timeout),
            attempts: settings.download_attempts.max(1),
            certificates: certificates(&settings.ssl_cert_file, &variable),
            checks_certificates: settings.verify_https_binary_caches,
            netrc: std::fs::read_to_string(&settings.netrc_file).ok(),
            proxies: Proxies::from_variables(text),
        }
    }
}

/// The text of the certificates that this machine trusts.
pub fn certificates(named: &str, variable: impl Fn(&str) -> Option<OsString>) -> Option<String> {
    let candidates = [
        Some(OsString::from(named)).filter(|file| !file.is_empty()),
        variable("NIX_SSL_CERT_FILE"),
        variable("SSL_CERT_FILE"),
        Some("/etc/ssl/certs/ca-certificates.crt".into()),
        Some("/etc/pki/tls/certs/ca-bundle.crt".into()),
    ];
    candidates.into_iter().flatten().find_map(|file| std::fs::read_to_string(file).ok())
}
