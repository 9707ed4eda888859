//! `larder`: the same store for people, with words instead of flags and JSON where output is data.

mod asking;
mod build;
mod changing;
mod check;
mod copy;
mod derivation;
mod doctor;
mod garbage;
mod links;
mod push;
mod serve;

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

use clap::{ArgAction, Args, CommandFactory as _, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use larder_core::report::Level;

use super::nar::{dump_options, dump_to, restore_from, restore_options};
use super::{Context, print};
use crate::args::{Common, LogFormat, Override, OverrideFrom};
use crate::exit::{Failure, Status};
use crate::printer::{Output, Printer};

/// The Nix store, written anew
#[derive(Debug, Parser)]
#[command(
    name = "larder",
    version,
    disable_help_subcommand = true,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "`larder nix-store ...`, `larder daemon` and so on are those of Nix; `larder links DIR` makes links."
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "For all commands")]
pub struct Global {
    /// Store to open
    #[arg(
        long,
        global = true,
        value_name = "URI",
        help = "Store to open: auto, local, /DIR, local?root=DIR, daemon, unix://SOCKET, ssh-ng://HOST, ssh://HOST"
    )]
    pub store: Option<String>,
    /// Set a setting, as in nix.conf
    #[arg(long, global = true, num_args = 2, value_names = ["NAME", "VALUE"], action = ArgAction::Append)]
    pub option: Vec<String>,
    /// Say more (repeatable)
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// Say less (repeatable)
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub quiet: u8,
    /// Write messages as raw text or as JSON
    #[arg(long, global = true, value_name = "FORMAT", value_parser = log_format, hide = true)]
    pub log_format: Option<LogFormat>,
}

fn log_format(text: &str) -> Result<LogFormat, crate::args::LogFormatError> {
    text.parse()
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Build derivations and print what they made
    Build(Build),
    /// Print the log of a build
    Log(Log),
    /// Write derivations without an evaluator, and read them
    #[command(subcommand)]
    Derivation(DerivationCommand),
    /// Copy files or trees into the store and print their paths
    Add(Add),
    /// Copy paths with all they need from one store to another
    Copy(copy::Copy),
    /// Tell what the store knows of paths
    PathInfo(PathInfo),
    /// List everything that paths need
    Closure(Closure),
    /// Write the NAR of a file or tree
    Dump(Dump),
    /// Unpack a NAR
    Restore(Restore),
    /// Check the database, and the contents of paths
    Verify(Verify),
    /// Look after the database
    Db(check::Db),
    /// Check the installation, and tell what mends it
    Doctor(doctor::Doctor),
    /// Tell what takes the space: the size of closures, and what only they need
    Du(Du),
    /// Delete what nothing needs, after telling what that is
    Gc(garbage::Gc),
    /// Tell which roots keep a path, and how
    Why(garbage::Why),
    /// List the roots: what must not be deleted
    Roots(garbage::Roots),
    /// Copy paths, and all they need, to a binary cache
    Push(push::Push),
    /// Be a binary cache: serve this store over HTTP
    Serve(serve::Serve),
    /// Link equal files, which saves space
    Optimise(garbage::Optimise),
    /// Make links by the names of the commands of Nix
    Links(Links),
    /// Serve the store to other users (the same as nix-daemon)
    #[command(disable_help_flag = true, hide = true)]
    Daemon(Daemon),
    /// Take over the store of a Nix installation, from its own records
    Adopt(Adopt),
    /// Print a script that completes words in a shell
    Completions(Completions),
    /// Print the manual page, or write all pages
    #[command(hide = true)]
    Man(Man),
}

#[derive(Debug, Args)]
pub struct Daemon {
    /// Words for nix-daemon
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "WORD")]
    pub words: Vec<OsString>,
}

