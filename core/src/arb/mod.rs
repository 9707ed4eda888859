//! Generators for properties, also for the tests of other crates (feature `testing`).

pub mod texts;
