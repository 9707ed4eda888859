//! `builtin:fetchurl`: one file, or one archive, from a URL.
//!
//! What comes is checked against the hash of the derivation afterwards, as any fixed output is.

use std::fs::{File, Permissions};
use std::io::{self, Read, Write as _};
use std::num::NonZeroU64;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use larder_cache::client::{Authorities, Client, ClientOptions, Proxies};
use larder_cache::error::SharedError;
use larder_cache::s3::Keys;
use larder_core::report::{Level, Reporter, chain};
use larder_fs::restore::{RestoreOptions, Restorer};
use serde_json::Value;

use super::{Anything, Given, at, say, unpack};

pub(super) fn run(given: &Given<'_>) -> Result<(), Anything> {
    let out = given.path("out")?;
    let url = given.text("url")?;
    if let (Some(hash), Value::Array(mirrors)) = (given.option("flatHash").as_str(), given.option("mirrors")) {
        for mirror in mirrors.iter().filter_map(Value::as_str) {
            let slash = if mirror.ends_with('/') { "" } else { "/" };
            match fetch(given, &format!("{mirror}{slash}{hash}"), &out) {
                Ok(()) => return Ok(()),
                Err(error) => say(&error.to_string()),
            }
        }
    }
    fetch(given, url, &out)
}

/// Fetches, unpacks if that is wanted, and sets the mode.
fn fetch(given: &Given<'_>, url: &str, out: &Path) -> Result<(), Anything> {
    let at_url = |error: Anything| -> Anything { format!("unable to download '{url}': {}", chain(&*error)).into() };
    write(given, url, open(given, url).map_err(at_url)?, out)
}

fn open(given: &Given<'_>, url: &str) -> Result<Box<dyn Read + Send>, Anything> {
    Ok(Client::new(options(given), Arc::new(Log)).open(url)?)
}

/// What the settings outside and the environment of the builder (`impureEnvVars`) say.
fn options(given: &Given<'_>) -> ClientOptions {
    let seconds = |name: &str| given.option(name).as_u64().filter(|seconds| *seconds > 0).map(Duration::from_secs);
    let text = |name: &str| given.option(name).as_str().map(str::to_owned);
    let variable = |name: &str| String::from_utf8(given.env.get(name.as_bytes())?.to_vec()).ok();
    ClientOptions {
        user_agent_suffix: text("userAgentSuffix").unwrap_or_default(),
        connections: 1,
        connect_timeout: seconds("connectTimeout"),
        stall_timeout: seconds("stalledTimeout"),
        speed: NonZeroU64::new(given.option("downloadSpeed").as_u64().unwrap_or(0).saturating_mul(1024)),
        attempts: given.option("attempts").as_u64().map_or(1, |n| u32::try_from(n).unwrap_or(u32::MAX)),
        authorities: Authorities {
            pem: text("certificates"),
            refused: text("certificatesRefused").map(|text| SharedError(text.into())),
        },
        http2: given.option("http2").as_bool().unwrap_or(true),
        checks_certificates: true,
        netrc: text("netrc"),
        proxies: Proxies::from_variables(variable),
        keys: Keys::default(),
    }
}

/// Tells the log of the build.
struct Log;

impl Reporter for Log {
    fn shows(&self, level: Level) -> bool {
        level <= Level::Warn
    }

    fn message(&self, level: Level, text: std::fmt::Arguments<'_>) {
        if self.shows(level) {
            say(&format!("warning: {text}"));
        }
    }
}

fn write(given: &Given<'_>, url: &str, mut body: Box<dyn Read + Send>, out: &Path) -> Result<(), Anything> {
    if given.is_set("unpack") {
        let source =
            if Path::new(url).extension().is_some_and(|ext| ext == "xz") { unpack::uncompressed(body)? } else { body };
        restore(source, out)?;
    } else {
        let mut file = File::create(out).map_err(at("creating file", out))?;
        io::copy(&mut body, &mut file)?;
        file.flush()?;
    }
    if given.is_set("executable") {
        std::fs::set_permissions(out, Permissions::from_mode(0o755)).map_err(at("changing mode of", out))?;
    }
    Ok(())
}

/// Lays an archive down.
fn restore(mut source: impl Read, out: &Path) -> Result<(), Anything> {
    let options = RestoreOptions::default();
    let mut restorer = Restorer::new(rustix::fs::CWD, out.as_os_str(), options);
    let mut block = vec![0; 64 << 10];
    while !restorer.is_done() {
        let n = source.read(&mut block)?;
        if n == 0 {
            break;
        }
        let bytes = block.get(..n).unwrap_or_default();
        let taken = restorer.push(bytes)?;
        if taken < n {
            return Err("there is something after the end of the archive".into());
        }
    }
    restorer.finish()?;
    if source.read(&mut block)? > 0 {
        return Err("there is something after the end of the archive".into());
    }
    Ok(())
}
