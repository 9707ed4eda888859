//! Where builds are measured.

use std::path::PathBuf;
use std::process::Command;

use super::remove;
use crate::run::{Failed, say};

/// A folder in which builds can be measured, until dropped.
///
/// All is measured in memory, so that figures tell of programs, not of a disk; but no sandbox shows
/// `/dev/shm`. Root mounts memory of its own. For others it is a folder of the disk, where what was
/// measured before may matter: ext4 without a journal takes minutes to give numbers of files that
/// were deleted out again, and each new file waits for that.
pub(super) struct Place {
    pub(super) dir: PathBuf,
    is_mounted: bool,
}

impl Place {
    pub(super) fn new(name: &str) -> Result<Self, Failed> {
        let dir = std::env::temp_dir().join(format!("larder-bench-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir)?;
        let is_mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "mode=0755", "larder-bench"])
            .arg(&dir)
            .stderr(std::process::Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        if !is_mounted {
            say(&format!("builds are measured on the disk of '{}', since no memory can be mounted", dir.display()));
        }
        Ok(Self { dir, is_mounted })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.is_mounted {
            let _ = Command::new("umount").arg("-l").arg(&self.dir).status();
        }
        remove(&self.dir);
    }
}
