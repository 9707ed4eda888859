//! Derivations that people write: `larder derivation add` and `show`, and files for `larder build`.
//!
//! The JSON is that of Nix 2.26, and leaving out is allowed: what has a usual value may be missing,
//! and paths of outputs follow from the rest. Two keys are our own, as nobody knows store paths by
//! heart: `files` names files or trees that are copied into the store, and `derivations` names other
//! JSON files. Each becomes an input, and a variable of the builder holds its path.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use larder_core::api::{ContentMethod, NewContent, Store, StoreError};
use larder_core::content_address::Method;
use larder_core::derivation::check::fill_output_paths;
use larder_core::derivation::json::{from_json, to_json};
use larder_core::derivation::modulo::Memo;
use larder_core::derivation::{Derivation, Output, OutputName};
use larder_core::hash::Algorithm;
use larder_core::settings::Settings;
use larder_core::store_path::StorePath;
use larder_fs::layout::Access;
use larder_store::ingest::ContentAddressed;
use serde_json::{Map, Value, json};

use super::asking::paths;
use super::{DerivationAdd, DerivationShow};
use crate::applets::nix_store::remote::objects;
use crate::applets::nix_store::store::object_name;
use crate::applets::place::{Place, Side};
use crate::applets::{Context, print_json};
use crate::args::Common;
use crate::exit::Failure;
use crate::printer::{Output as Kind, Printer};

/// The largest file that is read, in bytes.
const MAX_BYTES: u64 = 64 << 20;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum FileError {
    #[error("cannot read '{}'", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("'{}' has more than {MAX_BYTES} bytes", path.display())]
    Large { path: PathBuf },
    #[error("'{}' is not JSON", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("'{}' is no derivation", path.display())]
    Derivation { path: PathBuf, source: larder_core::derivation::json::JsonError },
    #[error("{place} in '{}' should be {wanted}", path.display())]
    Type { path: PathBuf, place: String, wanted: &'static str },
    #[error("'{}' needs itself, by way of '{}'", path.display(), by.display())]
    Cycle { path: PathBuf, by: PathBuf },
    #[error("the derivation of '{}' has no output 'out', so the variable '{variable}' has no path", path.display())]
    NoOut { path: PathBuf, variable: String },
}

/// `larder derivation add`.
pub(super) fn add(cx: &Context, settings: &Settings, common: &Common, args: &DerivationAdd) -> Result<(), Failure> {
    let place = Place::open(cx, settings, common, None, Access::ReadWrite)?;
    let side = place.side(cx, settings, common);
    let mut out = Printer::new(Kind::Listing);
    let mut loader = Loader::new(place.store(), &side, settings);
    for file in &args.files {
        let path = loader.load(file)?;
        out.line(place.store().dir().display(&path))?;
    }
    Ok(out.finish()?)
}

/// `larder derivation show`: an object of derivations by their paths.
pub(super) fn show(cx: &Context, settings: &Settings, common: &Common, args: &DerivationShow) -> Result<(), Failure> {
    let place = Place::open(cx, settings, common, None, Access::ReadOnly)?;
    let side = place.side(cx, settings, common);
    let (store, dir) = (place.store(), place.store().dir());
    let mut asked = paths(dir, &args.paths)?;
    if args.recursive {
        let all = store.closure(&asked.into_iter().collect(), false)?;
        asked = all.into_iter().filter(StorePath::is_derivation).collect();
    }
    let mut all = Map::new();
    for path in asked {
        // An output means what made it.
        let drv = if path.is_derivation() {
            path
        } else {
            let info = store.info(&path)?.ok_or_else(|| StoreError::not_valid(dir, &path))?;
            info.deriver.unwrap_or(path)
        };
        all.insert(dir.full(&drv), to_json(&side.derivation(&drv)?, dir)?);
    }
    print_json(&Value::Object(all))
}

/// Takes derivations from files into a store, each file once.
pub(super) struct Loader<'a> {
    store: &'a dyn Store,
    side: &'a Side<'a>,
    settings: &'a Settings,
    loaded: BTreeMap<PathBuf, StorePath>,
    /// Hashes of derivations of a store elsewhere.
    memo: Memo,
}

