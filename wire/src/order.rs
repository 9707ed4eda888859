//! Paths in the order in which they can be added: references before referrers.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use larder_core::api::{ErrorKind, StoreError};
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

/// Some paths with their references, those to themselves and to others than these left out.
///
/// Errors: paths that refer to each other.
pub fn order(
    dir: &StoreDir,
    mut references: BTreeMap<StorePath, BTreeSet<StorePath>>,
) -> Result<Vec<StorePath>, StoreError> {
    let all: BTreeSet<StorePath> = references.keys().cloned().collect();
    let mut referrers: HashMap<StorePath, Vec<StorePath>> = HashMap::new();
    let mut free = Vec::new();
    for (path, near) in &mut references {
        near.retain(|reference| reference != path && all.contains(reference));
        for reference in near.iter() {
            referrers.entry(reference.clone()).or_default().push(path.clone());
        }
        if near.is_empty() {
            free.push(path.clone());
        }
    }
    let mut ordered = Vec::with_capacity(all.len());
    free.reverse();
    while let Some(path) = free.pop() {
        references.remove(&path);
        for referrer in referrers.remove(&path).unwrap_or_default() {
            if let Some(near) = references.get_mut(&referrer) {
                near.remove(&path);
                if near.is_empty() {
                    free.push(referrer);
                }
            }
        }
        ordered.push(path);
    }
    match references.into_keys().next() {
        None => Ok(ordered),
        Some(path) => {
            let text = format!("cycle detected in the references of '{}'", dir.display(&path));
            Err(StoreError::new(ErrorKind::Other, text))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_come_first() {
        let dir = StoreDir::new("/nix/store").unwrap();
        let path = |name: &str| -> StorePath { format!("{}-{name}", "0".repeat(32)).parse().unwrap() };
        let graph = |edges: &[(&str, &str)]| {
            let mut graph: BTreeMap<StorePath, BTreeSet<StorePath>> = BTreeMap::new();
            for (from, to) in edges {
                let to: BTreeSet<StorePath> = to.split_whitespace().map(path).collect();
                graph.insert(path(from), to);
            }
            order(&dir, graph).map(|list| list.iter().map(|p| p.name().to_string()).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(graph(&[]).unwrap(), "");
        assert_eq!(graph(&[("a", "b c"), ("b", "c b"), ("c", "elsewhere"), ("d", "")]).unwrap(), "c b a d");
        assert!(graph(&[("a", "b"), ("b", "a"), ("c", "")]).unwrap_err().to_string().starts_with("cycle detected"));
    }
}
