//! Binary caches: where they are, what they have, and how it comes here and goes there.
//!
//! A cache is a folder of small files (`nix-cache-info`, `<hash part>.narinfo`) and compressed
//! archives (`nar/...`), on a disk or behind a web server. Nothing a cache says is believed
//! further than it can be checked: sizes bound what is read, hashes are taken of what came, and
//! names may not lead outside. Whether a path may be *trusted* (signatures) is for whoever asks;
//! nothing here touches a store.
//!
//! - [`uri`]: what a URI of a cache says; [`client`]: requests, retries, resuming; [`files`]: a
//!   cache on a disk; [`s3`]: one in a bucket;
//! - [`binary_cache`]: one cache; [`source`]: a cache or a store that is none; [`caches`]: several of
//!   either sort, asked in order of their priority;
//!   [`lookups`]: what was asked before, also by other processes;
//! - [`compress`], [`nar`]: archives on their way, decompressed and checked;
//! - [`mod@write`], [`listing`]: making a cache; [`serve`]: being one; [`closure`]: many paths at once.
//!
//! HTTP/1.1 is spoken with `ureq`: one request a connection at a time, connections kept and used
//! again. Where a server that is fetched from by TLS offers HTTP/2, many requests share one connection, by
//! `h2`, which a thread drives without an asynchronous runtime (`client::multiplex`). A thread waits for
//! each request that is open in either case, and `http-connections` bounds how many that are.
//!
//! Source: protocols, section 5.

pub mod binary_cache;
pub mod caches;
pub mod client;
pub mod closure;
pub mod compress;
pub mod error;
pub mod files;
mod lapses;
pub mod listing;
pub mod lookups;
pub mod nar;
pub mod netrc;
mod parallel;
mod place;
pub mod s3;
pub mod serve;
pub mod source;
#[cfg(feature = "testing")]
pub mod testing;
pub mod uri;
pub mod write;

pub use binary_cache::BinaryCache;
pub use caches::{Caches, Found, Options};
pub use error::{CacheError, DownloadError};
pub use source::Source;
