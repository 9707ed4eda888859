//! Ordinary builds.

use larder_core::content_address::Method;
use larder_core::hash::{Algorithm, Hash};
use larder_realise::job::{FailureKind, Mode, Outcome};

use crate::house::{House, WAYS, names, recipe};

#[test]
fn an_output_is_registered() {
    for way in WAYS {
        let house = House::new(way);
        let dep = house.build(&recipe("dep", "echo hello; echo dep > $out"));
        assert_eq!(house.log(), "hello\n");
        let top = recipe("top", "mkdir $out; cat $dep > $out/dep; echo $dep $out > $out/refs; chmod 600 $out/dep")
            .source(&dep)
            .env("dep", house.store.dir().full(&dep));
        let out = house.build(&top);
        assert_eq!(std::fs::read_to_string(house.real(&out).join("dep")).unwrap(), "dep\n");
        let info = house.info(&out);
        assert_eq!(info.references, [dep, out.clone()].into());
        assert_eq!(info.deriver, Some(house.derivation(&top).0));
        assert!(info.ultimate && info.content_address.is_none());
        assert!(house.store.contents_are_good(&info).unwrap());
        house.check_nothing_left();
        assert!(names(&house.path("store")).iter().all(|name| !name.contains(".lock")));
        assert!(matches!(house.run(&top, Mode::Normal), Outcome::AlreadyValid { .. }));
    }
}

#[test]
fn failures_are_told() {
    for way in WAYS {
        let mut house = House::new(way);
        let text = "builder for '{drv}' failed with exit code 3";
        house.fails(&recipe("x", "echo out > $out; exit 3"), Mode::Normal, FailureKind::Permanent, text);
        let text = "builder for '{drv}' failed due to signal 9 (Killed)";
        house.fails(&recipe("x", "kill -9 $$"), Mode::Normal, FailureKind::Permanent, text);
        house.settings.hides_log = true;
        house.values().log_lines = 2;
        let text = "builder for '{drv}' failed with exit code 1;\nlast 2 log lines:\n> b\n> c\n\
                    For full logs, run 'nix log {drv}'.";
        house.fails(&recipe("x", "echo a; echo b; echo c; exit 1"), Mode::Normal, FailureKind::Permanent, text);
    }
}

#[test]
fn fixed_outputs() {
    for way in WAYS {
        let house = House::new(way);
        let hash = |text: &str| Hash::of(Algorithm::Sha256, text.as_bytes());
        let right = recipe("f", "echo yes > $out; env > /dev/null").fixed(Method::Flat, hash("yes\n"));
        let out = house.build(&right);
        assert_eq!(
            house.info(&out).content_address.unwrap().to_string(),
            format!("fixed:{}", hash("yes\n").encode_prefixed(larder_core::hash::Encoding::Base32))
        );
        let wrong = recipe("g", "echo no > $out").fixed(Method::Flat, hash("yes\n"));
        let sri = |text| hash(text).encode(larder_core::hash::Encoding::Sri);
        let text = format!(
            "hash mismatch in fixed-output derivation '{{drv}}':\n  specified: {}\n     got:    {}",
            sri("yes\n"),
            sri("no\n")
        );
        house.fails(&wrong, Mode::Normal, FailureKind::HashMismatch, &text);
        // What came is kept under its own path, so that a corrected derivation needs no build.
        let corrected = recipe("g", "exit 1").fixed(Method::Flat, hash("no\n"));
        assert!(matches!(house.run(&corrected, Mode::Normal), Outcome::AlreadyValid { .. }));
    }
}

#[test]
fn s030_s031_s032_checking() {
    for way in WAYS {
        let house = House::new(way);
        let constant = recipe("c", "mkdir $out; echo $out > $out/self");
        let text = "some outputs of '{drv}' are not valid, so checking is not possible";
        house.fails(&constant, Mode::Check, FailureKind::Misc, text);
        house.build(&constant);
        assert!(matches!(house.run(&constant, Mode::Check), Outcome::Built { .. }));
        house.check_nothing_left();
        let random = recipe("r", "cat /proc/sys/kernel/random/uuid > $out");
        let out = house.build(&random);
        let before = (house.text(&out), house.info(&out));
        let real = house.real(&out);
        let text = format!("derivation '{{drv}}' may not be deterministic: output '{}' differs", real.display());
        house.fails(&random, Mode::Check, FailureKind::NotDeterministic, &text);
        assert_eq!((house.text(&out), house.info(&out)), before);
    }
}

#[test]
fn s057_s078_s087_repair() {
    for way in WAYS {
        let house = House::new(way);
        let two = recipe("two", "mkdir $out; echo $dev $out > $out/f; echo $out $dev > $dev; echo x > $out/g")
            .outputs(&["out", "dev"]);
        // A cycle is none of our business here.
        let two = crate::house::Recipe { script: two.script.replace("$out $dev > $dev", "$dev > $dev"), ..two };
        let out = house.build(&two);
        let good = house.info(&out);
        let file = house.real(&out).join("f");
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        std::fs::write(&file, "spoilt").unwrap();
        assert!(!house.store.contents_are_good(&good).unwrap());
        assert!(matches!(house.run(&two, Mode::Repair), Outcome::Built { .. }), "{}", house.log());
        assert!(house.store.contents_are_good(&good).unwrap());
        assert_eq!(house.info(&out).nar_hash, good.nar_hash);
        house.check_nothing_left();
        assert!(matches!(house.run(&two, Mode::Repair), Outcome::AlreadyValid { .. }));
        larder_fs::remove::remove_path(&house.real(&out), larder_fs::remove::OnFailure::Stop).unwrap();
        assert!(matches!(house.run(&two, Mode::Repair), Outcome::Built { .. }));
        assert!(house.store.contents_are_good(&good).unwrap());
    }
}
