//! The same work by real Nix and by Larder, compared byte by byte.

use std::path::{Path, PathBuf};

use crate::run::{Failed, Side, real_nix, release_binary, root, say};

/// Real trees that a Debian machine with a Rust toolchain has.
fn default_trees() -> Vec<PathBuf> {
    let sysroot = std::process::Command::new("rustc").args(["--print", "sysroot"]).output();
    let toolchain = sysroot.ok().map(|out| PathBuf::from(String::from_utf8_lossy(&out.stdout).trim()));
    let mut trees: Vec<PathBuf> = ["/usr/share", "/usr/include", "/usr/lib/python3", "/usr/bin", "/etc/alternatives"]
        .iter()
        .map(PathBuf::from)
        .collect();
    trees.extend(toolchain);
    trees.push(root().join("docs"));
    trees.retain(|tree| tree.exists());
    trees
}

#[expect(clippy::needless_pass_by_value, reason = "takes what a call just made")]
fn text(bytes: Vec<u8>) -> String {
    String::from_utf8_lossy(&bytes).trim_end().to_owned()
}

fn same(what: &str, nix: &str, larder: &str) -> Result<(), Failed> {
    if nix == larder {
        return Ok(());
    }
    Err(Failed(format!("{what} differ:\n  real Nix: {nix}\n  Larder:   {larder}")))
}

pub(crate) fn run(args: &[String]) -> Result<(), Failed> {
    let Some(nix_store) = real_nix() else {
        say("skipped: no real nix-store is installed (Debian: apt-get install nix-bin)");
        return Ok(());
    };
    let larder = release_binary()?;
    let work = std::env::temp_dir().join(format!("larder-interop-{}", std::process::id()));
    let outcome = compare(&work, &nix_store, &larder, args);
    // Store objects are read-only; make them deletable first.
    let _ = std::process::Command::new("chmod").args(["-R", "u+w"]).arg(&work).status();
    let _ = std::fs::remove_dir_all(&work);
    outcome
}

fn compare(work: &Path, nix_store: &Path, larder: &Path, args: &[String]) -> Result<(), Failed> {
    // One logical store directory for both, so that the paths are the same; the two never run on
    // it at the same time: each has its own root.
    let nix = Side::nix(nix_store, &work.join("a"));
    let mine = Side::larder(larder, &work.join("b"));
    let rooted = |side: &Side, words: &[&str]| {
        let mut job = side.job(words.iter().copied());
        job.env.retain(|(name, _)| !matches!(name.as_str(), "NIX_STORE_DIR" | "NIX_STATE_DIR" | "NIX_LOG_DIR"));
        job.env.retain(|(name, _)| name != "NIX_REMOTE");
        job.env.push(("NIX_REMOTE".into(), format!("local?root={}", side.dir.display())));
        job
    };
    std::fs::create_dir_all(&nix.dir)?;
    std::fs::create_dir_all(&mine.dir)?;
    let trees = if args.is_empty() { default_trees() } else { args.iter().map(PathBuf::from).collect() };
    for tree in &trees {
        let shown = tree.display().to_string();
        let added = text(rooted(&nix, &["--add", &shown]).output()?);
        same(&format!("store paths of {shown}"), &added, &text(rooted(&mine, &["--add", &shown]).output()?))?;
        for query in ["--hash", "--size"] {
            let words = ["--query", query, &added];
            same(
                &format!("{query} of {shown}"),
                &text(rooted(&nix, &words).output()?),
                &text(rooted(&mine, &words).output()?),
            )?;
        }
        let (one, two) = (work.join("one.nar"), work.join("two.nar"));
        for (side, file) in [(&nix, &one), (&mine, &two)] {
            let mut job = rooted(side, &["--dump", &shown]);
            job.stdout = Some(file.clone());
            job.cost(1)?;
        }
        equal_files(&one, &two)?;
        let size = std::fs::metadata(&one)?.len();
        say(&format!("{shown}: {added}, {:.1} MiB of NAR, byte-equal", mib(size)));
    }
    // A derivation with inputs gives a closure with references; then everything goes round.
    let expression = "let d = derivation { name = \"dep\"; system = \"x\"; builder = \"/bin/sh\"; args = [ (builtins.toFile \"a\" \"x\") ]; }; \
                      in derivation { name = \"top\"; system = \"x\"; builder = \"/bin/sh\"; inherit d; src = builtins.toFile \"b\" \"y\"; }";
    let mut instantiate = rooted(&nix, &["-E", expression]);
    instantiate.program = nix_store.with_file_name("nix-instantiate");
    let top = text(instantiate.output()?);
    let closure = text(rooted(&nix, &["-qR", &top]).output()?);
    let mut words = vec!["--export"];
    words.extend(closure.lines());
    let there = work.join("there.export");
    let mut export = rooted(&nix, &words);
    export.stdout = Some(there.clone());
    export.cost(1)?;
    let mut import = rooted(&mine, &["--import"]);
    import.stdin = Some(there.clone());
    let imported = text(import.output()?);
    say(&format!("export of real Nix imported: {} paths", imported.lines().count()));
    same("closures", &closure, &text(rooted(&mine, &["-qR", &top]).output()?))?;
    let back = work.join("back.export");
    let mut export = rooted(&mine, &words);
    export.stdout = Some(back.clone());
    export.cost(1)?;
    equal_files(&there, &back)?;
    let third = Side::nix(nix_store, &work.join("c"));
    std::fs::create_dir_all(&third.dir)?;
    let mut import = rooted(&third, &["--import", "--option", "require-sigs", "false"]);
    import.stdin = Some(back);
    import.output()?;
    same("closures after the way back", &closure, &text(rooted(&third, &["-qR", &top]).output()?))?;
    say("export of Larder byte-equal, imported by real Nix, closure intact");
    // Registrations both ways.
    let dump = work.join("dump.txt");
    let mut job = rooted(&nix, &["--dump-db"]);
    job.stdout = Some(dump.clone());
    job.cost(1)?;
    let mut job = rooted(&mine, &["--load-db"]);
    job.stdin = Some(dump.clone());
    job.output()?;
    let again = work.join("again.txt");
    let mut job = rooted(&mine, &["--dump-db"]);
    job.stdout = Some(again.clone());
    job.cost(1)?;
    equal_files(&dump, &again)?;
    let mut job = rooted(&nix, &["--load-db"]);
    job.stdin = Some(again.clone());
    job.output()?;
    let mut job = rooted(&nix, &["--dump-db"]);
    job.stdout = Some(again.clone());
    job.cost(1)?;
    equal_files(&dump, &again)?;
    say(&format!(
        "--dump-db: {} lines, the same on both sides and both ways",
        std::fs::read_to_string(&dump)?.lines().count()
    ));
    rooted(&mine, &["--verify", "--check-contents"]).output()?;
    say("--verify --check-contents: clean");
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / 1_048_576.0
}

fn equal_files(one: &Path, two: &Path) -> Result<(), Failed> {
    let status = std::process::Command::new("cmp").arg(one).arg(two).status()?;
    if status.success() { Ok(()) } else { Err(Failed(format!("{} and {} differ", one.display(), two.display()))) }
}
