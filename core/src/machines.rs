//! Machines that builds may be done on: how they are written, and which of them to take.
//!
//! A line a machine, fields separated by blanks, `-` for one that is left out; on a command line
//! `;` stands for the end of a line, and `@FILE` for the lines of a file. Source: building,
//! section 11; protocols, section 6.

use std::cmp::Reverse;
use std::collections::BTreeSet;

/// Files within files, at most.
const MAX_DEPTH: usize = 16;

/// A machine that builds may be done on.
#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    /// `ssh://host` and the like, as written, but for a scheme that was left out.
    pub uri: String,
    /// Kinds of machine that it can be.
    pub systems: BTreeSet<String>,
    /// A file with a private key.
    pub key: Option<String>,
    /// Builds at once; one at least.
    pub max_jobs: u32,
    /// How fast it is compared with others.
    pub speed: f32,
    pub features: BTreeSet<String>,
    /// Only what requires all of these is built there.
    pub mandatory: BTreeSet<String>,
    /// Its public key in base 64.
    pub host_key: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MachinesError {
    #[error("bad machine specification: '{line}' has {found} fields, and there are no more than 8")]
    Fields { line: String, found: usize },
    #[error("bad machine specification: '{value}' in '{line}' is no number of builds at once")]
    Jobs { line: String, value: String },
    #[error("bad machine specification: '{value}' in '{line}' is no speed factor of 1 or more")]
    Speed { line: String, value: String },
    #[error("bad machine specification: the host key '{value}' in '{line}' is not in base 64")]
    HostKey { line: String, value: String },
    #[error("bad machine specification: cannot read the file '{file}': {reason}")]
    File { file: String, reason: String },
    #[error("bad machine specification: '{file}' is a file within more than {MAX_DEPTH} others")]
    Depth { file: String },
}

/// What a build needs of a machine.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Needs {
    pub system: String,
    pub features: BTreeSet<String>,
}

impl Machine {
    /// Reads a line that has something in it. `system` is that of machines which name none.
    ///
    /// ```
    /// use larder_core::machines::Machine;
    /// let machine = Machine::parse("me@fast x86_64-linux,i686-linux - 4 2 kvm", "x86_64-linux")?;
    /// assert_eq!(machine.uri, "ssh://me@fast");
    /// assert_eq!((machine.max_jobs, machine.key), (4, None));
    /// # Ok::<(), larder_core::machines::MachinesError>(())
    /// ```
    pub fn parse(line: &str, system: &str) -> Result<Self, MachinesError> {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let whole = || line.trim().to_owned();
        if fields.len() > 8 {
            return Err(MachinesError::Fields { line: whole(), found: fields.len() });
        }
        let field = |number: usize| fields.get(number).copied().filter(|field| *field != "-");
        let list = |number| -> BTreeSet<String> {
            let words = field(number).unwrap_or_default().split(',').filter(|word| !word.is_empty());
            words.map(str::to_owned).collect()
        };
        let max_jobs = match field(3) {
            None => 1,
            Some(text) => {
                let bad = || MachinesError::Jobs { line: whole(), value: text.to_owned() };
                text.parse().ok().filter(|jobs| *jobs > 0).ok_or_else(bad)?
            }
        };
        let speed = match field(4) {
            None => 1.0,
            Some(text) => {
                let bad = || MachinesError::Speed { line: whole(), value: text.to_owned() };
                text.parse().ok().filter(|speed: &f32| speed.is_finite() && *speed >= 1.0).ok_or_else(bad)?
            }
        };
        let host_key = field(7).map(str::to_owned);
        if let Some(value) = &host_key
            && crate::hash::decode_base64(value).is_none()
        {
            return Err(MachinesError::HostKey { line: whole(), value: value.clone() });
        }
        let name = fields.first().copied().unwrap_or_default();
        let mut systems = list(1);
        if systems.is_empty() {
            systems.insert(system.to_owned());
        }
        Ok(Self {
            uri: if is_store(name) { name.to_owned() } else { format!("ssh://{name}") },
            systems,
            key: field(2).map(str::to_owned),
            max_jobs,
            speed,
            features: list(5),
            mandatory: list(6),
            host_key,
        })
    }

    /// Is it the right machine for something?
    pub fn suits(&self, needs: &Needs) -> bool {
        self.systems.contains(&needs.system)
            && needs.features.iter().all(|feature| self.features.contains(feature) || self.mandatory.contains(feature))
            && self.mandatory.iter().all(|feature| needs.features.contains(feature))
    }

    /// What files that stand for it are called: `ssh:__u@h`.
    pub fn file_name(&self) -> String {
        self.uri.replace('/', "_")
    }
}

/// Is it a whole store URI, rather than the name of a host?
fn is_store(name: &str) -> bool {
    let word = name.split('?').next().unwrap_or_default();
    name.contains("://") || word.contains('/') || ["auto", "daemon", "local"].contains(&word)
}

