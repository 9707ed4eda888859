//! Data for the benches.

use std::io::{self, Write};

use larder_core::hash::Sha256Digest;
use larder_core::hash_part::HashPart;
use larder_core::signature::Signature;
use larder_core::store_path::{Name, StorePath};
use larder_store_db::{Batch, DbError, Graph, NewPath, PathRef, StoreDb};

/// A store of so many paths that do not exist: 7 references each (to the hub, to earlier paths
/// near and far, some to itself), a deriver and a signature.
#[derive(Debug)]
pub struct Synthetic {
    count: u32,
    signature: Signature,
}

impl Synthetic {
    pub fn new(count: u32) -> Self {
        let text = format!("cache.nixos.org-1:{}==", "Ab1/".repeat(21) + "Aw");
        Self { count, signature: text.parse().expect("a signature") }
    }

    /// The path with this number, which may be beyond the count.
    pub fn path(&self, n: u32) -> StorePath {
        let digest = Sha256Digest::of(&n.to_le_bytes());
        let hash_part = HashPart::from_bytes(*digest.as_bytes().first_chunk().expect("32 bytes hold 20"));
        let name = ["glibc", "python3.11-requests", "perl", "linux-headers-static", "source", "gcc-wrapper"];
        let name = format!("{}-{}.{}", name.get(n as usize % name.len()).unwrap_or(&"x"), n % 90, n);
        StorePath::new(hash_part, Name::new(&name).expect("legal"))
    }

    pub fn references(&self, n: u32) -> Vec<u32> {
        let digest = Sha256Digest::of(&[n.to_le_bytes(), *b"refs"].concat());
        let random = |k: usize| {
            digest.as_bytes().get(k * 4..k * 4 + 4).map_or(0, |b| b.iter().fold(0, |a, b| a << 8 | u32::from(*b)))
        };
        let mut all: Vec<u32> = Vec::new();
        // Paths beyond the count come on top of a store that holds all the others.
        let below = if n < self.count { n } else { self.count };
        if below > 0 {
            if n % 4 == 1 {
                all.push(0);
            }
            all.push(below - 1);
            all.extend((0..5).map(|k| random(k) % below));
        }
        if n.is_multiple_of(2) {
            all.push(n);
        }
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Adds the path to a batch.
    pub fn push(&self, batch: &mut Batch, n: u32) {
        let path = self.path(n);
        let deriver = StorePath::new(
            HashPart::from_digest(*path.hash_part().as_bytes()),
            Name::new(&format!("{}.drv", path.name())).expect("legal"),
        );
        let references: Vec<StorePath> = self.references(n).into_iter().map(|n| self.path(n)).collect();
        let references: Vec<PathRef<'_>> = references.iter().map(PathRef::from).collect();
        batch
            .push(&NewPath {
                references: &references,
                deriver: Some(PathRef::from(&deriver)),
                registration_time_s: 1_700_000_000 + u64::from(n),
                signatures: std::slice::from_ref(&self.signature),
                ..NewPath::new(PathRef::from(&path), Sha256Digest::of(&n.to_be_bytes()), u64::from(n) * 17 + 120)
            })
            .expect("a batch of a million paths");
    }

    pub const fn count(&self) -> u32 {
        self.count
    }
}

/// What `--dump-db` prints. The ledger is read before the first line is written, as a reader of
/// the output may take its time.
pub fn dump(db: &StoreDb, out: &mut impl Write) -> Result<(), DbError> {
    let mut hashes = Vec::new();
    let mut derivers = Vec::new();
    let graph = db.read(|r| {
        Graph::load_with(r, |view| {
            hashes.push(view.nar_hash);
            derivers.push(view.deriver().map(|deriver| deriver.to_string().into_boxed_str()));
            Ok::<_, DbError>(())
        })
    })?;
    let write = || -> io::Result<()> {
        for ((node, hash), deriver) in graph.nodes().zip(hashes).zip(derivers) {
            writeln!(out, "/nix/store/{}", graph.path_ref(node))?;
            writeln!(out, "{}\n{}", hash.to_hex(), graph.nar_size_bytes(node))?;
            match deriver {
                Some(deriver) => writeln!(out, "/nix/store/{deriver}")?,
                None => writeln!(out)?,
            }
            writeln!(out, "{}", graph.references(node).len())?;
            for reference in graph.references(node) {
                out.write_all(b"/nix/store/")?;
                write!(out, "{}", graph.path_ref(reference))?;
                out.write_all(b"\n")?;
            }
        }
        out.flush()
    };
    write().expect("standard output takes it");
    Ok(())
}