/// A file that was read, some of whose inputs may not be in the store yet.
struct Opened {
    file: PathBuf,
    real: PathBuf,
    map: Map<String, Value>,
    /// Variables and files of inputs to come, the last first.
    derivations: Vec<(String, PathBuf)>,
}

impl<'a> Loader<'a> {
    /// Takes them into a store, one side of which it is.
    pub(super) fn new(store: &'a dyn Store, side: &'a Side<'a>, settings: &'a Settings) -> Self {
        Self { store, side, settings, loaded: BTreeMap::new(), memo: Memo::new() }
    }

    /// The derivation of a file (`-`: standard input), which is valid from then on.
    pub(super) fn load(&mut self, file: &Path) -> Result<StorePath, Failure> {
        let real = real_path(file)?;
        if let Some(path) = self.loaded.get(&real) {
            return Ok(path.clone());
        }
        let mut below = BTreeSet::from([real.clone()]);
        // Inputs may be as deep as people like: no stack of calls.
        let mut first = self.open(file, real)?;
        let mut above: Vec<Opened> = Vec::new();
        loop {
            let Some((variable, input)) = first.derivations.pop() else {
                below.remove(&first.real);
                let path = self.finish(first)?;
                match above.pop() {
                    Some(next) => first = next,
                    None => return Ok(path),
                }
                continue;
            };
            let real = real_path(&input)?;
            if let Some(path) = self.loaded.get(&real) {
                self.add_input(&mut first, &variable, &input, path)?;
            } else if below.insert(real.clone()) {
                let opened = self.open(&input, real)?;
                first.derivations.push((variable, input));
                above.push(std::mem::replace(&mut first, opened));
            } else {
                return Err(FileError::Cycle { path: input, by: first.file }.into());
            }
        }
    }

    fn open(&self, file: &Path, real: PathBuf) -> Result<Opened, Failure> {
        let read = |source| FileError::Read { path: file.to_owned(), source };
        let stdin = file.as_os_str() == "-";
        let mut text = Vec::new();
        let source: Box<dyn io::Read> =
            if stdin { Box::new(io::stdin()) } else { Box::new(File::open(&real).map_err(read)?) };
        source.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(read)?;
        if text.len() as u64 > MAX_BYTES {
            return Err(FileError::Large { path: file.to_owned() }.into());
        }
        let value: Value =
            serde_json::from_slice(&text).map_err(|source| FileError::Json { path: file.to_owned(), source })?;
        let dir = if stdin { Path::new(".") } else { file.parent().unwrap_or(Path::new("")) };
        let (map, mut derivations) = self.complete(value, file, dir)?;
        derivations.reverse();
        Ok(Opened { file: file.to_owned(), real, map, derivations })
    }

    /// All inputs are there.
    fn finish(&mut self, opened: Opened) -> Result<StorePath, Failure> {
        let Opened { file, real, map, .. } = opened;
        let mut drv = from_json(self.store.dir(), &Value::Object(map))
            .map_err(|source| FileError::Derivation { path: file, source })?;
        self.name_fixed_outputs(&mut drv);
        let path = match self.side {
            Side::Here(local) => {
                local.fill_output_paths(&mut drv)?;
                let mut arrivals = local.arrivals();
                let path = arrivals.add_derivation(&drv)?;
                arrivals.commit()?;
                path
            }
            Side::Far(_) => self.send(&mut drv)?,
        };
        self.loaded.insert(real, path.clone());
        Ok(path)
    }

    /// Completes a derivation, and takes it into a store that another process keeps.
    fn send(&mut self, drv: &mut Derivation) -> Result<StorePath, Failure> {
        let (store, dir) = (self.store, self.store.dir());
        fill_output_paths(&mut self.memo, dir, drv, |input| objects::derivation(store, input))?;
        let new = NewContent {
            name: drv.path(dir)?.name().clone(),
            method: ContentMethod::Text,
            references: drv.references(),
            is_nar: false,
            repair: false,
        };
        Ok(store.add_content(&new, &mut drv.to_aterm(dir).as_slice())?.path)
    }

    fn add_source(&self, file: &Path, content: ContentAddressed) -> Result<StorePath, Failure> {
        match self.side {
            Side::Here(local) => Ok(local.add(file, &content)?),
            Side::Far(far) => Ok(far.add_file(file, content)?.path),
        }
    }

