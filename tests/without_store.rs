//! What `nix-store` does without a store.

use std::os::unix::fs::PermissionsExt as _;

use crate::house::{House, run};

#[test]
fn usage_errors_have_a_hint() {
    let house = House::new();
    house.words("nix-store", "").fails_usage("nix-store", "no operation specified");
    house.words("nix-store", "--gc --delete").fails_usage("nix-store", "only one operation may be specified");
    house.words("larder", "nix-store --gc foo").fails_usage("nix-store", "no arguments expected");
    house.words("nix-store", "--log-format x --init").fails("option 'log-format' has an invalid value 'x'");
}

#[test]
fn settings_are_checked() {
    let house = House::new();
    let with = |text: &str| run(house.applet("nix-hash").env("NIX_CONFIG", text), b"");
    with("cores = 1\nzork=1").fails_usage("nix-hash", "illegal configuration line 'zork=1' in 'NIX_CONFIG'");
    with("cores = x").fails_usage("nix-hash", "setting 'cores' has invalid value 'x'");
    let unknown = with("zork = 1");
    assert_eq!((unknown.status, unknown.stderr.as_str()), (Some(0), "warning: unknown setting 'zork'\n"));
    std::fs::write(house.path().join("etc/nix.conf"), "include nope.conf\n").unwrap();
    let missing =
        format!("file '{0}/etc/nope.conf' included from '{0}/etc/nix.conf' not found", house.path().display());
    with("").fails(&missing);
    // Help is there for those who have to mend a setting.
    assert_eq!(house.words("nix-store", "--help").status, Some(0));
}

#[test]
fn s073_version() {
    let house = House::new();
    let wanted = format!("nix-store (Nix) 2.26.3\nlarder {}\n", env!("CARGO_PKG_VERSION"));
    house.words("nix-store", "--version").prints(&wanted);
    house.words("nix-store", "--zork --version foo").prints(&wanted);
    let long = house.words("nix-store", "--version -v").stdout;
    assert!(long.starts_with(&wanted));
    for (label, value) in
        [("System configuration file", "etc/nix.conf"), ("Store directory", "store"), ("State directory", "var")]
    {
        let line = format!("\n{label}: {}\n", house.path().join(value).display());
        assert!(long.contains(&line), "{line} in {long}");
    }
}

#[test]
fn help() {
    let house = House::new();
    let help = house.words("nix-store", "--gc --help --zork");
    assert_eq!(help.status, Some(0));
    assert!(help.stdout.starts_with("nix-store - "));
    house.words("nix-store", "--gc --delete --help").fails_usage("nix-store", "only one operation may be specified");
}

#[test]
fn fixed_paths() {
    let house = House::new();
    let hash = "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";
    let words = format!("nix-store --store local?store=/nix/store --print-fixed-path sha256 {hash} x");
    let path = house.words("larder", &words);
    path.prints("/nix/store/9zicq1m4wy4bv50xa4l1jk4kpyy41kih-x\n");
    assert!(!house.path().join("var").exists(), "no store is made");
    house
        .words("nix-store", "--print-fixed-path sha256 abc x")
        .fails("hash 'abc' has wrong length for hash algorithm 'sha256'");
    house.words("nix-store", "--print-fixed-path zork abc x").fails_usage("nix-store", "unknown hash algorithm 'zork'");
    house
        .words("nix-store", "--store zork --print-fixed-path sha256 abc x")
        .fails("don't know how to open Nix store 'zork'");
}

#[test]
fn arguments_from_standard_input() {
    let house = House::new();
    let run = house.feed("nix-store", "--print-fixed-path --stdin md5", b"00000000000000000000000000000000\n\tname\n");
    assert_eq!(run.status, Some(0), "{run:?}");
    assert!(run.stdout.ends_with("-name\n"));
}

#[test]
fn keys() {
    let house = House::new();
    house.words("nix-store", "--generate-binary-cache-key k-1 secret public").prints("");
    let read = |name: &str| std::fs::read_to_string(house.work().join(name)).unwrap();
    let mode = |name: &str| std::fs::metadata(house.work().join(name)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode("secret"), mode("public")), (0o600, 0o644));
    assert_eq!((read("secret").len(), read("public").len()), (4 + 88, 4 + 44));
    house
        .words("nix-store", "--generate-binary-cache-key k nowhere/s public")
        .fails("opening file 'nowhere/s': No such file or directory");
    house.words("nix-store", "--generate-binary-cache-key k").fails_usage("nix-store", "three arguments expected");
}

#[test]
fn dump_and_restore() {
    let house = House::new();
    house.write("file", "contents");
    std::fs::create_dir(house.work().join("dir")).unwrap();
    house.write("dir/x", "");
    std::os::unix::fs::symlink("x", house.work().join("dir/link")).unwrap();
    for name in ["file", "dir"] {
        let nar = crate::house::output(house.applet("nix-store").args(["--dump", name]), b"");
        assert!(nar.status.success());
        let copy = format!("{name}-copy");
        run(house.applet("nix-store").args(["--restore", &copy]), &nar.stdout).prints("");
        let again = crate::house::output(house.applet("nix-store").args(["--dump", &copy]), b"");
        assert_eq!(again.stdout, nar.stdout);
        let other = run(house.applet("larder").args(["dump", name, "-o", "archive"]), b"");
        other.prints("");
        assert_eq!(std::fs::read(house.work().join("archive")).unwrap(), nar.stdout);
        run(house.applet("larder").args(["restore", &format!("{name}-third"), "-i", "archive"]), b"").prints("");
    }
    house.words("nix-store", "--dump nope").fails("getting status of 'nope': No such file or directory");
    assert!(!house.path().join("store").exists(), "no store is made");
}
