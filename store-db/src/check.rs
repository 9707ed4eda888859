//! Does the ledger agree with itself? For `--verify`, and for repair after a fault of a program.

use std::fmt;

use larder_core::hash_part::HashPart;
use redb::{ReadableTable, Table};

use crate::error::DbError;
use crate::open::StoreDb;
use crate::query::ReadTxn;
use crate::record::{Details, RecordView, ReferencesView, read_output};
use crate::tables::{Bytes, HashKey, PairKey, pair, split_output_key, split_pair};
use crate::txn::{Tables, WriteTxn, insert_ascending};

/// Something that should not be. Paths are named as far as they are known.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Finding {
    /// The record cannot be read; the path is lost.
    BadRecord { path: HashPart, detail: String },
    /// A valid path refers to one that is not. Only registering that again helps.
    DanglingReference { path: HashPart, reference: HashPart },
    /// A reference is not listed, or listed although there is none. Repairable.
    Referrers { reference: HashPart, referrer: HashPart, listed: bool },
    /// Outputs of a derivation that is not valid, or that cannot be read. Repairable.
    StrayOutput { derivation: HashPart, output: String },
    /// A deriver is not listed, or listed although it is none. Repairable.
    Derivers { output: HashPart, derivation: HashPart, listed: bool },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let which = |listed: &bool| if *listed { "a wrong" } else { "no" };
        match self {
            Self::BadRecord { path, detail } => write!(f, "record of '{path}' cannot be read: {detail}"),
            Self::DanglingReference { path, reference } => {
                write!(f, "'{path}' refers to '{reference}', which is not valid")
            }
            Self::Referrers { reference, referrer, listed } => {
                write!(f, "'{reference}' has {} entry for its referrer '{referrer}'", which(listed))
            }
            Self::StrayOutput { derivation, output } => {
                write!(f, "there is a stray output '{output}' of '{derivation}'")
            }
            Self::Derivers { output, derivation, listed } => {
                write!(f, "'{output}' has {} entry for its deriver '{derivation}'", which(listed))
            }
        }
    }
}

/// The tables as they ought to be.
#[derive(Default)]
struct Truth {
    findings: Vec<Finding>,
    /// Valid paths, ascending, and whether they are derivations.
    keys: Vec<([u8; 20], bool)>,
    referrers: Vec<[u8; 40]>,
    derivers: Vec<[u8; 40]>,
    stray_outputs: Vec<Vec<u8>>,
}

impl Truth {
    fn read(
        paths: &impl ReadableTable<HashKey, Bytes>,
        references: &impl ReadableTable<HashKey, Bytes>,
        details: &impl ReadableTable<HashKey, Bytes>,
        outputs: &impl ReadableTable<Bytes, Bytes>,
    ) -> Result<Self, DbError> {
        let mut truth = Self::default();
        let mut references = Rows::new(references)?;
        let mut details = Rows::new(details)?;
        for row in paths.iter()? {
            let (key, bytes) = row?;
            let key = *key.value();
            for stray in references.skip_to(&key)?.into_iter().chain(details.skip_to(&key)?) {
                truth.bad(&stray, "there are details of a path that is not valid");
            }
            let own_references = references.take(&key)?;
            let own_details = details.take(&key)?;
            match RecordView::parse(&key, bytes.value()) {
                Ok(view) => {
                    truth.keys.push((key, view.path().is_derivation()));
                    if view.deriver().is_some_and(|deriver| deriver.to_store_path().is_err()) {
                        truth.bad(&key, "its deriver has an impossible name");
                    }
                    if view.has_references() != own_references.is_some() {
                        truth.bad(&key, "its references are lost, or should not be there");
                    }
                    if view.has_details() != own_details.is_some() {
                        truth.bad(&key, "its details are lost, or should not be there");
                    }
                }
                Err(error) => truth.bad(&key, error),
            }
            match own_references.as_deref().map(ReferencesView::parse).transpose() {
                Ok(list) => {
                    let others = list.unwrap_or_default().0.iter().filter(|reference| **reference != key);
                    truth.referrers.extend(others.map(|reference| pair(reference, &key)));
                }
                Err(error) => truth.bad(&key, error),
            }
            if let Some(Err(error)) = own_details.as_deref().map(Details::parse) {
                truth.bad(&key, error);
            }
        }
        for stray in references.rest()?.into_iter().chain(details.rest()?) {
            truth.bad(&stray, "there are details of a path that is not valid");
        }
        truth.referrers.sort_unstable();
        for key in &truth.referrers {
            let (reference, path) = split_pair(key);
            if !truth.is_valid(&reference) {
                let [path, reference] = [path, reference].map(HashPart::from_bytes);
                truth.findings.push(Finding::DanglingReference { path, reference });
            }
        }
        for row in outputs.iter()? {
            let (key, value) = row?;
            let stray = match split_output_key(key.value()) {
                Ok((derivation, output)) => {
                    let found = truth.keys.binary_search_by_key(&&derivation, |(k, _)| k).ok();
                    let is_derivation = found.and_then(|at| truth.keys.get(at)).is_some_and(|(_, drv)| *drv);
                    // Whatever the derivation is called, the form must be right.
                    let path = read_output("x.drv", output, value.value());
                    match path {
                        Ok(path) if is_derivation => {
                            truth.derivers.push(pair(path.hash_part().as_bytes(), &derivation));
                            None
                        }
                        _ => Some((derivation, output.to_owned())),
                    }
                }
                Err(_) => Some(([0; 20], String::from_utf8_lossy(key.value()).into_owned())),
            };
            if let Some((derivation, output)) = stray {
                let derivation = HashPart::from_bytes(derivation);
                truth.findings.push(Finding::StrayOutput { derivation, output });
                truth.stray_outputs.push(key.value().to_vec());
            }
        }
        truth.derivers.sort_unstable();
        truth.derivers.dedup();
        Ok(truth)
    }

