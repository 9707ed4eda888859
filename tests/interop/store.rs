//! A store that real Nix has made, with derivations and what was built from them: once its
//! registrations are taken over, both must answer every question alike, and refuse alike.

use std::os::unix::ffi::OsStrExt as _;
use std::process::{Command, Output};
use std::time::Duration;

use crate::house::{House, Run, output, run};

use super::has_nix;

/// Two results: one with several outputs, a fixed one and text files below it, and one not built.
const EXPRESSION: &str = r#"
let
  sh = name: attrs: derivation ({ inherit name; system = builtins.currentSystem; builder = "/bin/sh"; } // attrs);
  src = builtins.toFile "src" "text\n";
  dep = sh "dep" { args = [ "-c" "echo ${src} $out > $out" ]; };
  multi = sh "multi" {
    outputs = [ "out" "dev" "man" ];
    odd = "a \"b\" \$x 'y' <&> \\ \t\nnew line";
    args = [ "-c" "echo ${dep} > $dev; echo $dev > $out; echo man > $man" ];
  };
  fixed = sh "fixed" {
    outputHashMode = "flat"; outputHashAlgo = "sha256";
    outputHash = "6d49f8d5f70d5e85b41f1a9bf4a0fe4bfc5f6ff8bbcad1b3fa3c6cb1fae40be9";
    args = [ "-c" "echo fixed > $out" ];
  };
  top = sh "top" { inherit multi; inputs = [ multi.man dep ]; args = [ "-c" "echo ${multi} ${dep} ${src} > $out" ]; };
in { inherit top; unbuilt = sh "unbuilt" { inherit top fixed; doc = [ multi.dev src ]; }; }
"#;

/// What is asked, one call a line. Names in braces stand for paths.
const QUESTIONS: &str = "
-q {top}
-q {multi.drv}
-q --outputs {multi.drv} {top.drv} {top}
-q -u {multi.drv}
-q -R {top}
-q -R {top.drv}
-q -R {unbuilt.drv} {top}
-q -R -u {top.drv}
-q -R --include-outputs {unbuilt.drv}
-q --requisites {src} {src} {dep}
-qR {top}
-q --references {top} {multi.drv}
-q --references {dep}
-q --references -u {multi.drv}
-q --referrers {dep}
-q --referrers {src} {dep}
-q --referers {src}
-q --referrers-closure {src}
-q --referrers-closure {multi-man} {dep.drv}
-q -d {top} {multi-dev} {src} {top.drv}
-q --deriver -u {multi.drv}
-q --binding odd {multi.drv}
-q -b odd {multi} {multi-dev}
-q -b name {top} {top.drv}
-q -b outputs {multi-man}
-q -b nope {top}
-q -b out {src}
-q --hash {top} {src} {top.drv}
-q --hash -u {multi.drv}
-q --size {top} {top.drv} {multi-dev}
-q --tree {top}
-q --tree {top.drv}
-q --tree {src} {dep}
-q --tree -u {top.drv}
-q --graph {top}
-q --graph {unbuilt.drv} {top}
-q --graph -u {multi.drv}
-q --graphml {top}
-q --graphml {unbuilt.drv}
-q --resolve {top} {top}/bin {link} {nope}
-q --roots {top}
-q --roots {src}
-q --roots {multi.drv} {dep}
-q --roots {unbuilt.drv}
-q --size {link}
-q
-qR
-q --hash
-q --roots
--print-env {multi.drv}
--print-env {unbuilt.drv}
--dump-db
--dump-db {top}
--dump-db {top.drv} {src} {top}
--verify
--verify --check-contents
--verify-path {top} {src}
--check-validity {top} {src} {top.drv}
--check-validity --print-invalid {top} {nope} {src}
--export {src}
--export {top} {top.drv} {multi-dev}
--export
";

/// What is refused, one call a line; it fails before it does anything.
const REFUSED: &str = "
-q {nope}
-q -R {nope}
-q -R {top} {nope}
-q --references {nope}
-q -d {nope}
-q --hash {nope}
-q --hash {top} {nope} {src}
-q --size {nope}
-q --tree {nope}
-q --graph {nope}
-q --graphml {nope}
-q -b x {nope}
-q {unknown.drv}
-q --hash /
-q --hash /tmp
-q --hash .
-q --hash {store}
-q --hash {store}/
-q --hash {store}/abc
-q --hash {store}/.links
-q --hash -u {unbuilt.drv}
-q --hash ../..
-q --hash {store}/../store
-q --size {nope}/bin
-q --hash {store}/eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee-x
--export {nope}
--export {top} {nope}
--dump-db {nope}
--dump-db {top} {nope}
--verify-path {nope}
--check-validity {nope}
--check-validity {top} {nope} {src}
--print-env {nope}
--print-env /tmp
--add-fixed
--add-fixed sha256 {work}
--delete {top}
--delete {src}
--delete {top.drv}
--delete {store}/abc
--delete /tmp
";

/// A house whose store has been made by real Nix.
pub(super) struct Made {
    pub(super) house: House,
    names: Vec<(&'static str, String)>,
}

fn real(house: &House, program: &str) -> Command {
    let mut command = house.command(program);
    command.env("NIX_CONFIG", "build-users-group =\nsandbox = false\nsubstituters =");
    command
}

fn line(run: &Run) -> String {
    assert_eq!(run.status, Some(0), "{run:?}");
    run.stdout.trim_end().to_owned()
}

impl Made {
    pub(super) fn new() -> Self {
        let house = House::new();
        let file = house.write("x.nix", EXPRESSION);
        let instantiate =
            |attribute: &str| line(&run(real(&house, "nix-instantiate").arg(&file).args(["-A", attribute]), b""));
        let (top_drv, unbuilt) = (instantiate("top"), instantiate("unbuilt"));
        let link = house.work().join("result");
        let built = run(real(&house, "nix-store").args(["-r", &top_drv, "--add-root"]).arg(&link), b"");
        assert_eq!(built.status, Some(0), "{built:?}");
        let ask = |words: &[&str]| line(&run(real(&house, "nix-store").args(words), b""));
        let closure = ask(&["-qR", "--include-outputs", &unbuilt]);
        let store = house.path().join("store").display().to_string();
        let named = |name: &str| {
            let end = format!("-{name}");
            closure.lines().find(|path| path.ends_with(&end)).unwrap_or_else(|| panic!("{name}: {closure}")).to_owned()
        };
        let mut names: Vec<(&str, String)> = ["top", "src", "dep", "multi", "multi-dev", "multi-man"]
            .into_iter()
            .chain(["top.drv", "dep.drv", "multi.drv", "unbuilt.drv"])
            .map(|name| (name, named(name)))
            .collect();
        names.push(("nope", format!("{store}/{}-nope", "0".repeat(32))));
        names.push(("unknown.drv", format!("{store}/{}-unknown.drv", "0".repeat(32))));
        names.push(("link", link.display().to_string()));
        names.push(("work", house.work().display().to_string()));
        names.push(("store", store));
        Self { house, names }
    }

    pub(super) fn path(&self, name: &str) -> &str {
        &self.names.iter().find(|(known, _)| *known == name).unwrap_or_else(|| panic!("no path is named {name}")).1
    }

    fn words(&self, text: &str) -> Vec<String> {
        let filled =
            self.names.iter().fold(text.to_owned(), |text, (name, path)| text.replace(&format!("{{{name}}}"), path));
        assert!(!filled.contains('{'), "{filled}");
        filled.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect()
    }

    /// What real Nix says, with empty standard input.
    pub(super) fn real(&self, words: &[impl AsRef<std::ffi::OsStr>]) -> Run {
        let output = undisturbed(|| output(real(&self.house, "nix-store").args(words), b""));
        Run {
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            status: output.status.code(),
        }
    }

    pub(super) fn ours(&self, words: &[impl AsRef<std::ffi::OsStr>]) -> Run {
        self.house.run("nix-store", words)
    }
}

/// Real Nix stumbles over any process on the machine whose working directory is deeper than a path
/// can say, such as one of another test: then it is asked again, for up to a minute.
fn undisturbed(ask: impl Fn() -> Output) -> Output {
    for _ in 0..120 {
        let output = ask();
        if !String::from_utf8_lossy(&output.stderr).contains("reading symlink: File name too long") {
            return output;
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    ask()
}

/// Where 2.26 has other words than 2.8 for the same thing, and Larder has those.
fn same_words(mut run: Run) -> Run {
    for (old, new) in [
        ("for hash type '", "for hash algorithm '"),
        ("use: nix-store --query --roots\n", "use: nix-store --query --roots and nix-store --query --referrers\n"),
        ("attr.name='narSize' attr.type='int'", "attr.name='narSize' attr.type='long'"),
    ] {
        run.stderr = run.stderr.replace(old, new);
        run.stdout = run.stdout.replace(old, new);
    }
    run
}

#[test]
fn questions_have_the_same_answers() {
    if !has_nix() {
        return;
    }
    let made = Made::new();
    let adopted = made.house.words("larder", "adopt");
    assert_eq!(adopted.status, Some(0), "{adopted:?}");
    let mut faults = Vec::new();
    let mut count = 0;
    for text in QUESTIONS.lines().filter(|text| !text.is_empty()) {
        count += 1;
        let words = made.words(text);
        let mut theirs = undisturbed(|| output(real(&made.house, "nix-store").args(&words), b""));
        let mut ours = output(made.house.applet("nix-store").args(&words), b"");
        // As in `same_words`, on bytes; 2.26 prints an empty line after each variable.
        if text.starts_with("-q --graphml") {
            let long = String::from_utf8(theirs.stdout).unwrap().replace("attr.type='int'", "attr.type='long'");
            theirs.stdout = long.into_bytes();
        } else if text.starts_with("--print-env") {
            ours.stdout = String::from_utf8(ours.stdout).unwrap().replace("\n\n", "\n").into_bytes();
        }
        if (&ours.stdout, ours.status.code()) != (&theirs.stdout, theirs.status.code()) || ours.stderr != theirs.stderr
        {
            faults.push(format!(
                "nix-store {text}\n real: {:?} {}\n{}\n ours: {:?} {}\n{}",
                theirs.status.code(),
                String::from_utf8_lossy(&theirs.stderr),
                String::from_utf8_lossy(&theirs.stdout),
                ours.status.code(),
                String::from_utf8_lossy(&ours.stderr),
                String::from_utf8_lossy(&ours.stdout),
            ));
        }
    }
    println!("questions: {count} calls");
    assert!(faults.is_empty(), "{} differ\n{}", faults.len(), faults.join("\n"));
}

#[test]
fn refusals_are_the_same() {
    if !has_nix() {
        return;
    }
    let made = Made::new();
    assert_eq!(made.house.words("larder", "adopt").status, Some(0));
    let mut faults = Vec::new();
    let mut count = 0;
    for text in REFUSED.lines().filter(|text| !text.is_empty()) {
        count += 1;
        let words = made.words(text);
        let theirs = same_words(made.real(&words));
        let ours = made.ours(&words);
        if ours != theirs {
            faults.push(format!("nix-store {text}\n real: {theirs:?}\n ours: {ours:?}"));
        }
    }
    println!("refusals: {count} calls");
    assert!(faults.is_empty(), "{} differ\n{}", faults.len(), faults.join("\n"));
}

/// Trees, closures and registrations from one to the other and back.
#[test]
fn objects_go_there_and_back() {
    if !has_nix() {
        return;
    }
    // The same words on stores of the same name, each in a house of its own.
    let (theirs, ours, third) = (House::new(), House::new(), House::new());
    let nix = |house: &House, words: &[&str], stdin: &[u8]| {
        let mut command = real(house, "nix-store");
        house.as_root_of_its_own(&mut command);
        output(command.args(words), stdin)
    };
    let larder = |house: &House, words: &[&str], stdin: &[u8]| output(house.rooted("nix-store").args(words), stdin);
    let source = theirs.work();
    std::fs::create_dir_all(source.join("tree/bin/deep/er")).unwrap();
    std::fs::write(source.join("tree/bin/run"), "#!/bin/sh\n").unwrap();
    std::fs::write(source.join("tree/empty"), "").unwrap();
    std::fs::write(source.join("tree/name with blanks"), [0u8, 255, 7].repeat(50_000)).unwrap();
    std::os::unix::fs::symlink("../nowhere", source.join("tree/bin/link")).unwrap();
    // A name that is not UTF-8, in a tree and of a file.
    let odd = std::ffi::OsStr::from_bytes(b"odd\xff\x80");
    std::fs::write(source.join("tree").join(odd), "odd").unwrap();
    std::fs::write(source.join(odd), "odd").unwrap();
    for words in [["--add"].as_slice(), &["--dump"], &["--add-fixed", "sha256"]] {
        let mut command = real(&theirs, "nix-store");
        theirs.as_root_of_its_own(&mut command);
        let (a, b) =
            (output(command.args(words).arg(odd), b""), output(theirs.rooted("nix-store").args(words).arg(odd), b""));
        assert_eq!((a.status.code(), a.stdout), (b.status.code(), b.stdout), "{words:?}");
    }
    let tree = source.join("tree").display().to_string();
    let check = |words: &[&str]| {
        let (a, b) = (nix(&theirs, words, b""), larder(&ours, words, b""));
        assert_eq!((a.status, a.stderr), (b.status, b.stderr), "{words:?}");
        assert!(a.stdout == b.stdout, "{words:?} print other bytes");
        String::from_utf8_lossy(&a.stdout).trim_end().to_owned()
    };
    let path = check(&["--add", &tree]);
    check(&["--dump", &tree]);
    for query in ["--hash", "--size", "--references", "--deriver"] {
        check(&["-q", query, &path]);
    }
    for algorithm in ["md5", "sha1", "sha256", "sha512"] {
        check(&["--add-fixed", algorithm, &format!("{tree}/bin/run")]);
        check(&["--add-fixed", "--recursive", algorithm, &tree]);
    }
    let file = theirs.write("x.nix", EXPRESSION);
    let mut instantiate = real(&theirs, "nix-instantiate");
    theirs.as_root_of_its_own(&mut instantiate);
    let top = line(&run(instantiate.arg(&file).args(["-A", "unbuilt"]), b""));
    let closure = nix(&theirs, &["-qR", &top], b"").stdout;
    let listed = String::from_utf8(closure.clone()).unwrap();
    let mut words = vec!["--export"];
    words.extend(listed.lines());
    let stream = nix(&theirs, &words, b"").stdout;
    let imported = larder(&ours, &["--import"], &stream);
    assert_eq!(imported.status.code(), Some(0), "{}", String::from_utf8_lossy(&imported.stderr));
    assert!(imported.stdout == nix(&third, &["--import"], &stream).stdout, "other paths imported");
    assert!(larder(&ours, &["-qR", &top], b"").stdout == closure, "another closure");
    let back = larder(&ours, &words, b"").stdout;
    assert!(back == stream, "another stream on the way back");
    let dump = nix(&theirs, &["--dump-db"], b"").stdout;
    assert!(larder(&ours, &["--dump-db"], b"").stdout == dump, "other registrations");
    assert_eq!(larder(&ours, &["--load-db"], &dump).status.code(), Some(0));
    let again = larder(&ours, &["--dump-db"], b"").stdout;
    assert!(again == dump, "other registrations after loading");
    // Derivations are read when they are registered, so both want them there; all else may be missing.
    let bare = House::new();
    assert_eq!(nix(&bare, &["--load-db"], &dump).status.code(), Some(1));
    assert_eq!(larder(&bare, &["--load-db"], &dump).status.code(), Some(1));
    let loaded = nix(&third, &["--load-db"], &again);
    assert_eq!(loaded.status.code(), Some(0), "{}", String::from_utf8_lossy(&loaded.stderr));
    assert!(nix(&third, &["--dump-db"], b"").stdout == dump, "other registrations on the way back");
    println!("there and back: {} paths", listed.lines().count());
}
