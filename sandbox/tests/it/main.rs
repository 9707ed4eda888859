//! Real builders, observed from inside and from outside.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests may panic, and say what they skip")]

mod basics;
mod house;
