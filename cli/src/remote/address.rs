//! `ssh://` and `ssh-ng://` addresses. Source: protocols, section 4.

/// The protocol that is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// `nix-store --serve --write`
    Serve,
    /// `nix-daemon --stdio`
    Worker,
}

/// A store on another machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    pub scheme: Scheme,
    /// `host` or `user@host`, as `ssh` is given it.
    pub host: String,
    /// A file with a private key.
    pub key: Option<String>,
    /// The public key that the host has, as in `known_hosts`, in base 64.
    pub host_key: Option<String>,
    pub compress: bool,
    /// The program over there, and words before its own.
    pub program: Vec<String>,
    /// `--store` of the program over there.
    pub remote_store: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    #[error("don't know how to open Nix store '{uri}'")]
    Scheme { uri: String },
    #[error("invalid SSH host name '{host}'")]
    Host { host: String },
    #[error("store URI '{uri}' has no value that '{parameter}' could have: '{value}'")]
    Value { uri: String, parameter: String, value: String },
    #[error("store URI '{uri}' has a broken percent sequence")]
    Percent { uri: String },
}

impl Address {
    pub fn parse(uri: &str) -> Result<Self, AddressError> {
        let (scheme, rest) = uri.split_once("://").ok_or_else(|| AddressError::Scheme { uri: uri.to_owned() })?;
        let scheme = match scheme {
            "ssh" => Scheme::Serve,
            "ssh-ng" => Scheme::Worker,
            _ => return Err(AddressError::Scheme { uri: uri.to_owned() }),
        };
        let (host, query) = rest.split_once('?').unwrap_or((rest, ""));
        let decode = |text: &str| decode(text).ok_or_else(|| AddressError::Percent { uri: uri.to_owned() });
        let host = decode(host.trim_end_matches('/'))?;
        // An IPv6 address stands in brackets, which `ssh` does not know.
        let host = match host.split_once('[') {
            Some((before, after)) if after.ends_with(']') => format!("{before}{}", after.trim_end_matches(']')),
            _ => host,
        };
        let name = host.rsplit('@').next().unwrap_or_default();
        if name.is_empty() || host.starts_with('-') || name.starts_with('-') {
            return Err(AddressError::Host { host });
        }
        let program = match scheme {
            Scheme::Serve => "nix-store",
            Scheme::Worker => "nix-daemon",
        };
        let mut address = Self {
            scheme,
            host,
            key: None,
            host_key: None,
            compress: false,
            program: vec![program.to_owned()],
            remote_store: None,
        };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decode(value)?;
            match name {
                "ssh-key" => address.key = Some(value).filter(|value| !value.is_empty()),
                "base64-ssh-public-host-key" => address.host_key = Some(value).filter(|value| !value.is_empty()),
                "compress" => {
                    address.compress = match value.as_str() {
                        "true" | "1" | "yes" => true,
                        "false" | "0" | "no" => false,
                        _ => {
                            let (uri, parameter) = (uri.to_owned(), name.to_owned());
                            return Err(AddressError::Value { uri, parameter, value });
                        }
                    };
                }
                "remote-program" => {
                    let words: Vec<String> = value.split_whitespace().map(str::to_owned).collect();
                    if !words.is_empty() {
                        address.program = words;
                    }
                }
                "remote-store" => address.remote_store = Some(value).filter(|value| !value.is_empty()),
                // Those of stores in general, and of other clients.
                _ => {}
            }
        }
        Ok(address)
    }

    /// What runs over there.
    pub fn command(&self) -> Vec<String> {
        let mut words = self.program.clone();
        match self.scheme {
            Scheme::Serve => words.extend(["--serve".to_owned(), "--write".to_owned()]),
            Scheme::Worker => words.push("--stdio".to_owned()),
        }
        if let Some(store) = &self.remote_store {
            words.extend(["--store".to_owned(), quote(store)]);
        }
        words
    }
}

/// A word as a shell reads it back.
fn quote(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=?@%+,".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) && !word.contains('?') {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// Undoes percent-encoding.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let high = char::from(rest.next()?).to_digit(16)?;
            let low = char::from(rest.next()?).to_digit(16)?;
            bytes.push(u8::try_from(high << 4 | low).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let of = |uri: &str| Address::parse(uri).map(|address| (address.host.clone(), address.command().join(" ")));
        let ok = |host: &str, command: &str| Ok((host.to_owned(), command.to_owned()));
        assert_eq!(of("ssh://host"), ok("host", "nix-store --serve --write"));
        assert_eq!(of("ssh-ng://me@host/"), ok("me@host", "nix-daemon --stdio"));
        assert_eq!(of("ssh://[::1]"), ok("::1", "nix-store --serve --write"));
        assert_eq!(of("ssh://me@[::1]"), ok("me@::1", "nix-store --serve --write"));
        assert_eq!(
            of("ssh://h?remote-store=/tmp/a%20b&remote-program=/opt/larder nix-store".replace(' ', "%20").as_str()),
            ok("h", "/opt/larder nix-store --serve --write --store '/tmp/a b'")
        );
        assert_eq!(of("ssh-ng://h?remote-store=local?root=/x"), ok("h", "nix-daemon --stdio --store 'local?root=/x'"));
        for bad in ["ssh://", "ssh://-oProxyCommand=x", "ssh://me@-x", "ssh://me@", "http://x", "host"] {
            assert!(of(bad).is_err(), "{bad}");
        }
        let address = Address::parse("ssh://h?compress=true&ssh-key=/k&base64-ssh-public-host-key=QQ==").unwrap();
        assert!(address.compress);
        assert_eq!((address.key.as_deref(), address.host_key.as_deref()), (Some("/k"), Some("QQ==")));
        assert!(Address::parse("ssh://h?compress=maybe").is_err());
        assert!(Address::parse("ssh://h?ssh-key=%zz").is_err());
    }

    #[test]
    fn words_for_a_shell() {
        for (word, quoted) in [("a", "a"), ("a b", "'a b'"), ("it's", "'it'\\''s'"), ("", "''"), ("a?b", "'a?b'")] {
            assert_eq!(quote(word), quoted);
        }
    }
}
