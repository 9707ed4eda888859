//! Derivations against the Nix that is installed, if one is.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "tests may panic and tell")]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::{Command, Output};

use larder_core::arb;
use larder_core::derivation::check::{CheckError, check};
use larder_core::derivation::modulo::{Mask, Memo, ModuloError, output_paths};
use larder_core::derivation::options::print_env;
use larder_core::derivation::{Derivation, DerivationError, Kind, json, name_of, parse};
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;

/// A store of its own in a temporary folder.
struct House {
    root: tempfile::TempDir,
    dir: StoreDir,
}

impl House {
    /// `None`, with a word about it, where no Nix is installed.
    fn new() -> Option<Self> {
        match Command::new("nix-instantiate").arg("--version").output() {
            Ok(version) => print!("with {}", String::from_utf8_lossy(&version.stdout)),
            Err(e) => {
                println!("skipped: no nix-instantiate here ({e})");
                return None;
            }
        }
        let root = tempfile::tempdir().unwrap();
        let canonical = fs::canonicalize(root.path()).unwrap();
        let dir = StoreDir::new(canonical.join("store").to_str().unwrap()).unwrap();
        fs::create_dir(canonical.join("etc")).unwrap();
        let conf = "experimental-features = nix-command ca-derivations impure-derivations\n";
        fs::write(canonical.join("etc/nix.conf"), conf).unwrap();
        Some(Self { root, dir })
    }

    fn path(&self, below: &str) -> PathBuf {
        fs::canonicalize(self.root.path()).unwrap().join(below)
    }

    fn run(&self, program: &str, args: &[impl AsRef<OsStr>]) -> Output {
        // A derivation that makes 2.8 loop must not take the machine with it.
        let mut command = Command::new("timeout");
        command.args(["60", program]).args(args).env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        for (name, below) in [
            ("NIX_STORE_DIR", "store"),
            ("NIX_STATE_DIR", "var"),
            ("NIX_LOG_DIR", "log"),
            ("NIX_CONF_DIR", "etc"),
            ("HOME", "home"),
            ("TMPDIR", ""),
        ] {
            command.env(name, self.path(below));
        }
        command.output().unwrap()
    }

    fn read(&self, path: &StorePath) -> io::Result<Derivation> {
        let text = fs::read(self.dir.full(path))?;
        parse(&self.dir, &name_of(path).map_err(io::Error::other)?, &text).map_err(io::Error::other)
    }

    /// Every derivation in the store.
    fn derivations(&self) -> BTreeMap<StorePath, Vec<u8>> {
        let entries = fs::read_dir(self.path("store")).unwrap().map(|entry| entry.unwrap());
        entries
            .filter_map(|entry| {
                let path = StorePath::from_base_name(entry.file_name().as_encoded_bytes()).ok()?;
                path.is_derivation().then(|| (path, fs::read(entry.path()).unwrap()))
            })
            .collect()
    }

    fn masked(&self, drv: &Derivation) -> Result<larder_core::derivation::modulo::Modulo, ModuloError<io::Error>> {
        Memo::new().modulo(&self.dir, drv, Mask::On, |path| self.read(path))
    }
}

