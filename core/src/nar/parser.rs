//! Reads archives, strictly, from pieces of any size.

use super::{Event, Limits, MAGIC, NarError, padding, row};

/// No tag of the grammar is longer, in bytes; the magic string is judged by itself.
const MAX_TAG_BYTES: usize = 32;

/// A push parser: gets an archive in pieces and gives its [`Event`]s.
///
/// Accepts exactly what an [`Encoder`](super::Encoder) writes, so that the archive can be had back
/// from the events. It never allocates by a declared length and never recurses; its memory is
/// bounded by the limits (the names of the open directories and one name or target).
/// Ordering, duplicates, padding, field order and limits are all checked (formats, 3.2), which
/// Nix 2.8 does in part; no archive written by any Nix is refused, save for extreme depth.
///
/// ```
/// use larder_core::nar::{Event, Parser, encoder};
/// let nar = encoder::file(b"hi", true);
/// let (mut parser, mut input) = (Parser::default(), &nar[..]);
/// assert_eq!(parser.next(&mut input)?, Some(Event::File { executable: true, size_bytes: 2 }));
/// assert_eq!(parser.next(&mut input)?, Some(Event::Contents(b"hi")));
/// assert_eq!(parser.next(&mut input)?, Some(Event::EndFile));
/// assert_eq!(parser.next(&mut input)?, None);
/// assert!(parser.is_done());
/// # Ok::<(), larder_core::nar::NarError>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct Parser {
    limits: Limits,
    state: State,
    /// Bytes taken so far.
    consumed: u64,
    /// The start of a string whose end has not come yet, or a whole one that came in pieces.
    partial: Vec<u8>,
    /// `partial` is whole, has been looked at and goes when the next string begins.
    partial_seen: bool,
    /// The last name of each open directory, outermost first, in one row.
    names: Vec<u8>,
    /// Where in `names` that of each open directory begins.
    name_starts: Vec<usize>,
    failure: Option<Box<NarError>>,
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Magic,
    Open,
    Type,
    Kind,
    /// `contents` or `executable`.
    FileField,
    /// The empty value of `executable`.
    Marker,
    /// `contents`, after `executable`.
    ContentsTag,
    Size {
        executable: bool,
    },
    Data {
        left: u64,
        padding: usize,
    },
    DataPadding(usize),
    CloseFile,
    TargetTag,
    Target,
    CloseSymlink,
    /// The head of a directory is read; it is not yet open.
    Enter,
    /// `entry`, or the end of the directory.
    Item,
    EntryOpen,
    NameTag,
    Name,
    NodeTag,
    CloseEntry,
    Done,
}

/// A string that is whole: in the input, or so long in `partial` after its prefix.
#[derive(Clone, Copy)]
enum Text<'i> {
    Input(&'i [u8]),
    Partial(usize),
}

