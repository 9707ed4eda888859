//! `cargo xtask`: the project's own chores, with nothing but the standard library.

mod bench;
mod interop;
mod packages;
mod run;
mod soak;

use std::process::ExitCode;

use run::{Failed, cargo, step};

const HELP: &str = "\
cargo xtask ci                       format check, clippy, tests, docs: the gate
cargo xtask bench [FILTER...]        whole processes against real Nix, ratios in one run;
                                     `memory`: what streams, with a file of 6 GiB (minutes);
                                     `cache serve`: binary caches (minutes, 4 GiB of /dev/shm)
cargo xtask interop [TREE...]        differential run against real Nix (default: five real trees)
cargo xtask packages [NAME...]       sources of Debian, built in the sandbox, and again the same
cargo xtask fuzz [SECONDS [TARGET]]  every fuzz target, or one, for so long each (default 60)
cargo xtask soak [SECONDS [PROCESSES]]  the long forms of the stress and crash tests (default 60, 8)
cargo xtask soak kills [ROUNDS]      builds killed at random moments, by root and by a user (default 200)
`LARDER_PROGRAM` names a program to measure that is built already.
";

/// The fuzz targets: the files of `fuzz/fuzz_targets`.
fn fuzz_targets() -> Result<Vec<String>, Failed> {
    let folder = run::root().join("fuzz/fuzz_targets");
    let entries = std::fs::read_dir(&folder).map_err(|e| Failed(format!("{}: {e}", folder.display())))?;
    let mut names: Vec<String> =
        entries.filter_map(|entry| Some(entry.ok()?.path().file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    Ok(names)
}

fn fuzz(args: &[String]) -> Result<(), Failed> {
    let seconds = args.first().map_or("60", String::as_str);
    for target in fuzz_targets()? {
        if args.get(1).is_some_and(|only| *only != target) {
            continue;
        }
        let limit = format!("-max_total_time={seconds}");
        // Without a sanitizer a stable toolchain is enough and coverage feedback stays; the code
        // under test has no `unsafe`.
        step(
            cargo(&["fuzz", "run", "--sanitizer", "none", "--fuzz-dir", "fuzz", "--features", "libfuzzer"])
                .args([&target, "--", &limit, "-rss_limit_mb=2048", "-timeout=10", "-print_final_stats=1"])
                .env("RUSTC_BOOTSTRAP", "1")
                // The whole program as one unit, as the release is built, takes minutes for each
                // target and finds nothing more.
                .env("CARGO_PROFILE_RELEASE_LTO", "off")
                .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16"),
        )?;
    }
    Ok(())
}

fn ci() -> Result<(), Failed> {
    step(&mut cargo(&["fmt", "--all", "--check"]))?;
    step(&mut cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    step(&mut cargo(&["test", "--workspace"]))?;
    step(cargo(&["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let rest = args.get(1..).unwrap_or_default();
    let done = match args.first().map(String::as_str) {
        Some("ci") => ci(),
        Some("bench") => bench::run(rest),
        Some("interop") => interop::run(rest),
        Some("fuzz") => fuzz(rest),
        Some("packages") => packages::run(rest),
        Some("soak") => soak::run(rest),
        None | Some("help" | "--help" | "-h") => {
            run::say(HELP.trim_end());
            Ok(())
        }
        Some(other) => Err(Failed(format!("no chore is named '{other}'\n{HELP}"))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failed(why)) => {
            run::complain(&why);
            ExitCode::FAILURE
        }
    }
}
