//! Users and groups by name and number.
//!
//! `/etc/passwd` and `/etc/group` are read by ourselves: the C library's lookup would need its
//! plug-ins, which a static binary has not. Where an entry is not in the files (LDAP, systemd's
//! dynamic users) `getent` is asked, if there is one.

use std::fs::{File, Metadata};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// A line of the user database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: u32,
    /// The primary group.
    pub gid: u32,
    pub home: PathBuf,
}

/// A line of the group database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    pub name: String,
    pub gid: u32,
    /// In the order of the line; users whose primary group this is need not be listed.
    pub members: Vec<String>,
}

/// Where users and groups are looked up. Clones share what was read.
#[derive(Debug, Clone)]
pub struct Users {
    passwd: Arc<Database>,
    group: Arc<Database>,
    getent: Option<PathBuf>,
}

impl Default for Users {
    /// The system's own files and `getent`.
    fn default() -> Self {
        Self { getent: Some("getent".into()), ..Self::from_files("/etc/passwd", "/etc/group") }
    }
}

impl Users {
    /// Other files, and no `getent`.
    pub fn from_files(passwd: impl Into<PathBuf>, group: impl Into<PathBuf>) -> Self {
        let database = |name, file| Arc::new(Database { name, file, kept: Mutex::default() });
        Self { passwd: database("passwd", passwd.into()), group: database("group", group.into()), getent: None }
    }

    /// Errors: the file is there but cannot be read.
    pub fn user_by_name(&self, name: &str) -> io::Result<Option<User>> {
        self.find(&self.passwd, name, |line| User::parse(line).filter(|user| user.name == name))
    }

    pub fn user_by_uid(&self, uid: u32) -> io::Result<Option<User>> {
        self.find(&self.passwd, &uid.to_string(), |line| User::parse(line).filter(|user| user.uid == uid))
    }

    pub fn group_by_name(&self, name: &str) -> io::Result<Option<Group>> {
        self.find(&self.group, name, |line| Group::parse(line).filter(|group| group.name == name))
    }

    pub fn group_by_gid(&self, gid: u32) -> io::Result<Option<Group>> {
        self.find(&self.group, &gid.to_string(), |line| Group::parse(line).filter(|group| group.gid == gid))
    }

    /// All groups of a user: the primary one first, then those of the file that list it.
    ///
    /// Groups that only another service knows are not found: there is no way to ask by member.
    pub fn groups_of(&self, user: &User) -> io::Result<Vec<u32>> {
        let mut gids = vec![user.gid];
        self.group.each_line(|line| {
            if let Some(group) = Group::parse(line)
                && group.members.contains(&user.name)
                && !gids.contains(&group.gid)
            {
                gids.push(group.gid);
            }
            None::<()>
        })?;
        Ok(gids)
    }

    fn find<T>(
        &self,
        database: &Database,
        key: &str,
        mut matches: impl FnMut(&str) -> Option<T>,
    ) -> io::Result<Option<T>> {
        if let Some(found) = database.each_line(&mut matches)? {
            return Ok(Some(found));
        }
        // `getent` would take an empty key, or one that looks like an option, for something else.
        let Some(getent) = self.getent.as_ref().filter(|_| !key.is_empty() && !key.starts_with('-')) else {
            return Ok(None);
        };
        let asked = Command::new(getent).args([database.name, key]).stdin(Stdio::null()).stderr(Stdio::null()).output();
        let Ok(answer) = asked else { return Ok(None) };
        Ok(String::from_utf8_lossy(&answer.stdout).lines().find_map(matches))
    }
}

impl User {
    /// `name:password:uid:gid:comment:home:shell`
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next().filter(|n| !n.is_empty())?.to_owned();
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        Some(Self { name, uid, gid, home: fields.nth(1)?.into() })
    }
}

