//! Realising: making store paths valid, by building them or fetching them.

pub mod build;
pub mod copy;
mod crew;
pub mod derivations;
pub mod driver;
pub mod errand;
pub mod hook;
pub mod job;
pub mod logs;
mod mailbox;
pub mod missing;
pub mod plan;
pub mod results;
pub mod sharing;
mod signing;
pub mod slots;
pub mod substitute;