/// Reads the setting `builders`. A file that is not there has no machines.
pub fn parse(
    text: &str,
    system: &str,
    read: &mut dyn FnMut(&str) -> Result<Option<String>, String>,
) -> Result<Vec<Machine>, MachinesError> {
    let mut machines = Vec::new();
    parse_below(text, system, read, 0, &mut machines)?;
    Ok(machines)
}

fn parse_below(
    text: &str,
    system: &str,
    read: &mut dyn FnMut(&str) -> Result<Option<String>, String>,
    depth: usize,
    machines: &mut Vec<Machine>,
) -> Result<(), MachinesError> {
    let lines = text.lines().map(|line| line.split_once('#').map_or(line, |(before, _)| before));
    for line in lines.flat_map(|line| line.split(';')).map(str::trim).filter(|line| !line.is_empty()) {
        let Some(files) = line.strip_prefix('@') else {
            machines.push(Machine::parse(line, system)?);
            continue;
        };
        // `NIX_REMOTE_SYSTEMS` makes one line of several files.
        for file in files.split_ascii_whitespace().map(|file| file.trim_start_matches('@')) {
            if depth == MAX_DEPTH {
                return Err(MachinesError::Depth { file: file.to_owned() });
            }
            let found = read(file).map_err(|reason| MachinesError::File { file: file.to_owned(), reason })?;
            if let Some(text) = found {
                parse_below(&text, system, read, depth + 1, machines)?;
            }
        }
    }
    Ok(())
}

/// What is to become of a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// The machine of this number has the least to do.
    Take(usize),
    /// All machines that suit it are busy.
    Busy,
    /// None suits it.
    None,
}

