//! The worker protocol: what clients and a daemon say to each other.
//!
//! A session begins with a [`handshake`]. Then the client sends an operation ([`ops`]), the server
//! sends [`message`]s while it works, the last of which says whether a reply follows. Source:
//! protocols, section 2.

mod activity;
pub mod client;
pub mod handshake;
pub mod message;
pub mod ops;
pub mod server;
#[cfg(test)]
mod tests;
pub mod tunnel;

/// The newest minor version that is spoken.
pub const MINOR: u8 = 38;
/// The oldest one.
pub const MIN_MINOR: u8 = 10;
