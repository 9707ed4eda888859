//! Exit codes, signals, pipes: the binary as a process.

use std::io::Read as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::house::{House, run, spawn};

#[test]
fn a_reader_that_leaves_early() {
    let house = House::new();
    let file = house.write("big", vec![b'x'; 4 << 20]);
    // A NAR that was cut short is an error ...
    let mut child = spawn(house.applet("nix-store").arg("--dump").arg(&file));
    let mut some = [0; 100];
    child.stdout.take().unwrap().read_exact(&mut some).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "error: writing to file: Broken pipe\n");
    // ... a listing is not.
    let hash = "d41d8cd98f00b204e9800998ecf8427e";
    let mut child = spawn(house.applet("nix-hash").arg("--to-base32").args(vec![hash; 20_000]));
    child.stdout.take().unwrap().read_exact(&mut some).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0));
}

#[test]
fn a_full_disk_is_told() {
    let house = House::new();
    house.write("f", "x");
    for words in [&["nix-store", "--dump", "f"][..], &["nix-hash", "f"], &["nix-store", "--version"]] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut command = house.applet("larder");
        let child = command.args(words).stdin(Stdio::null()).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "error: writing to file: No space left on device\n");
        assert_eq!(output.status.code(), Some(1), "{words:?}");
    }
}

#[test]
fn signals_end_it_with_a_word() {
    let house = House::new();
    // One that works, and one that waits for its input.
    for words in [&["nix-hash", "--flat", "/dev/zero"][..], &["nix-store", "--restore", "x"]] {
        for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
            let mut command = house.applet("larder");
            command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = command.spawn().unwrap();
            let _open_stdin = child.stdin.take();
            // Time to start.
            std::thread::sleep(Duration::from_millis(150));
            let since = Instant::now();
            kill_process(Pid::from_child(&child), signal).unwrap();
            let output = child.wait_with_output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stderr), "error: interrupted by the user\n", "{words:?}");
            assert_eq!(output.status.code(), Some(1));
            assert!(since.elapsed() < Duration::from_secs(5));
        }
    }
}

#[test]
fn json_log() {
    let house = House::new();
    let run = run(house.applet("nix-store").args(["--log-format", "internal-json", "-q", "--zork"]), b"");
    // Byte for byte what 2.8.0 writes, but for the colour of the flag.
    let wanted = concat!(
        r#"@nix {"action":"msg","column":null,"file":null,"level":0,"line":null,"#,
        r#""msg":"\u001b[31;1merror:\u001b[0m unknown flag '--zork'","raw_msg":"unknown flag '--zork'"}"#,
        "\n",
        r#"@nix {"action":"msg","level":0,"msg":"Try 'nix-store --help' for more information."}"#,
        "\n",
    );
    assert_eq!((run.stderr.as_str(), run.status), (wanted, Some(1)));
}
