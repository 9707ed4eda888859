//! `builtin:buildenv`: a tree of links to the files of several packages (a profile).
//!
//! Source: modern, section 9; the `buildenv-*` cases of `modern.json`. Entries are taken in sorted
//! order, so that of several conflicts it is always the same one that is told.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::{Anything, Given, at, say};

/// Paths that end so are not linked, in directories that are entered.
const SKIPPED: [&str; 7] = [
    "/propagated-build-inputs",
    "/nix-support",
    "/perllocal.pod",
    "/info/dir",
    "/log",
    "/manifest.nix",
    "/manifest.json",
];

/// The priority of the first round of what packages bring with them.
const PROPAGATED: i64 = 1000;

/// A package to link.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Package {
    priority: i64,
    path: PathBuf,
}

pub(super) fn run(given: &Given<'_>) -> Result<(), Anything> {
    let out = given.path("out")?;
    let packages = parse(given.attribute("derivations")?)?;
    fs::create_dir(&out).map_err(at("creating directory", &out))?;
    let mut linker = Linker::default();
    linker.link_all(packages, &out)?;
    let manifest = given.path("manifest")?;
    let target = out.join("manifest.nix");
    symlink(manifest, &target).map_err(at("creating symlink", &target))?;
    Ok(())
}

/// `ACTIVE PRIORITY N PATH×N` records; those that are not active are left out.
fn parse(text: &[u8]) -> Result<Vec<Package>, Anything> {
    let mut words = text.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    let mut packages = Vec::new();
    while let Some(active) = words.next() {
        let mut number = |what: &str| -> Result<i64, Anything> {
            let word = words.next().ok_or_else(|| format!("'derivations' ends before a {what}"))?;
            let number = std::str::from_utf8(word).ok().and_then(|word| word.parse().ok());
            number.ok_or_else(|| {
                let word = String::from_utf8_lossy(word);
                format!("'derivations' has '{word}' where a {what} should be").into()
            })
        };
        let priority = number("priority")?;
        for _ in 0..number("count of outputs")? {
            let path = words.next().ok_or("'derivations' ends before a path")?;
            if active != b"false" {
                packages.push(Package { priority, path: OsString::from_vec(path.to_vec()).into() });
            }
        }
    }
    packages.sort();
    Ok(packages)
}

#[derive(Default)]
struct Linker {
    done: BTreeSet<PathBuf>,
    postponed: BTreeSet<PathBuf>,
    /// The priority with which each link was made.
    priorities: BTreeMap<PathBuf, i64>,
}

impl Linker {
    fn link_all(&mut self, packages: Vec<Package>, out: &Path) -> Result<(), Anything> {
        for Package { priority, path } in packages {
            self.add(&path, out, priority)?;
        }
        let mut priority = PROPAGATED;
        while !self.postponed.is_empty() {
            for path in std::mem::take(&mut self.postponed) {
                self.add(&path, out, priority)?;
                priority += 1;
            }
        }
        Ok(())
    }

    fn add(&mut self, package: &Path, out: &Path, priority: i64) -> Result<(), Anything> {
        if !self.done.insert(package.to_owned()) {
            return Ok(());
        }
        self.link_directory(package, out, priority)?;
        let list = package.join("nix-support/propagated-user-env-packages");
        match fs::read(&list) {
            Ok(text) => {
                let words = text.split(|b| b" \n".contains(b)).filter(|word| !word.is_empty());
                let words = words.map(|word| PathBuf::from(OsString::from_vec(word.to_vec())));
                self.postponed.extend(words.filter(|path| !self.done.contains(path)));
            }
            Err(e) if is_nothing(&e) => {}
            Err(e) => return Err(at("reading file", &list)(e)),
        }
        Ok(())
    }

