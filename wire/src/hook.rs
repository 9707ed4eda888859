//! What a process that builds says to its build hook, and what that answers.
//!
//! Requests are in the primitives of the other protocols; answers are lines of text that begin
//! with `# `, between others that are for people. Shared with Nix; source: protocols, section 6.

use std::collections::BTreeSet;
use std::io::BufRead;

use larder_core::derivation::OutputName;
use larder_core::machines::Needs;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

use crate::codec::{Budget, Decoder, Encoder, MAX_ITEMS, MAX_LONG, MAX_SETTINGS, MAX_SHORT, Protocol, WireError};
use crate::value::Wire;

/// Values are written as in the worker protocol, in its oldest version: none has changed since.
const PROTOCOL: Protocol = Protocol::Worker(0);

/// Can a certain build be done elsewhere?
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Try {
    /// Has the one who asks a slot for it?
    pub willing: bool,
    pub drv: StorePath,
    pub needs: Needs,
}

/// What an accepted build is to be given, and to give.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// The closure of all inputs.
    pub inputs: BTreeSet<StorePath>,
    pub outputs: BTreeSet<OutputName>,
}

/// What a hook says to [`Try`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The name of the machine follows in a line of its own.
    Accept,
    Decline,
    /// And do not ask again.
    DeclinePermanently,
    /// Ask again later.
    Postpone,
}

impl Answer {
    pub const ALL: [Self; 4] = [Self::Accept, Self::Decline, Self::DeclinePermanently, Self::Postpone];

    /// What stands behind `# `.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Accept => "accept",
            Self::Decline => "decline",
            Self::DeclinePermanently => "decline-permanently",
            Self::Postpone => "postpone",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|answer| answer.text() == text)
    }
}

/// Settings, which are said once, before anything else.
pub fn settings<'a>(dir: &StoreDir, settings: impl Iterator<Item = (&'a str, String)>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut to = Encoder::new(&mut bytes, dir, PROTOCOL);
    for (name, value) in settings {
        to.word(1);
        to.text(name);
        to.text(&value);
    }
    to.word(0);
    bytes
}

/// Reads what [`settings`] wrote.
pub fn read_settings(input: &mut dyn BufRead, dir: &StoreDir) -> Result<Vec<(String, String)>, WireError> {
    let mut from = Decoder::new(input, dir, PROTOCOL, Budget::unlimited());
    let mut found = Vec::new();
    while from.bool()? {
        let count = found.len() as u64;
        if count >= MAX_SETTINGS {
            return Err(WireError::LongList { count, max: MAX_SETTINGS });
        }
        let name = from.text(MAX_SHORT)?;
        // A value that is no text is none of a setting that matters here.
        found.push((name, String::from_utf8_lossy(&from.bytes(MAX_LONG)?).into_owned()));
    }
    Ok(found)
}

impl Try {
    pub fn write(&self, dir: &StoreDir) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut to = Encoder::new(&mut bytes, dir, PROTOCOL);
        to.text("try");
        to.bool(self.willing);
        to.text(&self.needs.system);
        self.drv.write(&mut to);
        to.count(self.needs.features.len());
        for feature in &self.needs.features {
            to.text(feature);
        }
        bytes
    }

    /// `None`: nothing more is asked.
    pub fn read(input: &mut dyn BufRead, dir: &StoreDir) -> Result<Option<Self>, WireError> {
        if input.fill_buf()?.is_empty() {
            return Ok(None);
        }
        let mut from = Decoder::new(input, dir, PROTOCOL, Budget::unlimited());
        if from.text(MAX_SHORT)? != "try" {
            return Ok(None);
        }
        let willing = from.bool()?;
        let system = from.text(MAX_SHORT)?;
        let drv = StorePath::read(&mut from)?;
        let mut features = BTreeSet::new();
        for _ in 0..from.count(MAX_ITEMS)?.0 {
            from.charge_item(size_of::<String>())?;
            features.insert(from.text(MAX_SHORT)?);
        }
        Ok(Some(Self { willing, drv, needs: Needs { system, features } }))
    }
}

