//! `nix-hash`.

use crate::house::House;

#[test]
fn hashes_of_files() {
    let house = House::new();
    house.write("f", "x\n");
    house.words("nix-hash", "").prints("");
    house.words("nix-hash", "--flat f").prints("401b30e3b8b5d629635a5c613cdb7919\n");
    house.words("nix-hash", "f").prints("396e3255ec1e760c9cd52b22fc4d7afa\n");
    house.words("nix-hash", "--truncate --type sha256 f").prints("efeeb4f135b5667c1a1b2cb594ae3f5cf9d27f6e\n");
    house
        .words("nix-hash", "--type sha256 --base32 f")
        .prints("0hkbia1003qqh0r7fn03drzx5yaw7yp99xs7j6c7qsddnp1w7dpc\n");
    house.words("larder", "nix-hash --sri --flat f").prints("md5-QBsw47i11iljWlxhPNt5GQ==\n");
}

#[test]
fn conversions() {
    let house = House::new();
    let (hex, base32) = ("da39a3ee5e6b4b0d3255bfef95601890afd80709", "143xibwh31h9bvxzalr0sjvbbvpa6ffs");
    house.words("nix-hash", &format!("--type sha1 --to-base16 {base32}")).prints(&format!("{hex}\n"));
    house
        .words("nix-hash", &format!("--type sha1 --to-base32 {hex} {base32}"))
        .prints(&format!("{base32}\n{base32}\n"));
    house.words("nix-hash", &format!("--to-sri --type sha1 {hex}")).prints("sha1-2jmj7l5rSw0yVb/vlWAYkK/YBwk=\n");
    let partly = house.words("nix-hash", &format!("--to-base16 --type sha1 {base32} zz"));
    assert_eq!(partly.stdout, format!("{hex}\n"));
    assert_eq!(partly.stderr, "error: hash 'zz' has wrong length for hash algorithm 'sha1'\n");
    assert_eq!(partly.status, Some(1));
}

#[test]
fn the_first_error_ends_the_list() {
    let house = House::new();
    house.write("f", "x\n");
    for count in [1, 3, 700] {
        let words = format!("{} nope f", "f ".repeat(count));
        let run = house.words("nix-hash", &words);
        assert_eq!(run.stdout, "396e3255ec1e760c9cd52b22fc4d7afa\n".repeat(count));
        assert_eq!(run.stderr, "error: getting status of 'nope': No such file or directory\n");
        assert_eq!(run.status, Some(1));
    }
    house.words("nix-hash", "--flat nope").fails("opening file 'nope': No such file or directory");
    house.words("nix-hash", "--flat .").fails("reading from file '.': Is a directory");
    house.words("nix-hash", "--zork").fails_usage("nix-hash", "unrecognised flag '--zork'");
}
