//! Builders that are part of the program: `builtin:NAME`.
//!
//! They run where any other builder would, in the sandbox and as the build user: what they read
//! and unpack is not to be trusted, and what they may read is what the builder may. What they have
//! to say goes to the log. Source: modern, section 9.

mod buildenv;
mod channel;
mod fetchurl;
pub mod unpack;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;

use larder_cache::client::Authorities;
use larder_core::content_address::{ContentAddress, Method};
use larder_core::derivation::{Kind, Output};
use larder_core::hash::Encoding;
use larder_core::settings::Settings;
use larder_sandbox::plan::Plan;
use serde_json::{Value, json};

use super::Build;
use crate::job::{Failure, FailureKind};

/// What the program of such a derivation begins with.
pub const PREFIX: &str = larder_sandbox::enter::INSIDE_PREFIX;

/// Runs the builder of a plan inside the sandbox; its exit code.
///
/// To be given to the launcher, see [`larder_sandbox::enter::launcher_main_with`].
pub fn inside(plan: &Plan) -> i32 {
    match run(plan) {
        Ok(()) => 0,
        Err(error) => {
            let mut text = error.to_string();
            let mut next = error.source();
            while let Some(reason) = next {
                text.push_str(": ");
                text.push_str(&reason.to_string());
                next = reason.source();
            }
            say(&format!("error: {text}"));
            1
        }
    }
}

/// A line of the log.
fn say(line: &str) {
    // There is nobody to tell if that fails.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Any error; all of them only become text of the log.
type Anything = Box<dyn std::error::Error + Send + Sync>;

/// What a builtin builder knows.
struct Given<'a> {
    env: BTreeMap<&'a [u8], &'a [u8]>,
    /// See [`options`].
    options: Value,
}

impl<'a> Given<'a> {
    fn of(plan: &'a Plan) -> Self {
        let env = plan.env.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())).collect();
        let options = plan.argv.get(1).and_then(|text| serde_json::from_slice(text.as_bytes()).ok());
        Self { env, options: options.unwrap_or_default() }
    }

    fn attribute(&self, name: &str) -> Result<&'a [u8], Anything> {
        let value = self.env.get(name.as_bytes()).copied();
        value.ok_or_else(|| format!("attribute '{name}' missing").into())
    }

    fn text(&self, name: &str) -> Result<&'a str, Anything> {
        let value = self.attribute(name)?;
        std::str::from_utf8(value).map_err(|_| format!("attribute '{name}' is not UTF-8").into())
    }

    fn path(&self, name: &str) -> Result<PathBuf, Anything> {
        Ok(OsString::from_vec(self.attribute(name)?.to_vec()).into())
    }

    /// One of [`options`].
    fn option(&self, name: &str) -> &Value {
        self.options.get(name).unwrap_or(&Value::Null)
    }

    fn is_set(&self, name: &str) -> bool {
        self.env.get(name.as_bytes()) == Some(&&b"1"[..])
    }
}

fn run(plan: &Plan) -> Result<(), Anything> {
    let given = Given::of(plan);
    let program = plan.program.as_os_str().to_string_lossy();
    match program.strip_prefix(PREFIX).unwrap_or_default() {
        "fetchurl" => fetchurl::run(&given),
        "buildenv" => buildenv::run(&given),
        "unpack-channel" => channel::run(&given),
        // The check before the start knows the same names.
        other => Err(format!("unsupported builtin builder '{other}'").into()),
    }
}

/// Is this one of these builders? Errors: it is one we do not have, or is not to be used so.
pub(super) fn check(build: &Build<'_>) -> Result<bool, Failure> {
    let builder = &build.job.drv.builder;
    let Some(name) = builder.strip_prefix(PREFIX.as_bytes()) else { return Ok(false) };
    let refused = |text: &str| Err(Failure::new(FailureKind::InputRejected, text));
    match name {
        b"fetchurl" if !matches!(build.kind, Kind::Fixed | Kind::Impure) => {
            refused("'builtin:fetchurl' must be a fixed-output or impure derivation")
        }
        _ => Ok(true),
    }
}

/// What of the settings these builders need; it is their only argument.
pub(super) fn options(build: &Build<'_>) -> OsString {
    let values = &build.settings.values;
    let hash = build.job.drv.outputs.values().find_map(|output| match output {
        Output::Fixed { address: ContentAddress::Fixed(Method::Flat, hash), .. } => {
            Some(format!("{}/{}", hash.algorithm(), hash.encode(Encoding::Base16)))
        }
        _ => None,
    });
    let authorities = authorities(build, values);
    let options = json!({
        "attempts": values.download_attempts,
        "certificates": authorities.pem,
        "certificatesRefused": authorities.refused.map(|error| error.to_string()),
        "connectTimeout": values.connect_timeout,
        "downloadSpeed": values.download_speed,
        "flatHash": hash,
        "http2": values.http2,
        "mirrors": values.hashed_mirrors,
        "netrc": std::fs::read_to_string(&values.netrc_file).ok(),
        "stalledTimeout": values.stalled_download_timeout,
        "userAgentSuffix": values.user_agent_suffix,
    });
    options.to_string().into()
}

/// Whom the host trusts; the sandbox does not show the file.
fn authorities(build: &Build<'_>, values: &Settings) -> Authorities {
    Authorities::find(&values.ssl_cert_file, |name| {
        Some(OsString::from_vec(build.settings.environment.get(name.as_bytes())?.clone()))
    })
}

/// Names what was attempted on a file.
fn at(doing: &str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Anything {
    let text = format!("{doing} '{}'", larder_fs::file_error::shown(path));
    move |error| format!("{text}: {error}").into()
}