impl Order {
    pub fn write(&self, dir: &StoreDir) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut to = Encoder::new(&mut bytes, dir, PROTOCOL);
        self.inputs.write(&mut to);
        to.count(self.outputs.len());
        for output in &self.outputs {
            output.write(&mut to);
        }
        bytes
    }

    pub fn read(input: &mut dyn BufRead, dir: &StoreDir) -> Result<Self, WireError> {
        let mut from = Decoder::new(input, dir, PROTOCOL, Budget::unlimited());
        let inputs = Wire::read(&mut from)?;
        let mut outputs = BTreeSet::new();
        for _ in 0..from.count(MAX_ITEMS)?.0 {
            from.charge_item(size_of::<OutputName>())?;
            outputs.insert(OutputName::read(&mut from)?);
        }
        Ok(Self { inputs, outputs })
    }
}

#[cfg(test)]
mod tests {
    use larder_core::arb::paths::store_path;
    use proptest::prelude::*;

    use super::*;

    fn dir() -> StoreDir {
        StoreDir::new("/nix/store").unwrap()
    }

    /// What Nix 2.8 writes, byte for byte.
    #[test]
    fn a_question_as_nix_asks_it() {
        let drv = "00000000000000000000000000000000-x.drv".parse().unwrap();
        let needs = Needs { system: "s".to_owned(), features: ["kvm".to_owned()].into() };
        let bytes = Try { willing: true, drv, needs }.write(&dir());
        let mut wanted = Vec::new();
        for text in ["try", "\u{1}", "s", "/nix/store/00000000000000000000000000000000-x.drv", "\u{1}", "kvm"] {
            if text == "\u{1}" {
                wanted.extend(1u64.to_le_bytes());
            } else {
                crate::codec::put_bytes(&mut wanted, text.as_bytes());
            }
        }
        assert_eq!(bytes, wanted);
    }

    #[test]
    fn the_end_of_questions() {
        let read = |mut bytes: &[u8]| Try::read(&mut bytes, &dir());
        assert_eq!(read(b"").unwrap(), None);
        let mut other = Vec::new();
        crate::codec::put_bytes(&mut other, b"enough");
        assert_eq!(read(&other).unwrap(), None);
        assert!(matches!(read(b"\x03\0\0"), Err(WireError::UnexpectedEnd)));
        for answer in Answer::ALL {
            assert_eq!(Answer::parse(answer.text()), Some(answer));
        }
        assert_eq!(Answer::parse("zork"), None);
    }

    proptest! {
        #[test]
        fn what_is_said_is_heard(
            given in prop::collection::vec(("[a-z-]{1,10}", ".{0,20}"), 0..5),
            willing in any::<bool>(),
            drv in store_path(),
            system in "[a-z0-9_-]{1,12}",
            features in prop::collection::btree_set("[a-z-]{1,10}", 0..4),
            inputs in prop::collection::btree_set(store_path(), 0..4),
            cut in any::<prop::sample::Index>(),
        ) {
            let asked = Try { willing, drv, needs: Needs { system, features } };
            let outputs = ["out".parse().unwrap(), "dev".parse().unwrap()].into();
            let order = Order { inputs, outputs };
            let mut bytes = settings(&dir(), given.iter().map(|(name, value)| (name.as_str(), value.clone())));
            bytes.extend(asked.write(&dir()));
            bytes.extend(order.write(&dir()));
            let read = |mut rest: &[u8]| {
                let found = read_settings(&mut rest, &dir())?;
                let asked = Try::read(&mut rest, &dir())?;
                let order = Order::read(&mut rest, &dir())?;
                assert!(rest.is_empty());
                Ok::<_, WireError>((found, asked, order))
            };
            prop_assert_eq!(read(&bytes).unwrap(), (given, Some(asked), order));
            // However little of it comes, that it is not all is noticed.
            prop_assert!(read(&bytes[..cut.index(bytes.len())]).is_err());
        }
    }
}
