//! As what caches say that outputs were built whose paths nobody knows beforehand: believed if it is
//! signed, and built otherwise.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use larder_cache::testing::{Answer, Server, file_of};
use larder_core::derivation::modulo::{Mask, Memo};
use larder_core::derivation::placeholder::Placeholder;
use larder_core::derivation::{Derivation, OutputName, aterm, name_of};
use larder_core::realisation::{DrvOutput, Realisation};
use larder_core::signature::SecretKey;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

use crate::house::{House, Run, run};

/// A house with two derivations, `leaf` and `user` above it, and a cache that has what was built.
pub struct Scene {
    pub house: House,
    pub dir: StoreDir,
    pub key: SecretKey,
    pub leaf: String,
    pub user: String,
    /// Where the outputs of the two are.
    pub outs: [String; 2],
}

impl Scene {
    /// Both were built, and only what was built is in the cache, not what is to be said of it.
    pub fn new() -> Self {
        let house = House::new();
        let dir = StoreDir::new(house.path().join("store").to_str().unwrap()).unwrap();
        let key = SecretKey::from_seed("builder-1", &[9; 32]).unwrap();
        house.write("secret", key.to_file_text());
        house.write("seed", "one\n");
        let mut scene = Self { house, dir, key, leaf: String::new(), user: String::new(), outs: Default::default() };
        scene.add();
        scene.outs = scene.built();
        let pushed = run(scene.command("larder", "").args(["push", &scene.uri()]).args(&scene.outs), b"");
        assert_eq!(pushed.status, Some(0), "{pushed:?}");
        scene
    }

    pub fn command(&self, applet: &str, config: &str) -> Command {
        let mut command = self.house.applet(applet);
        let secret = self.house.work().join("secret").display().to_string();
        command.env(
            "NIX_CONFIG",
            format!(
                "build-users-group =\nsandbox = false\nsubstituters =\nexperimental-features = ca-derivations\n\
                 download-attempts = 1\nsecret-key-files = {secret}\ntrusted-public-keys = {}\n{config}",
                self.key.public()
            ),
        );
        command
    }

