//! The long forms of tests that stand in for bad luck: processes killed and system calls that fail
//! at any moment.

use crate::run::{Failed, cargo, step};

/// Tests that have a long form, by crate and a part of their names.
const LONG_TESTS: &[(&str, &str)] = &[
    ("larder-store-db", "tests::crash"),
    ("larder-store-db", "tests::processes"),
    ("larder", "stress"),
    ("larder", "daemon_soak"),
    ("larder", "crash"),
    ("larder", "garbage_cuts"),
];

/// Rounds of killed builds, as many as the mission asks for.
const KILLS: &str = "200";

/// `soak [SECONDS [PROCESSES]]`, or one subject by its name.
pub(crate) fn run(args: &[String]) -> Result<(), Failed> {
    let word = |n: usize, usual: &'static str| args.get(n).map_or(usual, String::as_str);
    match word(0, "60") {
        "kills" => kills(word(1, KILLS)),
        seconds => {
            for (package, name) in LONG_TESTS {
                step(
                    cargo(&["test", "--package", package, name, "--", "--nocapture", "--test-threads=1"])
                        .env("LARDER_SOAK_S", seconds)
                        .env("LARDER_SOAK_PROCS", word(1, "8")),
                )?;
            }
            Ok(())
        }
    }
}

/// Builds of which something is killed at a random moment, as root and as an ordinary user.
fn kills(rounds: &str) -> Result<(), Failed> {
    let test = ["test", "--package", "larder", "--test", "larder", "build_kills", "--"];
    step(cargo(&test).args(["--nocapture", "--test-threads=1"]).env("LARDER_SOAK_ROUNDS", rounds))
}
