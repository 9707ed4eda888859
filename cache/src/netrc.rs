//! Passwords for hosts, as in the file `netrc`.

use larder_core::hash::encode_base64;

/// What a netrc file has for a host, as the value of the header `Authorization`.
pub fn credentials(netrc: &str, host: &str) -> Option<String> {
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
    Some(basic(login.filter(|_| ours)?, password.unwrap_or_default()))
}

/// The header for a name and a password.
pub fn basic(login: &str, password: &str) -> String {
    format!("Basic {}", encode_base64(format!("{login}:{password}").as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_which_password() {
        let netrc = "# machine a login no\nmachine a login me password p\nmachine b\n login you\ndefault login all";
        for (host, name, password) in [("a", "me", "p"), ("b", "you", ""), ("c", "all", "")] {
            assert_eq!(credentials(netrc, host), Some(basic(name, password)), "{host}");
        }
        assert_eq!(credentials("machine a login x", "c"), None);
        assert_eq!(credentials("machine a password x", "a"), None);
    }
}
