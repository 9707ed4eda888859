//! Fuzz bodies as ordinary functions: `cargo test` replays `corpus/NAME/*` through them.
//!
//! A body asserts more than that nothing panics.

pub mod drv;
pub mod export;
pub mod narinfo;
pub mod registration;
pub mod settings;
pub mod store_path;
pub mod wire;

use larder_core::nar::{Encoder, Event, NarError, Parser};

/// A body takes any input.
pub type Body = fn(&[u8]);

/// Every body by its name: that of the target and of the folder below `corpus`.
pub const BODIES: &[(&str, Body)] = &[
    ("client", wire::client),
    ("connection", wire::connection),
    ("drv", drv::drv),
    ("export", export::export),
    ("nar", nar),
    ("narinfo", narinfo::narinfo),
    ("registration", registration::registration),
    ("settings", settings::settings),
    ("serve", wire::serve_commands),
    ("serve_client", wire::serve_client),
    ("store_path", store_path::store_path),
    ("wire", wire::wire),
];

/// An archive is read alike however it is cut, and what is accepted is what we would write.
///
/// The first byte is the size of the pieces.
pub fn nar(data: &[u8]) {
    let Some((&cut, data)) = data.split_first() else { return };
    let whole = nar_again(std::iter::once(data));
    let pieces = nar_again(data.chunks(usize::from(cut).max(1)));
    assert_eq!(whole, pieces);
    let (encoded, verdict) = whole;
    if let Ok(consumed) = verdict {
        assert_eq!(encoded.len() as u64, consumed);
        assert!(data.starts_with(&encoded), "the events are not those of the archive");
    } else {
        // What was told before the error is right, too; the encoder is at most the two
        // closing parentheses of a symlink and its entry ahead.
        let certain = encoded.len().saturating_sub(32);
        assert!(encoded.get(..certain).is_some_and(|told| data.starts_with(told)), "wrong events before an error");
    }
}

/// The archive written anew from its events, as far as they go.
fn nar_again<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<u8>, Result<u64, NarError>) {
    let (mut parser, mut encoder, mut out) = (Parser::default(), Encoder::new(), Vec::new());
    let mut left = None;
    for mut piece in pieces {
        loop {
            match parser.next(&mut piece) {
                Ok(None) => break,
                Ok(Some(event)) => {
                    left = match (event, left) {
                        (Event::File { size_bytes, .. }, None) => Some(size_bytes),
                        (Event::Contents(bytes), Some(left)) => Some(left - bytes.len() as u64),
                        (Event::EndFile, Some(0)) => None,
                        (Event::File { .. } | Event::Contents(_) | Event::EndFile, left) => {
                            panic!("{event:?} with {left:?} bytes to come")
                        }
                        (_, left) => left,
                    };
                    encoder.push(event, &mut out);
                }
                Err(error) => return (out, Err(error)),
            }
        }
    }
    (out, parser.finish().map(|()| parser.consumed()))
}
