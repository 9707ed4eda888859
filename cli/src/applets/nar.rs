//! Archives to standard output and from standard input, for `nix-store` and `larder`.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use larder_core::settings::Settings;
use larder_fs::dump::{DumpOptions, StreamError, dump};
use larder_fs::restore::{RestoreOptions, restore_while};
use rustix::fs::CWD;

use crate::exit::Failure;
use crate::interrupt::{Interrupt, Interrupted};
use crate::printer::{Output, PrintError, Printer};

/// Why an archive did not come, or did not get through.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum NarStreamError {
    #[error(transparent)]
    Print(#[from] PrintError),
    #[error("creating file '{}'", path.display())]
    Create { path: PathBuf, source: io::Error },
    #[error("writing to file '{}'", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("opening file '{}'", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("interrupted")]
    Interrupted(#[from] Interrupted),
}

pub(super) fn dump_options(settings: &Settings) -> DumpOptions<'static> {
    DumpOptions { case_hack: settings.use_case_hack, ..DumpOptions::default() }
}

pub(super) fn restore_options(settings: &Settings) -> RestoreOptions<'static> {
    RestoreOptions {
        case_hack: settings.use_case_hack,
        preallocate: settings.preallocate_contents,
        ..RestoreOptions::default()
    }
}

/// Where an archive goes.
enum Sink {
    Stdout(Printer),
    File(PathBuf, File),
}

/// Writes the archive of `path` to a file, or to standard output.
pub(super) fn dump_to(
    path: &OsStr,
    options: &DumpOptions<'_>,
    file: Option<&Path>,
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    // A file is made once there is something to put into it, so that a mistake in `path` makes none.
    let mut sink: Option<Sink> = None;
    let result = dump(CWD, path, options, |piece| -> Result<(), NarStreamError> {
        interrupt.check()?;
        let open = || match file {
            None => Ok(Sink::Stdout(Printer::new(Output::Stream))),
            Some(path) => File::create(path)
                .map(|file| Sink::File(path.to_owned(), file))
                .map_err(|source| NarStreamError::Create { path: path.to_owned(), source }),
        };
        if sink.is_none() {
            sink = Some(open()?);
        }
        match sink.as_mut() {
            Some(Sink::Stdout(out)) => out.bytes(piece)?,
            Some(Sink::File(path, file)) => {
                file.write_all(piece).map_err(|source| NarStreamError::Write { path: path.clone(), source })?;
            }
            None => {}
        }
        Ok(())
    });
    match result {
        Ok(_) => {}
        Err(StreamError::Dump(error)) => return Err(error.into()),
        Err(StreamError::Sink(error)) => return Err(error.into()),
    }
    if let Some(Sink::Stdout(out)) = sink {
        out.finish()?;
    }
    Ok(())
}

/// Makes `path` from an archive in a file, or on standard input. What follows the archive is left.
pub(super) fn restore_from(
    path: &OsStr,
    options: RestoreOptions<'_>,
    file: Option<&Path>,
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    let stdin = io::stdin();
    let file = match file {
        None => None,
        Some(path) => Some(File::open(path).map_err(|source| NarStreamError::Open { path: path.to_owned(), source })?),
    };
    let input = file.as_ref().map_or_else(|| stdin.as_fd(), File::as_fd);
    restore_while(input, CWD, path, options, || Ok::<(), Failure>(interrupt.check()?))?;
    Ok(())
}
