//! A launcher that is nothing else, for the tests of this crate.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|word| word == larder_sandbox::launch::LAUNCHER_WORD) {
        larder_sandbox::enter::launcher_main_with(larder_realise::build::builtin::inside);
    }
    ExitCode::from(2)
}
