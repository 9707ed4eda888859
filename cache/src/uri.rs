//! URIs of caches: `https://host/path?priority=10`, `file:///folder?compression=zstd`.
//!
//! Source: protocols, section 5.5.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

use crate::compress::Method;
use crate::error::CacheError;
use crate::netrc;

/// Where a cache is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// `http://` or `https://`, without a slash at the end.
    Http(String),
    /// An absolute path.
    Folder(PathBuf),
    /// The name of a bucket of S3.
    Bucket(String),
}

/// A URI of a cache, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheUri {
    pub location: Location,
    pub parameters: BTreeMap<String, String>,
    /// The header `Authorization`, if the URI has a user.
    pub authorization: Option<String>,
    /// As people see it: no password, no parameters, no slash at the end.
    pub shown: String,
    /// What tells it from other caches: the same, and where a bucket is.
    pub identity: String,
}

/// Parameters that caches have, and for which there is something to do.
const KNOWN: &[&str] = &[
    "compression",
    "compression-level",
    "parallel-compression",
    "priority",
    "secret-key",
    "store",
    "token",
    "trusted",
    "want-mass-query",
    "write-nar-listing",
];

/// Those that buckets have besides.
const KNOWN_OF_BUCKETS: &[&str] = &[
    "buffer-size",
    "endpoint",
    "log-compression",
    "ls-compression",
    "multipart-upload",
    "narinfo-compression",
    "profile",
    "region",
    "scheme",
];

impl CacheUri {
    /// Parses a URI. Errors: it is for no cache, or for one of a kind that is not spoken.
    pub fn parse(uri: &str) -> Result<Self, CacheError> {
        let invalid = |reason: &str| CacheError::Uri { uri: without_password(uri), reason: reason.to_owned() };
        let (address, query) = uri.split_once('?').map_or((uri, ""), |(address, query)| (address, query));
        let (scheme, rest) =
            address.split_once("://").ok_or_else(|| CacheError::UnknownStore { uri: uri.to_owned() })?;
        let mut parameters = BTreeMap::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').ok_or_else(|| invalid("a parameter has no value"))?;
            let value = String::from_utf8(percent_decoded(value)).map_err(|_| invalid("a parameter is not UTF-8"))?;
            let known = KNOWN.contains(&name) || (scheme == "s3" && KNOWN_OF_BUCKETS.contains(&name));
            if !known {
                return Err(invalid(&format!("the parameter '{name}' is not known")));
            }
            parameters.insert(name.to_owned(), value);
        }
        let rest = rest.trim_end_matches('/');
        match scheme {
            "http" | "https" => {
                let (authority, path) = match rest.find('/') {
                    Some(at) => rest.split_at(at),
                    None => (rest, ""),
                };
                let (user, host) = authority.rsplit_once('@').map_or((None, authority), |(u, h)| (Some(u), h));
                if host.is_empty() || rest.contains('#') {
                    return Err(invalid("it names no host"));
                }
                let authorization = user.map(|user| {
                    let (name, password) = user.split_once(':').unwrap_or((user, ""));
                    let plain = |text| String::from_utf8_lossy(&percent_decoded(text)).into_owned();
                    netrc::basic(&plain(name), &plain(password))
                });
                let shown = format!("{scheme}://{host}{path}");
                let (location, identity) = (Location::Http(shown.clone()), shown.clone());
                Ok(Self { location, parameters, authorization, shown, identity })
            }
            "file" => {
                let path = PathBuf::from(OsString::from_vec(percent_decoded(rest)));
                if !path.is_absolute() {
                    return Err(invalid("it names no absolute path"));
                }
                let (location, shown) = (Location::Folder(path), format!("file://{rest}"));
                Ok(Self { location, parameters, authorization: None, identity: shown.clone(), shown })
            }
            "s3" => {
                let is_name = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
                if rest.is_empty() || rest.len() > 255 || rest.starts_with('.') || !rest.bytes().all(is_name) {
                    return Err(invalid("it names no bucket"));
                }
                let shown = format!("s3://{rest}");
                let place =
                    ["endpoint", "region", "scheme"].map(|name| parameters.get(name).map_or("", String::as_str));
                let identity = format!("{shown}?{}", place.join("&"));
                Ok(Self {
                    location: Location::Bucket(rest.to_owned()),
                    parameters,
                    authorization: None,
                    shown,
                    identity,
                })
            }
            "ssh" | "ssh-ng" | "unix" | "mounted-ssh-ng" => Err(CacheError::Unsupported { uri: uri.to_owned() }),
            _ => Err(CacheError::UnknownStore { uri: uri.to_owned() }),
        }
    }

    /// Is this the URI of a binary cache, of any kind?
    pub fn is_cache(uri: &str) -> bool {
        ["http://", "https://", "file://", "s3://"].iter().any(|scheme| uri.starts_with(scheme))
    }

    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// A parameter that says yes or no.
    pub fn flag(&self, name: &str) -> Result<Option<bool>, CacheError> {
        match self.parameter(name) {
            None => Ok(None),
            Some("true" | "1" | "yes") => Ok(Some(true)),
            Some("false" | "0" | "no") => Ok(Some(false)),
            Some(_) => Err(self.invalid(format!("'{name}' is neither true nor false"))),
        }
    }

    /// A parameter that is a way to compress; `None` of them if it is not there.
    pub fn method(&self, name: &str) -> Result<Option<Method>, CacheError> {
        let method = |text: &str| {
            let (uri, method) = (self.shown.clone(), text.to_owned());
            Method::parse(text).ok_or(CacheError::Compression { uri, method })
        };
        self.parameter(name).map(method).transpose()
    }

    /// A parameter that is a number of bytes.
    pub fn size(&self, name: &str) -> Result<Option<u64>, CacheError> {
        let number = |text: &str| text.parse().map_err(|_| self.invalid(format!("'{name}' is no number of bytes")));
        self.parameter(name).map(number).transpose()
    }

    /// A parameter that is a number.
    pub fn number(&self, name: &str) -> Result<Option<i32>, CacheError> {
        let number = |text: &str| text.parse().map_err(|_| self.invalid(format!("'{name}' is no number")));
        self.parameter(name).map(number).transpose()
    }

    pub(crate) fn invalid(&self, reason: String) -> CacheError {
        CacheError::Uri { uri: self.shown.clone(), reason }
    }
}

