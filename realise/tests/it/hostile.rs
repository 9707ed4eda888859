//! Builders that mean harm: each ends in a clear error, with nothing registered and nothing left.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use larder_core::content_address::Method;
use larder_core::hash::{Algorithm, Hash};
use larder_core::settings::Sandbox;
use larder_realise::job::{FailureKind, Mode, Outcome};

use crate::house::{House, WAYS, recipe, root_or_skip};

#[test]
fn s065_outputs_that_others_may_write() {
    for way in WAYS {
        let house = House::new(way);
        for script in ["mkdir $out; chmod 777 $out", "echo x > $out; chmod 620 $out"] {
            let failure = house.fail(&recipe("x", script), Mode::Normal);
            assert_eq!(failure.kind, FailureKind::OutputRejected);
            assert!(failure.text.starts_with("suspicious ownership or permission on '"), "{}", failure.text);
            assert!(failure.text.ends_with("' for output 'out'; rejecting this build output"), "{}", failure.text);
        }
    }
}

#[test]
fn s064_hard_links_within_a_build() {
    for way in WAYS {
        let house = House::new(way);
        let script = "mkdir $out $dev; echo x > $out/a; ln $out/a $out/b; ln $out/a $dev/c";
        let out = house.build(&recipe("x", script).outputs(&["out", "dev"]));
        let meta = std::fs::metadata(house.real(&out).join("b")).unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.mtime()), (0o444, 1));
        assert_eq!(meta.uid(), rustix::process::geteuid().as_raw());
    }
}

/// Without a sandbox a builder can reach files of others, and link them into its output where
/// `fs.protected_hardlinks` is off; by a rename of ours it is so everywhere.
#[test]
fn s055_s063_foreign_files_are_not_read() {
    if !root_or_skip("s055_s063") {
        return;
    }
    let house = House::new(Sandbox::Off);
    let secret = house.path("secret");
    std::fs::write(&secret, "secret").unwrap();
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o666)).unwrap();
    let inside = house.path("for-builders");
    std::fs::create_dir(&inside).unwrap();
    std::fs::set_permissions(&inside, std::fs::Permissions::from_mode(0o777)).unwrap();
    // Readable and writable, so that the link is allowed whatever the protection.
    let link = format!("ln {} $out/x", secret.display());
    let failure = house.fail(&recipe("x", &format!("mkdir $out; {link}")), Mode::Normal);
    assert!(failure.text.starts_with("invalid ownership on file '"), "{}", failure.text);
    assert_eq!(failure.kind, FailureKind::OutputRejected);
    // Once it is valid, the builder changes its mind; then outputs are read to be rewritten.
    let later = recipe("y", &format!("mkdir $out; echo $out > $out/y; [ ! -e {}/go ] || {link}", inside.display()));
    let out = house.build(&later);
    std::fs::write(inside.join("go"), "").unwrap();
    for mode in [Mode::Check, Mode::Repair] {
        if mode == Mode::Repair {
            std::fs::remove_file(house.real(&out).join("y")).unwrap();
        }
        let failure = match house.run(&later, mode) {
            Outcome::Failed(failure) => failure,
            other => panic!("{other:?}"),
        };
        assert!(failure.text.starts_with("invalid ownership on file '"), "{}", failure.text);
    }
    house.check_nothing_left();
    let meta = std::fs::metadata(&secret).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.nlink()), (0o666, 1));
}

#[test]
fn strange_entries_are_refused() {
    for way in WAYS {
        let house = House::new(way);
        let socket =
            "perl -MIO::Socket::UNIX -e 'chdir $ENV{out}; IO::Socket::UNIX->new(Local=>\"s\",Listen=>1) or die'";
        for (name, script) in [("fifo", "mkfifo $out/p".to_owned()), ("socket", socket.to_owned())] {
            let failure = house.fail(&recipe(name, &format!("mkdir $out; {script}")), Mode::Normal);
            assert!(failure.text.ends_with("' has an unsupported type"), "{name}: {}\n{}", failure.text, house.log());
            assert_eq!(failure.kind, FailureKind::OutputRejected);
        }
        // A device cannot even be made.
        house.fail(&recipe("dev", "mkdir $out; mknod $out/d c 1 3"), Mode::Normal);
        let text = if way == Sandbox::On { ".chroot/root" } else { "" };
        let missing = house.fail(&recipe("none", "true"), Mode::Normal);
        assert_eq!(missing.kind, FailureKind::OutputRejected);
        assert!(
            missing.text.contains(" failed to produce output path for output 'out' at '")
                && missing.text.contains(text),
            "{}",
            missing.text
        );
    }
}