    fn link_directory(&mut self, source: &Path, target: &Path, priority: i64) -> Result<(), Anything> {
        let entries = match fs::read_dir(source) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
                let source = source.display();
                say(&format!("warning: not including '{source}' in the user environment because it's not a directory"));
                return Ok(());
            }
            Err(e) => return Err(at("reading directory", source)(e)),
        };
        let names: Result<BTreeSet<OsString>, io::Error> =
            entries.map(|entry| entry.map(|entry| entry.file_name())).collect();
        for name in names.map_err(at("reading directory", source))? {
            if !name.as_bytes().starts_with(b".") {
                self.link(&source.join(&name), &target.join(&name), priority)?;
            }
        }
        Ok(())
    }

    fn link(&mut self, source: &Path, target: &Path, priority: i64) -> Result<(), Anything> {
        let meta = match fs::metadata(source) {
            Ok(meta) => meta,
            Err(e) if is_nothing(&e) => {
                say(&format!("warning: skipping dangling symlink '{}'", target.display()));
                return Ok(());
            }
            Err(e) => return Err(at("getting status of", source)(e)),
        };
        if SKIPPED.iter().any(|end| source.as_os_str().as_bytes().ends_with(end.as_bytes())) {
            return Ok(());
        }
        let there = match fs::symlink_metadata(target) {
            Ok(there) => Some(there),
            Err(e) if is_nothing(&e) => None,
            Err(e) => return Err(at("getting status of", target)(e)),
        };
        if meta.is_dir() {
            match there {
                Some(there) if there.is_dir() => return self.link_directory(source, target, priority),
                Some(there) if there.is_symlink() => return self.merge(source, target, priority),
                _ => {}
            }
        } else if let Some(there) = there {
            if !there.is_symlink() {
                let (source, target) = (source.display(), target.display());
                return Err(format!("collision between non-directory '{source}' and directory '{target}'").into());
            }
            let before = self.priorities.get(target).copied().unwrap_or(i64::MAX);
            if before < priority {
                return Ok(());
            }
            let old = fs::read_link(target).map_err(at("reading symbolic link", target))?;
            if before == priority {
                let (source, old) = (source.display(), old.display());
                return Err(format!(
                    "packages '{source}' and '{old}' have the same priority {priority}; use 'nix-env --set-flag \
                     priority NUMBER INSTALLED_PKGNAME' to change the priority of one of the conflicting packages (0 \
                     being the highest priority)"
                )
                .into());
            }
            fs::remove_file(target).map_err(at("deleting", target))?;
        }
        symlink(source, target).map_err(at("creating symlink", target))?;
        self.priorities.insert(target.to_owned(), priority);
        Ok(())
    }

    /// A directory meets a link: if that is to a directory, both become one.
    fn merge(&mut self, source: &Path, target: &Path, priority: i64) -> Result<(), Anything> {
        let old = fs::canonicalize(target).map_err(at("resolving", target))?;
        if !fs::metadata(&old).map_err(at("getting status of", &old))?.is_dir() {
            let (source, old) = (source.display(), old.display());
            return Err(format!("collision between '{source}' and non-directory '{old}'").into());
        }
        fs::remove_file(target).map_err(at("deleting", target))?;
        fs::create_dir(target).map_err(at("creating directory", target))?;
        let before = self.priorities.get(target).copied().unwrap_or(priority);
        self.link_directory(&old, target, before)?;
        self.link_directory(source, target, priority)
    }
}

