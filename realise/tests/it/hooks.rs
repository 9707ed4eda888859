//! Programs of the user around builds.

use std::os::unix::fs::PermissionsExt as _;

use larder_core::settings::{PathText, Sandbox};
use larder_realise::job::{FailureKind, Mode, Outcome};

use crate::house::{House, WAYS, recipe};

/// A script that everybody may run; its path.
fn script(house: &House, name: &str, text: &str) -> String {
    let path = house.path(name);
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn post_build_hook() {
    for way in WAYS {
        let mut house = House::new(way);
        let told = house.path("told");
        let text =
            format!("echo $DRV_PATH $OUT_PATHS > {}; echo \"$NIX_CONFIG\" | grep ^cores; echo err >&2", told.display());
        house.values().post_build_hook = script(&house, "hook", &text);
        let x = recipe("x", "echo x > $out");
        let out = house.build(&x);
        let full = |path| house.store.dir().full(path);
        let drv = house.derivation(&x).0;
        assert_eq!(std::fs::read_to_string(&told).unwrap(), format!("{} {}\n", full(&drv), full(&out)));
        let said = house.said();
        assert!(said.contains("post-build-hook: cores = 2\n") && said.contains("post-build-hook: err\n"), "{said}");
        // Not for what is valid already.
        std::fs::remove_file(&told).unwrap();
        assert!(matches!(house.run(&x, Mode::Normal), Outcome::AlreadyValid { .. }));
        assert!(!told.exists());
        let hook = script(&house, "bad-hook", "exit 4");
        house.values().post_build_hook.clone_from(&hook);
        let y = recipe("y", "echo y > $out");
        match house.run(&y, Mode::Normal) {
            Outcome::Failed(failure) => {
                assert_eq!(failure.text, format!("program '{hook}' failed with exit code 4"));
                assert_eq!(failure.kind, FailureKind::Misc);
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(house.run(&y, Mode::Normal), Outcome::AlreadyValid { .. }), "the path stays valid");
    }
}

#[test]
fn diff_hook() {
    for way in WAYS {
        let mut house = House::new(way);
        let told = house.path("told");
        std::fs::write(&told, "").unwrap();
        std::fs::set_permissions(&told, std::fs::Permissions::from_mode(0o666)).unwrap();
        let text = format!("cat $1 $2 > /dev/null && echo $# $3 > {}; id -u; exit ${{FAIL:-0}}", told.display());
        let hook = script(&house, "hook", &text);
        house.values().run_diff_hook = true;
        house.values().diff_hook = PathText::new(&hook).unwrap();
        let random = recipe("r", "cat /proc/sys/kernel/random/uuid > $out");
        let out = house.build(&random);
        let failure = match house.run(&random, Mode::Check) {
            Outcome::Failed(failure) => failure,
            other => panic!("{other:?}"),
        };
        let (real, drv) = (house.real(&out), house.store.dir().full(&house.derivation(&random).0));
        let (real, check) = (real.display().to_string(), format!("{}.check", real.display()));
        let text = format!("derivation '{drv}' may not be deterministic: output '{real}' differs from '{check}'");
        assert_eq!((failure.text, failure.kind), (text, FailureKind::NotDeterministic));
        assert_eq!(std::fs::read_to_string(&told).unwrap(), format!("4 {drv}\n"));
        let uid = if crate::house::is_root() { house.first_uid } else { rustix::process::geteuid().as_raw() };
        assert!(house.said().contains(&format!("{uid}\n")), "{}", house.said());
        assert!(std::fs::metadata(check).is_ok(), "kept to be looked at");
    }
}

#[test]
fn pre_build_hook() {
    let mut house = House::new(Sandbox::On);
    std::fs::write(house.path("extra"), "extra\n").unwrap();
    let text =
        format!("[ -d $2 ] || exit 1; echo extra-sandbox-paths; echo /extra={}; echo", house.path("extra").display());
    house.values().pre_build_hook = script(&house, "hook", &text);
    assert_eq!(house.text(&house.build(&recipe("x", "cat /extra > $out"))), "extra\n");
    let hook = script(&house, "bad-hook", "exit 4");
    house.values().pre_build_hook.clone_from(&hook);
    let text = format!("program '{hook}' failed with exit code 4");
    house.fails(&recipe("y", "echo > $out"), Mode::Normal, FailureKind::Misc, &text);
    house.values().pre_build_hook = script(&house, "odd-hook", "echo zork");
    let text = "unknown pre-build hook command 'zork'";
    house.fails(&recipe("y", "echo > $out"), Mode::Normal, FailureKind::Misc, text);
}

#[test]
fn no_chroot_is_asked_for() {
    let open = recipe("x", "[ -e $PROBE ] && echo out > $out || echo in > $out").env("__noChroot", "1");
    let with_probe = |house: &House| open.clone().env("PROBE", house.path("passwd").to_str().unwrap());
    let house = House::new(Sandbox::On);
    let text = "derivation '{drv}' has '__noChroot' set, but that's not allowed when 'sandbox' is 'true'";
    house.fails(&with_probe(&house), Mode::Normal, FailureKind::InputRejected, text);
    let house = House::new(Sandbox::Relaxed);
    assert_eq!(house.text(&house.build(&with_probe(&house))), "out\n");
    let shut = with_probe(&house).env("__noChroot", "");
    assert_eq!(house.text(&house.build(&shut)), "in\n");
}
