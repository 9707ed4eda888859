//! The output of a builder as lines.

/// Puts lines together from what a builder writes.
///
/// A carriage return goes back to the begin of the line that is not ended yet, and what follows
/// overwrites it, as on a terminal. Source: building, rule 10.4.
#[derive(Debug, Default)]
pub struct Lines {
    line: Vec<u8>,
    at: usize,
}

/// A line longer than this is shown in parts.
const MAX_LINE_BYTES: usize = 64 << 10;

impl Lines {
    /// Takes more bytes in, and gives away the lines that are ended by it.
    pub fn push(&mut self, bytes: &[u8], mut each: impl FnMut(&[u8])) {
        for &byte in bytes {
            match byte {
                b'\n' => self.give(&mut each),
                b'\r' => self.at = 0,
                _ => {
                    match self.line.get_mut(self.at) {
                        Some(there) => *there = byte,
                        None => self.line.push(byte),
                    }
                    self.at += 1;
                    if self.at >= MAX_LINE_BYTES {
                        self.give(&mut each);
                    }
                }
            }
        }
    }

    /// The last line, if it was not ended.
    pub fn finish(&mut self, mut each: impl FnMut(&[u8])) {
        if !self.line.is_empty() {
            self.give(&mut each);
        }
    }

    fn give(&mut self, each: &mut impl FnMut(&[u8])) {
        each(&self.line);
        self.line.clear();
        self.at = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines(pieces: &[&[u8]]) -> Vec<String> {
        let (mut lines, mut out) = (Lines::default(), Vec::new());
        for piece in pieces {
            lines.push(piece, |line| out.push(String::from_utf8_lossy(line).into_owned()));
        }
        lines.finish(|line| out.push(String::from_utf8_lossy(line).into_owned()));
        out
    }

    #[test]
    fn carriage_returns_overwrite() {
        assert_eq!(lines(&[b"a\nb\n"]), ["a", "b"]);
        assert_eq!(lines(&[b"50%\r100%\nlast"]), ["100%", "last"]);
        assert_eq!(lines(&[b"abc\rX\r\n\n"]), ["Xbc", ""]);
        let long = vec![b'x'; MAX_LINE_BYTES + 1];
        assert_eq!(lines(&[&long]).iter().map(String::len).collect::<Vec<_>>(), [MAX_LINE_BYTES, 1]);
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(text in "[ab\r\n]{0,20}", cut in 1usize..5) {
            let pieces: Vec<&[u8]> = text.as_bytes().chunks(cut).collect();
            prop_assert_eq!(lines(&pieces), lines(&[text.as_bytes()]));
        }
    }
}
