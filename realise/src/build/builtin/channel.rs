//! `builtin:unpack-channel`: a directory with one entry, out of an archive.

use std::fs::File;

use super::{Anything, Given, at, unpack};

pub(super) fn run(given: &Given<'_>) -> Result<(), Anything> {
    let out = given.path("out")?;
    let name = given.text("channelName")?;
    let source = given.path("src")?;
    if name.contains('/') || matches!(name, "" | "." | "..") {
        return Err(format!("channelName is not allowed to contain filesystem separators, got {name}").into());
    }
    std::fs::create_dir(&out).map_err(at("creating directory", &out))?;
    let file = File::open(&source).map_err(at("opening file", &source))?;
    unpack::unpack(file, &out).map_err(|error| {
        let text = error.to_string();
        let reason = std::error::Error::source(&error).map(|reason| format!(": {reason}")).unwrap_or_default();
        format!("failed to open archive: {text}{reason}")
    })?;
    let mut entries = std::fs::read_dir(&out).map_err(at("reading directory", &out))?;
    let (Some(Ok(only)), None) = (entries.next(), entries.next()) else {
        return Err(format!("channel tarball '{}' contains more than one file", source.display()).into());
    };
    let target = out.join(name);
    std::fs::rename(only.path(), &target).map_err(at("renaming to", &target))?;
    Ok(())
}
