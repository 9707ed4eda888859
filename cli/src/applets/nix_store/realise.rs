//! `--realise`, `--repair-path` and `--read-log`. Source: cli, sections 5.1, 5.6 and 5.8.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use larder_cache::client::Client;
use larder_cache::{Caches, Source};
use larder_core::api::ReadStore;
use larder_core::derivation::OutputName;
use larder_core::report::{Level, Reporter as _};
use larder_core::settings::Settings;
use larder_core::store_path::StorePath;
use larder_fs::layout::{Access, Layout};
use larder_realise::job::Mode;
use larder_realise::logs;
use larder_realise::plan::{Key, Target, Wanted};
use larder_store::LocalStore;

use super::store::{Voice, open};
use crate::applets::Context;
use crate::args::Common;
use crate::args::nix_store::{BuildMode, Realise};
use crate::builds::shows_logs;
use crate::caches::{caches, client_options};
use crate::exit::{Failure, chain};
use crate::paths::{absolute, store_path, store_paths};
use crate::printer::{Output, Printer};
use crate::realising::{How, Realiser, target};

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(in crate::applets) enum RealiseOpError {
    #[error("build log of derivation '{path}' is not available")]
    NoLog { path: String },
    #[error("reading the build log of '{path}'")]
    ReadLog { path: String, source: std::io::Error },
}

impl Context {
    /// Realises in a store, with this command's terminal and signals.
    pub(in crate::applets) fn realiser<'a>(&'a self, store: &'a LocalStore, settings: &'a Settings) -> Realiser<'a> {
        Realiser { store, settings, terminal: &self.terminal, interrupt: &self.interrupt, env: &self.env }
    }
}

pub(super) fn how(cx: &Context, common: &Common, mode: BuildMode) -> How {
    How {
        mode: match mode {
            BuildMode::Normal => Mode::Normal,
            BuildMode::Repair => Mode::Repair,
            BuildMode::Check => Mode::Check,
        },
        shows_logs: shows_logs(&cx.terminal, common.log_format, common.no_build_output),
        read_only: common.read_only,
        trace: common.build_trace,
        ..How::NORMAL
    }
}

/// Warns that results may go away; once is enough.
pub(super) fn warn_of_collector(cx: &Context, common: &Common) {
    if !common.no_gc_warning {
        cx.terminal.message(
            Level::Warn,
            format_args!("you did not specify '--add-root'; the result might be removed by the garbage collector"),
        );
    }
}

pub(super) fn realise(cx: &Context, settings: &Settings, common: &Common, args: &Realise) -> Result<(), Failure> {
    let store = open(cx, settings, Access::ReadWrite)?;
    let targets: Vec<Target> =
        args.targets.iter().map(|argument| target(store.dir(), argument)).collect::<Result<_, _>>()?;
    let how = How { dry_run: args.dry_run, ignore_unknown: args.ignore_unknown, ..how(cx, common, args.mode) };
    let realiser = cx.realiser(&store, settings);
    let targets = realiser.realise(targets, how)?;
    if args.dry_run || args.ignore_unknown {
        return Ok(());
    }
    let mut out = Printer::new(Output::Listing);
    if args.roots.add_root.is_none() && !targets.is_empty() {
        warn_of_collector(cx, common);
    }
    for (target, number) in targets.iter().zip(1usize..) {
        let mut printed: BTreeSet<Vec<u8>> = BTreeSet::new();
        for (output, path) in realiser.outputs(target)? {
            let suffix = output.as_ref().map(OutputName::as_str).filter(|name| *name != "out");
            printed.insert(match &args.roots.add_root {
                None => store.dir().full(&path).into_bytes(),
                Some(root) => {
                    let link = root_link(root, number, suffix)?;
                    store.add_permanent_root(&path, &link)?.into_os_string().into_vec()
                }
            });
        }
        if !args.no_output {
            for line in printed {
                out.bytes(&line)?;
                out.bytes(b"\n")?;
            }
        }
    }
    Ok(out.finish()?)
}

/// `ROOT`, `ROOT-2`, `ROOT-man`, `ROOT-2-man`, as an absolute path.
pub(super) fn root_link(root: &OsStr, number: usize, output: Option<&str>) -> Result<PathBuf, Failure> {
    let mut link = absolute(root)?;
    if number > 1 {
        link.extend_from_slice(format!("-{number}").as_bytes());
    }
    if let Some(output) = output {
        link.extend_from_slice(format!("-{output}").as_bytes());
    }
    Ok(PathBuf::from(OsString::from_vec(link)))
}

/// `--query --force-realise`: makes what is asked about valid first.
pub(super) fn force(cx: &Context, settings: &Settings, store: &LocalStore, paths: &[StorePath]) -> Result<(), Failure> {
    let targets = paths.iter().map(|path| {
        let path = path.clone();
        let key = if path.is_derivation() { Key::Derivation(path) } else { Key::Path(path) };
        Target { key, wanted: Wanted::All }
    });
    cx.realiser(store, settings).realise(targets.collect(), How { silent: true, ..How::NORMAL })?;
    Ok(())
}

