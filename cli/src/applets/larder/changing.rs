//! `larder add`, `verify` and `adopt`.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use indicatif::HumanBytes;
use larder_core::api::{Store, StoreError};
use larder_core::content_address::Method;
use larder_core::hash::Algorithm;
use larder_core::report::{Level, Reporter as _};
use larder_core::settings::Settings;
use larder_core::store_path::Name;
use larder_fs::layout::Access;
use larder_store::LocalStore;
use larder_store::ingest::ContentAddressed;
use larder_store::verify::VerifyOptions;
use serde_json::json;

use super::asking::paths;
use super::{Add, AddMode, Adopt, Verify};
use crate::applets::nix_store::remote::Far;
use crate::applets::nix_store::store::{object_name, open};
use crate::applets::place::{Place, Side};
use crate::applets::{Context, print_json};
use crate::args::{Common, LogFormat};
use crate::builds::shows_logs;
use crate::exit::{Failure, Status};
use crate::paths::absolute;
use crate::printer::{Output, Printer};
use crate::realising::{How, Repairs};

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum ChangeError {
    #[error("a name or a root can be given for one file only, not for {count}")]
    OneOnly { count: usize },
    #[error("cannot open '{}'", path.display())]
    Open { path: PathBuf, source: io::Error },
}

/// `larder add`.
pub(super) fn add(cx: &Context, settings: &Settings, common: &Common, args: &Add) -> Result<(), Failure> {
    let algorithm: Algorithm = args.hash.parse()?;
    let method = match args.mode {
        AddMode::Nar => Method::Recursive,
        AddMode::Flat => Method::Flat,
    };
    if args.files.len() > 1 && (args.name.is_some() || args.root.is_some()) {
        return Err(ChangeError::OneOnly { count: args.files.len() }.into());
    }
    let place = Place::open(cx, settings, common, None, Access::ReadWrite)?;
    let (store, side) = (place.store(), place.side(cx, settings, common));
    if let (Side::Far(far), Some(_)) = (&side, &args.root) {
        far.files("--root")?;
    }
    let mut sources = Vec::new();
    for file in &args.files {
        let name = match &args.name {
            Some(name) => Name::new(name)?,
            None => object_name(file.as_os_str())?,
        };
        sources.push((absolute_path(file)?, ContentAddressed { name, method, algorithm }));
    }
    let mut added = Vec::new();
    match &side {
        Side::Here(local) => {
            // In as few commits as can be.
            let mut arrivals = local.arrivals();
            for (file, (source, content)) in args.files.iter().zip(&sources) {
                added.push((file, arrivals.add(source, content)?));
            }
            arrivals.commit()?;
        }
        Side::Far(far) => {
            for (file, (source, content)) in args.files.iter().zip(sources) {
                added.push((file, far.add_file(&source, content)?.path));
            }
        }
    }
    let mut roots = Vec::new();
    if let (Some(link), [(_, path)]) = (&args.root, added.as_slice()) {
        roots.push(side.add_root("--root", path, &absolute_path(link)?)?);
    }
    let info = |path| store.info(path)?.ok_or_else(|| StoreError::not_valid(store.dir(), path));
    if args.json.json {
        let mut rows = Vec::new();
        for (file, path) in &added {
            let info = info(path)?;
            rows.push(json!({
                "file": file.display().to_string(),
                "path": store.dir().full(path),
                "narHash": info.nar_hash.to_hash().encode(larder_core::hash::Encoding::Sri),
                "narSize": info.nar_size_bytes,
                "root": roots.first().map(|link| link.display().to_string()),
            }));
        }
        return print_json(&json!(rows));
    }
    let mut out = Printer::new(Output::Listing);
    for (file, path) in &added {
        out.line(store.dir().display(path))?;
        let size = HumanBytes(info(path)?.nar_size_bytes);
        let real = place.layout().map(|layout| layout.real_path(path));
        let lies = match real.filter(|real| real.as_os_str() != store.dir().full(path).as_str()) {
            Some(real) => format!("; its files are in '{}'", real.display()),
            None => String::new(),
        };
        cx.terminal.message(Level::Notice, format_args!("added '{}' ({size}){lies}", file.display()));
    }
    for link in roots {
        cx.terminal.message(Level::Notice, format_args!("'{}' keeps it from being collected", link.display()));
    }
    Ok(out.finish()?)
}

