//! What a derivation says its outputs may refer to, and how large they may be.
//!
//! Source: building, section 12.8; modern, section 7.6; `build_checks.json`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use larder_core::derivation::OutputName;
use larder_core::derivation::options::Attributes;
use larder_core::path_info::PathInfo;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;
use serde_json::{Map, Value};

use crate::job::{Failure, FailureKind};

/// The rules for one output. A list that is not there allows all.
#[derive(Debug, Default)]
struct Rules {
    max_size_bytes: Option<u64>,
    max_closure_size_bytes: Option<u64>,
    allowed_references: Option<Vec<Vec<u8>>>,
    allowed_requisites: Option<Vec<Vec<u8>>>,
    disallowed_references: Option<Vec<Vec<u8>>>,
    disallowed_requisites: Option<Vec<Vec<u8>>>,
    /// Does an output not count among what it needs?
    ignore_self: bool,
}

/// What is known beyond the outputs themselves.
pub struct Known<'a> {
    pub dir: &'a StoreDir,
    pub drv_path: &'a StorePath,
    /// Where all outputs are, also those that are not made this time.
    pub outputs: &'a BTreeMap<OutputName, StorePath>,
    /// The closure of some valid paths.
    pub closure: &'a dyn Fn(&BTreeSet<StorePath>) -> Result<Vec<PathInfo>, Failure>,
}

fn rejected(text: String) -> Failure {
    Failure::new(FailureKind::OutputRejected, text)
}

/// Checks the outputs of a build, which need not be valid yet.
pub fn check(
    made: &BTreeMap<OutputName, PathInfo>,
    attributes: &Attributes<'_>,
    known: &Known<'_>,
) -> Result<(), Failure> {
    for (name, info) in made {
        let Some(rules) = Rules::of(name, attributes, known)? else { continue };
        rules.check(info, made, known)?;
    }
    Ok(())
}

impl Rules {
    fn of(name: &OutputName, attributes: &Attributes<'_>, known: &Known<'_>) -> Result<Option<Self>, Failure> {
        let Some(structured) = attributes.structured() else {
            let list = |name| {
                let words = attributes.strings(name)?;
                Ok::<_, Failure>(words.map(|words| words.into_iter().map(<[u8]>::to_vec).collect()))
            };
            return Ok(Some(Self {
                allowed_references: list("allowedReferences")?,
                allowed_requisites: list("allowedRequisites")?,
                disallowed_references: list("disallowedReferences")?,
                disallowed_requisites: list("disallowedRequisites")?,
                ignore_self: true,
                ..Self::default()
            }));
        };
        let rules = structured.get("outputChecks").and_then(|all| all.get(name.as_str()));
        let Some(Value::Object(map)) = rules else { return Ok(None) };
        let wrong = |attribute: &str, wanted: &str| {
            let drv = known.dir.display(known.drv_path);
            let text = format!("attribute '{attribute}' of derivation '{drv}' must be {wanted}");
            Failure::new(FailureKind::InputRejected, text)
        };
        let number = |map: &Map<String, Value>, key: &str| {
            let value = map.get(key).map(|value| value.as_u64().ok_or_else(|| wrong(key, "a number of bytes")));
            value.transpose()
        };
        let list = |key: &str| {
            let Some(value) = map.get(key) else { return Ok(None) };
            let words = value.as_array().ok_or_else(|| wrong(key, "a list of strings"))?.iter();
            let words = words.map(|word| word.as_str().map(|text| text.as_bytes().to_vec()));
            words.collect::<Option<Vec<_>>>().map(Some).ok_or_else(|| wrong(key, "a list of strings"))
        };
        Ok(Some(Self {
            max_size_bytes: number(map, "maxSize")?,
            max_closure_size_bytes: number(map, "maxClosureSize")?,
            allowed_references: list("allowedReferences")?,
            allowed_requisites: list("allowedRequisites")?,
            disallowed_references: list("disallowedReferences")?,
            disallowed_requisites: list("disallowedRequisites")?,
            ignore_self: false,
        }))
    }

