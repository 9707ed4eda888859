//! Processes that build and are killed: the next start cleans up after them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use larder_core::settings::Sandbox;
use larder_realise::job::{Mode, Outcome};

use crate::house::{House, Recipe, names, recipe};

const HOUSE: &str = "LARDER_TEST_HOUSE";

fn slow() -> Recipe {
    recipe("slow", "mkdir $out; (trap '' TERM HUP; sleep 1000) & echo started; sleep 1000; echo $out > $out/x")
}

/// What the killed process does; a test of its own only by name.
#[test]
fn child() {
    let Some(root) = std::env::var_os(HOUSE).map(PathBuf::from) else { return };
    for way in [Sandbox::Off, Sandbox::On] {
        if root.ends_with("x") || root.join(format!("{way:?}")).exists() {
            let house = House::open(&root, way, |_| {});
            drop(house.run(&slow(), Mode::Normal));
        }
    }
}

fn kill_at(root: &Path, delay: Duration) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["crash::child", "--exact"])
        .env(HOUSE, root)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(delay);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn nothing_is_left_after_the_next_start() {
    for way in [Sandbox::Off, Sandbox::On] {
        let house = House::new(way);
        std::fs::write(house.path(&format!("{way:?}")), "").unwrap();
        for round in 0..8u64 {
            kill_at(&house.path(""), Duration::from_millis(20 + 37 * round));
            let next = House::open(&house.path(""), way, |_| {});
            next.settings.clean_up(&next.store);
            assert_eq!(names(&house.path("tmp")), [""; 0], "round {round}: {}", next.said());
            assert_eq!(names(&house.path("var/larder/builds")), [""; 0]);
            let left = names(&house.path("store"));
            // One that was made just before the kill is empty, and as good as no entry at all.
            let full = |name: &&String| !names(&house.path("store").join(name)).is_empty();
            assert_eq!(left.iter().filter(|name| name.contains(".chroot")).find(full), None);
            let end = Instant::now() + Duration::from_secs(20);
            while crate::house::is_root() && (0..4).any(|n| crate::hostile::processes_of(house.first_uid + n) > 0) {
                assert!(Instant::now() < end, "round {round}: processes are left");
                std::thread::sleep(Duration::from_millis(10));
            }
            // Nothing stands in the way of the next one.
            let quick = Recipe { script: "mkdir $out; echo x > $out/x".into(), ..slow() };
            assert!(matches!(next.run(&quick, Mode::Normal), Outcome::Built { .. } | Outcome::AlreadyValid { .. }));
        }
    }
}