/// Makes damaged paths anew with what made them.
pub(super) fn repair_paths(
    cx: &Context,
    settings: &Settings,
    common: &Common,
    paths: &[OsString],
) -> Result<(), Failure> {
    let store = open(cx, settings, Access::ReadWrite)?;
    let realiser = cx.realiser(&store, settings);
    for path in store_paths(store.dir(), paths)? {
        realiser.repair(&path, how(cx, common, BuildMode::Repair))?;
    }
    Ok(())
}

pub(super) fn read_logs(cx: &Context, settings: &Settings, paths: &[OsString]) -> Result<(), Failure> {
    let store = open(cx, settings, Access::ReadOnly)?;
    let mut out = Printer::paged(&cx.env, &cx.interrupt);
    for argument in paths {
        print_log(cx, settings, &store, store.layout(), &store_path(store.dir(), argument)?, &mut out)?;
    }
    Ok(out.finish()?)
}

/// Prints the log of a derivation, or of what made an output. What does not lie here is looked for in
/// caches, and where `log-servers` says.
pub(in crate::applets) fn print_log(
    cx: &Context,
    settings: &Settings,
    store: &dyn ReadStore,
    layout: &Layout,
    path: &StorePath,
    out: &mut Printer,
) -> Result<(), Failure> {
    let full = || store.dir().full(path);
    let reporter = || Voice { terminal: Arc::clone(&cx.terminal), interrupt: cx.interrupt.clone() };
    let caches = || caches(&cx.env, settings, store.dir(), &(Arc::new(reporter()) as Arc<_>));
    let caches = Some(()).filter(|()| settings.substitute).map(|()| caches());
    let drv = if path.is_derivation() {
        Some(path.clone())
    } else {
        match (store.info(path)?, &caches) {
            (Some(info), _) => info.deriver,
            (None, Some(caches)) => caches.find(path, None)?.and_then(|found| found.info.info.deriver.clone()),
            (None, None) => None,
        }
    };
    let Some(drv) = drv else { return Err(RealiseOpError::NoLog { path: full() }.into()) };
    let mut log: Box<dyn std::io::Read + '_> = match logs::open(layout, &drv)? {
        Some(log) => Box::new(log),
        None => match remote_log(cx, settings, caches.as_ref(), &drv) {
            Some(log) => log,
            None => return Err(RealiseOpError::NoLog { path: full() }.into()),
        },
    };
    copy_log(&mut *log, &full(), out)
}

fn copy_log(log: &mut dyn std::io::Read, asked: &str, out: &mut Printer) -> Result<(), Failure> {
    let mut block = vec![0; 64 << 10];
    while !out.is_closed() {
        match log.read(&mut block) {
            Ok(0) => break,
            Ok(n) => out.bytes(block.get(..n).unwrap_or_default())?,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(source) => return Err(RealiseOpError::ReadLog { path: asked.to_owned(), source }.into()),
        }
    }
    Ok(())
}

/// The log of a derivation from whoever has it.
fn remote_log(
    cx: &Context,
    settings: &Settings,
    caches: Option<&Caches>,
    drv: &StorePath,
) -> Option<Box<dyn std::io::Read>> {
    for cache in caches.iter().flat_map(|caches| caches.list()).filter_map(Source::cache) {
        match cache.log(drv) {
            Ok(Some(log)) => {
                let url = format!("{}/log/{drv}", cache.uri());
                cx.terminal.message(Level::Info, format_args!("(using build log from {url})"));
                return Some(log);
            }
            Ok(None) => {}
            Err(error) => cx.terminal.message(Level::Warn, format_args!("{}", chain(&error))),
        }
    }
    let client = Client::new(client_options(&cx.env, settings), Arc::clone(&cx.terminal) as Arc<_>);
    for prefix in &settings.log_servers {
        let slash = if prefix.ends_with('/') { "" } else { "/" };
        let url = format!("{prefix}{slash}{drv}");
        match client.open(&url) {
            Ok(log) => {
                cx.terminal.message(Level::Info, format_args!("(using build log from {url})"));
                return Some(log);
            }
            Err(error) => {
                cx.terminal.message(Level::Talkative, format_args!("unable to download '{url}': {}", chain(&error)));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt as _;

    use super::*;

    #[test]
    fn s076_names_of_root_links() {
        for (number, output, expected) in [
            (1, None, "/r/result"),
            (1, Some("man"), "/r/result-man"),
            (2, None, "/r/result-2"),
            (3, Some("dev"), "/r/result-3-dev"),
        ] {
            let link = root_link(OsStr::new("/r/./result"), number, output).unwrap();
            assert_eq!(link.as_os_str().as_bytes(), expected.as_bytes());
        }
    }
}
