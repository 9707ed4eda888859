//! `builtin:fetchurl`: one file, or one archive, from a URL.
//!
//! What comes is checked against the hash of the derivation afterwards, as any fixed output is.

use std::fs::{File, Permissions};
use std::io::{self, Read, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use larder_core::hash::encode_base64;
use larder_fs::restore::{RestoreOptions, Restorer};
use serde_json::Value;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig};
use ureq::{Agent, Proxy};

use super::{Anything, Given, at, say, unpack};

/// What the text of the agent says.
const USER_AGENT: &str = concat!("Larder/", env!("CARGO_PKG_VERSION"));

/// Between two attempts, doubled each time.
const PAUSE: Duration = Duration::from_millis(250);

pub(super) fn run(given: &Given<'_>) -> Result<(), Anything> {
    let out = given.path("out")?;
    let url = given.text("url")?;
    if let (Some(hash), Value::Array(mirrors)) = (given.option("flatHash").as_str(), given.option("mirrors")) {
        for mirror in mirrors.iter().filter_map(Value::as_str) {
            let slash = if mirror.ends_with('/') { "" } else { "/" };
            match fetch(given, &format!("{mirror}{slash}{hash}"), &out) {
                Ok(()) => return Ok(()),
                Err(error) => say(&error.to_string()),
            }
        }
    }
    fetch(given, url, &out)
}

/// Fetches, unpacks if that is wanted, and sets the mode.
fn fetch(given: &Given<'_>, url: &str, out: &Path) -> Result<(), Anything> {
    let attempts = given.option("attempts").as_u64().unwrap_or(1).max(1);
    let mut pause = PAUSE;
    for attempt in 1.. {
        let failed = match open(given, url) {
            Ok(body) => match write(given, url, body, out) {
                Ok(()) => return Ok(()),
                Err(error) => Failed { text: error.to_string(), is_passing: false },
            },
            Err(failed) => failed,
        };
        let text = format!("unable to download '{url}': {}", failed.text);
        if !failed.is_passing || attempt >= attempts {
            return Err(text.into());
        }
        say(&format!("warning: {text}; retrying in {} ms", pause.as_millis()));
        std::thread::sleep(pause);
        pause *= 2;
    }
    Ok(())
}

/// Why there is no body.
struct Failed {
    text: String,
    /// Another attempt may do better.
    is_passing: bool,
}

fn open(given: &Given<'_>, url: &str) -> Result<Box<dyn Read>, Failed> {
    let lasting = |text: String| Failed { text, is_passing: false };
    if let Some(path) = url.strip_prefix("file://") {
        let path = percent_decoded(path);
        let file = File::open(Path::new(std::ffi::OsStr::new(&path))).map_err(|e| lasting(format!("{e}")))?;
        if !file.metadata().is_ok_and(|meta| meta.is_file()) {
            return Err(lasting("it is no regular file".into()));
        }
        return Ok(Box::new(file));
    }
    if !url.starts_with("http://") && !url.starts_with("https://") {
        return Err(lasting("only http, https and file URLs can be fetched".into()));
    }
    let agent = agent(given, url).map_err(|error| lasting(error.to_string()))?;
    let mut request = agent.get(url);
    if let Some(authorization) = given.option("netrc").as_str().and_then(|netrc| credentials(netrc, host(url))) {
        request = request.header("Authorization", authorization);
    }
    let response = request.call().map_err(|error| {
        let is_passing = matches!(
            error,
            ureq::Error::Io(_)
                | ureq::Error::Timeout(_)
                | ureq::Error::ConnectionFailed
                | ureq::Error::HostNotFound
                | ureq::Error::Protocol(_)
        );
        Failed { text: error.to_string(), is_passing }
    })?;
    let status = response.status();
    if !status.is_success() {
        let text = format!("HTTP error {} {}", status.as_u16(), status.canonical_reason().unwrap_or_default());
        let is_passing = matches!(status.as_u16(), 408 | 429 | 500..=599);
        return Err(Failed { text: text.trim_end().to_owned(), is_passing });
    }
    Ok(Box::new(response.into_body().into_reader()))
}

fn agent(given: &Given<'_>, url: &str) -> Result<Agent, Anything> {
    let seconds = |name: &str| given.option(name).as_u64().filter(|seconds| *seconds > 0).map(Duration::from_secs);
    let suffix = given.option("userAgentSuffix").as_str().filter(|text| !text.is_empty());
    let mut config = Agent::config_builder()
        .user_agent(suffix.map_or_else(|| USER_AGENT.to_owned(), |suffix| format!("{USER_AGENT} {suffix}")))
        .timeout_connect(seconds("connectTimeout"))
        .timeout_per_read(seconds("stalledTimeout"))
        .http_status_as_error(false)
        .proxy(proxy(given, url)?);
    if let Some(pem) = given.option("certificates").as_str() {
        let certificates: Vec<Certificate<'static>> = ureq::tls::parse_pem(pem.as_bytes())
            .filter_map(|item| match item {
                Ok(PemItem::Certificate(certificate)) => Some(certificate),
                _ => None,
            })
            .collect();
        if !certificates.is_empty() {
            let roots = RootCerts::Specific(Arc::new(certificates));
            config = config.tls_config(TlsConfig::builder().root_certs(roots).build());
        }
    }
    Ok(config.build().into())
}

