//! The tables by name, key and value. `docs/db-format.md` says the same in words.

use std::fmt;

use larder_core::hash_part::HashPart;
use redb::TableDefinition;

use crate::error::DbError;

pub(crate) type HashKey = &'static [u8; 20];
pub(crate) type PairKey = &'static [u8; 40];
pub(crate) type Bytes = &'static [u8];

/// Hash part of a valid path -> what is asked most.
pub(crate) const PATHS: TableDefinition<'static, HashKey, Bytes> = TableDefinition::new("paths");
/// Hash part of a valid path that has references -> their hash parts, ascending.
pub(crate) const REFERENCES: TableDefinition<'static, HashKey, Bytes> = TableDefinition::new("references");
/// Hash part of a valid path that has any -> content address and signatures.
pub(crate) const DETAILS: TableDefinition<'static, HashKey, Bytes> = TableDefinition::new("details");
/// Referenced path ++ referring path, without references to oneself.
pub(crate) const REFERRERS: TableDefinition<'static, PairKey, ()> = TableDefinition::new("referrers");
/// Valid derivation ++ name of the output -> output path (which need not be valid).
pub(crate) const OUTPUTS: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("derivation-outputs");
/// Output path ++ valid derivation that can make it: the inverse of `OUTPUTS`.
pub(crate) const DERIVERS: TableDefinition<'static, PairKey, ()> = TableDefinition::new("derivers");
/// Id of a realisation (`sha256:HEX!OUTPUT`) -> what its owner wrote.
pub(crate) const REALISATIONS: TableDefinition<'static, &'static str, Bytes> = TableDefinition::new("realisations");
/// Base name of a path that could not be built -> time of the failure, seconds since 1970.
pub(crate) const FAILED: TableDefinition<'static, &'static str, u64> = TableDefinition::new("failed");
/// Markers: the schema version and what other parts of the store remember.
pub(crate) const META: TableDefinition<'static, &'static str, Bytes> = TableDefinition::new("meta");

/// The marker that holds the schema version, 4 bytes, little-endian.
pub(crate) const SCHEMA_KEY: &str = "schema";

pub(crate) type Rows<'t> = redb::Table<'t, HashKey, Bytes>;
pub(crate) type Pairs<'t> = redb::Table<'t, PairKey, ()>;

pub(crate) fn pair(first: &[u8; 20], second: &[u8; 20]) -> [u8; 40] {
    let mut key = [0; 40];
    let (a, b) = key.split_at_mut(20);
    a.copy_from_slice(first);
    b.copy_from_slice(second);
    key
}

pub(crate) fn split_pair(key: &[u8; 40]) -> ([u8; 20], [u8; 20]) {
    let (first, second) = key.split_at(20);
    (first.try_into().expect("split at 20"), second.try_into().expect("40 less 20"))
}

/// The first and last key of those that begin with `first`.
pub(crate) fn pairs_of(first: &[u8; 20]) -> ([u8; 40], [u8; 40]) {
    (pair(first, &[0; 20]), pair(first, &[0xff; 20]))
}

/// Derivation ++ output name.
pub(crate) fn output_key(derivation: &[u8; 20], output: &str) -> Vec<u8> {
    [derivation.as_slice(), output.as_bytes()].concat()
}

/// Splits a key of [`OUTPUTS`].
pub(crate) fn split_output_key(key: &[u8]) -> Result<([u8; 20], &str), DbError> {
    key.split_first_chunk::<20>()
        .and_then(|(derivation, output)| Some((*derivation, str::from_utf8(output).ok()?)))
        .ok_or_else(|| inconsistent(format_args!("a key of the derivation outputs has {} bytes", key.len())))
}

/// The keys of [`OUTPUTS`] that belong to one derivation lie from the first of these up to,
/// not including, the second (`None`: up to the end).
pub(crate) fn outputs_of(derivation: &[u8; 20]) -> ([u8; 20], Option<[u8; 20]>) {
    let mut end = *derivation;
    for byte in end.iter_mut().rev() {
        let (next, overflow) = byte.overflowing_add(1);
        *byte = next;
        if !overflow {
            return (*derivation, Some(end));
        }
    }
    (*derivation, None)
}

pub(crate) fn inconsistent(detail: fmt::Arguments<'_>) -> DbError {
    DbError::Inconsistent { detail: detail.to_string() }
}

pub(crate) fn dangling(referrer: &[u8; 20], reference: &[u8; 20]) -> DbError {
    let (referrer, reference) = (HashPart::from_bytes(*referrer), HashPart::from_bytes(*reference));
    inconsistent(format_args!("'{referrer}' refers to '{reference}', which is not valid"))
}
