//! Ed25519 keys and signatures of path infos.
//!
//! Source: formats, section 8.4; `keys.json`, `signatures.json`.

use std::fmt;
use std::str::FromStr;

use ed25519_dalek::{Signer as _, SigningKey, VerifyingKey};

use crate::hash::{decode_base64, encode_base64};
use crate::path_info::PathInfo;
use crate::store_dir::StoreDir;

/// `NAME:BASE64`: who signed, and the signature. Only its form is checked here, as other tools
/// keep signatures they cannot read; [`Signature::bytes`] gives the 64 bytes if they are there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Signature(Box<str>);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SignatureError {
    #[error("'{text}' is no signature: it needs the form NAME:BASE64")]
    Form { text: String },
    #[error("key '{name}' is corrupt: it needs the form NAME:BASE64")]
    KeyForm { name: String },
    #[error("key '{name}' has {found} bytes instead of {wanted}")]
    KeySize { name: String, found: usize, wanted: usize },
    #[error("public key '{name}' is no point of the curve, or not the one of its secret key")]
    KeyPoint { name: String },
    #[error("the path has a NAR size of 0, so it cannot be signed")]
    NoSize,
}

/// Splits `NAME:REST` where neither is empty and both are printable ASCII.
fn split(text: &str) -> Option<(&str, &str)> {
    let (name, rest) = text.split_once(':')?;
    let fine = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_graphic());
    (fine(name) && fine(rest)).then_some((name, rest))
}

impl Signature {
    pub fn key_name(&self) -> &str {
        split(&self.0).map_or("", |(name, _)| name)
    }

    /// The 64 bytes; `None` if the text holds something else.
    pub fn bytes(&self) -> Option<[u8; 64]> {
        decode_base64(split(&self.0)?.1)?.try_into().ok()
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Signature {
    type Err = SignatureError;
    fn from_str(text: &str) -> Result<Self, SignatureError> {
        match split(text) {
            Some(_) => Ok(Self(text.into())),
            None => Err(SignatureError::Form { text: text.to_owned() }),
        }
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn parse_key<const N: usize>(text: &str) -> Result<(Box<str>, [u8; N]), SignatureError> {
    let shown = || text.split(':').next().unwrap_or_default().to_owned();
    let (name, rest) = split(text.trim_end()).ok_or_else(|| SignatureError::KeyForm { name: shown() })?;
    let bytes = decode_base64(rest).ok_or_else(|| SignatureError::KeyForm { name: shown() })?;
    let found = bytes.len();
    let bytes = bytes.try_into().map_err(|_| SignatureError::KeySize { name: shown(), found, wanted: N })?;
    Ok((name.into(), bytes))
}

/// A signing key. File form: `NAME:BASE64` of seed and public key, 64 bytes. Never shown.
pub struct SecretKey {
    name: Box<str>,
    key: SigningKey,
}

impl SecretKey {
    /// A key from 32 random bytes.
    pub fn from_seed(name: &str, seed: &[u8; 32]) -> Result<Self, SignatureError> {
        match split(&format!("{name}:x")) {
            Some((whole, _)) if whole == name => Ok(Self { name: name.into(), key: SigningKey::from_bytes(seed) }),
            _ => Err(SignatureError::KeyForm { name: name.to_owned() }),
        }
    }

    /// Reads the text of a key file.
    pub fn parse(text: &str) -> Result<Self, SignatureError> {
        let (name, bytes) = parse_key::<64>(text)?;
        let key =
            SigningKey::from_keypair_bytes(&bytes).map_err(|_| SignatureError::KeyPoint { name: name.to_string() })?;
        Ok(Self { name, key })
    }

    /// The text of its file, without a final newline.
    pub fn to_file_text(&self) -> String {
        format!("{}:{}", self.name, encode_base64(&self.key.to_keypair_bytes()))
    }

    pub fn public(&self) -> PublicKey {
        PublicKey { name: self.name.clone(), key: self.key.verifying_key() }
    }

    /// Signs bytes as they are.
    pub fn sign(&self, message: &[u8]) -> Signature {
        let bytes = self.key.sign(message).to_bytes();
        Signature(format!("{}:{}", self.name, encode_base64(&bytes)).into())
    }

    /// Signs a path info.
    pub fn sign_path(&self, dir: &StoreDir, info: &PathInfo) -> Result<Signature, SignatureError> {
        Ok(self.sign(fingerprint(dir, info)?.as_bytes()))
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretKey({}:...)", self.name)
    }
}

/// A key that verifies. Text form: `NAME:BASE64` of 32 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    name: Box<str>,
    key: VerifyingKey,
}

impl PublicKey {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Is this a signature by this key over these bytes?
    pub fn verifies(&self, message: &[u8], signature: &Signature) -> bool {
        signature.key_name() == &*self.name
            && signature.bytes().is_some_and(|bytes| {
                self.key.verify_strict(message, &ed25519_dalek::Signature::from_bytes(&bytes)).is_ok()
            })
    }
}

impl FromStr for PublicKey {
    type Err = SignatureError;
    fn from_str(text: &str) -> Result<Self, SignatureError> {
        let (name, bytes) = parse_key::<32>(text)?;
        let key = VerifyingKey::from_bytes(&bytes).map_err(|_| SignatureError::KeyPoint { name: name.to_string() })?;
        Ok(Self { name, key })
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, encode_base64(self.key.as_bytes()))
    }
}

/// The text a signature is made over: `1;PATH;NARHASH;NARSIZE;REF,REF...`.
pub fn fingerprint(dir: &StoreDir, info: &PathInfo) -> Result<String, SignatureError> {
    if info.nar_size_bytes == 0 {
        return Err(SignatureError::NoSize);
    }
    let references: Vec<String> = info.references.iter().map(|path| dir.full(path)).collect();
    Ok(format!("1;{};{};{};{}", dir.display(&info.path), info.nar_hash, info.nar_size_bytes, references.join(",")))
}

/// How many of the signatures are good. Of several keys with one name only the first counts.
pub fn count_valid(dir: &StoreDir, info: &PathInfo, keys: &[PublicKey]) -> usize {
    let Ok(text) = fingerprint(dir, info) else { return 0 };
    let good = |signature: &&Signature| {
        keys.iter()
            .find(|key| key.name() == signature.key_name())
            .is_some_and(|key| key.verifies(text.as_bytes(), signature))
    };
    info.signatures.iter().filter(good).count()
}
