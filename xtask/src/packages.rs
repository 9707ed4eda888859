//! Real packages: source archives of Debian, built in the sandbox from derivations that anybody
//! could write, and built again to see that the same comes out.
//!
//! The archives come through `apt-get` with lists and caches of its own, so that nothing of the
//! machine's changes. The inputs of a build are one store path, the archive, and what the sandbox
//! shows of the host.

use std::ffi::OsStr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{Failed, release_binary, say, step};

/// Debian's name of a source, how it is built, and a command that shows that it works.
struct Package {
    source: &'static str,
    script: &'static str,
    proof: &'static str,
    says: &'static str,
}

const PACKAGES: &[Package] = &[
    Package {
        source: "hello",
        script: "./configure --prefix=$out; make; make install",
        proof: "$out/bin/hello",
        says: "Hello, world!",
    },
    Package {
        source: "lua5.4",
        script: "make linux; make install INSTALL_TOP=$out",
        proof: "$out/bin/lua -e 'print(6 * 7)'",
        says: "42",
    },
    Package {
        source: "zlib",
        script: "./configure --prefix=$out; make; make check; make install",
        proof: "test -f $out/include/zlib.h && od -An -c -N7 $out/lib/libz.a",
        says: "!   <   a   r   c   h   >",
    },
];

/// An ordinary user who has no account.
const USER: u32 = 30_790;

pub(crate) fn run(args: &[String]) -> Result<(), Failed> {
    let wanted: Vec<&Package> =
        PACKAGES.iter().filter(|package| args.is_empty() || args.iter().any(|arg| arg == package.source)).collect();
    if wanted.is_empty() {
        let names: Vec<&str> = PACKAGES.iter().map(|package| package.source).collect();
        return Err(Failed(format!("the packages are: {}", names.join(", "))));
    }
    let program = release_binary()?;
    let work = std::env::temp_dir().join(format!("larder-packages-{}", std::process::id()));
    std::fs::create_dir(&work)?;
    std::fs::set_permissions(&work, PermissionsExt::from_mode(0o755))?;
    let outcome = all(&work, &program, &wanted);
    // Store objects are read-only; make them deletable first.
    let _ = Command::new("chmod").args(["-R", "u+rwX"]).arg(&work).status();
    let _ = std::fs::remove_dir_all(&work);
    outcome
}

fn all(work: &Path, program: &Path, packages: &[&Package]) -> Result<(), Failed> {
    let archives = fetch(&work.join("sources"), packages)?;
    // Where everybody may execute it.
    let copy = work.join("larder");
    std::fs::copy(program, &copy)?;
    let is_root = text(Command::new("id").arg("-u"))? == "0";
    let mut people = vec![None];
    if is_root {
        people.push(Some(USER));
    }
    for user in people {
        let who = user.map_or_else(|| "oneself".to_owned(), |uid| format!("user {uid}"));
        let home = work.join(user.map_or_else(|| "own".to_owned(), |uid| uid.to_string()));
        std::fs::create_dir(&home)?;
        if let Some(uid) = user {
            chown(&home, Some(uid), Some(uid))?;
        }
        let place = Place { program: &copy, home: &home, user };
        for (package, archive) in packages.iter().zip(&archives) {
            let out = place.build(package, archive)?;
            say(&format!("{} as {who}: {out}, the same three times", package.source));
        }
        let verified = place.command("nix-store").args(["--verify", "--check-contents"]).output()?;
        if !verified.status.success() {
            return Err(Failed(format!("the store does not verify: {}", String::from_utf8_lossy(&verified.stderr))));
        }
    }
    Ok(())
}