#[derive(Debug, Args)]
pub struct Json {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag that was given or not")]
pub struct Build {
    /// JSON files with derivations, or paths in the store: DRV, DRV^OUTPUT,...
    #[arg(required = true, value_name = "TARGET")]
    pub targets: Vec<OsString>,
    /// Builds at once, or auto for one a processor
    #[arg(short, long, value_name = "N")]
    pub jobs: Option<String>,
    /// Go on with what does not need a failed build
    #[arg(short, long)]
    pub keep_going: bool,
    /// Keep the directories of failed builds
    #[arg(short = 'K', long)]
    pub keep_failed: bool,
    /// Build once more, and compare
    #[arg(long, conflicts_with = "repair")]
    pub check: bool,
    /// Make damaged outputs anew
    #[arg(long)]
    pub repair: bool,
    /// Only tell what would be built
    #[arg(long)]
    pub dry_run: bool,
    /// Do not show what builders write
    #[arg(short = 'Q', long)]
    pub no_output: bool,
    /// Let builders see this path of the machine (repeatable): PATH or INSIDE=PATH
    #[arg(long = "sandbox-path", value_name = "PATH")]
    pub sandbox_paths: Vec<String>,
    /// Let builders see the programs of the machine: /bin, /lib, /usr, ...
    #[arg(long)]
    pub host_tools: bool,
    /// Also make this link, which keeps the output from being collected
    #[arg(long, value_name = "LINK")]
    pub root: Option<PathBuf>,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct Log {
    /// Derivations, or what they made
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum DerivationCommand {
    /// Take derivations from JSON files into the store, and print their paths
    Add(DerivationAdd),
    /// Print derivations as JSON
    Show(DerivationShow),
}

#[derive(Debug, Args)]
pub struct DerivationAdd {
    /// JSON files; - is standard input
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub struct DerivationShow {
    /// Derivations, or what they made
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Also all derivations they need
    #[arg(short, long)]
    pub recursive: bool,
}

#[derive(Debug, Args)]
pub struct Add {
    /// Files and directories to copy
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Name in the store, instead of the last part of FILE
    #[arg(long)]
    pub name: Option<String>,
    /// What is hashed: the NAR, or the contents of a file
    #[arg(long, value_enum, default_value_t)]
    pub mode: AddMode,
    /// Hash algorithm: md5, sha1, sha256 or sha512
    #[arg(long, value_name = "ALGO", default_value = "sha256")]
    pub hash: String,
    /// Also make this link, which keeps the path from being collected
    #[arg(long, value_name = "LINK")]
    pub root: Option<PathBuf>,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum AddMode {
    #[default]
    Nar,
    Flat,
}

#[derive(Debug, Args)]
pub struct PathInfo {
    /// Paths in the store, or links to them
    #[arg(required_unless_present = "all", value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Every valid path
    #[arg(long, conflicts_with = "paths")]
    pub all: bool,
    /// Also everything they need
    #[arg(short, long)]
    pub recursive: bool,
    /// Also the size of the closure
    #[arg(short = 'S', long)]
    pub closure_size: bool,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct Closure {
    /// Paths in the store, or links to them
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// How to print it
    #[arg(short, long, value_enum, default_value_t)]
    pub format: ClosureFormat,
    /// What needs the paths, instead of what they need
    #[arg(long)]
    pub referrers: bool,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ClosureFormat {
    /// One path a line, dependencies first
    #[default]
    List,
    Tree,
    /// For Graphviz
    Dot,
    Graphml,
}

#[derive(Debug, Args)]
pub struct Dump {
    /// File or directory to dump
    pub path: PathBuf,
    /// File to write, instead of standard output
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Restore {
    /// What to make; must not exist
    pub path: PathBuf,
    /// File to read, instead of standard input
    #[arg(short, long, value_name = "FILE")]
    pub input: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag that was given or not")]
pub struct Verify {
    /// Paths to check; all if there are none
    #[arg(value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Check the database, and that all paths are there (the default)
    #[arg(long, conflicts_with_all = ["contents", "resume", "paths"])]
    pub quick: bool,
    /// Also read and hash the contents
    #[arg(short, long, visible_alias = "full")]
    pub contents: bool,
    /// Go on where a check of the contents was stopped
    #[arg(long, conflicts_with = "paths")]
    pub resume: bool,
    /// Mend what is found
    #[arg(long)]
    pub repair: bool,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct Du {
    /// Paths to measure; all roots if there are none
    #[arg(value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Print only the N largest
    #[arg(short = 'n', long, value_name = "N")]
    pub largest: Option<usize>,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct Links {
    /// Directory for the links; made if missing
    pub dir: PathBuf,
    /// Replace what is there by these names
    #[arg(short, long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct Adopt {
    /// Records to read, as written by `nix-store --dump-db`, instead of the ledger of real Nix
    #[arg(long, value_name = "FILE")]
    pub from: Option<PathBuf>,
    /// Only tell what would be done
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct Completions {
    /// Shell to complete in
    pub shell: Shell,
}

#[derive(Debug, Args)]
pub struct Man {
    /// Write larder.1 and a page for each command into this directory
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// Why one of the commands here failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LarderError {
    #[error("cannot write manual pages to '{}'", dir.display())]
    Man { dir: PathBuf, source: io::Error },
    #[error("cannot write the manual page")]
    ManPage(#[source] io::Error),
}

impl Global {
    /// The settings that the flags stand for.
    fn overrides(&self) -> Vec<Override> {
        let options = self.option.chunks_exact(2).filter_map(|pair| match pair {
            [name, value] => Some(Override { name: name.clone(), value: value.clone(), from: OverrideFrom::Option }),
            _ => None,
        });
        let store = self.store.iter().map(|uri| Override {
            name: "store".to_owned(),
            value: uri.clone(),
            from: OverrideFrom::Flag,
        });
        options.chain(store).collect()
    }

    /// The last level that is shown.
    fn verbosity(&self) -> Level {
        const LEVELS: [Level; 8] = [
            Level::Error,
            Level::Warn,
            Level::Notice,
            Level::Info,
            Level::Talkative,
            Level::Chatty,
            Level::Debug,
            Level::Vomit,
        ];
        let at = (3 + usize::from(self.verbose)).saturating_sub(usize::from(self.quiet));
        LEVELS.get(at).copied().unwrap_or(Level::Vomit)
    }
}

/// Runs `larder`.
pub(super) fn run(cx: &Context, words: Vec<OsString>) -> Result<Status, Failure> {
    let words = std::iter::once(OsString::from("larder")).chain(words);
    let cli = match Cli::try_parse_from(words) {
        Ok(cli) => cli,
        Err(error) => {
            // Prints help and version to standard output, all else to standard error.
            drop(error.print());
            return Ok(if error.use_stderr() { Status::FAILURE } else { Status::SUCCESS });
        }
    };
    if let Command::Daemon(args) = cli.command {
        return super::nix_daemon::run(cx, args.words);
    }
    cx.terminal.set_verbosity(cli.global.verbosity());
    cx.terminal.set_format(cli.global.log_format.unwrap_or_default());
    let mut overrides = cli.global.overrides();
    if let Command::Build(args) = &cli.command {
        overrides.extend(args.overrides());
    }
    let settings = cx.settings(&overrides)?;
    let mut common = Common::of(cli.global.verbosity(), overrides);
    common.no_build_output = matches!(&cli.command, Command::Build(Build { no_output: true, .. }));
    match cli.command {
        Command::Build(args) => build::build(cx, &settings, &common, &args)?,
        Command::Log(args) => build::log(cx, &settings, &common, &args)?,
        Command::Derivation(DerivationCommand::Add(args)) => derivation::add(cx, &settings, &common, &args)?,
        Command::Derivation(DerivationCommand::Show(args)) => derivation::show(cx, &settings, &common, &args)?,
        Command::Links(links) => {
            let made = links::make(&links.dir, links.force)?;
            let mut out = Printer::new(Output::Listing);
            for (link, target) in made {
                out.line(format_args!("{} -> {}", link.display(), target.display()))?;
            }
            out.finish()?;
        }
        Command::Completions(completions) => {
            let mut text = Vec::new();
            clap_complete::generate(completions.shell, &mut Cli::command(), "larder", &mut text);
            let mut out = Printer::new(Output::Listing);
            out.bytes(&text)?;
            out.finish()?;
        }
        Command::Man(man) => write_man(&man)?,
        Command::Dump(args) => {
            dump_to(args.path.as_os_str(), &dump_options(&settings), args.output.as_deref(), &cx.interrupt)?;
        }
        Command::Restore(args) => {
            restore_from(args.path.as_os_str(), restore_options(&settings), args.input.as_deref(), &cx.interrupt)?;
        }
        Command::Add(args) => changing::add(cx, &settings, &common, &args)?,
        Command::Copy(args) => copy::run(cx, &settings, &common, &args)?,
        Command::PathInfo(args) => asking::path_info(cx, &settings, &common, &args)?,
        Command::Closure(args) => asking::print_closure(cx, &settings, &common, &args)?,
        Command::Du(args) => asking::disk_usage(cx, &settings, &common, &args)?,
        Command::Verify(args) => return changing::verify(cx, &settings, &common, &args),
        Command::Adopt(args) => changing::adopt(cx, &settings, &args)?,
        Command::Daemon(_) => {}
        Command::Db(args) => check::db(cx, &settings, &args)?,
        Command::Doctor(args) => return doctor::doctor(cx, &settings, &args),
        Command::Gc(args) => return garbage::collect(cx, &settings, &common, &args),
        Command::Why(args) => return garbage::why(cx, &settings, &common, &args),
        Command::Roots(args) => return garbage::roots(cx, &settings, &common, &args),
        Command::Push(args) => push::push(cx, &settings, &common, &args)?,
        Command::Serve(args) => serve::serve(cx, &settings, &args)?,
        Command::Optimise(args) => return garbage::optimise(cx, &settings, &common, &args),
    }
    Ok(Status::SUCCESS)
}

fn write_man(man: &Man) -> Result<(), Failure> {
    let command = Cli::command();
    if let Some(dir) = &man.dir {
        let failed = |source| LarderError::Man { dir: dir.clone(), source };
        std::fs::create_dir_all(dir).map_err(failed)?;
        clap_mangen::generate_to(command, dir).map_err(failed)?;
    } else {
        let mut text = Vec::new();
        clap_mangen::Man::new(command).render(&mut text).map_err(LarderError::ManPage)?;
        print(&String::from_utf8_lossy(&text))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::applets::APPLETS;

    #[test]
    fn definitions_are_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_help_fits_a_screen() {
        let mut command = Cli::command().term_width(80);
        command.build();
        let mut texts = vec![("larder".to_owned(), command.render_help())];
        for sub in command.get_subcommands_mut() {
            texts.push((sub.get_name().to_owned(), sub.render_help()));
        }
        for (name, text) in texts {
            let text = text.to_string();
            assert!(text.lines().count() <= 48, "{name} has {} lines", text.lines().count());
            assert!(APPLETS.iter().all(|applet| name != applet.name), "{name} is an applet already");
            for line in text.lines() {
                assert!(line.chars().count() <= 100, "{name}: {line}");
            }
        }
    }

    #[test]
    fn words() {
        let cli = Cli::try_parse_from(["larder", "-vv", "path-info", "--all", "--option", "cores", "2", "--json"]);
        let cli = cli.unwrap();
        assert_eq!(cli.global.option, ["cores", "2"]);
        assert_eq!(cli.global.verbosity(), Level::Chatty);
        assert!(matches!(cli.command, Command::PathInfo(PathInfo { all: true, json: Json { json: true }, .. })));
        for words in [&["larder"][..], &["larder", "path-info"], &["larder", "add"], &["larder", "zork"]] {
            Cli::try_parse_from(words).unwrap_err();
        }
    }
}
