//! Closures from one store to another.

use std::collections::BTreeSet;
use std::sync::Arc;

use larder_core::api::{AddOptions, Store};
use larder_core::report::{Level, Reporter as _};
use larder_core::settings::Settings;
use larder_core::store_path::StorePath;
use larder_fs::layout::Access;

use super::Context;
use super::nix_store::store::open;
use crate::args::Common;
use crate::conf::{Facts, StoreChoice, choose};
use crate::engine::Engine;
use crate::exit::Failure;
use crate::remote::Opened;

/// One end of a copy.
pub(super) enum End {
    Here(Box<Engine>),
    Far(Box<Opened>),
}

impl End {
    /// Opens the store of a URI, or the one that the settings choose.
    pub(super) fn open(
        cx: &Context,
        settings: &Settings,
        common: &Common,
        uri: Option<&str>,
        access: Access,
    ) -> Result<Self, Failure> {
        let settings = match uri {
            Some(uri) => Settings { store: uri.to_owned(), ..settings.clone() },
            None => settings.clone(),
        };
        let facts = Facts::gather(&cx.env, access == Access::ReadWrite)?;
        match choose(&settings.store, &cx.env, facts)? {
            StoreChoice::Local(_) => {
                let local = open(cx, &settings, access)?;
                let (builds, interrupt, settings) = (Arc::default(), cx.interrupt.clone(), Arc::new(settings));
                let env = Arc::new(cx.env.clone());
                Ok(Self::Here(Box::new(Engine { local, settings, builds, hides_logs: false, interrupt, env })))
            }
            choice => Ok(Self::Far(Box::new(cx.connect(&settings, common, choice)?))),
        }
    }

    pub(super) fn store(&self) -> &(dyn Store + Sync) {
        match self {
            Self::Here(engine) => &**engine,
            Self::Far(opened) => opened.store(),
        }
    }

    /// What messages call it; nothing for the store of this machine.
    fn uri(&self) -> Option<&str> {
        match self {
            Self::Here(_) => None,
            Self::Far(opened) => opened.uri.split('?').next(),
        }
    }
}

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
    from: &End,
    to: &End,
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