impl Group {
    /// `name:password:gid:member,member`
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next().filter(|n| !n.is_empty())?.to_owned();
        let gid = fields.nth(1)?.parse().ok()?;
        let members = fields.next().unwrap_or_default().split(',').map(str::trim);
        Some(Self { name, gid, members: members.filter(|m| !m.is_empty()).map(str::to_owned).collect() })
    }
}

/// A file of lines.
#[derive(Debug)]
struct Database {
    /// What `getent` calls it.
    name: &'static str,
    file: PathBuf,
    /// What was read last, and the file it was.
    kept: Mutex<Option<(Stamp, Arc<str>)>>,
}

/// Files that are longer, in bytes, are read anew each time.
const MAX_KEPT: usize = 1 << 20;

/// A file that was changed so shortly ago may be changed again without its times telling.
const SETTLED: Duration = Duration::from_secs(2);

/// What changes with a file's contents: device, inode, size, and the times of both kinds of changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    file: (u64, u64),
    size_bytes: u64,
    modified_ns: (i64, i64),
    changed_ns: (i64, i64),
}

impl Stamp {
    fn of(found: &Metadata) -> Self {
        Self {
            file: (found.dev(), found.ino()),
            size_bytes: found.size(),
            modified_ns: (found.mtime(), found.mtime_nsec()),
            changed_ns: (found.ctime(), found.ctime_nsec()),
        }
    }

    /// Did the last change happen well before this moment?
    fn is_settled(&self, now: SystemTime) -> bool {
        let now_s = now.duration_since(SystemTime::UNIX_EPOCH).ok().and_then(|now| i64::try_from(now.as_secs()).ok());
        let least = i64::try_from(SETTLED.as_secs()).unwrap_or(0);
        now_s.is_some_and(|now| now - self.changed_ns.0.max(self.modified_ns.0) > least)
    }
}

impl Database {
    /// The first line that `matches` takes. A file that is not there has no lines.
    fn each_line<T>(&self, mut matches: impl FnMut(&str) -> Option<T>) -> io::Result<Option<T>> {
        let text = self.text()?;
        Ok(text.split('\n').filter(|line| !line.starts_with('#')).find_map(&mut matches))
    }