    /// Puts the derivations into the store.
    fn add(&mut self) {
        let seed = self.house.work().join("seed").display().to_string();
        let own = Placeholder::own(&OutputName::new("out").unwrap()).to_text();
        let json = |name: &str, script: &str, env: &str, inputs: &str| {
            format!(
                r#"{{"name": "{name}", "builder": "/bin/sh", "args": ["-e", "-c", "{script}"],
                "env": {{"name": "{name}", "out": "{own}", "PATH": "/bin:/usr/bin"{env}}}, "inputDrvs": {{{inputs}}},
                "outputs": {{"out": {{"hashAlgo": "sha256", "method": "nar"}}}}}}"#
            )
        };
        let add = |name: &str, json: String| {
            let file = self.house.write(name, json);
            let added = run(self.command("larder", "").args(["derivation", "add"]).arg(file), b"");
            assert_eq!(added.status, Some(0), "{added:?}");
            added.stdout.trim_end().to_owned()
        };
        let leaf = add("leaf.json", json("leaf", &format!("cat {seed} > $out"), "", ""));
        let path = self.dir.parse(leaf.as_bytes()).unwrap();
        let upstream = Placeholder::upstream(&path, &OutputName::new("out").unwrap()).unwrap();
        let (env, inputs) = (format!(r#", "leaf": "{upstream}""#), format!(r#""{leaf}": ["out"]"#));
        let user = add("user.json", json("user", "echo $leaf > $out; cat $leaf >> $out", &env, &inputs));
        (self.leaf, self.user) = (leaf, user);
    }

    fn built(&self) -> [String; 2] {
        [&self.leaf, &self.user].map(|drv| {
            let built = run(self.command("nix-store", "").args(["-r", "--no-gc-warning", drv]), b"");
            assert_eq!(built.status, Some(0), "{built:?}");
            built.stdout.trim_end().to_owned()
        })
    }

    pub fn cache(&self) -> PathBuf {
        self.house.work().join("cache")
    }

    pub fn uri(&self) -> String {
        format!("file://{}", self.cache().display())
    }

    /// A store that has the derivations, and nothing else.
    pub fn start_anew(&mut self) {
        for name in ["store", "var", "log", "home/.cache"] {
            let path = self.house.path().join(name);
            let _ = Command::new("chmod").args(["-R", "u+w"]).arg(&path).output();
            let _ = std::fs::remove_dir_all(&path);
        }
        self.add();
    }

    /// Realises a derivation with what these caches have.
    pub fn realise(&self, drv: &str, uris: &str, config: &str) -> Run {
        let config = format!("substituters = {uris}\n{config}");
        run(self.command("nix-store", &config).args(["-r", "--no-gc-warning", drv]), b"")
    }

    /// The same in a new store, where `user` must come out as before: says whether anything was built.
    #[track_caller]
    fn builds(&mut self, uris: &str, config: &str) -> (bool, String) {
        self.start_anew();
        let run = self.realise(&self.user, uris, config);
        assert_eq!((run.stdout, run.status), (format!("{}\n", self.outs[1]), Some(0)), "{}", run.stderr);
        (run.stderr.contains("building '"), run.stderr)
    }

    fn read(&self, drv: &StorePath) -> Derivation {
        let text = std::fs::read(self.dir.full(drv)).unwrap();
        aterm::parse(&self.dir, &name_of(drv).unwrap(), &text).unwrap()
    }

    pub fn id(&self, drv: &str) -> DrvOutput {
        let drv = self.dir.parse(drv.as_bytes()).unwrap();
        let resolve = |input: &StorePath| Ok::<_, std::io::Error>(self.read(input));
        let modulo = Memo::new().modulo(&self.dir, &self.read(&drv), Mask::On, resolve).unwrap();
        DrvOutput::new(modulo.digest, "out").unwrap()
    }

    /// What was built, as it should be told of: of `leaf`, and of `user`.
    fn realisations(&self) -> [Realisation; 2] {
        let path = |n: usize| self.dir.parse(self.outs[n].as_bytes()).unwrap();
        let leaf = self.realisation(&self.leaf, &path(0), BTreeMap::new());
        let below = BTreeMap::from([(leaf.id.clone(), leaf.out_path.clone())]);
        let user = self.realisation(&self.user, &path(1), below);
        [leaf, user]
    }

    fn realisation(&self, drv: &str, out: &StorePath, below: BTreeMap<DrvOutput, StorePath>) -> Realisation {
        let (id, out_path) = (self.id(drv), out.clone());
        self.signed(Realisation { id, out_path, signatures: BTreeSet::new(), dependent_realisations: below })
    }

    fn signed(&self, mut realisation: Realisation) -> Realisation {
        realisation.signatures = [realisation.sign(&self.key)].into();
        realisation
    }

    fn file(&self, id: &DrvOutput) -> PathBuf {
        self.cache().join(format!("realisations/{id}.doi"))
    }

    fn tell(&self, realisation: &Realisation) {
        std::fs::write(self.file(&realisation.id), realisation.to_json()).unwrap();
    }
}

#[test]
fn what_others_have_built_is_not_built_again() {
    let mut scene = Scene::new();
    let uri = scene.uri();
    let [leaf, user] = scene.realisations();
    // Nobody says anything.
    let (built, said) = scene.builds(&uri, "");
    assert!(built && !said.contains("warning"), "{said}");
    scene.tell(&leaf);
    scene.tell(&user);
    let (built, said) = scene.builds(&uri, "");
    assert!(!built && !said.contains("warning"), "{said}");
    for out in &scene.outs {
        assert!(said.contains(&format!("copying path '{out}' from '{uri}'...")), "{said}");
    }
    let verified = run(scene.command("nix-store", "").args(["--verify", "--check-contents"]), b"");
    assert_eq!(verified.status, Some(0), "{verified:?}");
    // Both are known from now on.
    for (drv, out) in [&scene.leaf, &scene.user].into_iter().zip(&scene.outs) {
        scene.realise(drv, "", "").prints(&format!("{out}\n"));
    }
    // Only what is below is known elsewhere: what is above is built with it.
    std::fs::remove_file(scene.file(&user.id)).unwrap();
    let (built, said) = scene.builds(&uri, "");
    assert!(built && !said.contains("-leaf.drv'...") && said.contains("-user.drv'"), "{said}");
    // Nothing of it is asked for where nothing is fetched, or that is forbidden.
    scene.tell(&user);
    assert!(scene.builds(&uri, "substitute = false").0);
    scene.start_anew();
    let refused = scene.realise(&scene.user, &uri, "experimental-features =");
    assert!(refused.stderr.contains("experimental Nix feature 'ca-derivations' is disabled"), "{refused:?}");
}

