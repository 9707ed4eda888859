//! What a server says while it works: texts, activities, requests for data, and the end.
//!
//! Source: protocols, section 2.4.

#[cfg(any(test, feature = "testing"))]
use crate::codec::Protocol;
use crate::codec::{Decoder, Encoder, MAX_ITEMS, MAX_LONG, MAX_SHORT, WireError};
use crate::value::Wire;
#[cfg(any(test, feature = "testing"))]
use crate::value::gen_prelude::{BoxedStrategy, Just, Strategy, any, prop_oneof};

const NEXT: u64 = 0x6f6c_6d67;
const READ: u64 = 0x6461_7461;
const WRITE: u64 = 0x6461_7416;
const LAST: u64 = 0x616c_7473;
const ERROR: u64 = 0x6378_7470;
const START: u64 = 0x5354_5254;
const STOP: u64 = 0x5354_4f50;
const RESULT: u64 = 0x5253_4c54;

/// Most bytes of an error's text that are sent.
pub const MAX_ERROR: usize = 64 << 10;

/// A value that an activity or a result has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Field {
    Number(u64),
    Text(Vec<u8>),
}

/// The failure of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorMessage {
    pub text: Vec<u8>,
    /// The exit status of a command that fails so. Lost from 1.26 on.
    pub status: u64,
    /// Where it came from, the outermost first. From 1.26 on.
    pub traces: Vec<Vec<u8>>,
}

/// A message of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// A text for the user, usually with a line feed at its end.
    Next(Vec<u8>),
    /// The client is to send a string of 1 to so many bytes of its data.
    Read(u64),
    /// A piece of what the client asked for.
    Write(Vec<u8>),
    /// The work is done; the reply follows.
    Last,
    /// The work failed; no reply follows.
    Error(ErrorMessage),
    /// An activity begins. From 1.20 on, as are the next two.
    Start {
        id: u64,
        level: u64,
        kind: u64,
        text: Vec<u8>,
        fields: Vec<Field>,
        /// 0 for none.
        parent: u64,
    },
    Stop {
        id: u64,
    },
    Result {
        id: u64,
        kind: u64,
        fields: Vec<Field>,
    },
}

impl Wire for Field {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        match from.word()? {
            0 => from.word().map(Self::Number),
            1 => from.bytes(MAX_LONG).map(Self::Text),
            found => Err(WireError::Choice { what: "the kind of a field", found }),
        }
    }
    fn write(&self, to: &mut Encoder<'_>) {
        match self {
            Self::Number(number) => {
                to.word(0);
                to.word(*number);
            }
            Self::Text(text) => {
                to.word(1);
                to.bytes(text);
            }
        }
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        prop_oneof![any::<u64>().prop_map(Self::Number), any::<Vec<u8>>().prop_map(Self::Text)].boxed()
    }
}

impl Wire for ErrorMessage {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        if !from.protocol().is_worker(26) {
            return Ok(Self { text: from.bytes(MAX_LONG)?, status: from.word()?, traces: Vec::new() });
        }
        from.bytes(MAX_SHORT)?;
        from.word()?;
        from.bytes(MAX_SHORT)?;
        let text = from.bytes(MAX_LONG)?;
        let no_position = |from: &mut Decoder<'_>| match from.word()? {
            0 => Ok(()),
            found => Err(WireError::Choice { what: "the position of an error", found }),
        };
        no_position(from)?;
        let (count, slots) = from.count(MAX_ITEMS)?;
        let mut traces = Vec::with_capacity(slots);
        for _ in 0..count {
            from.charge_item(size_of::<Vec<u8>>())?;
            no_position(from)?;
            traces.push(from.bytes(MAX_LONG)?);
        }
        Ok(Self { text, status: 1, traces })
    }
    fn write(&self, to: &mut Encoder<'_>) {
        if !to.protocol().is_worker(26) {
            to.bytes(&self.text);
            to.word(self.status);
            return;
        }
        to.text("Error");
        to.word(0);
        to.text("Error");
        to.bytes(&self.text);
        to.word(0);
        to.count(self.traces.len());
        for trace in &self.traces {
            to.word(0);
            to.bytes(trace);
        }
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        let text = || proptest::collection::vec(any::<u8>(), 0..50);
        let new = protocol.is_worker(26);
        (text(), any::<u64>(), proptest::collection::vec(text(), 0..3))
            .prop_map(
                move |(text, status, traces)| {
                    if new { Self { text, status: 1, traces } } else { Self { text, status, traces: Vec::new() } }
                },
            )
            .boxed()
    }
}

impl Wire for Message {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        Ok(match from.word()? {
            NEXT => Self::Next(from.bytes(MAX_LONG)?),
            READ => Self::Read(from.word()?),
            WRITE => Self::Write(from.bytes(MAX_LONG)?),
            LAST => Self::Last,
            ERROR => Self::Error(Wire::read(from)?),
            START => Self::Start {
                id: from.word()?,
                level: from.word()?,
                kind: from.word()?,
                text: from.bytes(MAX_LONG)?,
                fields: Wire::read(from)?,
                parent: from.word()?,
            },
            STOP => Self::Stop { id: from.word()? },
            RESULT => Self::Result { id: from.word()?, kind: from.word()?, fields: Wire::read(from)? },
            code => return Err(WireError::UnknownMessage { code }),
        })
    }
    fn write(&self, to: &mut Encoder<'_>) {
        match self {
            Self::Next(text) => {
                to.word(NEXT);
                to.bytes(text);
            }
            Self::Read(most) => {
                to.word(READ);
                to.word(*most);
            }
            Self::Write(data) => {
                to.word(WRITE);
                to.bytes(data);
            }
            Self::Last => to.word(LAST),
            Self::Error(error) => {
                to.word(ERROR);
                error.write(to);
            }
            Self::Start { id, level, kind, text, fields, parent } => {
                to.word(START);
                to.word(*id);
                to.word(*level);
                to.word(*kind);
                to.bytes(text);
                fields.write(to);
                to.word(*parent);
            }
            Self::Stop { id } => {
                to.word(STOP);
                to.word(*id);
            }
            Self::Result { id, kind, fields } => {
                to.word(RESULT);
                to.word(*id);
                to.word(*kind);
                fields.write(to);
            }
        }
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        let text = || proptest::collection::vec(any::<u8>(), 0..50);
        let fields = || Vec::<Field>::arb(protocol);
        prop_oneof![
            text().prop_map(Self::Next),
            any::<u64>().prop_map(Self::Read),
            text().prop_map(Self::Write),
            Just(Self::Last),
            ErrorMessage::arb(protocol).prop_map(Self::Error),
            (any::<[u64; 4]>(), text(), fields()).prop_map(|([id, level, kind, parent], text, fields)| {
                Self::Start { id, level, kind, text, fields, parent }
            }),
            any::<u64>().prop_map(|id| Self::Stop { id }),
            (any::<u64>(), any::<u64>(), fields()).prop_map(|(id, kind, fields)| Self::Result { id, kind, fields }),
        ]
        .boxed()
    }
}
