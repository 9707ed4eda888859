//! Files of settings.

use std::io;

use camino::Utf8Path;
use larder_core::settings::{Configured, Machine, Os, SettingsBuilder, SettingsError, TABLE};

/// The text is `nix.conf`, and every file it includes is what follows its first NUL. The settings
/// it makes, printed and given as options, must be the same.
pub fn settings(data: &[u8]) {
    let (text, included) = data.split_at(data.iter().position(|b| *b == 0).unwrap_or(data.len()));
    let included = included.split_first().map(|(_, rest)| rest);
    let Ok(made) = configure(text, included) else { return };
    assert!(made.overrides().is_empty());
    let mut builder = SettingsBuilder::new(machine());
    for entry in TABLE {
        builder.option(entry.name, &(entry.print)(&made.settings));
    }
    let again = builder.finish();
    assert!(again.settings == made.settings);
    assert!(again.warnings.is_empty());
}

fn machine() -> Machine {
    Machine {
        cores: 4,
        root: false,
        system: "x86_64-linux".to_owned(),
        extra_platforms: ["i686-linux".to_owned()].into(),
        os: Os::Linux,
        kvm: false,
        conf_dir: "/etc/nix".into(),
        build_hook: String::new(),
    }
}

fn configure(text: &[u8], included: Option<&[u8]>) -> Result<Configured, SettingsError> {
    let main = Utf8Path::new("/etc/nix/nix.conf");
    let mut read = |file: &Utf8Path| -> io::Result<Option<Vec<u8>>> {
        Ok(if file == main { Some(text) } else { included }.map(<[u8]>::to_vec))
    };
    let mut builder = SettingsBuilder::new(machine());
    builder.system_file(main, &mut read)?;
    Ok(builder.finish())
}
