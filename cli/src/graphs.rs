//! The listings of a graph of store paths: `--tree`, `--graph`, `--graphml`, and dependency order.
//!
//! Pure but for asking [`Nodes`] for the references of one path at a time, so that a snapshot of
//! the database, a remote store and a table in a test all do. Nothing recurses: a graph may be
//! deeper than the stack. Source: cli, sections 6.1 to 6.5; `graph_outputs.json`.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::rc::Rc;

use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

use crate::exit::Failure;

/// Tells what the store knows of a valid path.
pub trait Nodes {
    /// The references in ascending order, the path itself among them if it refers to itself.
    /// An error if the path is not valid.
    fn references(&mut self, path: &StorePath) -> Result<Rc<[StorePath]>, Failure>;

    fn nar_size_bytes(&mut self, path: &StorePath) -> Result<u64, Failure>;
}

/// Two paths that refer to each other, directly or not, other than an object to itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cycle detected in the references of '{}' from '{}'", dir.display(path), dir.display(from))]
pub struct Cycle {
    dir: StoreDir,
    path: StorePath,
    from: StorePath,
}

/// Puts dependencies first: members in ascending order, each after those it refers to.
pub fn dependency_order(
    dir: &StoreDir,
    set: &BTreeSet<StorePath>,
    nodes: &mut dyn Nodes,
) -> Result<Vec<StorePath>, Failure> {
    /// A member whose references are being gone through.
    struct Open {
        path: StorePath,
        references: Rc<[StorePath]>,
        next: usize,
    }
    let mut order = Vec::with_capacity(set.len());
    // False while open, true once in the order.
    let mut seen: HashMap<StorePath, bool> = HashMap::with_capacity(set.len());
    let mut open: Vec<Open> = Vec::new();
    for start in set {
        if seen.contains_key(start) {
            continue;
        }
        seen.insert(start.clone(), false);
        open.push(Open { path: start.clone(), references: nodes.references(start)?, next: 0 });
        while let Some(top) = open.last_mut() {
            let Some(reference) = top.references.get(top.next).cloned() else {
                seen.insert(top.path.clone(), true);
                order.push(top.path.clone());
                open.pop();
                continue;
            };
            top.next += 1;
            if reference == top.path || !set.contains(&reference) {
                continue;
            }
            match seen.get(&reference) {
                Some(true) => {}
                Some(false) => {
                    let from = top.path.clone();
                    return Err(Cycle { dir: dir.clone(), path: reference, from }.into());
                }
                None => {
                    seen.insert(reference.clone(), false);
                    let references = nodes.references(&reference)?;
                    open.push(Open { path: reference, references, next: 0 });
                }
            }
        }
    }
    Ok(order)
}

/// `--tree`. Paths that were shown are shared over all calls for one command.
#[derive(Debug, Default)]
pub struct Tree {
    shown: HashSet<StorePath>,
}

impl Tree {
    /// The tree below one argument.
    pub fn print(
        &mut self,
        dir: &StoreDir,
        root: &StorePath,
        nodes: &mut dyn Nodes,
        out: &mut dyn Write,
    ) -> Result<(), Failure> {
        /// A path whose children are being printed.
        struct Open {
            children: std::iter::Peekable<std::vec::IntoIter<StorePath>>,
            /// Length in bytes of the prefix of its children.
            prefix_len: usize,
        }
        let mut children = |path: &StorePath| -> Result<Vec<StorePath>, Failure> {
            let set = nodes.references(path)?.iter().cloned().collect();
            dependency_order(dir, &set, nodes)
        };
        // Where a path is asked for twice, real Nix says nothing of its validity.
        if !self.shown.insert(root.clone()) {
            writeln!(out, "{} [...]", dir.display(root))?;
            return Ok(());
        }
        // The line of a path is there before it turns out that it is not valid.
        writeln!(out, "{}", dir.display(root))?;
        let first = children(root)?;
        let mut prefix = String::new();
        let mut open = vec![Open { children: first.into_iter().peekable(), prefix_len: 0 }];
        while let Some(top) = open.last_mut() {
            prefix.truncate(top.prefix_len);
            let Some(path) = top.children.next() else {
                open.pop();
                continue;
            };
            let (branch, below) = match top.children.peek() {
                Some(_) => ("├───", "│   "),
                None => ("└───", "    "),
            };
            if !self.shown.insert(path.clone()) {
                writeln!(out, "{prefix}{branch}{} [...]", dir.display(&path))?;
                continue;
            }
            writeln!(out, "{prefix}{branch}{}", dir.display(&path))?;
            let children = children(&path)?;
            prefix.push_str(below);
            open.push(Open { children: children.into_iter().peekable(), prefix_len: prefix.len() });
        }
        Ok(())
    }
}

