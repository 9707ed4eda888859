//! Real builders, observed from inside and from outside.
//!
//! Run as root, everything is run once more as an ordinary user ([`twice`]).

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "tests may panic, and say what they skip"
)]

mod basics;
mod filter;
mod hostile;
mod house;
mod outside;
mod seeds;
mod twice;
mod zygote;
