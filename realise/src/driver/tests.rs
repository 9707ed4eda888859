//! The driver in a real store, with builders that only say they built something.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};

use larder_core::derivation::{Derivation, Output, OutputName};
use larder_core::report::{Reporter, Start};
use larder_core::settings::{Jobs, Machine, Os, Settings};
use larder_core::store_dir::StoreDir;
use larder_core::store_path::{Name, StorePath};
use larder_fs::layout::{Access, Layout};
use larder_store::{LocalStore, Options};

use super::*;
use crate::derivations::Derivations;
use crate::missing::missing;
use crate::plan::{Key, Success, Wanted};

/// Keeps what was said, and can say that the user wants to stop.
#[derive(Default)]
struct Voice {
    said: Mutex<Vec<String>>,
    cancelled: AtomicBool,
}

impl Reporter for Voice {
    fn shows(&self, level: Level) -> bool {
        level <= Level::Info
    }
    fn message(&self, level: Level, text: std::fmt::Arguments<'_>) {
        if self.shows(level) {
            self.said.lock().unwrap().push(text.to_string());
        }
    }
    fn start(&self, start: &Start<'_>) -> u64 {
        if !start.text.is_empty() {
            self.message(start.level, format_args!("{}...", start.text));
        }
        0
    }
    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }
}

struct House {
    _dir: tempfile::TempDir,
    store: LocalStore,
    voice: Arc<Voice>,
    settings: Settings,
}

fn house() -> House {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    let mut layout = Layout::rooted(StoreDir::new(root.join("store").to_str().unwrap()).unwrap(), &root);
    layout.real_store = root.join("store");
    let voice = Arc::new(Voice::default());
    let options = Options { sync: false, ..Options::default() };
    let store = LocalStore::open(layout, options, Access::ReadWrite, Arc::clone(&voice) as Arc<_>).unwrap();
    let mut settings = Settings::new(&Machine {
        cores: 2,
        root: false,
        system: "x86_64-linux".into(),
        extra_platforms: BTreeSet::new(),
        os: Os::Linux,
        kvm: false,
        conf_dir: "/etc/nix".into(),
        build_hook: String::new(),
    });
    settings.max_jobs = Jobs(4);
    settings.build_poll_interval = 1;
    House { _dir: dir, store, voice, settings }
}

impl House {
    fn add(&self, name: &str, outputs: &[&str], inputs: &[&StorePath]) -> StorePath {
        let mut drv = Derivation {
            name: Name::new(name).unwrap(),
            outputs: outputs.iter().map(|name| (OutputName::new(name).unwrap(), Output::Deferred)).collect(),
            input_drvs: inputs.iter().map(|path| ((*path).clone(), [OutputName::out()].into())).collect(),
            input_srcs: BTreeSet::new(),
            system: self.settings.system.clone(),
            builder: "/bin/sh".into(),
            args: Vec::new(),
            env: BTreeMap::new(),
        };
        self.store.fill_output_paths(&mut drv).unwrap();
        let mut arrivals = self.store.arrivals();
        let path = arrivals.add_derivation(&drv).unwrap();
        arrivals.commit().unwrap();
        path
    }

    fn realise(&self, builder: &dyn Builder, listener: &dyn Listener, drvs: &[&StorePath]) -> Report {
        let derivations = Derivations::new(&self.store);
        let driver = Driver::new(&self.store, &self.settings, &derivations, builder, listener);
        driver.realise(&drvs.iter().map(|drv| target(drv)).collect::<Vec<_>>(), Mode::Normal)
    }

    /// Makes the wanted outputs valid, without much in them.
    fn make(&self, job: &Job) -> Outcome {
        let mut records = String::new();
        let mut outputs = BTreeMap::new();
        for name in &job.wanted {
            let path = job.drv.outputs.get(name).unwrap().path().unwrap().clone();
            let full = self.store.dir().full(&path);
            std::fs::write(&full, name.as_str()).unwrap();
            writeln!(records, "{full}\n{}\n0", self.store.dir().full(&job.drv_path)).unwrap();
            outputs.insert(name.clone(), path);
        }
        let how = larder_store::register::RegisterOptions { hash_given: false, reregister: false };
        self.store.register_validity(records.as_bytes(), how).unwrap();
        Outcome::Built { outputs }
    }

    fn said(&self) -> Vec<String> {
        std::mem::take(&mut *self.voice.said.lock().unwrap())
    }
}

fn target(drv: &StorePath) -> Target {
    Target { key: Key::Derivation(drv.clone()), wanted: Wanted::All }
}

