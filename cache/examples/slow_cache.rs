//! Serves the files of a folder, each answer after some time, for measurements: `slow_cache FOLDER
//! MILLISECONDS [CLOSURE]`. Prints its URL; for each line on standard input, the number of
//! requests since the last one and the most connections that were open. With `CLOSURE`, a file, it
//! offers whole closures and answers every question after one with that file.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a tool for measurements")]

use std::path::PathBuf;
use std::time::Duration;

use larder_cache::testing::{Answer, Server};

fn main() {
    let mut words = std::env::args().skip(1);
    let folder = PathBuf::from(words.next().unwrap());
    let delay = Duration::from_millis(words.next().unwrap().parse().unwrap());
    let closure = words.next().map(|file| std::fs::read(file).unwrap());
    let info = std::fs::read_to_string(folder.join("nix-cache-info")).unwrap();
    let server = Server::folder(&folder, delay, move |request| {
        let closure = closure.as_ref()?;
        match (request.method.as_str(), request.path.as_str()) {
            ("POST", "/closure") => Some(Answer::File(closure.clone())),
            (_, "/nix-cache-info") => Some(Answer::File(format!("{info}LarderClosure: closure\n").into_bytes())),
            _ => None,
        }
    });
    println!("{}", server.url());
    for _ in std::io::stdin().lines() {
        println!("{} {}", server.take_requests().len(), server.connections().0);
    }
}
