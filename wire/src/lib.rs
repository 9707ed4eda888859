//! The protocols by which stores talk: the worker protocol of the daemon and the serve protocol of
//! `nix-store --serve`. Shared with Nix; source: protocols, sections 1 to 3.
//!
//! A message is a value that implements [`value::Wire`]: it reads and writes itself at any version
//! of a protocol. Operations are rows of a table ([`worker::ops`], [`serve::ops`]). Both ends work
//! over any blocking `Read` and `Write`; sockets, users and processes are the caller's.

pub mod codec;
pub mod hook;
pub mod order;
pub mod serve;
pub mod stream;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod value;
pub mod worker;

pub use codec::{Budget, Decoder, Encoder, Protocol, WireError};
