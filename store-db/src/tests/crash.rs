//! The power goes at any moment: what was reported as done is there, what was not is there whole
//! or not at all, and the tables agree.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use larder_core::path_info::PathInfo;
use larder_core::store_path::StorePath;

use super::disk::{Disk, Op, apply};
use super::{batch, info, path, set, soak_s};
use crate::{DbError, StoreDb};

/// All of the ledger that the changes touch.
#[derive(Debug, Clone, PartialEq)]
struct Contents {
    infos: Vec<PathInfo>,
    meta: Option<Vec<u8>>,
}

fn contents(db: &StoreDb) -> Result<Contents, DbError> {
    db.read(|r| {
        assert_eq!(r.check()?, []);
        let infos = r.infos(&r.all_paths()?)?;
        Ok(Contents {
            infos: infos.into_iter().map(|info| info.expect("listed as valid")).collect(),
            meta: r.meta("n")?,
        })
    })
}

/// Numbers that look random (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// Many paths, so that pages split and the file grows.
fn crowd(from: u8, count: u8) -> Vec<PathInfo> {
    let name = |n: u8| path(n, &format!("{}-{n}", "long-name".repeat(18)));
    (from..from + count).map(|n| info(&name(n), &[&name(n), &name(n - (n - from).min(5)), &name(from)])).collect()
}

type Change<'a> = dyn Fn(&StoreDb) -> Result<(), DbError> + 'a;

/// Changes of every kind, with the contents after each.
fn record_changes(disk: &Disk) -> Vec<Contents> {
    let mut db = StoreDb::on_disk(disk).unwrap();
    let mut after = vec![contents(&db).unwrap()];
    let (a, b, c) = (path(1, "a"), path(2, "b"), path(3, "c.drv"));
    let many: BTreeSet<StorePath> = crowd(100, 60).into_iter().map(|info| info.path).collect();
    let changes: Vec<Box<Change<'_>>> = vec![
        Box::new(|db| db.register(batch(&[info(&path(1, "a"), &[])]))),
        Box::new(|db| db.register(batch(&crowd(20, 40)))),
        Box::new(|db| db.register(batch(&[info(&b, &[&a, &b]), info(&c, &[&b])]))),
        Box::new(|db| db.write(|w| w.set_meta("n", &[9; 5000]))),
        Box::new(|db| db.register(batch(&crowd(100, 60)))),
        Box::new(|db| db.write(|w| w.invalidate(&many).map(|n| assert_eq!(n, 60)))),
        Box::new(|db| db.write(|w| w.invalidate(&set([&c])).map(|_| ()))),
        Box::new(|db| db.register(batch(&crowd(170, 70)))),
        Box::new(|db| {
            db.write(|w| {
                w.invalidate(&set([&b]))?;
                w.register(batch(&[info(&b, &[])]))?;
                w.set_meta("n", b"2")
            })
        }),
        Box::new(|db| db.register(batch(&[info(&c, &[&a])]))),
    ];
    for (n, change) in changes.iter().enumerate() {
        if n % 4 == 3 {
            db.close().unwrap();
            db = StoreDb::on_disk(disk).unwrap();
        }
        change(&db).unwrap();
        disk.mark(n + 1);
        after.push(contents(&db).unwrap());
    }
    after
}

/// The disk after the power went at `cut`: all that was synced, and of the rest what luck let through.
fn image_after(start: &[u8], log: &[Op], cut: usize, luck: u64) -> Vec<u8> {
    let synced = log[..cut].iter().rposition(|op| matches!(op, Op::Sync)).map_or(0, |at| at + 1);
    let mut image = start.to_vec();
    log[..synced].iter().for_each(|op| apply(&mut image, op));
    let mut random = Random(luck);
    for op in &log[synced..cut] {
        let fate = match luck {
            0 => 0,
            1 => 1,
            _ => random.below(4),
        };
        match (fate, op) {
            (0, _) => {}
            (3, Op::Write { offset, data }) => tear(&mut image, *offset, data, &mut random),
            _ => apply(&mut image, op),
        }
    }
    image
}

/// Lets some sectors of a write through, or it up to some byte.
fn tear(image: &mut Vec<u8>, offset: u64, data: &[u8], random: &mut Random) {
    if random.below(2) == 0 {
        let upto = usize::try_from(random.below(data.len() as u64 + 1)).unwrap();
        return apply(image, &Op::Write { offset, data: data[..upto].to_vec() });
    }
    for (sector, at) in data.chunks(512).zip((0u64..).step_by(512)) {
        if random.below(2) == 0 {
            apply(image, &Op::Write { offset: offset + at, data: sector.to_vec() });
        }
    }
}

#[test]
fn a_crash_loses_nothing_that_was_done() {
    let start = Instant::now();
    let disk = Disk::default();
    drop(StoreDb::on_disk(&disk).unwrap());
    let (first, disk) = (disk.image(), Disk::of(disk.image()));
    let after = record_changes(&disk);
    let log = disk.log();
    println!("{} steps, {} changes", log.len(), after.len() - 1);
    let limit = soak_s().map_or(Duration::from_secs(6), Duration::from_secs);
    // Every cut with nothing and with all of the unsynced writes, and with as much luck as time allows.
    let mut tried = 0;
    for round in 0u64.. {
        for cut in 0..=log.len() {
            let luck = if round < 2 { round } else { round << 32 | cut as u64 };
            let marks = log[..cut].iter().rev().find_map(|op| if let Op::Mark(n) = op { Some(*n) } else { None });
            let done = marks.unwrap_or(0);
            let image = image_after(&first, &log, cut, luck);
            let disk = Disk::of(image.clone());
            let db = StoreDb::on_disk(&disk).unwrap_or_else(|e| panic!("cut {cut}, luck {luck}: {e:?}"));
            let found = contents(&db).unwrap_or_else(|e| panic!("cut {cut}, luck {luck}: {e:?}"));
            let fine = |found: &Contents| *found == after[done] || after.get(done + 1) == Some(found);
            assert!(fine(&found), "cut {cut}, luck {luck}: neither change {done} nor the next");
            // The power goes again, while this is recovered from.
            let recovery = disk.log();
            let again = usize::try_from(Random(luck ^ 0x5555).below(recovery.len() as u64 + 1)).unwrap();
            let image = image_after(&image, &recovery, again, luck);
            let twice = StoreDb::on_disk(&Disk::of(image)).and_then(|db| contents(&db));
            let twice = twice.unwrap_or_else(|e| panic!("cut {cut}, luck {luck}, again at {again}: {e:?}"));
            assert!(fine(&twice), "cut {cut}, luck {luck}, again at {again}: neither change {done} nor the next");
            if cut % 16 == 0 {
                // It is usable, not only readable.
                db.register(batch(&crowd(241, 9))).unwrap();
                assert_eq!(contents(&db).unwrap().infos.len(), found.infos.len() + 9);
            }
            tried += 1;
            if start.elapsed() > limit && round >= 2 {
                println!("{tried} crashes");
                return;
            }
        }
    }
}
