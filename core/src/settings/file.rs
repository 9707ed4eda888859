//! The syntax of `nix.conf`.

use super::value::words;

/// What a line says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Line {
    Empty,
    /// The words of the value, joined by one blank each.
    Set {
        name: String,
        value: String,
    },
    Include {
        file: String,
        may_be_missing: bool,
    },
}

/// Cuts a line at the first `#`, wherever that stands.
pub(super) fn without_comment(line: &[u8]) -> &[u8] {
    line.split(|b| *b == b'#').next().unwrap_or_default()
}

/// Parses a line without its comment; `None` if it has another form.
pub(super) fn parse_line(line: &str) -> Option<Line> {
    let mut words = words(line);
    let Some(first) = words.next() else { return Some(Line::Empty) };
    if first == "include" || first == "!include" {
        let file = words.next()?.to_owned();
        return words.next().is_none().then_some(Line::Include { file, may_be_missing: first == "!include" });
    }
    if words.next()? != "=" {
        return None;
    }
    Some(Line::Set { name: first.to_owned(), value: words.collect::<Vec<_>>().join(" ") })
}
