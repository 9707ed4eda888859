//! One binary, many names.

fn main() -> std::process::ExitCode {
    // Before there is anything that a launcher of builders must not have, such as a second thread.
    if std::env::args_os().nth(1).is_some_and(|word| word == larder_sandbox::launch::LAUNCHER_WORD) {
        larder_sandbox::enter::launcher_main();
    }
    larder::main(std::env::args_os())
}