/// Strings of all sorts, outputs of all kinds, inputs of all kinds.
const EXPRESSION: &str = r#"
let
  base = { system = "x86_64-linux"; builder = "/bin/sh"; };
  drv = attrs: derivation (base // attrs);
  fixed = drv { name = "f.tar.gz"; outputHashAlgo = "sha256"; outputHashMode = "flat";
    outputHash = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"; };
  fixed2 = drv { name = "f.tar.gz"; args = [ "otherwise" ]; outputHashAlgo = "sha256"; outputHashMode = "flat";
    outputHash = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"; };
  tree = drv { name = "tree"; outputHashAlgo = "sha1"; outputHashMode = "recursive"; inherit fixed;
    outputHash = "da39a3ee5e6b4b0d3255bfef95601890afd80709"; };
  multi = drv { name = "multi-1.0"; outputs = [ "out" "dev" "doc" ]; src = fixed; };
  odd = drv { name = "odd"; args = [ "\"\\\n\r\t'$`" "zażółć" "" ]; "weird \"key\"" = "x"; n = 1; t = true; l = [ 1 "a" ]; };
  text = builtins.toFile "text" "see ${builtins.toFile "other" "x"}";
  top = drv { name = "top"; inherit multi odd fixed fixed2 tree text; dev = multi.dev; };
  chain = builtins.foldl' (below: n: drv { name = "chain-${toString n}"; inherit below; }) top (builtins.genList (n: n) 50);
  structured = drv { name = "structured"; __structuredAttrs = true; outputs = [ "out" "lib" ]; list = [ 1 { a = null; } ]; inherit multi; };
  float = drv { name = "float"; outputs = [ "out" "dev" ]; __contentAddressed = true;
    outputHashAlgo = "sha256"; outputHashMode = "recursive"; inherit top; };
  deferred = drv { name = "deferred"; outputs = [ "out" "a" ]; dev = float.dev; };
  above = drv { name = "above"; inherit deferred; };
  impure = drv { name = "impure"; __impure = true; };
  drvs = drv { name = "drvs"; d = top.drvPath; };
in [ chain structured above impure drvs fixed2 ]
"#;

#[test]
fn instantiated() {
    let Some(house) = House::new() else { return };
    let done = house.run("nix-instantiate", &["-E", EXPRESSION]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let derivations = house.derivations();
    println!("{} derivations", derivations.len());
    assert!(derivations.len() >= 60);
    let old = house.run("nix", &["--version"]).stdout.ends_with(b" 2.8.0\n");
    for (path, text) in &derivations {
        let full = house.dir.full(path);
        let drv = house.read(path).unwrap_or_else(|e| panic!("{full}: {e}"));
        assert_eq!(String::from_utf8_lossy(&drv.to_aterm(&house.dir)), String::from_utf8_lossy(text));
        assert_eq!(drv.path(&house.dir).unwrap(), *path);
        let masked = house.masked(&drv).unwrap();
        assert_eq!(masked.deferred, !drv.kind().unwrap().has_paths(), "{full}");
        if drv.kind() == Ok(Kind::InputAddressed) {
            for (name, path) in output_paths(&house.dir, &drv, &masked.digest).unwrap() {
                assert_eq!(drv.outputs[&name].path(), Some(&path), "{full}");
            }
        }
        check(&house.dir, path, &drv, || house.masked(&drv)).unwrap();
        // A process each: not for the whole chain.
        if path.name().as_str().starts_with("chain-") {
            continue;
        }
        let env = house.run("nix-store", &["--print-env", &full]).stdout;
        let mut ours = print_env(&drv);
        if old {
            // 2.26 prints an empty line after each variable, 2.8 none.
            let lines: Vec<&[u8]> = ours.split_inclusive(|b| *b == b'\n').filter(|line| *line != b"\n").collect();
            ours = lines.concat();
            let shown = house.run("nix", &["show-derivation", &full]);
            let theirs: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
            assert_eq!(json::to_json_2_8(&drv, &house.dir).unwrap().to_string(), theirs[&full].to_string());
        }
        assert_eq!(String::from_utf8_lossy(&ours), String::from_utf8_lossy(&env), "{full}");
    }
}

/// Do we refuse, knowingly, what some Nix takes?
fn is_stricter(error: &DerivationError) -> bool {
    match error {
        // 2.8 never ends, or fails an assertion.
        DerivationError::Unterminated { .. }
        | DerivationError::PathOfFloating { .. }
        // Names are looked at only where they make a path.
        | DerivationError::OutputName { .. }
        | DerivationError::System { .. }
        // The prefixes of 2.26.
        | DerivationError::Method { .. } => true,
        // The dash after the hash part, and names that begin with dots.
        DerivationError::Path { source, .. } => {
            matches!(source, larder_core::store_path::StorePathError::Separator { .. })
                || source.to_string().contains("is not valid: name '.")
        }
        _ => false,
    }
}

/// Texts with one place spoiled get the verdict that Nix gives them.
#[test]
fn s038_spoiled_derivations() {
    let Some(house) = House::new() else { return };
    let mut runner = TestRunner::deterministic();
    let any_place = (any::<Index>(), select(b"\"\\,()[]/:x0-\n".to_vec()), 0..3u8);
    let graphs = arb::derivation::graph(house.dir.clone(), 1..2);
    let (mut refused, mut accepted, mut skipped) = (0, 0, 0);
    for n in 0..60 {
        let (_, drv) = graphs.new_tree(&mut runner).unwrap().current().swap_remove(0);
        let (at, byte, how) = any_place.new_tree(&mut runner).unwrap().current();
        let mut text = drv.to_aterm(&house.dir);
        let at = at.index(text.len());
        match how {
            0 => text[at] = byte,
            1 => text.insert(at, byte),
            _ => drop(text.remove(at)),
        }
        let ours = parse(&house.dir, &drv.name, &text);
        // Git and text outputs are unknown to 2.8.
        if ours.as_ref().is_err_and(is_stricter) {
            skipped += 1;
            continue;
        }
        let file = house.path(&format!("{n}/{}.drv", drv.name));
        fs::create_dir(file.parent().unwrap()).unwrap();
        fs::write(&file, &text).unwrap();
        let theirs = house.run("nix-store", &[OsStr::new("--add"), file.as_os_str()]);
        let ours = ours.map_err(|e| e.to_string()).and_then(|drv| {
            let path = StorePath::from_base_name(b"0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x.drv").unwrap();
            check(&house.dir, &path, &drv, || house.masked(&drv)).map_err(|e| match e {
                CheckError::Modulo { source: ModuloError::Resolve { .. }, .. } => "no input".to_owned(),
                other => other.to_string(),
            })
        });
        let shown = (String::from_utf8_lossy(&text), String::from_utf8_lossy(&theirs.stderr));
        assert_eq!(ours.is_ok(), theirs.status.success(), "{ours:?} {shown:?}");
        if ours.is_ok() { accepted += 1 } else { refused += 1 }
    }
    println!("{refused} refused alike, {accepted} accepted alike, {skipped} refused by us alone");
    assert!(refused > 20);
}