#[test]
fn what_nobody_has_signed_is_built() {
    let mut scene = Scene::new();
    let uri = scene.uri();
    let [leaf, user] = scene.realisations();
    scene.tell(&leaf);
    let warning = |by: &str| {
        format!(
            "warning: the realisation of '{}' from '{uri}' is not signed by any of the keys in 'trusted-public-keys' \
             (it has signatures by: {by}; trusted are: builder-1)\n",
            user.id
        )
    };
    let unsigned = Realisation { signatures: BTreeSet::new(), ..user.clone() };
    let forged =
        Realisation { out_path: leaf.out_path.clone(), dependent_realisations: BTreeMap::new(), ..user.clone() };
    let other = SecretKey::from_seed("other-1", &[1; 32]).unwrap();
    let others = Realisation { signatures: [forged.sign(&other)].into(), ..forged.clone() };
    for (told, by) in [(&unsigned, "none"), (&forged, "builder-1"), (&others, "other-1")] {
        scene.tell(told);
        let (built, said) = scene.builds(&uri, "");
        assert!(built && said.matches(&warning(by)).count() == 1, "{said}");
    }
    // Who does not ask for signatures, or trusts the cache, takes it.
    scene.tell(&unsigned);
    for (uris, config) in [(uri.clone(), "require-sigs = false"), (format!("{uri}?trusted=true"), "")] {
        let (built, said) = scene.builds(&uris, config);
        assert!(!built && !said.contains("warning"), "{said}");
    }
    // What is below needs no signature if it says no more than what is signed.
    scene.tell(&user);
    scene.tell(&Realisation { signatures: BTreeSet::new(), ..leaf.clone() });
    assert!(!scene.builds(&uri, "").0);
    // It must be told of, and as the same.
    std::fs::remove_file(scene.file(&leaf.id)).unwrap();
    assert!(scene.builds(&uri, "").0);
    let (out_path, signatures) = (user.out_path.clone(), BTreeSet::new());
    scene.tell(&Realisation { out_path, signatures, ..leaf.clone() });
    assert!(scene.builds(&uri, "").0);
}