struct With<F>(F);

impl<F: Fn(&Job, &dyn Watch) -> Outcome + Sync> Builder for With<F> {
    fn build(&self, job: &Job, watch: &dyn Watch) -> Outcome {
        watch.started();
        (self.0)(job, watch)
    }
}

fn fails(kind: FailureKind) -> Outcome {
    Outcome::Failed(Failure { kind, text: "it is broken".into() })
}

#[derive(Default)]
struct Ears(Mutex<Vec<String>>);

impl Listener for Ears {
    fn line(&self, drv: &StorePath, line: &[u8]) {
        self.0.lock().unwrap().push(format!("{}: {}", drv.name(), String::from_utf8_lossy(line)));
    }
    fn ended(&self, drv: &StorePath, how: Result<(), &Failure>) {
        self.0.lock().unwrap().push(format!("{}: {}", drv.name(), how.is_ok()));
    }
    fn failed(&self, text: &str) {
        self.0.lock().unwrap().push(format!("failed: {text}"));
    }
}

#[test]
fn a_graph_is_built_once() {
    let house = house();
    let a = house.add("a", &["out"], &[]);
    let b = house.add("b", &["out", "dev"], &[&a]);
    let derivations = Derivations::new(&house.store);
    let found = missing(&house.store, &derivations, &[target(&b)]).unwrap();
    assert_eq!(found.will_build, [a.clone(), b.clone()]);
    let builder = With(|job: &Job, watch: &dyn Watch| {
        watch.log(b"one\ntw");
        watch.log(b"o\n@nix {\"action\":\"setPhase\"}\n\xff");
        house.make(job)
    });
    let ears = Ears::default();
    house.said();
    let report = house.realise(&builder, &ears, &[&b]);
    report.check(|_| ()).unwrap();
    assert_eq!(report.targets.len(), 1);
    let dir = house.store.dir();
    assert_eq!(house.said(), [&a, &b].map(|drv| format!("building '{}'...", dir.full(drv))));
    let lines = |n: &str| ["one", "two", "\u{fffd}", "true"].map(|line| format!("{n}.drv: {line}"));
    assert_eq!(*ears.0.lock().unwrap(), [lines("a"), lines("b")].concat());
    // What is there is not built, nor read.
    std::fs::remove_file(house.store.layout().real_path(&b)).unwrap();
    let never = With(|_: &Job, _: &dyn Watch| panic!("nothing to do"));
    let report = house.realise(&never, &Deaf, &[&b]);
    assert!(matches!(report.targets.first().unwrap().result, Some(Ok(Success::AlreadyValid))));
    assert_eq!(missing(&house.store, &derivations, &[target(&b)]).unwrap(), crate::missing::Missing::default());
}