/// The proxy that the environment of the builder names (`impureEnvVars`).
fn proxy(given: &Given<'_>, url: &str) -> Result<Option<Proxy>, Anything> {
    let variable = |name: &str| {
        let value = given.env.get(name.as_bytes()).copied().filter(|value| !value.is_empty())?;
        std::str::from_utf8(value).ok()
    };
    let host = host(url);
    let excluded = variable("no_proxy").is_some_and(|list| {
        let names = list.split(',').map(|name| name.trim().trim_start_matches('.'));
        names
            .filter(|name| !name.is_empty())
            .any(|name| name == "*" || host == name || host.strip_suffix(name).is_some_and(|rest| rest.ends_with('.')))
    });
    let own = if url.starts_with("https:") { "https_proxy" } else { "http_proxy" };
    match variable(own).or_else(|| variable("all_proxy")).filter(|_| !excluded) {
        None => Ok(None),
        Some(text) => Ok(Some(Proxy::new(text)?)),
    }
}

/// The host of a URL, without user and port.
fn host(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = authority.rsplit('@').next().unwrap_or_default();
    match host.strip_prefix('[').and_then(|host| host.split_once(']')) {
        Some((address, _)) => address,
        None => host.split(':').next().unwrap_or_default(),
    }
}

/// What a netrc file has for a host, as the value of the header.
fn credentials(netrc: &str, host: &str) -> Option<String> {
    let mut words = netrc.lines().filter(|line| !line.trim_start().starts_with('#')).flat_map(str::split_whitespace);
    let (mut ours, mut login, mut password) = (false, None, None);
    while let Some(word) = words.next() {
        match word {
            "machine" | "default" => {
                if ours {
                    break;
                }
                ours = word == "default" || words.next() == Some(host);
            }
            "login" if ours => login = words.next(),
            "password" if ours => password = words.next(),
            _ => {}
        }
    }
    let (login, password) = (login.filter(|_| ours)?, password.unwrap_or_default());
    Some(format!("Basic {}", encode_base64(format!("{login}:{password}").as_bytes())))
}

/// `%20` and its like as the bytes they stand for.
fn percent_decoded(text: &str) -> std::ffi::OsString {
    use std::os::unix::ffi::OsStringExt as _;
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, others)) = rest.split_first() {
        let hex = others.get(..2).filter(|_| first == b'%').and_then(|hex| std::str::from_utf8(hex).ok());
        if let Some(byte) = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            out.push(byte);
            rest = others.get(2..).unwrap_or_default();
        } else {
            out.push(first);
            rest = others;
        }
    }
    std::ffi::OsString::from_vec(out)
}

fn write(given: &Given<'_>, url: &str, mut body: Box<dyn Read>, out: &Path) -> Result<(), Anything> {
    if given.is_set("unpack") {
        let source =
            if Path::new(url).extension().is_some_and(|ext| ext == "xz") { unpack::uncompressed(body)? } else { body };
        restore(source, out)?;
    } else {
        let mut file = File::create(out).map_err(at("creating file", out))?;
        io::copy(&mut body, &mut file)?;
        file.flush()?;
    }
    if given.is_set("executable") {
        std::fs::set_permissions(out, Permissions::from_mode(0o755)).map_err(at("changing mode of", out))?;
    }
    Ok(())
}

/// Lays an archive down.
fn restore(mut source: impl Read, out: &Path) -> Result<(), Anything> {
    let options = RestoreOptions::default();
    let mut restorer = Restorer::new(rustix::fs::CWD, out.as_os_str(), options);
    let mut block = vec![0; 64 << 10];
    while !restorer.is_done() {
        let n = source.read(&mut block)?;
        if n == 0 {
            break;
        }
        let bytes = block.get(..n).unwrap_or_default();
        let taken = restorer.push(bytes)?;
        if taken < n {
            return Err("there is something after the end of the archive".into());
        }
    }
    restorer.finish()?;
    if source.read(&mut block)? > 0 {
        return Err("there is something after the end of the archive".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_credentials() {
        for (url, expected) in [
            ("http://a.b/c", "a.b"),
            ("https://u:p@a.b:8080/c@d", "a.b"),
            ("http://[::1]:80/x", "::1"),
            ("http://a?b/c", "a"),
        ] {
            assert_eq!(host(url), expected);
        }
        let netrc = "# machine a login no\nmachine a login me password p\nmachine b\n login you\ndefault login all";
        let basic = |text: &str| Some(format!("Basic {}", encode_base64(text.as_bytes())));
        assert_eq!(credentials(netrc, "a"), basic("me:p"));
        assert_eq!(credentials(netrc, "b"), basic("you:"));
        assert_eq!(credentials(netrc, "c"), basic("all:"));
        assert_eq!(credentials("machine a login x", "c"), None);
        assert_eq!(percent_decoded("/a%20b%zz%4"), "/a b%zz%4");
    }
}
