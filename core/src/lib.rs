//! Words and formats of the Nix store.
//!
//! Everything here is a value or a function of values: no files, no clock, no environment and
//! no `/nix/store` as a constant (a [`store_dir::StoreDir`] is passed).

pub mod api;
#[cfg(any(test, feature = "testing"))]
#[expect(clippy::indexing_slicing, reason = "tests may panic")]
pub mod arb;
pub mod base32;
pub mod content_address;
pub mod derivation;
pub mod export;
pub mod hash;
pub mod hash_part;
pub mod machines;
pub mod nar;
pub mod narinfo;
pub mod path_info;
pub mod realisation;
pub mod refscan;
pub mod registration;
pub mod report;
pub mod rewrite;
pub mod settings;
pub mod signature;
pub mod store_dir;
pub mod store_path;
#[cfg(test)]
mod test_vectors;
