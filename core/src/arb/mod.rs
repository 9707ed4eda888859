//! Generators for properties: well-formed values of our formats, and the same with one place spoiled.
//!
//! For tests only (feature `testing`).

pub mod nar;
pub mod derivation;
pub mod paths;
//! Generators for properties, also for the tests of other crates (feature `testing`).

pub mod texts;
