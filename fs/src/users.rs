//! Users and groups by name and number.
//!
//! `/etc/passwd` and `/etc/group` are read by ourselves: the C library's lookup would need its
//! plug-ins, which a static binary has not. Where an entry is not in the files (LDAP, systemd's
//! dynamic users) `getent` is asked, if there is one.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

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

/// Where users and groups are looked up.
#[derive(Debug, Clone)]
pub struct Users {
    passwd: PathBuf,
    group: PathBuf,
    getent: Option<PathBuf>,
}

impl Default for Users {
    /// The system's own files and `getent`.
    fn default() -> Self {
        Self { passwd: "/etc/passwd".into(), group: "/etc/group".into(), getent: Some("getent".into()) }
    }
}

impl Users {
    /// Other files, and no `getent`.
    pub fn from_files(passwd: impl Into<PathBuf>, group: impl Into<PathBuf>) -> Self {
        Self { passwd: passwd.into(), group: group.into(), getent: None }
    }

    /// Errors: the file is there but cannot be read.
    pub fn user_by_name(&self, name: &str) -> io::Result<Option<User>> {
        self.find(&self.passwd, "passwd", name, |line| User::parse(line).filter(|user| user.name == name))
    }

    pub fn user_by_uid(&self, uid: u32) -> io::Result<Option<User>> {
        self.find(&self.passwd, "passwd", &uid.to_string(), |line| User::parse(line).filter(|user| user.uid == uid))
    }

    pub fn group_by_name(&self, name: &str) -> io::Result<Option<Group>> {
        self.find(&self.group, "group", name, |line| Group::parse(line).filter(|group| group.name == name))
    }

    pub fn group_by_gid(&self, gid: u32) -> io::Result<Option<Group>> {
        self.find(&self.group, "group", &gid.to_string(), |line| Group::parse(line).filter(|group| group.gid == gid))
    }

    /// All groups of a user: the primary one first, then those of the file that list it.
    ///
    /// Groups that only another service knows are not found: there is no way to ask by member.
    pub fn groups_of(&self, user: &User) -> io::Result<Vec<u32>> {
        let mut gids = vec![user.gid];
        each_line(&self.group, |line| {
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
        file: &Path,
        database: &str,
        key: &str,
        mut matches: impl FnMut(&str) -> Option<T>,
    ) -> io::Result<Option<T>> {
        if let Some(found) = each_line(file, &mut matches)? {
            return Ok(Some(found));
        }
        // `getent` would take an empty key, or one that looks like an option, for something else.
        let Some(getent) = self.getent.as_ref().filter(|_| !key.is_empty() && !key.starts_with('-')) else {
            return Ok(None);
        };
        let asked = Command::new(getent).args([database, key]).stdin(Stdio::null()).stderr(Stdio::null()).output();
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

/// The first line that `matches` takes. A file that is not there has no lines.
fn each_line<T>(file: &Path, mut matches: impl FnMut(&str) -> Option<T>) -> io::Result<Option<T>> {
    let file = match File::open(file) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    for line in BufReader::new(file).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        if line.starts_with('#') {
            continue;
        }
        if let Some(found) = matches(&line) {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
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
