//! Fuzz bodies as ordinary functions: `cargo test` replays `corpus/NAME/*` through them.

pub mod drv;
pub mod store_path;
