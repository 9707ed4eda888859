//! One binary, many names.

fn main() -> std::process::ExitCode {
    let mut words = std::env::args_os().skip(1);
    // Before anything else: a launcher must be alone in its process.
    if words.next().is_some_and(|word| word == larder_sandbox::launch::LAUNCHER_WORD) {
        larder_sandbox::enter::launcher_main();
    }
    larder::main(std::env::args_os())
}