/// The original archives, by `apt-get` with directories of its own.
fn fetch(dir: &Path, packages: &[&Package]) -> Result<Vec<PathBuf>, Failed> {
    for name in ["lists/partial", "cache/archives/partial", "parts", "got"] {
        std::fs::create_dir_all(dir.join(name))?;
    }
    let release = std::fs::read_to_string("/etc/os-release")?;
    let name = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let name =
        name.ok_or_else(|| Failed("this is no Debian: there is no VERSION_CODENAME in /etc/os-release".into()))?;
    let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let list = dir.join("sources.list");
    std::fs::write(&list, format!("deb-src [signed-by={keys}] http://deb.debian.org/debian {name} main\n"))?;
    let option = |name: &str, value: &OsStr| {
        let mut word = std::ffi::OsString::from(format!("{name}="));
        word.push(value);
        ["-o".into(), word]
    };
    let options: Vec<std::ffi::OsString> = [
        option("Dir::Etc::SourceList", list.as_os_str()),
        option("Dir::Etc::SourceParts", dir.join("parts").as_os_str()),
        option("Dir::State::Lists", dir.join("lists").as_os_str()),
        option("Dir::Cache", dir.join("cache").as_os_str()),
        option("APT::Sandbox::User", OsStr::new("root")),
        option("Acquire::Languages", OsStr::new("none")),
    ]
    .concat();
    step(Command::new("apt-get").args(&options).args(["-q", "update"]))?;
    let names = packages.iter().map(|package| package.source);
    let mut source = Command::new("apt-get");
    source.args(&options).args(["-q", "source", "--download-only", "--only-source"]).args(names);
    step(source.current_dir(dir.join("got")))?;
    let archive = |package: &&Package| {
        let begins = format!("{}_", package.source);
        let entries = std::fs::read_dir(dir.join("got"))?.flatten();
        let found = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).find(|name| {
            let is_archive = name.contains(".orig.tar.") && Path::new(name).extension().is_none_or(|ext| ext != "asc");
            name.starts_with(&begins) && is_archive
        });
        found.map(|name| dir.join("got").join(name)).ok_or_else(|| Failed(format!("no archive of {}", package.source)))
    };
    packages.iter().map(archive).collect()
}

fn text(command: &mut Command) -> Result<String, Failed> {
    let output = command.output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Failed(format!("{command:?} ended with {}: {said}", output.status)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// Somebody's store.
struct Place<'a> {
    program: &'a Path,
    home: &'a Path,
    user: Option<u32>,
}

impl Place<'_> {
    fn command(&self, applet: &str) -> Command {
        let mut command = Command::new(self.program);
        command.arg0(applet).current_dir(self.home).env_clear();
        for (name, dir) in [
            ("NIX_STORE_DIR", "store"),
            ("NIX_STATE_DIR", "var"),
            ("NIX_LOG_DIR", "log"),
            ("NIX_CONF_DIR", "etc"),
            ("HOME", "."),
        ] {
            command.env(name, self.home.join(dir));
        }
        command.env("PATH", "/usr/bin:/bin").env("NIX_USER_CONF_FILES", "").env("NIX_REMOTE", "");
        let config = "sandbox = true\nsandbox-fallback = false\nsubstituters =\n\
                      sandbox-paths = /bin /usr /lib /lib64? /etc/alternatives?";
        command.env("NIX_CONFIG", config);
        if let Some(uid) = self.user {
            command.uid(uid).gid(uid);
        }
        command
    }

    /// Builds a package, and twice more to compare; gives the path of what was made.
    fn build(&self, package: &Package, archive: &Path) -> Result<String, Failed> {
        let script = format!("tar xf $src; cd */; {}", package.script);
        let json = format!(
            r#"{{"name": "{}", "builder": "/bin/sh", "args": ["-e", "-c", "{script}"], "files": {{"src": "{}"}},
                "env": {{"PATH": "/usr/bin:/bin", "SOURCE_DATE_EPOCH": "1", "LC_ALL": "C"}}}}"#,
            package.source,
            archive.display(),
        );
        let file = self.home.join(format!("{}.json", package.source));
        std::fs::write(&file, json)?;
        let drv = text(self.command("larder").args(["derivation", "add"]).arg(&file))?;
        let realise = |more: &[&str]| text(self.command("nix-store").args(["-r", "--quiet", &drv]).args(more));
        let out = realise(&[])?;
        for _ in 0..2 {
            realise(&["--check"])?;
        }
        let said = text(Command::new("/bin/sh").args(["-e", "-c", package.proof]).env("out", &out))?;
        if !said.contains(package.says) {
            return Err(Failed(format!("what was made of {} says '{said}'", package.source)));
        }
        Ok(out)
    }
}
