//! Building again: rounds of `repeat`, failures that are remembered, outputs that contain themselves.

use larder_core::content_address::Method;
use larder_core::hash::{Algorithm, Hash};
use larder_core::settings::Sandbox;
use larder_realise::job::{FailureKind, Mode, Outcome};

use crate::house::{House, WAYS, recipe, root_or_skip};

/// Counts its builders outside of the sandbox, in a directory that is bound to itself.
fn counting(house: &mut House) -> (std::path::PathBuf, String) {
    let dir = house.path("counted");
    std::fs::create_dir(&dir).unwrap();
    std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    house.values().sandbox_paths.insert(dir.to_str().unwrap().into());
    let script = format!("mktemp {}/XXXXXX > /dev/null", dir.display());
    (dir, script)
}

#[test]
fn rounds_are_repeated_and_compared() {
    for way in WAYS {
        let mut house = House::with(way, |values| values.repeat = 2);
        let (dir, count) = counting(&mut house);
        let rounds = || std::fs::read_dir(&dir).unwrap().count();
        let out = house.build(&recipe("same", &format!("{count}; echo $out > $out")));
        assert_eq!(rounds(), 3);
        assert!(house.store.contents_are_good(&house.info(&out)).unwrap());
        let differs = recipe("differs", &format!("{count}; cat /proc/sys/kernel/random/uuid > $out"));
        let text = "output '{out}' of '{drv}' differs from previous round";
        house.fails(&differs, Mode::Normal, FailureKind::NotDeterministic, text);
        assert_eq!(rounds(), 5, "the third round is not needed");
        house.values().enforce_determinism = false;
        house.build(&differs);
        assert_eq!(rounds(), 8);
        assert_eq!(house.said().matches(" differs from previous round").count(), 2);
        // What has a known hash is made once.
        let hash = Hash::of(Algorithm::Sha256, b"x\n");
        house.build(&recipe("fixed", &format!("{count}; echo x > $out; chmod 644 $out")).fixed(Method::Flat, hash));
        assert_eq!(rounds(), 9);
        house.check_nothing_left();
    }
}

#[test]
fn failures_are_remembered_if_wanted() {
    for way in WAYS {
        let mut house = House::with(way, |values| values.build_cache_failure = true);
        let (dir, count) = counting(&mut house);
        let tries = || std::fs::read_dir(&dir).unwrap().count();
        let bad = recipe("bad", &format!("{count}; exit 1"));
        house.fails(&bad, Mode::Normal, FailureKind::Permanent, "builder for '{drv}' failed with exit code 1");
        house.fails(&bad, Mode::Normal, FailureKind::Cached, "builder for '{out}' failed previously (cached)");
        assert_eq!(tries(), 1);
        // What fails by its hash, or by the clock, may do better next time.
        let hash = Hash::of(Algorithm::Sha256, b"other");
        let fixed = recipe("fixed", &format!("{count}; exit 1")).fixed(Method::Flat, hash);
        house.fail(&fixed, Mode::Normal);
        house.fail(&fixed, Mode::Normal);
        assert_eq!(tries(), 3);
        house.values().timeout = 1;
        let slow = recipe("slow", &format!("{count}; sleep 1000"));
        for _ in 0..2 {
            assert_eq!(house.fail(&slow, Mode::Normal).kind, FailureKind::TimedOut);
        }
        assert_eq!(tries(), 5);
        house.values().timeout = 0;
        // Without the setting nobody looks.
        house.values().build_cache_failure = false;
        house.fails(&bad, Mode::Normal, FailureKind::Permanent, "builder for '{drv}' failed with exit code 1");
        assert_eq!(tries(), 6);
    }
}

/// After hash parts are replaced the files are root's, and nobody minds.
#[test]
fn s056_checks_of_outputs_that_contain_their_own_path() {
    if !root_or_skip("s056") {
        return;
    }
    let house = House::new(Sandbox::Off);
    let own = recipe("own", "mkdir $out; echo $out > $out/own; ln -s $out/own $out/link; ln $out/own $out/hard");
    let out = house.build(&own);
    assert_eq!(house.info(&out).references, [out.clone()].into());
    for _ in 0..2 {
        assert!(matches!(house.run(&own, Mode::Check), Outcome::Built { .. }), "{}", house.said());
    }
    house.check_nothing_left();
}

/// An input file that cannot be linked to.
#[test]
fn s110_files_that_refuse_links_are_inputs() {
    let house = House::new(Sandbox::On);
    let file = house.build(&recipe("file", "echo contents > $out"));
    let link = house.build(&recipe("link", "ln -s /nowhere $out"));
    let real = house.real(&file);
    let chattr = |flag: &str| std::process::Command::new("chattr").arg(flag).arg(&real).status();
    let is_immutable = chattr("+i").is_ok_and(|status| status.success());
    assert!(is_immutable || !crate::house::is_root() || std::fs::hard_link(&real, house.path("x")).is_ok());
    let user = recipe("user", "cat $file > $out; readlink $link >> $out")
        .source(&file)
        .source(&link)
        .env("file", house.store.dir().full(&file))
        .env("link", house.store.dir().full(&link));
    let outcome = house.run(&user, Mode::Normal);
    if is_immutable {
        assert!(std::fs::hard_link(&real, house.path("y")).is_err(), "it can be linked to all the same");
        assert!(chattr("-i").unwrap().success());
    }
    let Outcome::Built { outputs } = outcome else { panic!("{outcome:?}\n{}", house.log()) };
    assert_eq!(house.text(outputs.values().next().unwrap()), "contents\n/nowhere\n");
}