/// Each builder waits for three others: they do run at once. A fifth has to wait.
#[test]
fn builds_run_at_once() {
    let house = house();
    let drvs: Vec<StorePath> = (0..8).map(|n| house.add(&format!("n{n}"), &["out"], &[])).collect();
    let barrier = Barrier::new(4);
    let (now, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let builder = With(|job: &Job, _: &dyn Watch| {
        most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        barrier.wait();
        now.fetch_sub(1, Ordering::SeqCst);
        house.make(job)
    });
    house.realise(&builder, &Deaf, &drvs.iter().collect::<Vec<_>>()).check(|_| ()).unwrap();
    assert_eq!(most.load(Ordering::SeqCst), 4);
}

#[test]
fn failures_have_their_texts() {
    let mut house = house();
    let bad = house.add("bad", &["out"], &[]);
    let worse = house.add("worse", &["out"], &[]);
    let top = house.add("top", &["out"], &[&bad]);
    let builder = With(|job: &Job, _: &dyn Watch| match job.drv.name.as_str() {
        "bad" => fails(FailureKind::Permanent),
        _ => fails(FailureKind::TimedOut),
    });
    house.settings.keep_going = true;
    let dir = house.store.dir().clone();
    let ears = Ears::default();
    let error = house.realise(&builder, &ears, &[&top]).check(|_| panic!("one error only")).unwrap_err();
    let RealiseError::Failed { text, kinds } = error else { panic!("{error}") };
    assert_eq!(text, format!("1 dependencies of derivation '{}' failed to build", dir.full(&top)));
    assert!(kinds.contains(&FailureKind::Permanent));
    assert_eq!(*ears.0.lock().unwrap(), ["bad.drv: false", "failed: it is broken"]);
    let mut told = Vec::new();
    let report = house.realise(&builder, &Deaf, &[&worse, &top]);
    let error = report.check(|text| told.push(text.to_owned())).unwrap_err();
    let mut both = [dir.full(&worse), dir.full(&top)];
    both.sort();
    assert_eq!(error.to_string(), format!("build of '{}', '{}' failed", both[0], both[1]));
    assert_eq!(told.len(), 2);
    assert!(report.kinds.contains(&FailureKind::TimedOut) && report.kinds.contains(&FailureKind::Permanent));
    house.settings.max_jobs = Jobs(0);
    let error = house.realise(&builder, &Deaf, &[&worse]).check(|_| ()).unwrap_err();
    assert!(error.to_string().starts_with("unable to start any build; either increase '--max-jobs'"));
    // A path that nobody has is told by the list of what is missing.
    let path: StorePath = format!("{}-nowhere", "0".repeat(32)).parse().unwrap();
    let derivations = Derivations::new(&house.store);
    let driver = Driver::new(&house.store, &house.settings, &derivations, &builder, &Deaf);
    let nowhere = [Target { key: Key::Path(path.clone()), wanted: Wanted::All }];
    let error = driver.realise(&nowhere, Mode::Normal).check(|_| panic!("nothing more")).unwrap_err();
    assert_eq!(error.to_string(), format!("build of '{}' failed", dir.full(&path)));
    assert!(missing(&house.store, &derivations, &nowhere).unwrap().unknown.contains(&path));
}

/// A builder's thread that panics is a failed build, and the others go on.
#[test]
fn a_panic_is_a_failure() {
    let mut house = house();
    house.settings.keep_going = true;
    let (a, b) = (house.add("a", &["out"], &[]), house.add("b", &["out"], &[]));
    let builder = With(|job: &Job, _: &dyn Watch| {
        assert_ne!(job.drv.name.as_str(), "a", "this panic is part of the test");
        house.make(job)
    });
    let report = house.realise(&builder, &Deaf, &[&a, &b]);
    let [first, second] = report.targets.as_slice() else { panic!() };
    assert!(matches!(first.result, Some(Err(_))) && matches!(second.result, Some(Ok(Success::Built))));
}

#[test]
fn locked_outputs_are_tried_again() {
    let house = house();
    let a = house.add("a", &["out"], &[]);
    let tries = AtomicUsize::new(0);
    let builder = With(|job: &Job, _: &dyn Watch| match tries.fetch_add(1, Ordering::SeqCst) {
        0 => Outcome::Locked { path: "/p.lock".into() },
        1 => Outcome::NoBuildUser,
        _ => house.make(job),
    });
    house.realise(&builder, &Deaf, &[&a]).check(|_| ()).unwrap();
    let said = house.said();
    assert!(said.contains(&"waiting for lock on '/p.lock'...".to_owned()), "{said:?}");
    assert_eq!(tries.load(Ordering::SeqCst), 3);
}

#[test]
fn an_interrupt_reaches_the_builders() {
    let house = house();
    let drvs: Vec<StorePath> = (0..8).map(|n| house.add(&format!("n{n}"), &["out"], &[])).collect();
    let started = AtomicUsize::new(0);
    let builder = With(|_: &Job, watch: &dyn Watch| {
        started.fetch_add(1, Ordering::SeqCst);
        house.voice.cancelled.store(true, Ordering::SeqCst);
        while !watch.is_cancelled() {
            thread::yield_now();
        }
        fails(FailureKind::Cancelled)
    });
    let report = house.realise(&builder, &Deaf, &drvs.iter().collect::<Vec<_>>());
    assert!(matches!(report.check(|_| ()), Err(RealiseError::Interrupted)));
    assert!(started.load(Ordering::SeqCst) <= 4);
}

/// Without `keep_going` a failure stops builders that run.
#[test]
fn a_failure_stops_the_others() {
    let house = house();
    let (a, b) = (house.add("a", &["out"], &[]), house.add("b", &["out"], &[]));
    let both = Barrier::new(2);
    let builder = With(|job: &Job, watch: &dyn Watch| {
        both.wait();
        if job.drv.name.as_str() == "a" {
            return fails(FailureKind::HashMismatch);
        }
        while !watch.is_cancelled() {
            thread::yield_now();
        }
        fails(FailureKind::Cancelled)
    });
    let report = house.realise(&builder, &Deaf, &[&a, &b]);
    let error = report.check(|_| ()).unwrap_err();
    assert!(error.to_string().starts_with("build of "), "{error}");
    assert_eq!(report.kinds, [FailureKind::HashMismatch].into());
}
