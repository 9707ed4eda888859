//! One binary, many names.

fn main() -> std::process::ExitCode {
    larder::main(std::env::args_os())
}