/// Goes through the closure of `start`, always on with the smallest path that is left.
fn each_node(
    start: impl IntoIterator<Item = StorePath>,
    nodes: &mut dyn Nodes,
    mut visit: impl FnMut(&StorePath, &mut dyn Nodes) -> Result<Rc<[StorePath]>, Failure>,
) -> Result<(), Failure> {
    let mut left: BTreeSet<StorePath> = start.into_iter().collect();
    let mut done = HashSet::new();
    while let Some(path) = left.pop_first() {
        if !done.insert(path.clone()) {
            continue;
        }
        let references = visit(&path, nodes)?;
        left.extend(references.iter().filter(|reference| !done.contains(*reference)).cloned());
    }
    Ok(())
}

/// Colours of edges, in turn.
const COLOURS: [&str; 6] = ["black", "red", "green", "blue", "magenta", "burlywood"];

/// `--graph`: the language of Graphviz.
pub fn print_dot(
    start: impl IntoIterator<Item = StorePath>,
    nodes: &mut dyn Nodes,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let mut colours = COLOURS.iter().cycle();
    out.write_all(b"digraph G {\n")?;
    each_node(start, nodes, |path, nodes| {
        let label = path.name();
        // Before it turns out whether the path is valid.
        writeln!(out, "\"{path}\" [label = \"{label}\", shape = box, style = filled, fillcolor = \"#ff0000\"];")?;
        let references = nodes.references(path)?;
        for reference in references.iter().filter(|reference| *reference != path) {
            let colour = colours.next().unwrap_or(&"black");
            writeln!(out, "\"{reference}\" -> \"{path}\" [color = \"{colour}\"];")?;
        }
        Ok(references)
    })?;
    out.write_all(b"}\n")?;
    Ok(())
}

const GRAPHML_HEAD: &str = "\
<?xml version='1.0' encoding='utf-8'?>
<graphml xmlns='http://graphml.graphdrawing.org/xmlns'
    xmlns:xsi='http://www.w3.org/2001/XMLSchema-instance'
    xsi:schemaLocation='http://graphml.graphdrawing.org/xmlns/1.0/graphml.xsd'>
<key id='narSize' for='node' attr.name='narSize' attr.type='long'/>\
<key id='name' for='node' attr.name='name' attr.type='string'/>\
<key id='type' for='node' attr.name='type' attr.type='string'/>\
<graph id='G' edgedefault='directed'>
";

/// `--graphml`. The size is declared `long`, as in 2.26; 2.8 says `int` and prints the same.
pub fn print_graphml(
    start: impl IntoIterator<Item = StorePath>,
    nodes: &mut dyn Nodes,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    out.write_all(GRAPHML_HEAD.as_bytes())?;
    each_node(start, nodes, |path, nodes| {
        let size = nodes.nar_size_bytes(path)?;
        let references = nodes.references(path)?;
        // Meant to be the name without its version; both versions of Nix print no more than this.
        let name = path.name().as_str();
        let name = name.split_inclusive('-').next().filter(|first| first.ends_with('-')).unwrap_or_default();
        let kind = if path.is_derivation() { "derivation" } else { "output-path" };
        writeln!(out, "  <node id=\"{path}\">")?;
        writeln!(out, "    <data key=\"narSize\">{size}</data>")?;
        writeln!(out, "    <data key=\"name\">{name}</data>")?;
        writeln!(out, "    <data key=\"type\">{kind}</data>")?;
        writeln!(out, "  </node>")?;
        for reference in references.iter().filter(|reference| *reference != path) {
            writeln!(out, "  <edge source=\"{path}\" target=\"{reference}\"/>")?;
        }
        Ok(references)
    })?;
    out.write_all(b"</graph>\n</graphml>\n")?;
    Ok(())
}

