//! One binary, many names.

fn main() {}