    fn check(&self, info: &PathInfo, made: &BTreeMap<OutputName, PathInfo>, known: &Known<'_>) -> Result<(), Failure> {
        let shown = known.dir.display(&info.path);
        let too_large = |what: &str, size: u64, limit: u64| {
            rejected(format!("{what} '{shown}' is too large at {size} bytes; limit is {limit} bytes"))
        };
        if let Some(limit) = self.max_size_bytes.filter(|limit| info.nar_size_bytes > *limit) {
            return Err(too_large("path", info.nar_size_bytes, limit));
        }
        let needs_closure = self.max_closure_size_bytes.is_some()
            || self.allowed_requisites.is_some()
            || self.disallowed_requisites.is_some();
        let closure = if needs_closure { closure_of(info, made, known)? } else { BTreeMap::new() };
        if let Some(limit) = self.max_closure_size_bytes {
            let size = closure.values().fold(0u64, |sum, size| sum.saturating_add(*size));
            if size > limit {
                return Err(too_large("closure of path", size, limit));
            }
        }
        let mut requisites: BTreeSet<StorePath> = closure.into_keys().collect();
        if self.ignore_self {
            requisites.remove(&info.path);
        }
        for (list, used, allowed) in [
            (&self.allowed_references, &info.references, true),
            (&self.allowed_requisites, &requisites, true),
            (&self.disallowed_references, &info.references, false),
            (&self.disallowed_requisites, &requisites, false),
        ] {
            let Some(list) = list else { continue };
            let listed = specified(list, known)?;
            let bad: Vec<&StorePath> = used.iter().filter(|path| listed.contains(*path) != allowed).collect();
            if !bad.is_empty() {
                let mut text = format!("output '{shown}' is not allowed to refer to the following paths:");
                for path in bad {
                    let _ = write!(text, "\n  {}", known.dir.display(path));
                }
                return Err(rejected(text));
            }
        }
        Ok(())
    }
}

/// What a list of reference specifiers means: store paths, or names of outputs.
fn specified(words: &[Vec<u8>], known: &Known<'_>) -> Result<BTreeSet<StorePath>, Failure> {
    let one = |word: &Vec<u8>| {
        if let Ok(path) = known.dir.parse(word) {
            return Ok(path);
        }
        let output = std::str::from_utf8(word).ok().and_then(|name| known.outputs.get(name));
        output.cloned().ok_or_else(|| {
            let word = String::from_utf8_lossy(word);
            Failure::new(
                FailureKind::InputRejected,
                format!("derivation contains an illegal reference specifier '{word}'"),
            )
        })
    };
    words.iter().map(one).collect()
}

/// All that an output needs, itself included, with the sizes of the archives in bytes.
fn closure_of(
    info: &PathInfo,
    made: &BTreeMap<OutputName, PathInfo>,
    known: &Known<'_>,
) -> Result<BTreeMap<StorePath, u64>, Failure> {
    let mut all = BTreeMap::new();
    let mut valid = BTreeSet::new();
    let mut todo = vec![info];
    while let Some(next) = todo.pop() {
        if all.insert(next.path.clone(), next.nar_size_bytes).is_some() {
            continue;
        }
        for reference in &next.references {
            match made.values().find(|other| other.path == *reference) {
                Some(other) => todo.push(other),
                None => {
                    valid.insert(reference.clone());
                }
            }
        }
    }
    for member in (known.closure)(&valid)? {
        all.entry(member.path).or_insert(member.nar_size_bytes);
    }
    Ok(all)
}

/// Looks for a cycle among outputs: which one's references, from which one.
pub fn find_cycle(made: &BTreeMap<OutputName, PathInfo>) -> Option<(OutputName, OutputName)> {
    let by_path: BTreeMap<&StorePath, &OutputName> = made.iter().map(|(name, info)| (&info.path, name)).collect();
    // In the order of the names, which decides what is told of a cycle.
    let others = |name: &OutputName| -> Vec<&OutputName> {
        let references = made.get(name).into_iter().flat_map(|info| &info.references);
        let mut names: Vec<&OutputName> =
            references.filter_map(|path| by_path.get(path).copied()).filter(|other| *other != name).collect();
        names.sort_by(|a, b| b.cmp(a));
        names
    };
    let (mut above, mut done) = (BTreeSet::new(), BTreeSet::new());
    for start in made.keys() {
        if !done.insert(start) {
            continue;
        }
        above.insert(start);
        let mut stack = vec![(start, others(start))];
        while let Some((at, rest)) = stack.last_mut() {
            let at = *at;
            let Some(next) = rest.pop() else {
                above.remove(at);
                stack.pop();
                continue;
            };
            if above.contains(next) {
                return Some((next.clone(), at.clone()));
            }
            if done.insert(next) {
                above.insert(next);
                stack.push((next, others(next)));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use larder_core::hash::Sha256Digest;

    fn output(name: &str, letter: char, references: &[&PathInfo]) -> (OutputName, PathInfo) {
        let path: StorePath = format!("{}-{name}", letter.to_string().repeat(32)).parse().unwrap();
        let mut info = PathInfo::new(path, Sha256Digest([0; 32]), 10);
        info.references = references.iter().map(|info| info.path.clone()).collect();
        (OutputName::new(name).unwrap(), info)
    }

    #[test]
    fn cycles_are_told_as_nix_does() {
        let (out, mut one) = output("out", 'a', &[]);
        let (dev, two) = output("dev", 'b', &[&one]);
        one.references.insert(one.path.clone());
        let mut made = BTreeMap::from([(out.clone(), one), (dev.clone(), two.clone())]);
        assert_eq!(find_cycle(&made), None);
        made.get_mut("out").unwrap().references.insert(two.path);
        assert_eq!(find_cycle(&made), Some((dev, out)));
    }
}
