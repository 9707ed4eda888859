//! The ledger as a whole. What one function does is tested beside it.

mod crash;
pub(crate) mod disk;
mod ledger;
mod model;
mod processes;

use std::collections::{BTreeMap, BTreeSet};

use larder_core::hash::Sha256Digest;
use larder_core::hash_part::HashPart;
use larder_core::path_info::PathInfo;
use larder_core::store_path::{Name, StorePath};

use crate::{Batch, Mode, OpenOptions, StoreDb};

/// The path whose hash part is a byte repeated.
fn path(n: u8, name: &str) -> StorePath {
    StorePath::new(HashPart::from_bytes([n; 20]), Name::new(name).unwrap())
}

fn info(path: &StorePath, references: &[&StorePath]) -> PathInfo {
    let mut info = PathInfo::new(path.clone(), Sha256Digest([7; 32]), 100);
    info.references = references.iter().map(|p| (*p).clone()).collect();
    info
}

fn batch(infos: &[PathInfo]) -> Batch {
    let mut batch = Batch::new();
    for info in infos {
        batch.push_info(info, &BTreeMap::new()).unwrap();
    }
    batch
}

fn set<const N: usize>(paths: [&StorePath; N]) -> BTreeSet<StorePath> {
    paths.into_iter().cloned().collect()
}

fn house() -> (tempfile::TempDir, StoreDb) {
    let dir = tempfile::tempdir().unwrap();
    let db = StoreDb::open(dir.path(), &OpenOptions::new(Mode::Create)).unwrap();
    (dir, db)
}

/// Seconds that the long form of a test may take; `None` for the short form.
fn soak_s() -> Option<u64> {
    std::env::var("LARDER_SOAK_S").ok()?.parse().ok()
}