#[test]
fn modes_and_names_do_not_matter() {
    for way in WAYS {
        let house = House::new(way);
        // Of a directory that nobody may search only root can read anything.
        let closed = if crate::house::is_root() { "0" } else { "500" };
        let script = format!("mkdir $out $out/d; echo x > $out/d/f; chmod 0 $out/d/f; chmod {closed} $out/d");
        let script = script
            + r"; chmod 700 $out
            printf x > $out/$(printf 'a\377b'); ln -s /etc/shadow $out/l; ln -s $out $out/m; chmod u+s $out/a* || true";
        let out = house.build(&recipe("x", &script));
        let real = house.real(&out);
        let mode = |name: &str| std::fs::symlink_metadata(real.join(name)).unwrap().mode() & 0o7777;
        assert_eq!(mode("."), 0o555);
        // Where the output is copied, directories are made anew.
        assert_eq!(mode("d"), if way == Sandbox::On && crate::house::is_root() { 0o444 } else { 0o555 });
        let count = std::fs::read_dir(&real).unwrap().count();
        assert_eq!(count, 4, "{}", house.log());
        assert_eq!(std::fs::read_link(real.join("l")).unwrap().to_str(), Some("/etc/shadow"));
        // A link to itself is a reference, the shadow file is none of it.
        assert_eq!(house.info(&out).references, [out.clone()].into());
        assert!(house.store.contents_are_good(&house.info(&out)).unwrap());
    }
}

/// What a builder leaves running cannot touch its output any more, nor outlive the build.
#[test]
fn children_left_behind() {
    for way in WAYS {
        let house = House::new(way);
        let script = "mkdir $out; echo good > $out/f
            (exec >&- 2>&- <&-; trap '' TERM HUP; while true; do
                echo bad > $out/f; mv $out $out.moved; mv $out.moved $out; done) &
            sleep 0.1; echo good > $out/f; exit 0";
        match house.run(&recipe("x", script), Mode::Normal) {
            Outcome::Built { outputs } => {
                let path = outputs.values().next().unwrap();
                assert!(house.store.contents_are_good(&house.info(path)).unwrap());
            }
            // It was away just then.
            Outcome::Failed(failure) => assert!(failure.text.contains("failed to produce"), "{}", failure.text),
            other => panic!("{other:?}"),
        }
        if crate::house::is_root() {
            assert_eq!(processes_of(house.first_uid), 0);
        }
    }
}

pub(crate) fn processes_of(uid: u32) -> usize {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    all.filter(|entry| entry.metadata().is_ok_and(|meta| meta.is_dir() && meta.uid() == uid)).count()
}

/// A builder with the host's network hands a descriptor of its output to somebody outside, who
/// writes to it once the output is checked.
#[test]
fn cve_2024_27297_descriptors_kept_outside() {
    if !root_or_skip("cve_2024_27297") {
        return;
    }
    let house = House::with(Sandbox::Off, |_| {});
    // The accomplice is another user's process; a directory of its own stands for a socket: it
    // opens the output by its path while the builder still runs, and keeps it open.
    let hash = Hash::of(Algorithm::Sha256, b"good\n");
    let fixed = recipe("f", "echo good > $out; chmod 644 $out; touch $TELL; while [ -e $TELL ]; do sleep 0.01; done")
        .env("TELL", house.path("public/tell").to_str().unwrap())
        .fixed(Method::Flat, hash);
    std::fs::create_dir(house.path("public")).unwrap();
    std::fs::set_permissions(house.path("public"), std::fs::Permissions::from_mode(0o777)).unwrap();
    let (_, drv) = house.derivation(&fixed);
    let path = house.real(drv.output_paths().next().unwrap().1.unwrap());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let tell = house.path("public/tell");
            while !tell.exists() {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            let kept = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            std::fs::remove_file(&tell).unwrap();
            let registered = || drv.output_paths().all(|(_, path)| house.store.is_valid(path.unwrap()).unwrap());
            while !registered() {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            std::io::Write::write_all(&mut &kept, b"evil\n").unwrap();
        });
        let out = house.build(&fixed);
        // Let the accomplice finish before the look.
        scope.spawn(move || drop(out));
    });
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "good\n");
}

