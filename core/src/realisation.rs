//! Realisations: the statement that an output of a derivation was built as a path.
//!
//! Text of an id: `sha256:HEX!OUTPUT`, HEX the derivation modulo hash. The JSON is the one of
//! binary caches (`realisations/ID.doi`), of the protocols and of `nix realisation info --json`.
//! Source: modern, section 2.6; `modern.json`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::hash::{Hash, HashError, Sha256Digest};
use crate::signature::{PublicKey, SecretKey, Signature};
use crate::store_path::{NameError, StorePath, StorePathError, check_name};

/// A JSON text with more bytes is none of ours.
pub const MAX_LEN: usize = 16 << 20;

/// An output of a derivation, whatever its path: the id of a realisation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DrvOutput {
    /// The derivation modulo hash.
    pub derivation: Sha256Digest,
    output: Box<str>,
}

/// What is wrong with a realisation or its id.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RealisationError {
    #[error("invalid derivation output id '{text}': it needs the form sha256:HASH!OUTPUT")]
    Form { text: String },
    #[error("invalid derivation output id '{text}'")]
    Hash { text: String, source: HashError },
    #[error("invalid derivation output id '{text}'")]
    Output { text: String, source: NameError },
    #[error("a realisation is corrupt")]
    Json(#[from] serde_json::Error),
    #[error("a realisation is longer than {MAX_LEN} bytes")]
    TooLong,
    #[error("realisation of '{id}' has a bad path")]
    Path { id: String, source: StorePathError },
}

impl DrvOutput {
    /// The output's name follows the rules of names of store paths.
    pub fn new(derivation: Sha256Digest, output: &str) -> Result<Self, NameError> {
        check_name(output.as_bytes())?;
        Ok(Self { derivation, output: output.into() })
    }

    pub fn output(&self) -> &str {
        &self.output
    }
}

impl FromStr for DrvOutput {
    type Err = RealisationError;
    fn from_str(text: &str) -> Result<Self, RealisationError> {
        let owned = || text.to_owned();
        let (hash, output) = text.split_once('!').ok_or_else(|| RealisationError::Form { text: owned() })?;
        let hash = Hash::parse(hash, None).map_err(|source| RealisationError::Hash { text: owned(), source })?;
        let derivation = hash.sha256().ok_or_else(|| RealisationError::Form { text: owned() })?;
        Self::new(derivation, output).map_err(|source| RealisationError::Output { text: owned(), source })
    }
}

impl fmt::Display for DrvOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}!{}", self.derivation.to_hex(), self.output)
    }
}

/// An output and the path it was built as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Realisation {
    pub id: DrvOutput,
    pub out_path: StorePath,
    pub signatures: BTreeSet<Signature>,
    /// Outputs it was built from, if their paths are references of this one.
    pub dependent_realisations: BTreeMap<DrvOutput, StorePath>,
}

/// Keys in the order in which Nix writes them.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Json {
    #[serde(default)]
    dependent_realisations: BTreeMap<String, String>,
    id: String,
    out_path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    signatures: Option<Vec<String>>,
}

impl Realisation {
    /// Reads the JSON. Unknown keys are ignored, signatures of no form dropped.
    pub fn from_json(text: &[u8]) -> Result<Self, RealisationError> {
        if text.len() > MAX_LEN {
            return Err(RealisationError::TooLong);
        }
        let json: Json = serde_json::from_slice(text)?;
        let path = |text: &str| {
            let path = StorePath::from_base_name(text.as_bytes());
            path.map_err(|source| RealisationError::Path { id: json.id.clone(), source })
        };
        let dependent = json.dependent_realisations.iter().map(|(id, text)| Ok((id.parse()?, path(text)?)));
        Ok(Self {
            id: json.id.parse()?,
            out_path: path(&json.out_path)?,
            signatures: json.signatures.iter().flatten().filter_map(|text| text.parse().ok()).collect(),
            dependent_realisations: dependent.collect::<Result<_, RealisationError>>()?,
        })
    }

    /// The JSON, compact.
    pub fn to_json(&self) -> String {
        let signatures = self.signatures.iter().map(ToString::to_string).collect();
        self.json(Some(signatures))
    }

    /// The text a signature is made over: the JSON without signatures.
    pub fn fingerprint(&self) -> String {
        self.json(None)
    }

    pub fn sign(&self, key: &SecretKey) -> Signature {
        key.sign(self.fingerprint().as_bytes())
    }

