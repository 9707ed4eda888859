//! Realising: making store paths valid, by building them or fetching them.

pub mod job;
pub mod plan;
