//! Fuzz bodies as ordinary functions: `cargo test` replays `corpus/NAME/*` through them.