fn is_nothing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    /// The cases of the vectors, with the store in a directory of its own.
    #[test]
    fn buildenv_vectors() {
        let file = format!("{}/../tests/vectors/modern.json", env!("CARGO_MANIFEST_DIR"));
        let vectors: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
        let cases = vectors["cases"].as_array().unwrap();
        let of = |id: &str| cases.iter().find(|case| case["id"] == id).unwrap();
        let root = tempfile::tempdir().unwrap();
        let store = root.path().join("store");
        fs::create_dir(&store).unwrap();
        let here = |text: &str| text.replace("/nix/store", store.to_str().unwrap());
        lay_down(of("buildenv-packages"), &here);
        let mut seen = 0;
        for case in cases.iter().filter(|case| case["id"].as_str().unwrap().starts_with("buildenv-")) {
            let id = case["id"].as_str().unwrap();
            let Some(text) = case["drv_text"].as_str() else { continue };
            if !text.contains("\"builtin:buildenv\"") {
                continue;
            }
            let dir = larder_core::store_dir::StoreDir::new("/nix/store").unwrap();
            let path = dir.parse(case["drv_path"].as_str().unwrap()).unwrap();
            let name = larder_core::derivation::name_of(&path).unwrap();
            let drv = larder_core::derivation::parse(&dir, &name, text.as_bytes()).unwrap();
            let env: Vec<(Vec<u8>, Vec<u8>)> = drv
                .env
                .iter()
                .filter(|_| !id.contains("structured"))
                .map(|(k, v)| (k.to_vec(), here(std::str::from_utf8(v).unwrap()).into_bytes()))
                .collect();
            let out = here(case["output_path"].as_str().unwrap_or(drv.env[&b"out"[..]].as_str().unwrap()));
            let mut env: BTreeMap<&[u8], &[u8]> = env.iter().map(|(k, v)| (&k[..], &v[..])).collect();
            if id.contains("structured") {
                env.insert(b"out", out.as_bytes());
            }
            let done = run(&Given { env, options: Value::Null });
            let accepted = case["accepted"].as_bool().unwrap();
            assert_eq!(done.is_ok(), accepted, "{id}: {done:?}");
            seen += 1;
            if accepted {
                assert_eq!(tree(Path::new(&out), ""), result(case, &here), "{id}");
                continue;
            }
            let error = format!("error: {}", done.unwrap_err());
            let messages = case["messages"].get("2.8.0").unwrap_or(&case["messages"]).as_array().unwrap();
            let last = here(messages.last().unwrap().as_str().unwrap());
            match id {
                // The reference prints the name of a C function.
                "buildenv-nonnum" => assert!(error.contains("has 'x' where a priority should be"), "{error}"),
                // Which of several is told depends on the order of the directory there.
                "buildenv-conflict" => assert!(error.contains("have the same priority 5"), "{error}"),
                _ => assert_eq!(error, last, "{id}"),
            }
        }
        assert!(seen > 10, "{seen}");
    }

    /// Makes the packages: `[path, kind, target or text]`.
    fn lay_down(case: &Value, here: &dyn Fn(&str) -> String) {
        for (package, entries) in case["packages"].as_object().unwrap() {
            let top = PathBuf::from(here(package));
            match entries {
                Value::Array(entries) => {
                    fs::create_dir_all(&top).unwrap();
                    for entry in entries {
                        let path = top.join(entry[0].as_str().unwrap());
                        let text = || here(entry[2].as_str().unwrap_or_default());
                        match entry[1].as_str().unwrap() {
                            "dir" => fs::create_dir_all(path).unwrap(),
                            "link" => symlink(text(), path).unwrap(),
                            _ => fs::write(path, text()).unwrap(),
                        }
                    }
                }
                _ => fs::write(top, "").unwrap(),
            }
        }
    }

    fn result(case: &Value, here: &dyn Fn(&str) -> String) -> Vec<(String, String)> {
        let entries = case["result"].as_array().unwrap().iter();
        let mut all: Vec<_> = entries
            .map(|entry| {
                let what = entry[2].as_str().map_or_else(String::new, here);
                (entry[0].as_str().unwrap().to_owned(), what)
            })
            .collect();
        all.sort();
        all
    }

    fn tree(dir: &Path, below: &str) -> Vec<(String, String)> {
        let mut all = Vec::new();
        for entry in fs::read_dir(dir).unwrap().flatten() {
            let name = format!("{below}{}", entry.file_name().to_str().unwrap());
            if entry.file_type().unwrap().is_dir() {
                all.extend(tree(&entry.path(), &format!("{name}/")));
                all.push((name, String::new()));
            } else {
                all.push((name, fs::read_link(entry.path()).unwrap().to_str().unwrap().to_owned()));
            }
        }
        all.sort();
        all
    }
}
