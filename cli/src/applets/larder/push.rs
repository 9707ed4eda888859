//! `larder push`: paths of a store to a binary cache.

use std::collections::BTreeSet;
use std::ffi::OsString;

use clap::Args;
use larder_core::settings::Settings;
use larder_core::store_path::StorePath;
use larder_fs::layout::Access;

use crate::applets::Context;
use crate::applets::place::Place;
use crate::applets::pushing::{self, How};
use crate::args::Common;
use crate::exit::Failure;
use crate::paths::store_paths;

#[derive(Debug, Args)]
pub struct Push {
    /// The cache
    #[arg(
        value_name = "URI",
        help = "The cache: file:///DIR, https://HOST/..., s3://BUCKET?region=REGION; parameters are \
                compression=METHOD, secret-key=FILE, write-nar-listing=true and more"
    )]
    pub to: String,
    /// Paths to copy; they come with all that they need
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<OsString>,
    /// Copy these paths only, not what they need
    #[arg(long)]
    pub no_closure: bool,
    /// Also copy the logs of the builds that made them, where they are here
    #[arg(long)]
    pub logs: bool,
    /// Archives that are compressed at once, instead of one a processor
    #[arg(short, long, value_name = "N")]
    pub jobs: Option<usize>,
}

pub(super) fn push(cx: &Context, settings: &Settings, common: &Common, args: &Push) -> Result<(), Failure> {
    let from = Place::open(cx, settings, common, None, Access::ReadOnly)?;
    let asked: BTreeSet<StorePath> = store_paths(from.store().dir(), &args.paths)?.into_iter().collect();
    let how = How {
        uri: &args.to,
        jobs: args.jobs,
        logs: args.logs,
        include_outputs: false,
        no_closure: args.no_closure,
        dry_run: false,
    };
    pushing::push(cx, settings, &from, &asked, how).map(drop)
}
