//! Comparing what was made with what there was: `--check`, and rounds of `repeat`.
//!
//! Source: building, sections 12.11 and 12.13.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;

use super::Build;
use super::hooks;
use super::outputs::Collected;
use super::run::Made;
use super::tempdir::{Owner, TempDir};
use crate::job::{Failure, FailureKind};

/// Compares new outputs with the valid ones, which are not touched.
pub(super) fn check(
    build: &Build<'_>,
    collected: Collected<'_>,
    user: Option<Owner>,
    temp: &TempDir,
) -> Result<(), Failure> {
    let drv = build.shown_drv();
    let values = &build.settings.values;
    let mut equal = BTreeSet::new();
    for (name, output) in collected {
        let Some(known) = build.outputs.get(&name).and_then(|place| place.known.as_ref()) else { continue };
        if known.nar_hash == output.info.nar_hash {
            equal.insert(known.path.clone());
            continue;
        }
        let path = build.store.layout().real_path(&known.path);
        let mut text = format!("derivation '{drv}' may not be deterministic: output '{}' differs", path.display());
        if values.keep_failed || values.run_diff_hook {
            let name = OsString::from(format!("{}.check", known.path));
            let kept = build.store.keep_as(output.taken, &name)?;
            let temp = temp.path();
            let words = [path.as_os_str(), kept.as_os_str(), OsStr::new(&drv), temp.as_os_str()];
            hooks::diff(values, build.store.reporter(), words, user);
            let _ = write!(text, " from '{}'", kept.display());
        }
        return Err(Failure::new(FailureKind::NotDeterministic, text));
    }
    // What was substituted is as good as built here now.
    Ok(build.store.mark_ultimate(&equal)?)
}

/// Compares a round with the one before.
pub(super) fn rounds(build: &Build<'_>, before: &Made, made: &Made) -> Result<(), Failure> {
    let drv = build.shown_drv();
    for (name, info) in made {
        let Some(old) = before.get(name) else { continue };
        if (old.nar_hash, &old.references) == (info.nar_hash, &info.references) {
            continue;
        }
        let path = build.store.layout().real_path(&info.path);
        let text = format!("output '{}' of '{drv}' differs from previous round", path.display());
        if build.settings.values.enforce_determinism {
            return Err(Failure::new(FailureKind::NotDeterministic, text));
        }
        build.say(larder_core::report::Level::Error, format_args!("{text}"));
    }
    Ok(())
}
