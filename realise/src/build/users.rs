//! Build users: accounts that builders run as, each used by one build at a time.
//!
//! Source: building, section 8. The members of the group are taken in their order; whoever holds
//! the lock on `$V/userpool/<uid>` has the user, across all processes and real Nix. Stores of one
//! machine have state folders of their own, but the users are the same, and whoever has one kills all
//! that it runs: so there is a second lock in `/run/larder/uids`, which Larder's stores share.

use std::hash::{Hash as _, Hasher as _};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use larder_fs::file_error::FileError;
use larder_fs::layout::{Layout, make_dirs};
use larder_fs::lock_file::{LockFile, Sharing, Wait};
use larder_fs::users::Users;

/// A user that one build has, until dropped.
#[derive(Debug)]
pub struct BuildUser {
    pub uid: u32,
    /// Of the build users' group.
    pub gid: u32,
    /// The groups of the account, for builds without a sandbox (`kvm`).
    pub groups: Vec<u32>,
    _lock: UserLock,
}

/// Locks named by user ids, for root alone. Where it cannot be made, each store has its own locks only.
const FOR_ALL_STORES: &str = "/run/larder/uids";

/// A user id that nobody else has, until dropped.
#[derive(Debug)]
pub(super) struct UserLock {
    _store: LockFile,
    _machine: Option<LockFile>,
    _slot: Option<LockFile>,
}

/// Ids that belong to no account, for builds in a sandbox where there are no build users. Each is
/// the first of a slot of 65,536, as real Nix lays them out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    pub start: u32,
    pub count: u32,
}

