//! The same words for Larder and for a real Nix: what they say must be the same.
//!
//! Runs where a `nix-store` is installed, and says so where not. The version matters little: what
//! is compared here has been the same from 2.8 to 2.26, but for the words in `same_words`.

mod adopt;
mod building;
mod caches;
mod floating;
mod store;

use std::process::Command;

use crate::house::{House, Run, run};

/// Words of `nix-store`, one call a line; the first has none.
const USAGE_ERRORS: &str = "
--zork
foo --bar
-
--
-h
--upgrade
--gc --delete
-r -q
--version foo --gc
--gc --delete --help
--zork --gc
--gc foo --zork
--gc --max-links 3
--gc foo
--gc --max-freed 1X
--gc --max-freed -ab
--gc --max-freed K
--gc --max-freed --
--gc --max-freed 9223372036854775808
--max-freed
--add-root
-r --add-root
--add-root --init
-q --zork /x
-q -z
-q --size --hash /x
-q --outputs --hash
-q --binding
-q -b --zork
-q --hash --binding
--init foo
--init -
--init --zork foo
--init -- --zork
--init -- -v
--init --max-freed 3
--keep-outputs true --init
--dump
--dump a b
--dump --zork a
--dump -- --foo
--restore
--restore --zork x
--print-fixed-path
--print-fixed-path a b c
--print-fixed-path r:sha256 b c
--print-fixed-path --zork
--generate-binary-cache-key
--generate-binary-cache-key --zork a b c
--add --recursive x
--add-fixed
--add-fixed zork x
--add-fixed --zork
--read-log --zork foo
--print-env
--print-env a b
--print-env --zork x
--verify x --zork
--verify --zork
--verify-path --zork foo
--repair-path --zork foo
--optimise x
--optimise --zork
--delete foo --zork
--delete --max-freed 3
--dump-db --zork foo
--load-db foo
--load-db --zork foo
--register-validity foo
--register-validity --zork foo
--check-validity --zork
--serve --write foo
--serve --zork foo
--export --sign x
--import foo
--import --zork foo
-r --zork
--option
--option a
-j
-jx
-jauto
-j1K
-j -4
--max-jobs --init
--cores x --init
--cores 1KK
--cores -1
--cores 5000000000
--log-format
--log-format zork --init
--store
--timeout x
--http-connections
--extra-substituters
--substituters --init
-vv5 --init
-q-z
--verbose=3 --init
-4j --init
--no-zork --init
--option x y
--http-connections x --init
--option cores x
--min-free 99999999999999999999999 --init
";

/// Words of `nix-store` that need no store.
const STORELESS: &str = "\
--print-fixed-path sha256 0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73 x
--print-fixed-path --recursive sha256 0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73 x-1.2
--print-fixed-path sha256 sha1:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73 x
--print-fixed-path sha256 abc x
--dump f
--dump d
--dump ./d/
--dump d/l
";

/// Words of `nix-hash`; the first call has none.
const HASHES: &str = "
d
--flat f
d f d/l ./d/ d/e
nope
f nope d
f f f f nope d
--flat nope
--flat d/l
--type zork f
--type
--type SHA1 f
--type=sha1 f
--zork f
f --zork
--base32 --type sha256 f
--type sha512 --truncate d
--type sha1 --truncate --base32 f
--type md5 --type sha1 f
-v f
-12
-v12
-v-12
-qf f
-
-- f
--flat -- --x
d/f/
--to-base16
--to-base16 xyz
--to-base16 --type sha1 143xibwh31h9bvxzalr0sjvbbvpa6ffs zz
--to-base32 --type sha1 143xibwh31h9bvxzalr0sjvbbvpa6ffs
--to-base16 --to-base32 --type sha1 143xibwh31h9bvxzalr0sjvbbvpa6ffs
--to-base16 --type sha256 sha1:143xibwh31h9bvxzalr0sjvbbvpa6ffs
--to-base16 sha1:143xibwh31h9bvxzalr0sjvbbvpa6ffs
--option cores x f
--option zork x f
--cores 3 --log-format raw f
--store zork f
";

/// Is there a real Nix?
pub fn has_nix() -> bool {
    let found = Command::new("nix-store").arg("--version").output();
    let found = found.is_ok_and(|output| {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.starts_with("nix-store (Nix)") && !text.contains("larder")
    });
    if !found {
        println!("skipped: there is no nix-store here");
    }
    found
}

/// Texts that 2.26 changed, and that Larder takes from there.
fn same_words(mut run: Run) -> Run {
    run.stderr = run.stderr.replace("for hash type '", "for hash algorithm '");
    run
}

fn compare(house: &House, applet: &str, words: &str) {
    let split = || words.split(' ').filter(|word| !word.is_empty());
    let real = same_words(run(house.command(applet).args(split()), b""));
    let ours = house.run(applet, split());
    assert_eq!(ours, real, "{applet} {words}");
}

#[test]
fn usage_errors() {
    if !has_nix() {
        return;
    }
    let house = House::new();
    println!("usage errors: {} cases", USAGE_ERRORS.lines().count());
    for words in USAGE_ERRORS.lines() {
        compare(&house, "nix-store", words);
    }
}

#[test]
fn without_a_store() {
    if !has_nix() {
        return;
    }
    let house = House::new();
    house.write("f", "x\n");
    std::fs::create_dir_all(house.work().join("d/e")).unwrap();
    std::os::unix::fs::symlink("nowhere", house.work().join("d/l")).unwrap();
    for words in STORELESS.lines() {
        compare(&house, "nix-store", words);
    }
    // Nix begins an archive before it looks at the file; we do not.
    let nope = house.words("nix-store", "--dump nope");
    let real = run(house.command("nix-store").args(["--dump", "nope"]), b"");
    assert_eq!((nope.stderr, nope.status), (real.stderr, real.status));
    for words in HASHES.lines() {
        compare(&house, "nix-hash", words);
    }
}