/// A URI with whatever it says of a user left out.
fn without_password(uri: &str) -> String {
    match uri.split_once("://") {
        Some((scheme, rest)) => {
            let end = rest.find(['/', '?']).unwrap_or(rest.len());
            let (authority, path) = rest.split_at(end);
            let host = authority.rsplit('@').next().unwrap_or_default();
            format!("{scheme}://{host}{path}")
        }
        None => uri.to_owned(),
    }
}

/// `%20` and its like as the bytes they stand for.
pub fn percent_decoded(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, others)) = rest.split_first() {
        let hex = others.get(..2).filter(|_| first == b'%').and_then(|hex| std::str::from_utf8(hex).ok());
        let hex = hex.filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()));
        if let Some(byte) = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            out.push(byte);
            rest = others.get(2..).unwrap_or_default();
        } else {
            out.push(first);
            rest = others;
        }
    }
    out
}

/// The host of a URL, without user and port.
pub fn host(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = authority.rsplit('@').next().unwrap_or_default();
    match host.strip_prefix('[').and_then(|host| host.split_once(']')) {
        Some((address, _)) => address,
        None => host.split(':').next().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris() {
        let http = CacheUri::parse("https://me:p%20w@a.b:81/c/?priority=3&trusted=true").unwrap();
        assert_eq!(http.location, Location::Http("https://a.b:81/c".into()));
        assert_eq!(http.shown, "https://a.b:81/c");
        assert_eq!(http.authorization, Some(netrc::basic("me", "p w")));
        assert_eq!((http.number("priority").unwrap(), http.flag("trusted").unwrap()), (Some(3), Some(true)));
        let file = CacheUri::parse("file:///a%20b/c/?secret-key=%2fk").unwrap();
        assert_eq!(file.location, Location::Folder("/a b/c".into()));
        assert_eq!(file.parameter("secret-key"), Some("/k"));
        for (uri, text) in [
            ("zork://x", "don't know how to open Nix store 'zork://x'"),
            ("x", "don't know how to open Nix store 'x'"),
            ("http://", "the URI 'http://' of a cache is not valid: it names no host"),
            (
                "http://u:secret@h/?x=1",
                "the URI 'http://h/?x=1' of a cache is not valid: the parameter 'x' is not known",
            ),
            ("file://x", "the URI 'file://x' of a cache is not valid: it names no absolute path"),
        ] {
            assert_eq!(CacheUri::parse(uri).unwrap_err().to_string(), text);
        }
        assert!(CacheUri::parse("ssh://h").unwrap_err().to_string().starts_with("cannot use the cache"));
        let odd = CacheUri::parse("file:///x?priority=3x&trusted=maybe").unwrap();
        odd.number("priority").unwrap_err();
        odd.flag("trusted").unwrap_err();
    }

    #[test]
    fn buckets() {
        let uri = CacheUri::parse("s3://a-bucket/?region=r&endpoint=h:9000&profile=p").unwrap();
        assert_eq!(uri.location, Location::Bucket("a-bucket".into()));
        // Buckets of one name at two places are two caches.
        let other = CacheUri::parse("s3://a-bucket?endpoint=h:9001").unwrap();
        assert!(uri.shown == "s3://a-bucket" && uri.shown == other.shown && uri.identity != other.identity);
        for uri in ["s3://", "s3://a/b", "s3://a b", "s3://u@h", "s3://..", "s3://a?zork=1", "http://h?region=x"] {
            CacheUri::parse(uri).unwrap_err();
        }
    }

    #[test]
    fn hosts() {
        for (url, expected) in [
            ("http://a.b/c", "a.b"),
            ("https://u:p@a.b:8080/c@d", "a.b"),
            ("http://[::1]:80/x", "::1"),
            ("http://a?b/c", "a"),
        ] {
            assert_eq!(host(url), expected);
        }
        assert_eq!(percent_decoded("/a%20b%zz%4%+1"), b"/a b%zz%4%+1");
    }
}