    fn bad(&mut self, key: &[u8; 20], detail: impl fmt::Display) {
        self.findings.push(Finding::BadRecord { path: HashPart::from_bytes(*key), detail: detail.to_string() });
    }

    fn is_valid(&self, key: &[u8; 20]) -> bool {
        self.keys.binary_search_by_key(&key, |(k, _)| k).is_ok()
    }

    fn compare(
        mut self,
        referrers: &impl ReadableTable<PairKey, ()>,
        derivers: &impl ReadableTable<PairKey, ()>,
    ) -> Result<Self, DbError> {
        compare_pairs(&self.referrers, referrers, |key, listed| {
            let (reference, referrer) = split_pair(key);
            let [reference, referrer] = [reference, referrer].map(HashPart::from_bytes);
            self.findings.push(Finding::Referrers { reference, referrer, listed });
        })?;
        compare_pairs(&self.derivers, derivers, |key, listed| {
            let (output, derivation) = split_pair(key);
            let [output, derivation] = [output, derivation].map(HashPart::from_bytes);
            self.findings.push(Finding::Derivers { output, derivation, listed });
        })?;
        Ok(self)
    }
}

type OwnedRow = ([u8; 20], Vec<u8>);

/// Rows of a table that has the order of the paths.
struct Rows<'t> {
    range: redb::Range<'t, HashKey, Bytes>,
    next: Option<OwnedRow>,
}

impl<'t> Rows<'t> {
    fn new(table: &'t impl ReadableTable<HashKey, Bytes>) -> Result<Self, DbError> {
        let mut rows = Self { range: table.iter()?, next: None };
        rows.advance()?;
        Ok(rows)
    }

    fn advance(&mut self) -> Result<Option<OwnedRow>, DbError> {
        let row = self.range.next().transpose()?;
        let row = row.map(|(key, value)| (*key.value(), value.value().to_vec()));
        Ok(std::mem::replace(&mut self.next, row))
    }

    /// Keys below `key`, passed over.
    fn skip_to(&mut self, key: &[u8; 20]) -> Result<Vec<[u8; 20]>, DbError> {
        let mut passed = Vec::new();
        while self.next.as_ref().is_some_and(|(next, _)| next < key) {
            passed.extend(self.advance()?.map(|(key, _)| key));
        }
        Ok(passed)
    }

    fn take(&mut self, key: &[u8; 20]) -> Result<Option<Vec<u8>>, DbError> {
        if self.next.as_ref().is_some_and(|(next, _)| next == key) {
            return Ok(self.advance()?.map(|(_, value)| value));
        }
        Ok(None)
    }

    fn rest(&mut self) -> Result<Vec<[u8; 20]>, DbError> {
        let mut rest = Vec::new();
        while let Some((key, _)) = self.advance()? {
            rest.push(key);
        }
        Ok(rest)
    }
}

/// Tells of every pair that stands on one side only.
fn compare_pairs(
    truth: &[[u8; 40]],
    table: &impl ReadableTable<PairKey, ()>,
    mut differs: impl FnMut(&[u8; 40], bool),
) -> Result<(), DbError> {
    let mut truth = truth.iter().peekable();
    for row in table.iter()? {
        let (key, ()) = {
            let (key, unit) = row?;
            (*key.value(), unit.value())
        };
        while let Some(missing) = truth.next_if(|t| **t < key) {
            differs(missing, false);
        }
        if truth.next_if(|t| **t == key).is_none() {
            differs(&key, true);
        }
    }
    truth.for_each(|missing| differs(missing, false));
    Ok(())
}

impl ReadTxn {
    /// Everything that does not fit together. Reads all tables.
    pub fn check(&self) -> Result<Vec<Finding>, DbError> {
        let truth = Truth::read(self.paths()?, self.references_table()?, self.details()?, self.outputs()?)?;
        Ok(truth.compare(self.referrers_table()?, self.derivers_table()?)?.findings)
    }
}

impl WriteTxn<'_> {
    /// Makes the tables that follow from others anew, and gives what was found before. Bad
    /// records and dangling references stay: what they say is lost.
    pub fn repair(&mut self) -> Result<Vec<Finding>, DbError> {
        let Tables { paths, references, details, referrers, outputs, derivers } = self.tables();
        let truth = Truth::read(paths, references, details, outputs)?.compare(referrers, derivers)?;
        if truth.findings.is_empty() {
            return Ok(truth.findings);
        }
        for key in &truth.stray_outputs {
            outputs.remove(key.as_slice())?;
        }
        rebuild(referrers, &truth.referrers)?;
        rebuild(derivers, &truth.derivers)?;
        self.set_changed();
        Ok(truth.findings)
    }
}

fn rebuild(table: &mut Table<'_, PairKey, ()>, truth: &[[u8; 40]]) -> Result<(), DbError> {
    table.retain(|_, ()| false)?;
    let mut pairs = truth.iter().copied();
    insert_ascending(table, |_| pairs.next())
}

impl StoreDb {
    /// Everything that does not fit together; empty if all is well.
    pub fn check(&self) -> Result<Vec<Finding>, DbError> {
        self.read(ReadTxn::check)
    }

    /// [`WriteTxn::repair`] in a transaction of its own.
    #[expect(clippy::redundant_closure_for_method_calls, reason = "the method is for one lifetime only")]
    pub fn repair(&self) -> Result<Vec<Finding>, DbError> {
        self.write(|w| w.repair())
    }
}