fn absolute_path(path: &Path) -> Result<PathBuf, Failure> {
    Ok(std::ffi::OsStr::from_bytes(&absolute(path.as_os_str())?).into())
}

/// `larder verify`.
pub(super) fn verify(cx: &Context, settings: &Settings, common: &Common, args: &Verify) -> Result<Status, Failure> {
    let access = if args.paths.is_empty() { Access::ReadWrite } else { Access::ReadOnly };
    let place = Place::open(cx, settings, common, None, access)?;
    let (store, side) = (place.store(), place.side(cx, settings, common));
    if args.paths.is_empty() {
        return match &side {
            Side::Here(local) => verify_here(cx, settings, local, args),
            Side::Far(far) => verify_there(cx, store, far, args),
        };
    }
    let mut rows = Vec::new();
    let mut status = Status::SUCCESS;
    for path in paths(store.dir(), &args.paths)? {
        let good = match &side {
            Side::Here(local) => local.verify_path(&path)?,
            Side::Far(far) => far.verify_path(&path)?,
        };
        if !good {
            status = Status::FAILURE;
        }
        rows.push(json!({ "path": store.dir().full(&path), "good": good }));
    }
    if args.json.json {
        print_json(&json!(rows))?;
    }
    Ok(status)
}

/// All of a store whose ledger is ours.
fn verify_here(cx: &Context, settings: &Settings, store: &LocalStore, args: &Verify) -> Result<Status, Failure> {
    let check_contents = args.contents || args.resume;
    let options = VerifyOptions { check_contents, repair: args.repair, resume: args.resume };
    let how = How { shows_logs: shows_logs(&cx.terminal, LogFormat::RawWithLogs, false), ..How::NORMAL };
    let verified = store.verify(options, &Repairs { realiser: cx.realiser(store, settings), how })?;
    if args.json.json {
        let gone: Vec<String> = verified.disappeared.iter().map(|path| store.dir().full(path)).collect();
        print_json(&json!({ "errors": verified.errors, "disappeared": gone }))?;
    } else if verified.errors == 0 {
        tell_good(cx, store.read(|txn| Ok(txn.count()?))?, check_contents);
    } else {
        cx.terminal.message(Level::Notice, format_args!("{} faults remain", verified.errors));
    }
    Ok(if verified.errors == 0 { Status::SUCCESS } else { Status::FAILURE })
}

/// All of a store that another process keeps, which says only whether something is still wrong.
fn verify_there(cx: &Context, store: &dyn Store, far: &Far<'_>, args: &Verify) -> Result<Status, Failure> {
    if args.resume {
        return Err(far.not_there("verify --resume"));
    }
    if args.json.json {
        return Err(far.not_there("verify --json"));
    }
    if store.verify(args.contents, args.repair)? {
        cx.terminal.message(Level::Notice, format_args!("faults remain"));
        return Ok(Status::FAILURE);
    }
    tell_good(cx, store.all_paths()?.len() as u64, args.contents);
    Ok(Status::SUCCESS)
}

fn tell_good(cx: &Context, paths: u64, check_contents: bool) {
    let what = if check_contents { "and their contents are" } else { "are" };
    cx.terminal.message(Level::Notice, format_args!("{paths} paths {what} as recorded"));
}

/// `larder adopt`.
pub(super) fn adopt(cx: &Context, settings: &Settings, args: &Adopt) -> Result<(), Failure> {
    let access = if args.dry_run { Access::ReadOnly } else { Access::ReadWrite };
    let store = open(cx, settings, access)?;
    let adopted = match &args.from {
        Some(path) => {
            let file = File::open(path).map_err(|source| ChangeError::Open { path: path.clone(), source })?;
            store.adopt_dump(file, args.dry_run)?
        }
        None => store.adopt(args.dry_run)?,
    };
    if args.json.json {
        return print_json(&json!({
            "registered": adopted.registered,
            "new": adopted.new,
            "missing": adopted.missing,
            "dryRun": args.dry_run,
        }));
    }
    let mut out = Printer::new(Output::Listing);
    out.line(format_args!(
        "{} {} of {} registrations{}",
        if args.dry_run { "would take over" } else { "took over" },
        adopted.new,
        adopted.registered,
        if adopted.missing > 0 { format!("; {} were left out", adopted.missing) } else { String::new() },
    ))?;
    Ok(out.finish()?)
}
