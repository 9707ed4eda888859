//! Generators for properties: well-formed values of our formats, and the same with one place spoiled.
//!
//! For tests only (feature `testing`).

pub mod api;
pub mod derivation;
pub mod nar;
pub mod paths;
pub mod texts;
