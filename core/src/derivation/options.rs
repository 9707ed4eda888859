//! Attributes of a derivation that steer its build, and the environment as shell text.
//!
//! Source: formats, section 5.8; modern, section 7; cli, section 6.6.

use serde_json::{Map, Value};

use super::{Bytes, Derivation};
use crate::store_path::StorePath;

/// The variable that holds structured attributes.
pub const STRUCTURED: &str = "__json";

/// Why an attribute cannot be used. Worded as Nix does.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttributeError {
    #[error("cannot process __json attribute of '{drv}'")]
    Json { drv: StorePath, source: serde_json::Error },
    #[error("cannot process __json attribute of '{drv}': it is not an object")]
    NotObject { drv: StorePath },
    #[error("attribute '{attribute}' of derivation '{drv}' must be {wanted}")]
    Type { attribute: String, drv: StorePath, wanted: &'static str },
}

/// The attributes of a derivation: its environment, or the JSON object in the variable
/// `__json`, whoever wrote that.
#[derive(Debug)]
pub struct Attributes<'a> {
    path: &'a StorePath,
    drv: &'a Derivation,
    structured: Option<Map<String, Value>>,
}

impl<'a> Attributes<'a> {
    /// Of the derivation at `path`, which is for messages.
    pub fn new(path: &'a StorePath, drv: &'a Derivation) -> Result<Self, AttributeError> {
        let structured = match drv.binding(STRUCTURED.as_bytes()) {
            None => None,
            Some(text) => match serde_json::from_slice(text) {
                Ok(Value::Object(map)) => Some(map),
                Ok(_) => return Err(AttributeError::NotObject { drv: path.clone() }),
                Err(source) => return Err(AttributeError::Json { drv: path.clone(), source }),
            },
        };
        Ok(Self { path, drv, structured })
    }

    /// The structured attributes, if that is what the derivation has.
    pub const fn structured(&self) -> Option<&Map<String, Value>> {
        self.structured.as_ref()
    }

    /// A string, or `None` where there is no such attribute.
    pub fn string(&self, name: &str) -> Result<Option<&[u8]>, AttributeError> {
        match &self.structured {
            None => Ok(self.drv.binding(name.as_bytes()).map(|value| &**value)),
            Some(map) => match map.get(name) {
                None => Ok(None),
                Some(Value::String(text)) => Ok(Some(text.as_bytes())),
                Some(_) => Err(self.wrong(name, "a string")),
            },
        }
    }

    /// A flag: as a variable it is set by exactly `1`.
    pub fn flag(&self, name: &str, default: bool) -> Result<bool, AttributeError> {
        match &self.structured {
            None => Ok(self.drv.binding(name.as_bytes()).map_or(default, |value| **value == *b"1")),
            Some(map) => match map.get(name) {
                None => Ok(default),
                Some(Value::Bool(flag)) => Ok(*flag),
                Some(_) => Err(self.wrong(name, "a Boolean")),
            },
        }
    }

    /// A list of strings: a variable is split at white space.
    pub fn strings(&self, name: &str) -> Result<Option<Vec<&[u8]>>, AttributeError> {
        let wrong = || self.wrong(name, "a list of strings");
        match &self.structured {
            None => Ok(self.drv.binding(name.as_bytes()).map(|value| split(value))),
            Some(map) => match map.get(name) {
                None => Ok(None),
                Some(Value::Array(items)) => {
                    let items = items.iter().map(|item| item.as_str().map(str::as_bytes).ok_or_else(wrong));
                    items.collect::<Result<_, _>>().map(Some)
                }
                Some(_) => Err(wrong()),
            },
        }
    }

    fn wrong(&self, name: &str, wanted: &'static str) -> AttributeError {
        AttributeError::Type { attribute: name.to_owned(), drv: self.path.clone(), wanted }
    }
}

/// Words between blanks, tabs, line feeds and carriage returns.
fn split(text: &[u8]) -> Vec<&[u8]> {
    text.split(|b| b" \t\n\r".contains(b)).filter(|word| !word.is_empty()).collect()
}

/// The environment as `nix-store --print-env` prints it: for each variable a line that exports
/// and sets it, then an empty line (as 2.26), and at last the arguments.
///
/// Names are printed as they are, as in Nix: whoever evaluates this trusts the derivation.
pub fn print_env(drv: &Derivation) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in &drv.env {
        out.extend_from_slice(b"export ");
        out.extend_from_slice(name);
        out.extend_from_slice(b"; ");
        out.extend_from_slice(name);
        out.push(b'=');
        quote(&mut out, value);
        out.extend_from_slice(b"\n\n");
    }
    out.extend_from_slice(b"export _args; _args='");
    for (n, arg) in drv.args.iter().enumerate() {
        if n > 0 {
            out.push(b' ');
        }
        quote(&mut out, arg);
    }
    out.extend_from_slice(b"'\n");
    out
}