#[test]
fn outputs_of_100_000_files() {
    for way in WAYS {
        let house = House::new(way);
        let out = house.build(&recipe("x", "mkdir $out; cd $out; seq 100000 | xargs touch"));
        assert_eq!(std::fs::read_dir(house.real(&out)).unwrap().count(), 100_000);
        assert!(house.store.contents_are_good(&house.info(&out)).unwrap());
        house.check_nothing_left();
    }
}

/// A fork bomb hits the limit of its build, whose end leaves nothing of it.
#[test]
fn fork_bombs_are_bounded() {
    for way in WAYS {
        if way == Sandbox::Off && !root_or_skip("fork_bombs without a sandbox") {
            // There they cannot be told from the user's other processes.
            continue;
        }
        let house = House::with(way, |values| values.max_build_processes = 60);
        let bomb = r#"perl -e '$n = 0; while (defined($pid = fork)) { if (!$pid) { close STDOUT; close STDERR; sleep 1000 } last if ++$n == 1000 }
            print "made $n\n"; exit 7'"#;
        let failure = house.fail(&recipe("bomb", bomb), Mode::Normal);
        assert!(failure.text.ends_with("failed with exit code 7"), "{}", failure.text);
        let log = house.log();
        let made: u32 = log.trim().strip_prefix("made ").unwrap().parse().unwrap();
        assert!(made < 60, "{log}");
        if crate::house::is_root() {
            assert_eq!(processes_of(house.first_uid), 0);
        }
        // One that never stops trying takes the time that it is given, and no more.
        let house = House::with(way, |values| {
            values.max_build_processes = 60;
            values.timeout = 2;
        });
        let endless = "perl -e '$SIG{TERM} = $SIG{HUP} = \"IGNORE\"; fork while 1'";
        let failure = house.fail(&recipe("endless", endless), Mode::Normal);
        assert_eq!(failure.kind, FailureKind::TimedOut, "{}", failure.text);
        if crate::house::is_root() {
            assert_eq!(processes_of(house.first_uid), 0);
        }
    }
}

/// Links in the build directory lead nowhere when that is deleted, or kept and opened for others.
#[test]
fn links_planted_in_the_build_directory() {
    for way in WAYS {
        for keeps in [false, true] {
            let house = House::with(way, |values| values.keep_failed = keeps);
            let victim = house.path("victim");
            std::fs::create_dir(&victim).unwrap();
            std::fs::write(victim.join("file"), "precious").unwrap();
            std::fs::set_permissions(victim.join("file"), std::fs::Permissions::from_mode(0o640)).unwrap();
            let plant = format!(
                "ln -s {0} link; ln -s {0}/file file; ln -s ../.. up; ln {0}/file hard || true; mkdir -p d/d; chmod 0 d",
                victim.display()
            );
            let out = house.build(&recipe("good", &format!("{plant}; echo > $out")));
            assert_eq!(house.info(&out).references.len(), 0);
            house.check_nothing_left();
            assert!(matches!(house.run(&recipe("bad", &format!("{plant}; exit 1")), Mode::Normal), Outcome::Failed(_)));
            let kept = crate::house::names(&house.path("tmp"));
            assert_eq!(kept.len(), usize::from(keeps), "{kept:?}");
            let meta = std::fs::metadata(victim.join("file")).unwrap();
            assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o640, rustix::process::geteuid().as_raw()));
            assert_eq!(std::fs::metadata(&victim).unwrap().mode() & 0o777, 0o755);
        }
    }
}

/// A builder opens its directory for everybody; an accomplice outside does not get there.
#[test]
fn cve_2025_52991_build_directories_are_closed() {
    if !root_or_skip("cve_2025_52991") {
        return;
    }
    let house = House::new(Sandbox::On);
    let open = recipe("open", "chmod 777 .; echo secret > s; chmod 666 s; echo ready; sleep 2; echo > $out");
    std::thread::scope(|scope| {
        let build = scope.spawn(|| house.build(&open));
        while !house.log().contains("ready") {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let name = format!("nix-build-{}-0", house.derivation(&open).0.name());
        let file = house.path("tmp").join(name).join("build/s");
        assert!(file.exists());
        // Another build user, and somebody who is none.
        for (uid, gid) in [(house.first_uid + 1, crate::house::GROUP), (65534, 65534)] {
            use std::os::unix::process::CommandExt as _;
            let read = std::process::Command::new("cat").arg(&file).uid(uid).gid(gid).output().unwrap();
            let said = String::from_utf8_lossy(&read.stderr).into_owned();
            assert!(!read.status.success() && said.contains("Permission denied"), "{uid}: {said}");
        }
        build.join().unwrap();
    });
}