/// The machine that suits a build best. `load` says how much one of a number has to do; `None`
/// leaves it out.
///
/// The load for its speed comes first, then the speed, then the load itself, then the order in
/// which machines are written.
pub fn choose(machines: &[Machine], needs: &Needs, mut load: impl FnMut(usize) -> Option<u32>) -> Choice {
    let mut suits = false;
    let mut best: Option<(u32, Reverse<u32>, u32, usize)> = None;
    for (number, machine) in machines.iter().enumerate().filter(|(_, machine)| machine.suits(needs)) {
        let Some(load) = load(number) else { continue };
        suits = true;
        if load >= machine.max_jobs {
            continue;
        }
        // Whole numbers, as in 2.x: machines that are about as busy are told apart by their speed.
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "neither is below 0; `as` saturates"
        )]
        let share = (f64::from(load) / f64::from(machine.speed)) as u32;
        let found = (share, Reverse(machine.speed.to_bits()), load, number);
        best = Some(best.map_or(found, |best| best.min(found)));
    }
    match best {
        Some((.., number)) => Choice::Take(number),
        None if suits => Choice::Busy,
        None => Choice::None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> Result<Vec<Machine>, MachinesError> {
        parse(text, "own-system", &mut |file| match file {
            "/m" => Ok(Some("a x86_64-linux # one\n\n# none\n  b - - 2\n".to_owned())),
            "/loop" => Ok(Some("@/loop".to_owned())),
            "/bad" => Err("Permission denied".to_owned()),
            _ => Ok(None),
        })
    }

    fn set(words: &[&str]) -> BTreeSet<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn fields() {
        let found = read("ssh-ng://u@h?compress=true s1,s2 /key 3 2.5 kvm,big must QQ==").unwrap();
        let wanted = Machine {
            uri: "ssh-ng://u@h?compress=true".to_owned(),
            systems: set(&["s1", "s2"]),
            key: Some("/key".to_owned()),
            max_jobs: 3,
            speed: 2.5,
            features: set(&["kvm", "big"]),
            mandatory: set(&["must"]),
            host_key: Some("QQ==".to_owned()),
        };
        assert_eq!(found, [wanted]);
        let [plain] = read("u@h").unwrap().try_into().unwrap();
        assert_eq!((plain.uri.as_str(), plain.max_jobs, plain.speed), ("ssh://u@h", 1, 1.0));
        assert_eq!((plain.systems.clone(), plain.key.clone()), (set(&["own-system"]), None));
        assert_eq!(plain.file_name(), "ssh:__u@h");
        assert_eq!(read("u@h - - - - - - -").unwrap(), [plain]);
        for store in ["/nix2", "local?root=/x", "unix:///run/s", "ssh-ng://h"] {
            assert_eq!(Machine::parse(store, "s").unwrap().uri, store);
        }
    }

    #[test]
    fn lines_and_files() {
        let uris = |text: &str| {
            read(text).map(|list| list.into_iter().map(|machine| machine.uri.replace("ssh://", "")).collect::<Vec<_>>())
        };
        assert_eq!(uris("").unwrap(), [""; 0]);
        assert_eq!(uris("x ; y - ;").unwrap(), ["x", "y"]);
        assert_eq!(uris("@/m").unwrap(), ["a", "b"]);
        assert_eq!(uris("x\n@/m;@/none\ny # z").unwrap(), ["x", "a", "b", "y"]);
        assert_eq!(uris("@/none @/m").unwrap(), ["a", "b"]);
        for (bad, message) in [
            ("h - - 0", "'0' in 'h - - 0' is no number of builds at once"),
            ("h - - many", "'many' in"),
            ("h - - - 0.5", "'0.5' in 'h - - - 0.5' is no speed factor"),
            ("h - - - NaN", "is no speed factor"),
            ("h - - - - - - !", "the host key '!'"),
            ("h - - - - - - - more", "has 9 fields"),
            ("@/loop", "'/loop' is a file within more than"),
            ("@/bad", "cannot read the file '/bad': Permission denied"),
        ] {
            let error = uris(bad).unwrap_err().to_string();
            assert!(error.starts_with("bad machine specification: ") && error.contains(message), "{error}");
        }
    }

    fn needs(system: &str, features: &[&str]) -> Needs {
        Needs { system: system.to_owned(), features: set(features) }
    }

    #[test]
    fn which_machines_suit() {
        let machine = |line| Machine::parse(line, "s").unwrap();
        for (line, features, suits) in [
            ("h", &[][..], true),
            ("h", &["kvm"], false),
            ("h - - - - kvm", &["kvm"], true),
            ("h - - - - kvm", &[], true),
            ("h - - - - - kvm", &["kvm"], true),
            ("h - - - - - kvm", &[], false),
            ("h - - - - big kvm", &["big", "kvm"], true),
            ("h t", &[], false),
        ] {
            assert_eq!(machine(line).suits(&needs("s", features)), suits, "{line} {features:?}");
        }
    }

    #[test]
    fn the_best_machine() {
        let lines = "slow - - 4 1\nfast - - 4 2\nbig - - 8 1 kvm";
        let machines = parse(lines, "s", &mut |_| Ok(None)).unwrap();
        let chosen = |loads: [Option<u32>; 3], features: &[&str]| {
            choose(&machines, &needs("s", features), |number| loads.get(number).copied().flatten())
        };
        assert_eq!(chosen([Some(0), Some(0), Some(0)], &[]), Choice::Take(1), "the fastest of idle ones");
        assert_eq!(chosen([Some(0), Some(1), Some(0)], &[]), Choice::Take(1), "half a load counts for none");
        assert_eq!(chosen([Some(0), Some(2), Some(0)], &[]), Choice::Take(0));
        assert_eq!(chosen([Some(4), Some(4), Some(7)], &[]), Choice::Take(2));
        assert_eq!(chosen([Some(4), Some(4), Some(8)], &[]), Choice::Busy);
        assert_eq!(chosen([Some(0), Some(0), Some(8)], &["kvm"]), Choice::Busy);
        assert_eq!(chosen([Some(0), Some(0), None], &["kvm"]), Choice::None, "one that is out of order is none");
        assert_eq!(choose(&machines, &needs("t", &[]), |_| Some(0)), Choice::None);
    }

    proptest! {
        /// What is chosen suits, and has a slot free; and nothing is refused that could be done.
        #[test]
        fn choices_are_possible(
            machines in prop::collection::vec((1u32..4, 1u8..5, 0u8..4, 0u8..4, any::<bool>()), 0..6),
            wanted in 0u8..4,
            loads in prop::collection::vec(prop::option::weighted(0.8, 0u32..4), 6),
        ) {
            let bits = |bits: u8| set(["a", "b"].into_iter().enumerate().filter(|(n, _)| bits >> n & 1 == 1).map(|(_, w)| w).collect::<Vec<_>>().as_slice());
            let machines: Vec<Machine> = machines.into_iter().map(|(max_jobs, speed, features, mandatory, right)| Machine {
                systems: set(&[if right { "s" } else { "t" }]),
                max_jobs,
                speed: speed.into(),
                features: bits(features),
                mandatory: bits(mandatory),
                ..Machine::parse("h", "s").unwrap()
            }).collect();
            let needs = Needs { system: "s".to_owned(), features: bits(wanted) };
            let able = |number: usize| machines.get(number).is_some_and(|machine| machine.suits(&needs)) && loads[number].is_some();
            let free = |number: usize| able(number) && loads[number].is_some_and(|load| load < machines[number].max_jobs);
            match choose(&machines, &needs, |number| loads[number]) {
                Choice::Take(number) => prop_assert!(free(number)),
                Choice::Busy => prop_assert!((0..machines.len()).any(able) && !(0..machines.len()).any(free)),
                Choice::None => prop_assert!(!(0..machines.len()).any(able)),
            }
        }
    }
}
