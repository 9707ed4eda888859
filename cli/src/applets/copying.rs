//! Closures from one store to another.

use std::collections::BTreeSet;

use larder_core::api::AddOptions;
use larder_core::report::{Level, Reporter as _};
use larder_core::store_path::StorePath;

use super::Context;
use super::place::Place;
use crate::exit::Failure;

/// How to copy.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag that was given or not")]
pub(super) struct How {
    /// Refuse what is neither signed by a trusted key nor content-addressed.
    pub(super) check_signatures: bool,
    /// Let the receiver fetch what it can get elsewhere.
    pub(super) substitute: bool,
    /// Copy outputs of derivations along with them.
    pub(super) include_outputs: bool,
    /// Copy these paths only, and not what they need.
    pub(super) no_closure: bool,
    pub(super) dry_run: bool,
}

/// Copies paths with all they need; gives what was missing, references first.
pub(super) fn copy(
    cx: &Context,
    from: &Place,
    to: &Place,
    paths: &BTreeSet<StorePath>,
    how: How,
) -> Result<Vec<StorePath>, Failure> {
    let (source, target) = (from.store(), to.store());
    let all = if how.no_closure { paths.clone() } else { source.closure(paths, how.include_outputs)? };
    let valid = target.hold_valid(&all, how.substitute && !how.dry_run)?;
    let missing: BTreeSet<StorePath> = all.difference(&valid).cloned().collect();
    let missing = source.sorted(&missing)?;
    cx.terminal.message(Level::Info, format_args!("copying {} paths...", missing.len()));
    if missing.is_empty() || how.dry_run {
        return Ok(missing);
    }
    let way = match (from.uri(), to.uri()) {
        (_, Some(to)) => format!(" to '{to}'"),
        (Some(from), None) => format!(" from '{from}'"),
        (None, None) => String::new(),
    };
    let tell = |path: &StorePath| {
        cx.terminal.message(Level::Info, format_args!("copying path '{}'{way}...", source.dir().display(path)));
    };
    let options = AddOptions { repair: false, check_signatures: how.check_signatures };
    larder_realise::copy::copy(source, target, &missing, options, &tell)?;
    Ok(missing)
}