/// Single quotes around, and `'\''` for each within.
fn quote(out: &mut Vec<u8>, value: &Bytes) {
    out.push(b'\'');
    for (n, piece) in value.split(|b| *b == b'\'').enumerate() {
        if n > 0 {
            out.extend_from_slice(b"'\\''");
        }
        out.extend_from_slice(piece);
    }
    out.push(b'\'');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::derivation::{name_of, parse};
    use crate::store_dir::StoreDir;

    fn with_env(env: &[(&str, &str)]) -> (StorePath, Derivation) {
        let dir = StoreDir::new("/nix/store").unwrap();
        let path: StorePath = "0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x.drv".parse().unwrap();
        let mut drv = parse(&dir, &name_of(&path).unwrap(), br#"Derive([],[],[],"s","b",[],[])"#).unwrap();
        drv.env = env.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        (path, drv)
    }

    #[test]
    fn variables() {
        let env = [("s", "x y"), ("t", "1"), ("f", ""), ("n", "true"), ("l", " a\tb\n\nc\r"), ("e", "")];
        let (path, drv) = with_env(&env);
        let attrs = Attributes::new(&path, &drv).unwrap();
        assert!(attrs.structured().is_none());
        assert_eq!(attrs.string("s").unwrap(), Some(&b"x y"[..]));
        assert_eq!(attrs.string("gone").unwrap(), None);
        for (name, default, expected) in
            [("t", false, true), ("f", true, false), ("n", true, false), ("gone", true, true), ("gone", false, false)]
        {
            assert_eq!(attrs.flag(name, default).unwrap(), expected, "{name}");
        }
        assert_eq!(attrs.strings("l").unwrap().unwrap(), [b"a", b"b", b"c"]);
        assert_eq!(attrs.strings("e").unwrap().unwrap(), [b""; 0]);
        assert!(attrs.strings("gone").unwrap().is_none());
    }

    #[test]
    fn structured() {
        let (path, drv) = with_env(&[("__json", r#"{"s":"x","b":true,"l":["a","b c"],"i":1}"#), ("other", "1")]);
        let attrs = Attributes::new(&path, &drv).unwrap();
        assert_eq!(attrs.structured().unwrap().len(), 4);
        assert_eq!(attrs.string("s").unwrap(), Some(&b"x"[..]));
        assert!(attrs.flag("b", false).unwrap());
        assert_eq!(attrs.strings("l").unwrap().unwrap(), [&b"a"[..], b"b c"]);
        // Variables do not count beside them.
        assert_eq!(attrs.string("other").unwrap(), None);
        let base = "0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x.drv";
        for (error, wanted) in [
            (attrs.string("i").unwrap_err(), "a string"),
            (attrs.flag("s", true).unwrap_err(), "a Boolean"),
            (attrs.strings("s").unwrap_err(), "a list of strings"),
        ] {
            let text = error.to_string();
            assert!(text.ends_with(&format!("of derivation '{base}' must be {wanted}")), "{text}");
        }
        for (bad, message) in [
            ("{", format!("cannot process __json attribute of '{base}'")),
            ("[]", format!("cannot process __json attribute of '{base}': it is not an object")),
        ] {
            let (path, drv) = with_env(&[("__json", bad)]);
            assert_eq!(Attributes::new(&path, &drv).unwrap_err().to_string(), message);
        }
        let deep = format!(r#"{{"a":{}{}}}"#, "[".repeat(1 << 20), "]".repeat(1 << 20));
        let (path, drv) = with_env(&[("__json", &deep)]);
        assert!(Attributes::new(&path, &drv).is_err(), "nesting has a limit");
    }

    #[test]
    fn environment_as_text() {
        let (_, mut drv) = with_env(&[("PATH", "/usr/bin:/bin"), ("q", "it's\n"), ("e", "")]);
        drv.args = vec!["-c".into(), "mkdir $out".into(), "'".into()];
        let text = String::from_utf8(print_env(&drv)).unwrap();
        let expected = r"export PATH; PATH='/usr/bin:/bin'

export e; e=''

export q; q='it'\''s
'

export _args; _args=''-c' 'mkdir $out' ''\''''
";
        assert_eq!(text, expected);
        let (_, drv) = with_env(&[]);
        assert_eq!(print_env(&drv), b"export _args; _args=''\n");
    }
}