/// Ids in one slot.
const SLOT: u32 = 1 << 16;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UsersError {
    #[error("the group '{group}' specified in 'build-users-group' does not exist")]
    NoGroup { group: String },
    #[error("the build users group '{group}' has no members")]
    NoMembers { group: String },
    #[error("the user '{user}' in the group '{group}' does not exist")]
    NoUser { user: String, group: String },
    #[error("the Nix user should not be a member of '{group}'")]
    Ourselves { group: String },
    #[error("cannot read the user database")]
    Database(#[source] io::Error),
    #[error(transparent)]
    Lock(#[from] FileError),
}

/// Takes a member of the group that no build uses; `None` if all are in use.
pub fn acquire(layout: &Layout, users: &Users, group: &str) -> Result<Option<BuildUser>, UsersError> {
    let found = users.group_by_name(group).map_err(UsersError::Database)?;
    let found = found.ok_or_else(|| UsersError::NoGroup { group: group.to_owned() })?;
    if found.members.is_empty() {
        return Err(UsersError::NoMembers { group: group.to_owned() });
    }
    let me = rustix::process::geteuid().as_raw();
    for name in &found.members {
        let user = users.user_by_name(name).map_err(UsersError::Database)?;
        let user = user.ok_or_else(|| UsersError::NoUser { user: name.clone(), group: group.to_owned() })?;
        if user.uid == 0 || user.uid == me || rustix::process::getuid().as_raw() == user.uid {
            return Err(UsersError::Ourselves { group: group.to_owned() });
        }
        if let Some(lock) = lock(layout, user.uid)? {
            let groups = users.groups_of(&user).map_err(UsersError::Database)?;
            // What belongs to root's group is nothing for a builder.
            let groups = groups.into_iter().filter(|gid| *gid != 0 && *gid != found.gid).collect();
            return Ok(Some(BuildUser { uid: user.uid, gid: found.gid, groups, _lock: lock }));
        }
    }
    Ok(None)
}

/// Takes ids of a range that no build uses; `None` if all are in use.
///
/// The lock on `$V/userpool2/slot-N` keeps real Nix out. Each store begins at another place, as real
/// Nix knows nothing of the others, and ids that are at work are passed over. (What a dead build of
/// ours has left was killed before, by the journal.)
pub fn allocate(layout: &Layout, range: Range) -> Result<Option<BuildUser>, UsersError> {
    let pool = layout.state.join("userpool2");
    make_dirs(&pool)?;
    let slots = range.count / SLOT;
    let mut hasher = std::hash::DefaultHasher::new();
    layout.state.hash(&mut hasher);
    let first = hasher.finish().checked_rem(u64::from(slots)).and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
    for slot in (first..slots).chain(0..first) {
        let Some(uid) = slot.checked_mul(SLOT).and_then(|offset| range.start.checked_add(offset)) else { break };
        // Root, and the number that means "as it was", are no ids for a builder.
        if uid == 0 || uid == u32::MAX {
            continue;
        }
        let file = LockFile::open(&pool.join(format!("slot-{slot}")))?;
        if super::run::runs_anything(uid) {
            continue;
        }
        if file.lock(Sharing::Exclusive, &mut Wait::No)?
            && let Some(lock) = lock(layout, uid)?
        {
            let lock = UserLock { _slot: Some(file), ..lock };
            return Ok(Some(BuildUser { uid, gid: uid, groups: Vec::new(), _lock: lock }));
        }
    }
    Ok(None)
}

/// Takes the locks of a build user, if nobody has them.
pub(super) fn lock(layout: &Layout, uid: u32) -> Result<Option<UserLock>, FileError> {
    let pool = layout.user_pool();
    make_dirs(&pool)?;
    let of_store = LockFile::open(&pool.join(uid.to_string()))?;
    if !of_store.lock(Sharing::Exclusive, &mut Wait::No)? {
        return Ok(None);
    }
    let of_machine = for_all_stores(Path::new(FOR_ALL_STORES), uid);
    if let Some(lock) = &of_machine
        && !lock.lock(Sharing::Exclusive, &mut Wait::No)?
    {
        return Ok(None);
    }
    Ok(Some(UserLock { _store: of_store, _machine: of_machine, _slot: None }))
}

/// The lock file of a user id for all stores of this machine. Only root has users to share.
fn for_all_stores(dir: &Path, uid: u32) -> Option<LockFile> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).ok()?;
    LockFile::open(&dir.join(uid.to_string())).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use larder_core::store_dir::StoreDir;

    #[test]
    fn slots_of_a_range_are_used_once() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::rooted(StoreDir::new("/nix/store").unwrap(), dir.path());
        let range = Range { start: 872_415_232, count: 3 * SLOT };
        let get = || allocate(&layout, range).unwrap();
        let (first, second, third) = (get().unwrap(), get().unwrap(), get().unwrap());
        let ids: std::collections::BTreeSet<u32> = [first.uid, second.uid, third.uid].into();
        assert_eq!(ids, [0, 1, 2].map(|slot| range.start + slot * SLOT).into());
        assert_eq!((second.gid, second.groups.len()), (second.uid, 0));
        assert!(get().is_none());
        let again = second.uid;
        drop(second);
        assert_eq!(get().unwrap().uid, again);
        drop((first, third));
        assert!(allocate(&layout, Range { start: u32::MAX, count: SLOT }).unwrap().is_none());
        assert!(allocate(&layout, Range { start: 0, count: SLOT }).unwrap().is_none());
        assert!(allocate(&layout, Range { start: 1, count: SLOT - 1 }).unwrap().is_none());
    }

    #[test]
    fn stores_share_the_users_of_a_machine() {
        if !rustix::process::geteuid().is_root() || for_all_stores(Path::new(FOR_ALL_STORES), 1).is_none() {
            println!("skipped: it takes root, and a folder /run");
            return;
        }
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [first, second] =
            dirs.each_ref().map(|dir| Layout::rooted(StoreDir::new("/nix/store").unwrap(), dir.path()));
        // Ids that no other test takes.
        let range = Range { start: 1_900_000_000, count: SLOT };
        let user = allocate(&first, range).unwrap().unwrap();
        assert!(allocate(&second, range).unwrap().is_none());
        assert!(lock(&second, user.uid).unwrap().is_none());
        drop(user);
        assert!(allocate(&second, range).unwrap().is_some());
    }

    #[test]
    fn each_user_once_and_clear_errors() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::rooted(StoreDir::new("/nix/store").unwrap(), dir.path());
        let me = rustix::process::geteuid().as_raw();
        let group = "g:x:100:\nb:x:4000:u1,u2\nlost:x:4001:u9\nroot:x:0:u1\nmine:x:4002:me\nkvm:x:78:u1\n";
        std::fs::write(dir.path().join("group"), group).unwrap();
        let passwd = format!("u1:x:40001:4000::/:/x\nu2:x:40002:4000::/:/x\nme:x:{me}:4002::/:/x\n");
        std::fs::write(dir.path().join("passwd"), passwd).unwrap();
        let users = Users::from_files(dir.path().join("passwd"), dir.path().join("group"));
        let get = |group: &str| acquire(&layout, &users, group);
        let first = get("b").unwrap().unwrap();
        assert_eq!((first.uid, first.gid, &first.groups[..]), (40001, 4000, &[78][..]));
        let second = get("b").unwrap().unwrap();
        assert_eq!((second.uid, second.groups.len()), (40002, 0));
        assert!(get("b").unwrap().is_none());
        drop(first);
        assert_eq!(get("b").unwrap().unwrap().uid, 40001);
        for (group, text) in [
            ("z", "the group 'z' specified in 'build-users-group' does not exist"),
            ("g", "the build users group 'g' has no members"),
            ("lost", "the user 'u9' in the group 'lost' does not exist"),
            ("mine", "the Nix user should not be a member of 'mine'"),
        ] {
            assert_eq!(get(group).unwrap_err().to_string(), text);
        }
    }
}
