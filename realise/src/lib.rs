//! Realising: making store paths valid, by building them or fetching them.

pub mod build;
pub mod job;
pub mod logs;
pub mod plan;