/// What [`Parser::advance`] comes to, before its parts are lent out.
enum Found<'i> {
    Event(Event<'i>),
    Entry,
    Symlink(Text<'i>),
}

impl Parser {
    pub fn new(limits: Limits) -> Self {
        Self { limits, ..Self::default() }
    }

    /// The next event, taking from the front of `input` what it needs.
    ///
    /// `None` means that all of `input` is used up and more is needed, or, if
    /// [`is_done`](Self::is_done), that the archive has ended: what follows it stays in `input`.
    /// After an error every call gives that error again.
    pub fn next<'e, 'i: 'e>(&'e mut self, input: &mut &'i [u8]) -> Result<Option<Event<'e>>, NarError> {
        if let Some(failure) = &self.failure {
            return Err(NarError::clone(failure));
        }
        match self.advance(input) {
            Ok(None) => Ok(None),
            Ok(Some(Found::Event(event))) => Ok(Some(event)),
            Ok(Some(Found::Entry)) => Ok(Some(Event::Entry { name: last_name(&self.names, &self.name_starts) })),
            Ok(Some(Found::Symlink(text))) => Ok(Some(Event::Symlink { target: text.bytes(&self.partial) })),
            Err(error) => {
                self.failure = Some(Box::new(error.clone()));
                Err(error)
            }
        }
    }

    /// Has the archive ended?
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Bytes taken so far; once the archive has ended, its size (`narSize`).
    pub fn consumed(&self) -> u64 {
        self.consumed
    }

    /// Call at the end of the input: an error unless the archive has ended.
    pub fn finish(&self) -> Result<(), NarError> {
        match &self.failure {
            Some(failure) => Err(NarError::clone(failure)),
            None if self.is_done() => Ok(()),
            None => Err(NarError::UnexpectedEnd { at: self.consumed }),
        }
    }

    fn advance<'i>(&mut self, input: &mut &'i [u8]) -> Result<Option<Found<'i>>, NarError> {
        loop {
            match self.state {
                State::Data { left: 0, padding } => self.state = State::DataPadding(padding),
                State::Data { left, padding } => {
                    let here = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
                    let (piece, rest) = input.split_at(here);
                    if piece.is_empty() {
                        return Ok(None);
                    }
                    *input = rest;
                    self.consumed += piece.len() as u64;
                    self.state = State::Data { left: left - piece.len() as u64, padding };
                    return Ok(Some(Found::Event(Event::Contents(piece))));
                }
                State::DataPadding(0) => self.state = State::CloseFile,
                State::DataPadding(padding) => {
                    let Some((&first, rest)) = input.split_first() else { return Ok(None) };
                    if first != 0 {
                        return Err(NarError::Padding { at: self.consumed });
                    }
                    *input = rest;
                    self.consumed += 1;
                    self.state = State::DataPadding(padding - 1);
                }
                State::Size { executable } => {
                    let Some(size_bytes) = self.size(input)? else { return Ok(None) };
                    self.state = State::Data { left: size_bytes, padding: padding(size_bytes) };
                    return Ok(Some(Found::Event(Event::File { executable, size_bytes })));
                }
                State::Enter => {
                    let max = self.limits.max_depth;
                    if self.name_starts.len() >= max {
                        return Err(NarError::TooDeep { max, at: self.consumed });
                    }
                    self.name_starts.push(self.names.len());
                    self.state = State::Item;
                    return Ok(Some(Found::Event(Event::Directory)));
                }
                State::Done => return Ok(None),
                _ => {
                    if self.skip_row(input) {
                        continue;
                    }
                    let at = self.string_start();
                    let Some(text) = self.string(input)? else { return Ok(None) };
                    let (state, found) = self.judge(text, at)?;
                    self.state = state;
                    if found.is_some() {
                        return Ok(found);
                    }
                }
            }
        }
    }

    /// Takes a whole row of tags at once where one stands in the input. Where none does, the way
    /// tag by tag comes to the same, or says what is wrong.
    fn skip_row(&mut self, input: &mut &[u8]) -> bool {
        let rows: &[(&[u8], State)] = match self.state {
            State::Open => &[
                (&row::FILE, State::Size { executable: false }),
                (&row::EXECUTABLE, State::Size { executable: true }),
                (&row::SYMLINK, State::Target),
                (&row::DIRECTORY, State::Enter),
            ],
            State::Item => &[(&row::ENTRY, State::Name)],
            _ => return false,
        };
        if !(self.partial.is_empty() || self.partial_seen) {
            return false;
        }
        for &(row, state) in rows {
            if let Some(rest) = input.strip_prefix(row) {
                *input = rest;
                self.consumed += row.len() as u64;
                self.state = state;
                return true;
            }
        }
        false
    }

    #[expect(clippy::match_same_arms, reason = "a row for each rule, in the order of the grammar")]
    /// Judges a whole string: the state that follows it, and what it brings.
    fn judge<'i>(&mut self, text: Text<'i>, at: u64) -> Result<(State, Option<Found<'i>>), NarError> {
        let found = text.bytes(&self.partial);
        let tag = |expected| Err(NarError::Tag { expected, found: found.to_vec(), at });
        let node_end = if self.name_starts.is_empty() { State::Done } else { State::CloseEntry };
        let next = match (self.state, found) {
            (State::Magic, MAGIC) => State::Open,
            (State::Magic, _) => return Err(NarError::Magic),

            (State::Open, b"(") => State::Type,
            (State::EntryOpen, b"(") => State::NameTag,
            (State::Open | State::EntryOpen, _) => return tag("'('"),

            (State::Type, b"type") => State::Kind,
            (State::Type, _) => return tag("'type'"),
            (State::Kind, b"regular") => State::FileField,
            (State::Kind, b"symlink") => State::TargetTag,
            (State::Kind, b"directory") => State::Enter,
            (State::Kind, _) => return Err(NarError::FileType { found: found.to_vec(), at }),

            (State::FileField, b"executable") => State::Marker,
            (State::FileField, b"contents") => State::Size { executable: false },
            (State::FileField, _) => return tag("'executable' or 'contents'"),
            (State::Marker, b"") => State::ContentsTag,
            (State::Marker, _) => return Err(NarError::ExecutableMarker { found: found.to_vec(), at }),
            (State::ContentsTag, b"contents") => State::Size { executable: true },
            (State::ContentsTag, _) => return tag("'contents'"),
            (State::CloseFile, b")") => return Ok((node_end, Some(Found::Event(Event::EndFile)))),

            (State::TargetTag, b"target") => State::Target,
            (State::TargetTag, _) => return tag("'target'"),
            (State::Target, target) if target.is_empty() || target.contains(&0) => {
                return Err(NarError::Target { target: target.to_vec(), at });
            }
            (State::Target, _) => return Ok((State::CloseSymlink, Some(Found::Symlink(text)))),
            (State::CloseSymlink, b")") => node_end,

            (State::Item, b"entry") => State::EntryOpen,
            (State::Item, b")") => {
                let start = self.name_starts.pop().unwrap_or_default();
                self.names.truncate(start);
                let node_end = if self.name_starts.is_empty() { State::Done } else { State::CloseEntry };
                return Ok((node_end, Some(Found::Event(Event::EndDirectory))));
            }
            (State::Item, _) => return tag("'entry' or ')'"),
            (State::NameTag, b"name") => State::Name,
            (State::NameTag, _) => return tag("'name'"),
            (State::Name, name) => {
                if matches!(name, b"" | b"." | b"..") || name.iter().any(|b| matches!(b, b'/' | 0)) {
                    return Err(NarError::Name { name: name.to_vec(), at });
                }
                // No name is empty, so that the first one follows.
                let previous = last_name(&self.names, &self.name_starts);
                if name <= previous {
                    return Err(NarError::NotSorted { previous: previous.to_vec(), name: name.to_vec(), at });
                }
                self.names.truncate(self.name_starts.last().copied().unwrap_or_default());
                self.names.extend_from_slice(name);
                return Ok((State::NodeTag, Some(Found::Entry)));
            }
            (State::NodeTag, b"node") => State::Open,
            (State::NodeTag, _) => return tag("'node'"),
            (State::CloseEntry, b")") => State::Item,
            (State::CloseFile | State::CloseSymlink | State::CloseEntry, _) => return tag("')'"),

            (State::Size { .. } | State::Data { .. } | State::DataPadding(_) | State::Enter | State::Done, _) => {
                unreachable!("these states read no string")
            }
        };
        Ok((next, None))
    }

    /// The offset at which the string to be read next begins.
    fn string_start(&mut self) -> u64 {
        self.forget_seen();
        self.consumed - self.partial.len() as u64
    }

    fn forget_seen(&mut self) {
        if self.partial_seen {
            self.partial_seen = false;
            self.partial.clear();
        }
    }

    /// Reads one padded string within the limit of the state.
    fn string<'i>(&mut self, input: &mut &'i [u8]) -> Result<Option<Text<'i>>, NarError> {
        let at = self.string_start();
        if self.partial.is_empty()
            && let Some((prefix, rest)) = input.split_first_chunk::<8>()
        {
            let length = self.checked_length(*prefix, at)?;
            if let Some((padded, rest)) = rest.split_at_checked(length.next_multiple_of(8)) {
                let (text, zeros) = padded.split_at(length);
                if zeros.iter().any(|b| *b != 0) {
                    return Err(NarError::Padding { at });
                }
                *input = rest;
                self.consumed += 8 + padded.len() as u64;
                return Ok(Some(Text::Input(text)));
            }
        }
        let Some(prefix) = self.gather(8, input).and_then(|prefix| prefix.first_chunk::<8>().copied()) else {
            return Ok(None);
        };
        let length = self.checked_length(prefix, at)?;
        let Some(whole) = self.gather(8 + length.next_multiple_of(8), input) else { return Ok(None) };
        if whole.iter().skip(8 + length).any(|b| *b != 0) {
            return Err(NarError::Padding { at });
        }
        self.partial_seen = true;
        Ok(Some(Text::Partial(length)))
    }

    fn size(&mut self, input: &mut &[u8]) -> Result<Option<u64>, NarError> {
        let at = self.string_start();
        let Some(prefix) = self.gather(8, input).and_then(|prefix| prefix.first_chunk::<8>().copied()) else {
            return Ok(None);
        };
        self.partial.clear();
        let (length, max) = (u64::from_le_bytes(prefix), i64::MAX.unsigned_abs());
        if length > max {
            return Err(NarError::TooLong { what: "file contents", length, max, at });
        }
        Ok(Some(length))
    }

    /// Fills `partial` up to `want` bytes, as far as the input goes; all of them, or nothing yet.
    fn gather(&mut self, want: usize, input: &mut &[u8]) -> Option<&[u8]> {
        let missing = want.saturating_sub(self.partial.len());
        let (taken, rest) = input.split_at(missing.min(input.len()));
        self.partial.extend_from_slice(taken);
        self.consumed += taken.len() as u64;
        *input = rest;
        (taken.len() == missing).then_some(&self.partial)
    }

    /// The length of a string, if the state allows so long a one.
    fn checked_length(&self, prefix: [u8; 8], at: u64) -> Result<usize, NarError> {
        let length = u64::from_le_bytes(prefix);
        let (what, max) = match self.state {
            State::Magic if length != MAGIC.len() as u64 => return Err(NarError::Magic),
            State::Name => ("file name", self.limits.max_name_bytes),
            State::Target => ("symlink target", self.limits.max_target_bytes),
            _ => ("tag", MAX_TAG_BYTES),
        };
        match usize::try_from(length) {
            Ok(length) if length <= max => Ok(length),
            _ => Err(NarError::TooLong { what, length, max: max as u64, at }),
        }
    }
}

impl<'i> Text<'i> {
    fn bytes<'p>(self, partial: &'p [u8]) -> &'p [u8]
    where
        'i: 'p,
    {
        match self {
            Text::Input(bytes) => bytes,
            Text::Partial(length) => partial.get(8..8 + length).unwrap_or_default(),
        }
    }
}

/// The name of the innermost open directory's latest entry.
fn last_name<'n>(names: &'n [u8], starts: &[usize]) -> &'n [u8] {
    starts.last().and_then(|start| names.get(*start..)).unwrap_or_default()
}
