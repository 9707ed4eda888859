//! Builds from the derivation to the ledger, with real builders.

mod basics;
mod house;
