//! Derivations, alone and in graphs whose output paths are right.

use std::collections::{BTreeMap, BTreeSet};

use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::paths::{algorithm, content_address, drv_path, hash, short_name, store_path};
use crate::content_address::{ContentAddress, Method};
use crate::derivation::modulo::{Mask, Memo, fill_deferred};
use crate::derivation::{Bytes, Derivation, Output, OutputMethod, OutputName};
use crate::store_dir::StoreDir;
use crate::store_path::{Name, StorePath};

/// Bytes for arguments and variables: text, text that needs escapes, and any bytes.
pub fn bytes() -> impl Strategy<Value = Bytes> {
    prop_oneof![
        4 => "[a-z/$ ]{0,12}".prop_map(Bytes::from),
        3 => "([a-z]|[\"\\\\\n\r\t']){0,12}".prop_map(Bytes::from),
        2 => any::<String>().prop_map(Bytes::from),
        1 => vec(any::<u8>(), 0..12).prop_map(Bytes::from),
    ]
}

/// As [`bytes`], but text.
pub fn text() -> impl Strategy<Value = Bytes> {
    bytes().prop_filter("text only", |bytes| bytes.as_str().is_some())
}

pub fn output_name() -> impl Strategy<Value = OutputName> {
    select(vec!["out", "dev", "lib", "doc", "bin", "a", "z-1"]).prop_map(|name| OutputName::new(name).expect("a name"))
}

fn method_and_algorithm() -> impl Strategy<Value = (OutputMethod, crate::hash::Algorithm)> {
    let method =
        select(vec![OutputMethod::FLAT, OutputMethod::RECURSIVE, OutputMethod::Fixed(Method::Git), OutputMethod::Text]);
    (method, algorithm()).prop_filter("not every method takes every algorithm", |(m, a)| m.allows(*a))
}

/// Outputs of one kind. Fixed ones belong to the derivation `name`.
fn outputs(dir: StoreDir, name: Name) -> impl Strategy<Value = BTreeMap<OutputName, Output>> {
    let each = |output: Output, names: BTreeSet<OutputName>| names.into_iter().map(|n| (n, output.clone())).collect();
    let names = || btree_set(output_name(), 1..4);
    prop_oneof![
        4 => btree_map(output_name(), store_path().prop_map(Output::InputAddressed), 1..4),
        3 => content_address().prop_map(move |address| {
            let out = OutputName::out();
            let output = Output::fixed(&dir, &name, &out, address).expect("the name is short");
            BTreeMap::from([(out, output)])
        }),
        2 => (method_and_algorithm(), names())
            .prop_map(move |((method, algorithm), names)| each(Output::Floating { method, algorithm }, names)),
        1 => names().prop_map(move |names| each(Output::Deferred, names)),
        1 => (method_and_algorithm(), names())
            .prop_map(move |((method, algorithm), names)| each(Output::Impure { method, algorithm }, names)),
    ]
}

/// A derivation of any kind. Its fixed paths are right; input-addressed ones are anything.
pub fn derivation(dir: StoreDir) -> impl Strategy<Value = Derivation> {
    with_strings(dir, bytes().boxed())
}

/// A derivation that JSON can express.
pub fn text_derivation(dir: StoreDir) -> impl Strategy<Value = Derivation> {
    with_strings(dir, text().boxed())
}

fn with_strings(dir: StoreDir, strings: BoxedStrategy<Bytes>) -> impl Strategy<Value = Derivation> {
    let inputs = (btree_map(drv_path(), btree_set(output_name(), 0..3), 0..4), btree_set(store_path(), 0..4));
    let how = (
        "[a-z0-9_]{1,8}-[a-z]{1,6}|builtin",
        strings.clone(),
        vec(strings.clone(), 0..4),
        btree_map(strings.clone(), strings, 0..6),
    );
    let named = short_name().prop_flat_map(move |name| (outputs(dir.clone(), name.clone()), Just(name)));
    (named, inputs, how).prop_map(|((outputs, name), (input_drvs, input_srcs), (system, builder, args, env))| {
        Derivation { name, outputs, input_drvs, input_srcs, system, builder, args, env }
    })
}

/// Derivations with their paths, inputs before what uses them; all paths are right, so that
/// each could be registered.
///
/// Most are input-addressed; some are fixed and some floating, and what is above those is deferred.
pub fn graph(dir: StoreDir, size: std::ops::Range<usize>) -> impl Strategy<Value = Vec<(StorePath, Derivation)>> {
    let uses = vec((any::<Index>(), any::<Index>()), 0..4);
    let node = (short_name(), 0..10u8, hash(), btree_set(output_name(), 1..4), uses, bytes());
    vec(node, size).prop_map(move |nodes| {
        let mut made: Vec<(StorePath, Derivation)> = Vec::new();
        let mut memo = Memo::new();
        for (name, kind, hash, names, uses, note) in nodes {
            let outputs = match kind {
                0..2 => {
                    let out = OutputName::out();
                    let address = ContentAddress::Fixed(Method::Flat, hash);
                    let output = Output::fixed(&dir, &name, &out, address).expect("the name is short");
                    BTreeMap::from([(out, output)])
                }
                2 => {
                    let floating = Output::Floating { method: OutputMethod::RECURSIVE, algorithm: hash.algorithm() };
                    names.into_iter().map(|name| (name, floating.clone())).collect()
                }
                _ => names.into_iter().map(|name| (name, Output::Deferred)).collect(),
            };
            let mut input_drvs: BTreeMap<StorePath, BTreeSet<OutputName>> = BTreeMap::new();
            for (which, output) in uses.into_iter().filter(|_| !made.is_empty()) {
                let (path, drv) = which.get(&made);
                let names: Vec<_> = drv.outputs.keys().collect();
                input_drvs.entry(path.clone()).or_default().insert((*output.get(&names)).clone());
            }
            let env = outputs.iter().map(|(name, output)| {
                (name.as_str().into(), output.path().map(|path| dir.full(path)).unwrap_or_default().into())
            });
            let mut drv = Derivation {
                name,
                env: env.chain([("note".into(), note)]).collect(),
                outputs,
                input_drvs,
                input_srcs: BTreeSet::new(),
                system: "x86_64-linux".into(),
                builder: "/bin/sh".into(),
                args: Vec::new(),
            };
            let find = |path: &StorePath| -> Result<&Derivation, std::convert::Infallible> {
                let found = made.iter().find(|(p, _)| p == path);
                Ok(found.map(|(_, drv)| drv).expect("inputs are made before"))
            };
            let modulo = memo.modulo(&dir, &drv, Mask::On, find).expect("inputs are there, outputs of one kind");
            if !modulo.deferred {
                fill_deferred(&dir, &mut drv, &modulo.digest).expect("names are short");
            }
            made.push((drv.path(&dir).expect("the name is short"), drv));
        }
        made
    })
}