    /// How many of the signatures are good. Of several keys with one name only the first counts.
    pub fn count_valid(&self, keys: &[PublicKey]) -> usize {
        let text = self.fingerprint();
        let good = |signature: &&Signature| {
            let key = keys.iter().find(|key| key.name() == signature.key_name());
            key.is_some_and(|key| key.verifies(text.as_bytes(), signature))
        };
        self.signatures.iter().filter(good).count()
    }

    fn json(&self, signatures: Option<Vec<String>>) -> String {
        let dependent = self.dependent_realisations.iter().map(|(id, path)| (id.to_string(), path.to_string()));
        let json = Json {
            dependent_realisations: dependent.collect(),
            id: self.id.to_string(),
            out_path: self.out_path.to_string(),
            signatures,
        };
        serde_json::to_string(&json).expect("strings and maps of strings are fine JSON")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arb::texts as arb;
    use crate::test_vectors::cases;
    use proptest::prelude::*;
    use serde_json::Value;

    /// All realisations anywhere in a case.
    fn realisations(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                found.extend(map.get("realisation").and_then(Value::as_str).map(str::to_owned));
                map.values().for_each(|value| realisations(value, found));
            }
            Value::Array(list) => list.iter().for_each(|value| realisations(value, found)),
            _ => {}
        }
    }

    #[test]
    fn modern_vectors() {
        let cases = cases("modern");
        let keys: Vec<SecretKey> = crate::test_vectors::cases("keys")
            .iter()
            .map(|key| SecretKey::parse(key["secret_key_file"].as_str().unwrap()).unwrap())
            .collect();
        let public: Vec<PublicKey> = keys.iter().map(SecretKey::public).collect();
        let mut count = 0;
        for case in &cases {
            let id = case["id"].as_str().unwrap();
            let mut found = Vec::new();
            realisations(case, &mut found);
            count += found.len();
            for text in found {
                let parsed = Realisation::from_json(text.as_bytes()).unwrap();
                assert_eq!(parsed.to_json(), text, "{id}");
                assert_eq!(parsed.count_valid(&public), 1, "{id}");
                let unsigned = Realisation { signatures: BTreeSet::new(), ..parsed.clone() };
                let signatures = BTreeSet::from([unsigned.sign(&keys[0])]);
                assert_eq!(Realisation { signatures, ..unsigned }, parsed, "{id}");
            }
        }
        println!("modern: {count} realisations in {} cases", cases.len());
        assert!(count > 10);
    }

    #[test]
    fn ids_and_texts_of_other_forms() {
        let hash = "07d94b9968316c955ac0a52dcc53466c797ce2627b0f50a1176f7073b3249a20";
        let id: DrvOutput = format!("sha256:{hash}!out").parse().unwrap();
        assert_eq!((id.output(), id.derivation.to_hex().as_str()), ("out", hash));
        for text in [
            "",
            "!",
            "out",
            &format!("{hash}!out"),
            &format!("sha256:{hash}!"),
            "sha1:x!out",
            "md5:d41d8cd98f00b204e9800998ecf8427e!out",
        ] {
            assert!(text.parse::<DrvOutput>().is_err(), "{text}");
        }
        let path = "bxmmr41x9c9n77x15xklpqwpv1rrma88-leaf";
        let parse = |text: String| Realisation::from_json(text.as_bytes());
        let short = parse(format!(r#"{{"id":"{id}","outPath":"{path}","more":[1]}}"#)).unwrap();
        assert!(short.signatures.is_empty() && short.dependent_realisations.is_empty());
        assert!(parse(format!(r#"{{"id":"{id}"}}"#)).unwrap_err().to_string().contains("corrupt"));
        assert!(parse(format!(r#"{{"id":"{id}","outPath":"/nix/store/{path}"}}"#)).is_err());
        assert!(parse("[".repeat(100_000)).is_err());
    }

    proptest! {
        #[test]
        fn reads_what_it_writes(realisation in arb::realisation()) {
            prop_assert_eq!(Realisation::from_json(realisation.to_json().as_bytes()).unwrap(), realisation);
        }

        #[test]
        fn spoiled_texts(text in arb::realisation().prop_flat_map(|r| arb::spoiled(r.to_json().into_bytes()))) {
            if let Ok(realisation) = Realisation::from_json(&text) {
                prop_assert_eq!(Realisation::from_json(realisation.to_json().as_bytes()).unwrap(), realisation);
            }
        }
    }
}
