//! The ledger from outside, case by case.

use super::{batch, house, info, path, set};
use crate::{DbError, Mode, OpenOptions, ReadTxn, StoreDb, Walk, graph};

#[test]
fn registered_paths_are_found_again() {
    let (dir, db) = house();
    let (a, b, c) = (path(1, "a"), path(2, "b"), path(3, "c"));
    let infos = [info(&a, &[&b, &a]), info(&b, &[&c]), info(&c, &[])];
    db.register(batch(&infos)).unwrap();
    db.close().unwrap();
    let db = StoreDb::open(dir.path(), &OpenOptions::new(Mode::ReadOnly)).unwrap();
    for info in &infos {
        assert_eq!(db.read(|r| r.info(&info.path)).unwrap().as_ref(), Some(info));
    }
    assert_eq!(db.read(|r| r.referrers(&a)).unwrap(), Some(vec![a.clone()]));
    assert_eq!(db.read(|r| r.referrers(&c)).unwrap(), Some(vec![b.clone()]));
    assert_eq!(db.read(|r| r.by_hash_part(b.hash_part())).unwrap(), Some(b.clone()));
    assert_eq!(db.read(|r| r.info(&path(1, "other"))).unwrap(), None);
    let graph = db.read(|r| graph::closure_of(r, std::slice::from_ref(&b), Walk::REFERENCES)).unwrap();
    let names: Vec<&str> = graph.topological_all().unwrap().into_iter().map(|n| graph.base_name(n)).collect();
    assert_eq!(names, [c.to_string(), b.to_string()]);
    assert_eq!(db.check().unwrap(), []);
    assert!(matches!(db.write(|w| w.set_meta("x", b"y")), Err(DbError::ReadOnly { .. })));
}

#[test]
fn nothing_is_left_dangling() {
    let (_dir, db) = house();
    let (a, b, c) = (path(1, "a"), path(2, "b"), path(3, "c"));
    let error = db.register(batch(&[info(&a, &[&b])])).unwrap_err();
    assert_eq!(error.to_string(), format!("path '{b}' is not valid"));
    let error = db.register(batch(&[info(&a, &[&b]), info(&b, &[&a])])).unwrap_err();
    assert_eq!(error.to_string(), format!("cycle detected in the references of '{a}' from '{b}'"));
    db.register(batch(&[info(&a, &[&b]), info(&c, &[&b, &a]), info(&b, &[])])).unwrap();
    let error = db.write(|w| w.invalidate(&set([&b]))).unwrap_err();
    assert_eq!(error.to_string(), format!("cannot delete path '{b}' because it is in use by '{a}', '{c}'"));
    assert_eq!(db.write(|w| w.invalidate(&set([&a, &b, &c]))).unwrap(), 3);
    assert_eq!(db.read(ReadTxn::count).unwrap(), 0);
    assert_eq!(db.check().unwrap(), []);
}
