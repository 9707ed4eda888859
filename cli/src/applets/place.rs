//! The store that a command works with, wherever it is.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use larder_core::api::Store;
use larder_core::derivation::Derivation;
use larder_core::settings::Settings;
use larder_core::store_path::StorePath;
use larder_fs::layout::{Access, Layout};
use larder_store::{LocalStore, Pages};

use super::Context;
use super::nix_store::remote::Far;
use super::nix_store::store::open_chosen;
use crate::args::Common;
use crate::conf::{Facts, StoreChoice, choose};
use crate::engine::Engine;
use crate::exit::Failure;
use crate::remote::Opened;

/// A store of this process, or one that another process keeps.
pub(super) enum Place {
    Here(Box<Engine>),
    Far(Box<Opened>),
}

impl Place {
    /// Opens the store of a URI, or the one that the settings choose.
    pub(super) fn open(
        cx: &Context,
        settings: &Settings,
        common: &Common,
        uri: Option<&str>,
        access: Access,
    ) -> Result<Self, Failure> {
        let settings = match uri {
            Some(uri) => Cow::Owned(Settings { store: uri.to_owned(), ..settings.clone() }),
            None => Cow::Borrowed(settings),
        };
        Self::open_with(cx, settings, common, access, Pages::Usual)
    }

    /// Opens the store that the settings choose, for who looks at all that is there.
    pub(super) fn open_for_survey(
        cx: &Context,
        settings: &Settings,
        common: &Common,
        access: Access,
    ) -> Result<Self, Failure> {
        Self::open_with(cx, Cow::Borrowed(settings), common, access, Pages::Few)
    }

    fn open_with(
        cx: &Context,
        settings: Cow<'_, Settings>,
        common: &Common,
        access: Access,
        pages: Pages,
    ) -> Result<Self, Failure> {
        match choose(&settings.store, &cx.env, Facts::gather(&cx.env, access == Access::ReadWrite)?)? {
            StoreChoice::Local(chosen) => {
                let local = open_chosen(cx, &settings, chosen, access, pages)?;
                let (builds, interrupt, env) = (Arc::default(), cx.interrupt.clone(), Arc::new(cx.env.clone()));
                let settings = Arc::new(settings.into_owned());
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

    /// The store, if its ledger is ours to read.
    pub(super) fn local(&self) -> Option<&LocalStore> {
        match self {
            Self::Here(engine) => Some(&engine.local),
            Self::Far(_) => None,
        }
    }

    /// Where its files lie, if that is on this machine.
    pub(super) fn layout(&self) -> Option<&Layout> {
        match self {
            Self::Here(engine) => Some(engine.local.layout()),
            Self::Far(opened) => opened.files.as_ref().map(|files| &files.layout),
        }
    }

    /// The place as commands see it that do what no trait has a word for.
    pub(super) fn side<'a>(&'a self, cx: &'a Context, settings: &'a Settings, common: &'a Common) -> Side<'a> {
        match self {
            Self::Here(engine) => Side::Here(&engine.local),
            Self::Far(opened) => Side::Far(Far::new(cx, settings, common, opened)),
        }
    }

    /// What messages call it; nothing for the store of this machine.
    pub(super) fn uri(&self) -> Option<&str> {
        match self {
            Self::Here(_) => None,
            Self::Far(opened) => opened.uri.split('?').next(),
        }
    }
}

/// Either side of a place.
pub(super) enum Side<'a> {
    Here(&'a LocalStore),
    Far(Far<'a>),
}

impl Side<'_> {
    /// Makes a link to a path, and a root of the link; gives it as it was made. `flag` asks for that.
    pub(super) fn add_root(&self, flag: &'static str, path: &StorePath, link: &Path) -> Result<PathBuf, Failure> {
        match self {
            Self::Here(local) => Ok(local.add_permanent_root(path, link)?),
            Self::Far(far) => far.add_root(flag, path, link),
        }
    }

    /// Reads the derivation at a path.
    pub(super) fn derivation(&self, path: &StorePath) -> Result<Derivation, Failure> {
        match self {
            Self::Here(local) => Ok(local.derivation(path)?),
            Self::Far(far) => far.derivation(path),
        }
    }
}