/// A line of `--roots` and `--print-roots`: `LINK -> PATH`.
pub fn print_root(dir: &StoreDir, link: &OsStr, target: &StorePath, out: &mut dyn Write) -> io::Result<()> {
    out.write_all(link.as_bytes())?;
    writeln!(out, " -> {}", dir.display(target))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Deserialize)]
    struct File {
        store_dir: String,
        cases: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Case {
        id: String,
        nodes: Vec<Node>,
        arguments: Vec<String>,
        tree: String,
        graph: String,
        graphml: String,
        requisites: String,
        references: String,
    }

    #[derive(Deserialize)]
    struct Node {
        path: String,
        nar_size: u64,
        references: Vec<String>,
    }

    #[derive(Debug, thiserror::Error)]
    #[error("path '{0}' is not valid")]
    struct NotValid(StorePath);

    #[derive(Default)]
    struct Table(HashMap<StorePath, (u64, Rc<[StorePath]>)>);

    impl Nodes for Table {
        fn references(&mut self, path: &StorePath) -> Result<Rc<[StorePath]>, Failure> {
            Ok(self.0.get(path).ok_or_else(|| NotValid(path.clone()))?.1.clone())
        }
        fn nar_size_bytes(&mut self, path: &StorePath) -> Result<u64, Failure> {
            Ok(self.0.get(path).ok_or_else(|| NotValid(path.clone()))?.0)
        }
    }

    impl Table {
        fn add(&mut self, path: &StorePath, size: u64, references: impl IntoIterator<Item = StorePath>) {
            let references: BTreeSet<StorePath> = references.into_iter().collect();
            self.0.insert(path.clone(), (size, references.into_iter().collect()));
        }
    }

    fn paths<'a>(texts: impl IntoIterator<Item = &'a String>) -> Vec<StorePath> {
        texts.into_iter().map(|text| text.parse().unwrap()).collect()
    }

    fn lines(dir: &StoreDir, paths: &[StorePath]) -> String {
        paths.iter().flat_map(|path| [dir.full(path), "\n".to_owned()]).collect()
    }

    fn written(print: impl FnOnce(&mut Vec<u8>) -> Result<(), Failure>) -> String {
        let mut out = Vec::new();
        print(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn vectors() {
        let text = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/graph_outputs.json"));
        let file: File = serde_json::from_str(text).unwrap();
        let dir = StoreDir::new(file.store_dir).unwrap();
        println!("graph_outputs: {} cases", file.cases.len());
        for case in &file.cases {
            let mut table = Table::default();
            for node in &case.nodes {
                table.add(&node.path.parse().unwrap(), node.nar_size, paths(&node.references));
            }
            let arguments = paths(&case.arguments);
            let tree = written(|out| {
                let mut tree = Tree::default();
                arguments.iter().try_for_each(|path| tree.print(&dir, path, &mut table, out))
            });
            assert_eq!(tree, case.tree, "{} --tree", case.id);
            let dot = written(|out| print_dot(arguments.clone(), &mut table, out));
            assert_eq!(dot, case.graph, "{} --graph", case.id);
            let graphml = written(|out| print_graphml(arguments.clone(), &mut table, out));
            let wanted = case.graphml.replace("attr.type='int'", "attr.type='long'");
            assert_eq!(graphml, wanted, "{} --graphml", case.id);

            let mut direct = BTreeSet::new();
            let mut closure = BTreeSet::new();
            each_node(arguments.clone(), &mut table, |path, nodes| {
                closure.insert(path.clone());
                nodes.references(path)
            })
            .unwrap();
            for path in &arguments {
                direct.extend(table.references(path).unwrap().iter().cloned());
            }
            let order = dependency_order(&dir, &closure, &mut table).unwrap();
            assert_eq!(lines(&dir, &order), case.requisites, "{} --requisites", case.id);
            let order = dependency_order(&dir, &direct, &mut table).unwrap();
            assert_eq!(lines(&dir, &order), case.references, "{} --references", case.id);
        }
    }

    fn path(number: u32, name: &str) -> StorePath {
        format!("{number:0>32}-{name}").parse().unwrap()
    }

    #[test]
    fn a_cycle_is_an_error() {
        let dir = StoreDir::new("/nix/store").unwrap();
        let (a, b) = (path(1, "a"), path(2, "b"));
        let mut table = Table::default();
        table.add(&a, 1, [b.clone()]);
        table.add(&b, 1, [a.clone(), b.clone()]);
        let error = dependency_order(&dir, &[a.clone(), b.clone()].into(), &mut table).unwrap_err();
        let text = format!("cycle detected in the references of '{}' from '{}'", dir.full(&a), dir.full(&b));
        assert_eq!(error.error().to_string(), text);
        // Where no order is asked for there is no harm in one.
        assert!(written(|out| print_dot([a], &mut table, out)).contains(" -> "));
    }

    #[test]
    fn a_deep_graph_needs_no_deep_stack() {
        let dir = StoreDir::new("/nix/store").unwrap();
        let mut table = Table::default();
        let chain: Vec<StorePath> = (0..3000).map(|number| path(number, "link")).collect();
        for (i, path) in chain.iter().enumerate() {
            table.add(path, 1, chain.get(i + 1).cloned());
        }
        let set: BTreeSet<StorePath> = chain.iter().cloned().collect();
        let order = dependency_order(&dir, &set, &mut table).unwrap();
        assert!(order.iter().rev().eq(&chain));
        let tree = written(|out| Tree::default().print(&dir, chain.first().unwrap(), &mut table, out));
        assert_eq!(tree.lines().count(), 3000);
    }

    #[test]
    fn a_path_that_is_not_valid_is_told() {
        let dir = StoreDir::new("/nix/store").unwrap();
        let mut out = Vec::new();
        let error = Tree::default().print(&dir, &path(1, "a"), &mut Table::default(), &mut out).unwrap_err();
        assert!(error.error().to_string().ends_with("is not valid"));
        // Real Nix has printed it by then.
        assert_eq!(out, format!("{}\n", dir.display(&path(1, "a"))).as_bytes());
    }

    #[test]
    fn root_lines_keep_the_bytes_of_the_link() {
        let dir = StoreDir::new("/nix/store").unwrap();
        let mut out = Vec::new();
        print_root(&dir, OsStr::from_bytes(b"/h/r\xff"), &path(1, "a"), &mut out).unwrap();
        assert_eq!(out, [b"/h/r\xff -> ", dir.full(&path(1, "a")).as_bytes(), b"\n"].concat());
    }
}