#[test]
fn files_that_are_none_and_of_others() {
    let mut scene = Scene::new();
    let (uri, good) = (scene.uri(), format!("file://{}", scene.house.work().join("good").display()));
    let [leaf, user] = scene.realisations();
    scene.tell(&leaf);
    scene.tell(&user);
    let copied = Command::new("cp").args(["-r", "cache", "good"]).current_dir(scene.house.work()).status().unwrap();
    assert!(copied.success());
    // A good one, of another output.
    std::fs::write(scene.file(&user.id), leaf.to_json()).unwrap();
    let (built, said) = scene.builds(&uri, "");
    let text = format!("was asked for the realisation of '{}' and tells of '{}'", user.id, leaf.id);
    assert!(built && said.matches(&text).count() == 1, "{said}");
    for junk in ["", "{", "[]", &format!(r#"{{"id":"{}"}}"#, user.id), &user.to_json().replace("-user", "/../user")] {
        std::fs::write(scene.file(&user.id), junk).unwrap();
        scene.start_anew();
        let failed = scene.realise(&scene.user, &uri, "");
        let text = format!("error: what the cache '{uri}' says in 'realisations/{}.doi' is not valid: ", user.id);
        assert!(failed.status == Some(1) && failed.stderr.contains(&text), "{failed:?}");
        assert!(failed.stderr.contains("try '--fallback'") && !failed.stderr.contains("building '"), "{failed:?}");
        let (built, said) = scene.builds(&uri, "fallback = true");
        assert!(built && said.contains(&text), "{said}");
        // Another cache has it.
        let (built, said) = scene.builds(&format!("{uri}?priority=1 {good}?priority=2"), "");
        assert!(!built, "{said}");
    }
}

#[test]
fn what_is_known_here_otherwise_is_not_taken() {
    let mut scene = Scene::new();
    let uri = scene.uri();
    let [leaf, user] = scene.realisations();
    scene.tell(&leaf);
    scene.tell(&user);
    scene.start_anew();
    // Here, `leaf` comes out as something else.
    scene.house.write("seed", "two\n");
    let here = scene.realise(&scene.leaf, "", "").stdout;
    assert_ne!(here.trim_end(), scene.outs[0]);
    let built = scene.realise(&scene.user, &uri, "");
    let warning = format!(
        "warning: substituter '{uri}' has an incompatible realisation for '{}', ignoring.\nLocal:  {}\nRemote: {}\n",
        leaf.id,
        here.trim_end(),
        scene.outs[0]
    );
    assert_eq!(built.status, Some(0), "{built:?}");
    assert!(built.stderr.contains(&warning) && built.stderr.contains("building '"), "{built:?}");
    assert_ne!(built.stdout.trim_end(), scene.outs[1]);
}

#[test]
fn caches_on_the_network_are_asked_once() {
    let mut scene = Scene::new();
    let [leaf, user] = scene.realisations();
    let server = Server::folder(&scene.cache(), Duration::ZERO, |_| None);
    let asked = |server: &Server, id: &DrvOutput| {
        let lines = server.take_lines();
        lines.iter().filter(|line| **line == format!("GET /realisations/{id}.doi")).count()
    };
    // That it is not there is remembered for as long as the settings say.
    scene.start_anew();
    let built = scene.realise(&scene.user, &server.url(), "");
    assert!(built.status == Some(0) && asked(&server, &user.id) == 1, "{built:?}");
    scene.tell(&leaf);
    scene.tell(&user);
    let forget = |scene: &mut Scene| {
        let memory = scene.house.path().join("home/.cache");
        std::fs::rename(&memory, scene.house.work().join("memory")).unwrap();
        scene.start_anew();
        std::fs::rename(scene.house.work().join("memory"), memory).unwrap();
    };
    forget(&mut scene);
    let built = scene.realise(&scene.user, &server.url(), "");
    assert!(built.stderr.contains("building '") && asked(&server, &user.id) == 0, "{built:?}");
    forget(&mut scene);
    let fetched = scene.realise(&scene.user, &server.url(), "narinfo-cache-negative-ttl = 0");
    assert!(fetched.status == Some(0) && asked(&server, &user.id) == 1, "{fetched:?}");
    assert!(!fetched.stderr.contains("building '"), "{fetched:?}");
    // That it is there is remembered, too.
    forget(&mut scene);
    let fetched = scene.realise(&scene.user, &server.url(), "");
    assert!(fetched.status == Some(0) && asked(&server, &user.id) == 0, "{fetched:?}");
    assert!(!fetched.stderr.contains("building '"), "{fetched:?}");
    // One that fails is passed over.
    let folder = scene.cache();
    let ill = Server::start(move |request| {
        if request.path.starts_with("/realisations/") { Answer::status(500) } else { file_of(&folder, request) }
    });
    scene.start_anew();
    let failed = scene.realise(&scene.user, &ill.url(), "");
    assert!(failed.status == Some(1) && failed.stderr.contains("HTTP error 500"), "{failed:?}");
    let (built, said) = scene.builds(&format!("{}?priority=1 {}?priority=2", ill.url(), server.url()), "");
    assert!(!built, "{said}");
}
