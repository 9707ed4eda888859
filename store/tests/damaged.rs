//! A ledger in which bits have changed, or of which the end is missing: every question has an answer or
//! an error, nothing panics, and what lies in the store can be registered anew.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests may panic")]

use std::fmt::Write as _;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use larder_core::content_address::Method;
use larder_core::hash::Algorithm;
use larder_core::report::Silent;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::{Name, StorePath};
use larder_fs::layout::{Access, Layout};
use larder_store::ingest::ContentAddressed;
use larder_store::rebuild::{SetAside, set_ledger_aside};
use larder_store::verify::{Nobody, VerifyOptions};
use larder_store::{LocalStore, Options, StoreError};
use proptest::prelude::*;

const PAGE: usize = 4096;

fn open(root: &Path, access: Access) -> Result<LocalStore, StoreError> {
    let layout = Layout::rooted(StoreDir::new("/nix/store").unwrap(), root);
    let options = Options { sync: false, gc_reserved_space_bytes: 0, ..Options::default() };
    LocalStore::open(layout, options, access, Arc::new(Silent))
}

fn source(n: usize) -> ContentAddressed {
    let name = Name::new(&format!("object{n}")).unwrap();
    ContentAddressed { name, method: Method::Recursive, algorithm: Algorithm::Sha256 }
}

/// A ledger in which all is well.
struct Sound {
    ledger: Vec<u8>,
    /// Pages that hold something.
    pages: Vec<usize>,
}

/// Fills a store; the same paths each time.
fn fill(root: &Path) -> Vec<StorePath> {
    let store = open(root, Access::ReadWrite).unwrap();
    let mut paths: Vec<StorePath> = Vec::new();
    let mut text = String::new();
    for n in 0..40 {
        let file = root.join("file");
        std::fs::write(&file, format!("object {n}")).unwrap();
        let path = store.add(&file, &source(n)).unwrap();
        let mut dump = Vec::new();
        store.dump_db(Some(std::slice::from_ref(&path)), &mut dump).unwrap();
        let head: Vec<String> = String::from_utf8(dump).unwrap().lines().take(3).map(str::to_owned).collect();
        let references: Vec<String> = paths.iter().rev().take(3).map(|path| store.dir().full(path)).collect();
        writeln!(text, "{}\n\n{}", head.join("\n"), references.len()).unwrap();
        for reference in references {
            writeln!(text, "{reference}").unwrap();
        }
        paths.push(path);
    }
    store.load_db(text.as_bytes()).unwrap();
    paths
}

fn sound() -> &'static Sound {
    static SOUND: LazyLock<Sound> = LazyLock::new(|| {
        let folder = tempfile::tempdir().unwrap();
        fill(folder.path());
        let ledger = std::fs::read(ledger(folder.path())).unwrap();
        let pages = (0..ledger.len() / PAGE).filter(|page| ledger[page * PAGE..][..PAGE].iter().any(|b| *b != 0));
        Sound { pages: pages.collect(), ledger }
    });
    &SOUND
}

fn ledger(root: &Path) -> std::path::PathBuf {
    root.join("nix/var/nix/db/larder.redb")
}

/// Bits that change (pages of those in use, offsets, bits), or where the file ends.
#[derive(Debug, Clone)]
enum Damage {
    Bits(Vec<(prop::sample::Index, usize, u32)>),
    End(prop::sample::Index),
}

impl Damage {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = sound().ledger.clone();
        match self {
            Self::Bits(bits) => {
                for (page, offset, bit) in bits {
                    bytes[page.get(&sound().pages) * PAGE + offset] ^= 1 << bit;
                }
            }
            Self::End(end) => bytes.truncate(end.index(bytes.len())),
        }
        bytes
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    let bits = proptest::collection::vec((any::<prop::sample::Index>(), 0..PAGE, 0..8u32), 1..24);
    prop_oneof![3 => bits.prop_map(Damage::Bits), 1 => any::<prop::sample::Index>().prop_map(Damage::End)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_damaged_ledger_ends_in_errors_and_can_be_made_anew(damage in damage()) {
        let bytes = damage.bytes();
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let paths = fill(root);
        let put = || std::fs::write(ledger(root), &bytes).unwrap();
        let check = VerifyOptions { check_contents: false, repair: false, resume: false };
        for access in [Access::ReadOnly, Access::ReadWrite] {
            put();
            // The answers may be wrong, as the bits of a size are no worse than others.
            if let Ok(store) = open(root, access) {
                let _ = store.info(&paths[20]);
                let _ = store.closure([&paths[39]]);
                let _ = larder_core::api::ReadStore::referrers(&store, &paths[0]);
                let _ = store.dump_db(None, &mut Vec::new());
                let _ = store.survey();
                let _ = store.verify(check, &Nobody);
                let file = root.join("new");
                std::fs::write(&file, "new").unwrap();
                let _ = store.add(&file, &source(100));
            }
        }
        put();
        let db_dir = ledger(root).parent().unwrap().to_owned();
        set_ledger_aside(&db_dir, SetAside::Broken).unwrap();
        let mut store = open(root, Access::ReadWrite).unwrap();
        let all_are_known = |store: &LocalStore| paths.iter().all(|path| matches!(store.is_valid(path), Ok(true)));
        if store.rebuild(false).is_err() || !all_are_known(&store) {
            // It makes sense, but not for this store.
            drop(store);
            put();
            set_ledger_aside(&db_dir, SetAside::Any).unwrap().unwrap();
            store = open(root, Access::ReadWrite).unwrap();
            store.rebuild(false).unwrap();
        }
        prop_assert!(all_are_known(&store));
    }
}
