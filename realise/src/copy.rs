//! Objects from one store to another.

use std::collections::BTreeSet;
use std::io::{self, PipeReader, Read, Write as _};

use larder_core::api::{AddOptions, NarSource, ReadStore, Store, StoreError};
use larder_core::path_info::PathInfo;
use larder_core::store_path::StorePath;

/// Copies valid paths, in this order: references first. `tell` hears of each before it is sent.
pub fn copy(
    source: &(dyn Store + Sync),
    target: &dyn Store,
    paths: &[StorePath],
    options: AddOptions,
    tell: &dyn Fn(&StorePath),
) -> Result<(), StoreError> {
    let infos = infos(source, paths)?;
    copy_known(source, target, infos, options, tell)
}

/// The records of valid paths, in their order. Errors: one is not valid.
pub(crate) fn infos(source: &dyn ReadStore, paths: &[StorePath]) -> Result<Vec<PathInfo>, StoreError> {
    let found = paths.iter().zip(source.infos(paths)?);
    found.map(|(path, info)| info.ok_or_else(|| StoreError::not_valid(source.dir(), path))).collect()
}

/// Copies what these records are of.
pub(crate) fn copy_known(
    source: &(dyn Store + Sync),
    target: &dyn Store,
    infos: Vec<PathInfo>,
    options: AddOptions,
    tell: &dyn Fn(&StorePath),
) -> Result<(), StoreError> {
    // One end gives, the other takes: they meet in a pipe, each in a thread of its own.
    let (reader, mut writer) = io::pipe()?;
    let paths: Vec<StorePath> = infos.iter().map(|info| info.path.clone()).collect();
    let (taken, given) = std::thread::scope(|scope| {
        let giving = scope.spawn(move || {
            for path in &paths {
                source.nar(path, &mut writer)?;
            }
            Ok::<(), StoreError>(writer.flush()?)
        });
        let mut objects = Objects { infos: infos.into_iter(), reader, left: 0, tell };
        let taken = target.add_nars(&mut objects, options);
        // Whoever still gives finds nobody to give to.
        drop(objects);
        (taken, giving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    match (taken, given) {
        (Ok(()), _) => Ok(()),
        // That the stream ended early says less than why.
        (Err(taken), Err(given)) if is_broken_stream(&taken) => Err(given),
        (Err(taken), _) => Err(taken),
    }
}

/// Copies what is missing of a closure, and protects all of it there; gives what was missing. With
/// `substitute` the target fetches what it can get elsewhere.
pub fn copy_closure(
    source: &(dyn Store + Sync),
    target: &dyn Store,
    closure: &BTreeSet<StorePath>,
    substitute: bool,
    options: AddOptions,
    tell: &dyn Fn(&StorePath),
) -> Result<Vec<StorePath>, StoreError> {
    let valid = target.hold_valid(closure, substitute)?;
    let missing: BTreeSet<StorePath> = closure.difference(&valid).cloned().collect();
    let missing = source.sorted(&missing)?;
    if !missing.is_empty() {
        copy(source, target, &missing, options, tell)?;
    }
    Ok(missing)
}

/// Is it only that there came no more?
fn is_broken_stream(error: &StoreError) -> bool {
    let mut reason: Option<&(dyn std::error::Error + 'static)> = Some(error.inner());
    while let Some(error) = reason {
        if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::UnexpectedEof) {
            return true;
        }
        reason = error.source();
    }
    false
}

/// Archives one after another, each as long as its record says.
struct Objects<'a> {
    infos: std::vec::IntoIter<PathInfo>,
    reader: PipeReader,
    /// Bytes left of the current archive.
    left: u64,
    tell: &'a dyn Fn(&StorePath),
}

impl Read for Objects<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(into.len());
        if most == 0 {
            return Ok(0);
        }
        let n = self.reader.read(into.get_mut(..most).unwrap_or_default())?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= n as u64;
        Ok(n)
    }
}

impl NarSource for Objects<'_> {
    fn next_object(&mut self) -> Result<Option<PathInfo>, StoreError> {
        io::copy(&mut *self, &mut io::sink())?;
        let Some(info) = self.infos.next() else { return Ok(None) };
        (self.tell)(&info.path);
        self.left = info.nar_size_bytes;
        Ok(Some(info))
    }
}
