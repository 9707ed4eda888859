//! A launcher that is nothing else, for the tests and examples of this crate.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|word| word == larder_sandbox::launch::LAUNCHER_WORD) {
        larder_sandbox::enter::launcher_main();
    }
    ExitCode::from(2)
}
