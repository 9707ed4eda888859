//! Who is at the other end of a connection, and what that one may do.
//!
//! Source: protocols, section 2.8; cli, section 9.

use std::cell::OnceCell;
use std::io;

use larder_core::settings::Settings;
use larder_fs::users::Users;

/// The process at the other end, as the kernel knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub pid: i32,
    pub uid: u32,
    pub gid: u32,
    /// The user's name, or the number where there is none.
    pub user: String,
    /// The name of the primary group, or the number, once somebody wants to know.
    group: OnceCell<String>,
}

impl Peer {
    /// Looks the user's name up.
    pub fn new(users: &Users, pid: i32, uid: u32, gid: u32) -> io::Result<Self> {
        let user = users.user_by_uid(uid)?.map_or_else(|| uid.to_string(), |user| user.name);
        Ok(Self { pid, uid, gid, user, group: OnceCell::new() })
    }

    fn group(&self, users: &Users) -> io::Result<&str> {
        if let Some(group) = self.group.get() {
            return Ok(group);
        }
        let found = users.group_by_gid(self.gid)?;
        Ok(self.group.get_or_init(|| found.map_or_else(|| self.gid.to_string(), |group| group.name)))
    }

    /// Does a list of names, `@group`s and `*` mean this peer?
    ///
    /// A group is the peer's primary one, or lists the user as a member; other groups of the
    /// process do not count.
    fn is_in(&self, list: &[String], users: &Users) -> io::Result<bool> {
        for entry in list {
            let matches = match entry.strip_prefix('@') {
                _ if entry == "*" => true,
                None => *entry == self.user,
                Some(group) if group == self.group(users)? => true,
                Some(group) => users.group_by_name(group)?.is_some_and(|group| group.members.contains(&self.user)),
            };
            if matches {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// May it connect, and is it trusted then? `None` for a peer that is refused.
    pub fn judge(&self, settings: &Settings, users: &Users) -> io::Result<Option<Trust>> {
        // A builder must not talk to the daemon that watches over it.
        if !settings.build_users_group.is_empty() && self.group(users)? == settings.build_users_group {
            return Ok(None);
        }
        if self.is_in(&settings.trusted_users, users)? {
            return Ok(Some(Trust::Trusted));
        }
        Ok(self.is_in(&settings.allowed_users, users)?.then_some(Trust::Allowed))
    }
}

/// What a peer may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// Anything.
    Trusted,
    /// What harms no other user.
    Allowed,
}

#[cfg(test)]
mod tests {
    use super::*;
    use larder_core::settings::{Machine, Os};

    fn users(dir: &std::path::Path) -> Users {
        let (passwd, group) = (dir.join("passwd"), dir.join("group"));
        std::fs::write(&passwd, "root:x:0:0::/root:/bin/sh\nalice:x:1000:100::/:/bin/sh\nbob:x:1001:101::/:/bin/sh\n")
            .unwrap();
        std::fs::write(&group, "root:x:0:\nstaff:x:100:\nwheel:x:10:alice\nnixbld:x:30000:bob\n").unwrap();
        Users::from_files(passwd, group)
    }

    #[test]
    fn s010_s011_who_is_who() {
        let dir = tempfile::tempdir().unwrap();
        let users = users(dir.path());
        let judge = |uid, gid, trusted: &str, allowed: &str| {
            let mut settings = Settings::new(&Machine {
                cores: 1,
                root: true,
                system: "x".into(),
                extra_platforms: std::collections::BTreeSet::default(),
                os: Os::Linux,
                kvm: false,
                conf_dir: "/".into(),
                build_hook: String::new(),
            });
            let list = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
            (settings.trusted_users, settings.allowed_users) = (list(trusted), list(allowed));
            settings.build_users_group = "nixbld".into();
            Peer::new(&users, 1, uid, gid).unwrap().judge(&settings, &users).unwrap()
        };
        let (trusted, allowed) = (Some(Trust::Trusted), Some(Trust::Allowed));
        for (uid, gid, trusted_users, allowed_users, expected) in [
            (0, 0, "root", "*", trusted),
            (1000, 100, "root", "*", allowed),
            (1000, 100, "root alice", "*", trusted),
            (1000, 100, "@staff", "", trusted),
            (1000, 100, "@wheel", "", trusted),
            (1001, 101, "@wheel @staff", "", None),
            (1001, 101, "*", "", trusted),
            (1000, 100, "root", "root", None),
            (1000, 100, "root", "alice", allowed),
            (1000, 100, "root", "@wheel", allowed),
            (0, 0, "root", "alice", trusted),
            // Trusted users are allowed, but builders never are.
            (1001, 30000, "*", "*", None),
            // That it is listed as a member makes nobody a builder.
            (1001, 101, "root", "*", allowed),
            // Those whom no database knows go by their numbers.
            (4711, 4712, "4711", "", trusted),
            (4711, 4712, "@4712", "", trusted),
            (4711, 4712, "root", "", None),
        ] {
            assert_eq!(judge(uid, gid, trusted_users, allowed_users), expected, "{uid} {gid} {trusted_users}");
        }
    }
}
