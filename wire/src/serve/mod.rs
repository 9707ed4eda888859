//! The serve protocol: what `nix-store --serve` says over ssh.
//!
//! Commands and replies, with nothing between them: texts go to standard error. Source: protocols,
//! section 3.

pub mod client;
pub mod ops;
pub mod server;
#[cfg(test)]
mod tests;

use std::io::{BufRead, Write};
use std::sync::Arc;

use larder_core::store_dir::StoreDir;

use crate::codec::{Budget, Decoder, Protocol, WireError};

const CLIENT_MAGIC: u64 = 0x390c_9deb;
const SERVER_MAGIC: u64 = 0x5452_eecb;
const MAJOR: u64 = 2;

/// The newest minor version that is spoken.
pub const MINOR: u8 = 7;

fn words(output: &mut dyn Write, words: &[u64]) -> Result<(), WireError> {
    let out: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    output.write_all(&out).and_then(|()| output.flush()).map_err(WireError::Write)
}

fn agree(found: u64, newest: u8) -> Result<u8, WireError> {
    let (major, minor) = (found >> 8, found & 0xff);
    if major != MAJOR {
        return Err(WireError::Version { major, minor });
    }
    Ok(u8::try_from(minor).unwrap_or(u8::MAX).min(newest))
}

/// The server's part of the handshake; gives the minor version that both speak.
pub fn accept(input: &mut dyn BufRead, output: &mut dyn Write, dir: &StoreDir) -> Result<u8, WireError> {
    let mut from = Decoder::new(input, dir, Protocol::Serve(0), Budget::unlimited());
    let found = from.word()?;
    if found != CLIENT_MAGIC {
        return Err(WireError::Magic { found });
    }
    // Clients of 1.x wait for our words before they send their version.
    words(output, &[SERVER_MAGIC, MAJOR << 8 | u64::from(MINOR)])?;
    agree(from.word()?, MINOR)
}

/// The client's part; `newest` is the minor version that it offers.
pub fn connect(input: &mut dyn BufRead, output: &mut dyn Write, dir: &StoreDir, newest: u8) -> Result<u8, WireError> {
    words(output, &[CLIENT_MAGIC, MAJOR << 8 | u64::from(newest)])?;
    let mut from = Decoder::new(input, dir, Protocol::Serve(0), Budget::unlimited());
    let found = from.word()?;
    if found != SERVER_MAGIC {
        return Err(WireError::Magic { found });
    }
    agree(from.word()?, newest)
}

/// A decoder for what a side sends.
fn decoder<'a>(input: &'a mut dyn BufRead, dir: &'a StoreDir, minor: u8, budget: &Arc<Budget>) -> Decoder<'a> {
    Decoder::new(input, dir, Protocol::Serve(minor), Arc::clone(budget))
}
