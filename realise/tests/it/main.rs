//! Builds from the derivation to the ledger, with real builders.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests may panic")]
#![allow(clippy::print_stdout, reason = "tests say what they skip")]

mod again;
mod basics;
mod builtins;
mod checks;
mod crash;
mod given;
mod hooks;
mod hostile;
mod house;
mod limits;
