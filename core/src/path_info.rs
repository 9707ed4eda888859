//! What the store knows about a valid path.

use std::collections::BTreeSet;

use crate::content_address::ContentAddress;
use crate::hash::Sha256Digest;
use crate::signature::Signature;
use crate::store_dir::{References, StoreDir};
use crate::store_path::StorePath;

/// The record of a valid path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathInfo {
    pub path: StorePath,
    /// SHA-256 of the NAR.
    pub nar_hash: Sha256Digest,
    pub nar_size_bytes: u64,
    /// Paths whose hash part occurs in the contents; may hold the path itself.
    pub references: BTreeSet<StorePath>,
    /// The derivation that made it; need not be valid.
    pub deriver: Option<StorePath>,
    /// Seconds since 1970.
    pub registration_time_s: u64,
    /// Built here, so trusted without signatures.
    pub ultimate: bool,
    pub signatures: BTreeSet<Signature>,
    pub content_address: Option<ContentAddress>,
}

impl PathInfo {
    /// A record with the given contents and nothing else known.
    pub fn new(path: StorePath, nar_hash: Sha256Digest, nar_size_bytes: u64) -> Self {
        Self {
            path,
            nar_hash,
            nar_size_bytes,
            references: BTreeSet::new(),
            deriver: None,
            registration_time_s: 0,
            ultimate: false,
            signatures: BTreeSet::new(),
            content_address: None,
        }
    }

    /// The references, those to itself told apart.
    pub fn split_references(&self) -> References {
        let mut others = self.references.clone();
        let to_self = others.remove(&self.path);
        References { others, to_self }
    }

    /// Does the content address it claims lead to this very path?
    ///
    /// Such a path needs no signature.
    pub fn is_content_addressed(&self, dir: &StoreDir) -> bool {
        self.content_address.as_ref().is_some_and(|address| {
            dir.make_content_path(self.path.name(), address, &self.split_references())
                .is_ok_and(|path| path == self.path)
        })
    }
}