    fn text(&self) -> io::Result<Arc<str>> {
        let now = SystemTime::now();
        let stamp = match std::fs::metadata(&self.file) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok("".into()),
            found => Stamp::of(&found?),
        };
        let kept = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, text)) = &*kept()
            && *of == stamp
        {
            return Ok(Arc::clone(text));
        }
        let mut file = match File::open(&self.file) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok("".into()),
            file => file?,
        };
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let text: Arc<str> = String::from_utf8_lossy(&bytes).into();
        if text.len() <= MAX_KEPT && stamp.is_settled(now) && Stamp::of(&file.metadata()?) == stamp {
            *kept() = Some((stamp, Arc::clone(&text)));
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn files() -> (tempfile::TempDir, Users) {
        let dir = tempfile::tempdir().unwrap();
        let (passwd, group) = (dir.path().join("passwd"), dir.path().join("group"));
        let text = "root:x:0:0:root:/root:/bin/sh\n# b1:x:7:7::/:\n\nbroken\nbad:x:minus:0::/:\n\
                    b1:x:30001:30000:Build \u{fc}:/var/empty:/sbin/nologin\nb2:x:30002:30000::/var/empty:";
        std::fs::write(&passwd, text).unwrap();
        std::fs::write(&group, "root:x:0:\nnixbld:x:30000:b2,b1\nkvm:!:36:b1, ghost ,\nshort:x:5\n").unwrap();
        let users = Users::from_files(&passwd, &group);
        (dir, users)
    }

    #[test]
    fn looks_up() {
        let (_dir, users) = files();
        assert_eq!(users.user_by_name("b1").unwrap().unwrap().uid, 30001);
        assert_eq!(users.user_by_uid(30002).unwrap().unwrap().name, "b2");
        assert_eq!(users.user_by_uid(0).unwrap().unwrap().home, Path::new("/root"));
        assert_eq!(users.user_by_uid(7).unwrap(), None, "a comment");
        for nobody in ["", "b", "bad", "broken", "ROOT"] {
            assert_eq!(users.user_by_name(nobody).unwrap(), None, "{nobody}");
        }
        let nixbld = users.group_by_name("nixbld").unwrap().unwrap();
        assert_eq!((nixbld.gid, nixbld.members), (30000, vec!["b2".to_owned(), "b1".to_owned()]));
        assert_eq!(users.group_by_gid(36).unwrap().unwrap().members, ["b1", "ghost"]);
        assert_eq!(users.group_by_name("short").unwrap().unwrap().members, Vec::<String>::new());
        let b1 = users.user_by_name("b1").unwrap().unwrap();
        assert_eq!(users.groups_of(&b1).unwrap(), [30000, 36]);
    }

    /// Whoever edits the files is heard, also if size and time of the file stay the same.
    #[test]
    fn changes_are_seen() {
        let (dir, users) = files();
        let (passwd, clone) = (dir.path().join("passwd"), users.clone());
        let name = |users: &Users| users.user_by_uid(5).unwrap().map(|user| user.name);
        let before = SystemTime::now() - Duration::from_hours(1);
        let write = |text: &str| {
            std::fs::write(&passwd, text).unwrap();
            File::options().write(true).open(&passwd).unwrap().set_modified(before).unwrap();
        };
        assert_eq!(name(&users), None);
        for text in ["old", "new", "odd"] {
            write(&format!("{text}:x:5:5::/:\n"));
            for users in [&users, &clone] {
                assert_eq!(name(users).as_deref(), Some(text));
            }
        }
        std::fs::remove_file(&passwd).unwrap();
        assert_eq!(name(&users), None);
        std::fs::rename(dir.path().join("group"), &passwd).unwrap();
        assert_eq!(name(&users), None);
    }

    /// Only what nobody has touched for a while is kept, and it is kept for clones too.
    #[test]
    fn what_is_settled_is_kept() {
        let (_dir, users) = files();
        let stamp = Stamp::of(&std::fs::metadata(&users.passwd.file).unwrap());
        let changed = SystemTime::UNIX_EPOCH + Duration::from_secs(stamp.changed_ns.0.unsigned_abs());
        for (after_s, is_settled) in [(0, false), (2, false), (3, true), (1 << 20, true)] {
            assert_eq!(stamp.is_settled(changed + Duration::from_secs(after_s)), is_settled, "{after_s}");
        }
        assert!(!stamp.is_settled(changed - Duration::from_hours(1)), "a clock that was set back");
        *users.passwd.kept.lock().unwrap() = Some((stamp, "kept:x:5:5::/:".into()));
        assert_eq!(users.clone().user_by_uid(5).unwrap().unwrap().name, "kept");
    }

    #[test]
    fn missing_files_have_no_users() {
        let users = Users::from_files("/no/such/passwd", "/no/such/group");
        assert_eq!(users.user_by_uid(0).unwrap(), None);
        assert_eq!(users.group_by_name("root").unwrap(), None);
    }

    /// What the files lack, `getent` may know; here a script stands for it.
    #[test]
    fn asks_getent() {
        use std::os::unix::fs::PermissionsExt as _;
        let (dir, mut users) = files();
        let script = dir.path().join("getent");
        std::fs::write(
            &script,
            "#!/bin/sh\n[ \"$1 $2\" = 'passwd far' ] && echo 'far:*:70000:70001:F:/h/far:/bin/sh'\n",
        )
        .unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        users.getent = Some(script);
        assert_eq!(users.user_by_name("far").unwrap().unwrap().gid, 70001);
        assert_eq!(users.user_by_name("near").unwrap(), None);
        assert_eq!(users.user_by_name("-far").unwrap(), None);
        users.getent = Some("/no/such/getent".into());
        assert_eq!(users.user_by_name("far").unwrap(), None);
    }
}