    fn add_input(&self, to: &mut Opened, variable: &str, file: &Path, input: &StorePath) -> Result<(), Failure> {
        let output = match self.side {
            Side::Here(local) => local.derivation_outputs(input)?.remove("out"),
            Side::Far(_) => self.store.derivation_outputs(input)?.remove("out").flatten(),
        };
        let output = output.ok_or_else(|| FileError::NoOut { path: file.to_owned(), variable: variable.to_owned() })?;
        if let Some(Value::Object(inputs)) = to.map.get_mut("inputDrvs") {
            inputs.insert(self.store.dir().full(input), json!({ "dynamicOutputs": {}, "outputs": ["out"] }));
        }
        set_variable(&mut to.map, variable, &self.store.dir().full(&output));
        Ok(())
    }

    /// Adds what may be left out, and replaces our own keys.
    ///
    /// Also gives the variables and files of derivations.
    fn complete(&self, value: Value, file: &Path, dir: &Path) -> Result<Completed, Failure> {
        let wrong = |place: &str, wanted| FileError::Type { path: file.to_owned(), place: place.to_owned(), wanted };
        let Value::Object(mut map) = value else { return Err(wrong("it", "an object").into()) };
        let mut own = |key: &str| -> Result<Vec<(String, PathBuf)>, Failure> {
            let Some(value) = map.remove(key) else { return Ok(Vec::new()) };
            let Value::Object(named) = value else { return Err(wrong(key, "an object").into()) };
            let named = named.into_iter().map(|(name, value)| match value {
                Value::String(text) => Ok((name, dir.join(text))),
                _ => Err(wrong(&format!("{key}.{name}"), "the name of a file").into()),
            });
            named.collect()
        };
        let (files, derivations) = (own("files")?, own("derivations")?);
        for (key, usual) in [
            ("args", json!([])),
            ("env", json!({})),
            ("inputDrvs", json!({})),
            ("inputSrcs", json!([])),
            ("outputs", json!({ "out": {} })),
            ("system", json!(self.settings.system)),
        ] {
            map.entry(key).or_insert(usual);
        }
        if let Some(Value::Object(inputs)) = map.get_mut("inputDrvs") {
            for value in inputs.values_mut() {
                match value {
                    Value::Array(names) => {
                        let names = std::mem::take(names);
                        *value = json!({ "dynamicOutputs": {}, "outputs": names });
                    }
                    Value::Object(input) => drop(input.entry("dynamicOutputs").or_insert_with(|| json!({}))),
                    _ => {}
                }
            }
        }
        for (variable, file) in files {
            let content = ContentAddressed {
                name: object_name(file.as_os_str())?,
                method: Method::Recursive,
                algorithm: Algorithm::Sha256,
            };
            let path = self.store.dir().full(&self.add_source(&file, content)?);
            if let Some(Value::Array(sources)) = map.get_mut("inputSrcs") {
                sources.push(json!(path));
            }
            set_variable(&mut map, &variable, &path);
        }
        Ok((map, derivations))
    }

    /// Builders find the path of an output in the variable of its name.
    fn name_fixed_outputs(&self, drv: &mut Derivation) {
        let dir = self.store.dir();
        let fixed = drv.outputs.iter().filter_map(|(name, output)| match output {
            Output::Fixed { path, .. } => Some((name.clone(), dir.full(path))),
            _ => None,
        });
        for (name, path) in fixed.collect::<Vec<(OutputName, String)>>() {
            drv.env.entry(name.as_str().into()).or_insert_with(|| path.into());
        }
    }
}

/// A derivation without our own keys, and variables and files of its inputs.
type Completed = (Map<String, Value>, Vec<(String, PathBuf)>);

fn real_path(file: &Path) -> Result<PathBuf, FileError> {
    if file.as_os_str() == "-" {
        return Ok(PathBuf::from("/dev/stdin"));
    }
    file.canonicalize().map_err(|source| FileError::Read { path: file.to_owned(), source })
}

fn set_variable(map: &mut Map<String, Value>, variable: &str, value: &str) {
    if let Some(Value::Object(env)) = map.get_mut("env") {
        env.insert(variable.to_owned(), json!(value));
    }
}
