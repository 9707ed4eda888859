//! The store on a local file system: one door in, one ledger, and nothing deleted by guess.
//!
//! What comes in comes through [`ingest`]; what is valid is what the ledger (`larder-store-db`)
//! says; objects are real entries of the store directory (`larder-fs`).

pub mod adopt;
pub mod adoption;
mod api;
mod broom;
pub mod closure;
pub mod collect;
pub mod delete;
pub mod deliver;
mod derivations;
pub mod error;
pub mod foreign;
pub mod ingest;
pub mod local;
pub mod optimise;
pub mod plan;
mod realisations;
pub mod rebuild;
mod receive;
pub mod register;
pub mod room;
pub mod sqlite;
pub mod survey;
mod transfer;
pub mod verify;

pub use error::StoreError;
pub use local::{LocalStore, Options, Pages};
