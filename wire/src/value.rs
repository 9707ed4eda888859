//! Values that go over the wire, at every version of both protocols.

use std::collections::{BTreeMap, BTreeSet};

use larder_core::api::{
    BuildMode, BuildResult, BuildStatus, ContentMethod, DerivedPath, Missing, RootLink, Substitutable,
};
use larder_core::content_address::{ContentAddress, Method};
use larder_core::derivation::aterm::output_from_fields;
use larder_core::derivation::{Bytes, Derivation, OutputName, name_of};
use larder_core::hash::{Algorithm, Hash, Sha256Digest};
use larder_core::hash_part::HashPart;
use larder_core::path_info::PathInfo;
use larder_core::realisation::{DrvOutput, Realisation};
use larder_core::signature::Signature;
use larder_core::store_path::{Name, StorePath};

use crate::codec::{Decoder, Encoder, MAX_ITEMS, MAX_LONG, MAX_SHORT, MAX_TEXT, Protocol, WireError};

/// A value that reads and writes itself.
///
/// What is written at some version reads back as the same at that version, if that version can
/// say it at all.
pub trait Wire: Sized {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError>;

    fn write(&self, to: &mut Encoder<'_>);

    /// Any value that this version can say.
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> proptest::strategy::BoxedStrategy<Self>;
}

#[cfg(any(test, feature = "testing"))]
pub(crate) mod gen_prelude {
    pub(crate) use larder_core::arb;
    pub(crate) use proptest::prelude::*;
    pub(crate) use proptest::strategy::BoxedStrategy;
}
#[cfg(any(test, feature = "testing"))]
use gen_prelude::{BoxedStrategy, Just, Strategy, any, arb, prop_oneof};

/// The word 1 that says nothing but "done".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct One;

impl Wire for One {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        from.word().map(|_| Self)
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.word(1);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        Just(Self).boxed()
    }
}

/// A word that nobody looks at any more, and that is written as 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Obsolete;

impl Wire for Obsolete {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        from.word().map(|_| Self)
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.word(0);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        Just(Self).boxed()
    }
}

impl Wire for () {
    fn read(_: &mut Decoder<'_>) -> Result<Self, WireError> {
        Ok(())
    }
    fn write(&self, _: &mut Encoder<'_>) {}
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        Just(()).boxed()
    }
}

impl Wire for u64 {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        from.word()
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.word(*self);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        any::<Self>().boxed()
    }
}

impl Wire for u32 {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        from.word32()
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.word((*self).into());
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        any::<Self>().boxed()
    }
}

impl Wire for bool {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        from.bool()
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.bool(*self);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        any::<Self>().boxed()
    }
}

/// A truth value whose word must be 0 or 1, as real servers insist for these fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flag(pub bool);

impl Wire for Flag {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        match from.word()? {
            0 => Ok(Self(false)),
            1 => Ok(Self(true)),
            found => Err(WireError::Integer { found, kind: 'b' }),
        }
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.bool(self.0);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        any::<bool>().prop_map(Self).boxed()
    }
}

/// A short text: a name, an id.
impl Wire for String {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        from.text(MAX_SHORT)
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.text(self);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        ".{0,20}".boxed()
    }
}

/// Short bytes: the path of a file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct FilePath(pub Vec<u8>);

impl Wire for FilePath {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        from.bytes(MAX_SHORT).map(Self)
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.bytes(&self.0);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        proptest::collection::vec(any::<u8>(), 0..30).prop_map(Self).boxed()
    }
}

/// The value of a setting, an argument or a variable.
impl Wire for Bytes {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        from.bytes(MAX_LONG).map(Into::into)
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.bytes(self);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        arb::derivation::bytes().boxed()
    }
}

/// Contents that come as one string.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Text(pub Vec<u8>);

impl Wire for Text {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        from.bytes(MAX_TEXT).map(Self)
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.bytes(&self.0);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        proptest::collection::vec(any::<u8>(), 0..100).prop_map(Self).boxed()
    }
}

impl<T: Wire + std::fmt::Debug + 'static> Wire for Vec<T> {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        let (count, slots) = from.count(MAX_ITEMS)?;
        let mut list = Self::with_capacity(slots);
        for _ in 0..count {
            from.charge_item(size_of::<T>())?;
            list.push(T::read(from)?);
        }
        Ok(list)
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.count(self.len());
        for item in self {
            item.write(to);
        }
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        proptest::collection::vec(T::arb(protocol), 0..4).boxed()
    }
}

/// Read in any order, and with duplicates; written in order.
impl<T: Wire + Ord + std::fmt::Debug + 'static> Wire for BTreeSet<T> {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        let (count, _) = from.count(MAX_ITEMS)?;
        let mut set = Self::new();
        for _ in 0..count {
            from.charge_item(2 * size_of::<T>())?;
            set.insert(T::read(from)?);
        }
        Ok(set)
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.count(self.len());
        for item in self {
            item.write(to);
        }
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        proptest::collection::btree_set(T::arb(protocol), 0..4).boxed()
    }
}

/// Of one key the last value counts.
impl<K, V> Wire for BTreeMap<K, V>
where
    K: Wire + Ord + std::fmt::Debug + 'static,
    V: Wire + std::fmt::Debug + 'static,
{
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        let (count, _) = from.count(MAX_ITEMS)?;
        let mut map = Self::new();
        for _ in 0..count {
            from.charge_item(2 * (size_of::<K>() + size_of::<V>()))?;
            let key = K::read(from)?;
            map.insert(key, V::read(from)?);
        }
        Ok(map)
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.count(self.len());
        for (key, value) in self {
            key.write(to);
            value.write(to);
        }
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        proptest::collection::btree_map(K::arb(protocol), V::arb(protocol), 0..4).boxed()
    }
}

impl Wire for StorePath {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        let dir = from.dir();
        Ok(dir.parse(from.bytes(MAX_SHORT)?)?)
    }
    fn write(&self, to: &mut Encoder<'_>) {
        let full = to.dir().full(self);
        to.text(&full);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        arb::paths::store_path().boxed()
    }
}

/// The empty string is none.
impl Wire for Option<StorePath> {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        let dir = from.dir();
        match from.bytes(MAX_SHORT)? {
            text if text.is_empty() => Ok(None),
            text => Ok(Some(dir.parse(text)?)),
        }
    }
    fn write(&self, to: &mut Encoder<'_>) {
        match self {
            Some(path) => path.write(to),
            None => to.text(""),
        }
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        proptest::option::of(arb::paths::store_path()).boxed()
    }
}

/// A store path without its directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseName(pub StorePath);

impl Wire for BaseName {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        Ok(Self(StorePath::from_base_name(&from.bytes(MAX_SHORT)?)?))
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.text(&self.0.to_string());
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        arb::paths::store_path().prop_map(Self).boxed()
    }
}

/// Values with a text of their own: `parse` and `Display`.
macro_rules! as_text {
    ($($kind:ty: $max:expr, $arb:expr;)*) => {$(
        impl Wire for $kind {
            fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
                Ok(from.text($max)?.parse()?)
            }
            fn write(&self, to: &mut Encoder<'_>) {
                to.text(&self.to_string());
            }
            #[cfg(any(test, feature = "testing"))]
            fn arb(_: Protocol) -> BoxedStrategy<Self> {
                $arb.boxed()
            }
        }
    )*};
}

as_text! {
    Name: MAX_SHORT, arb::paths::name();
    OutputName: MAX_SHORT, arb::derivation::output_name();
    Signature: MAX_SHORT, arb::paths::signature();
    DrvOutput: MAX_SHORT, arb::texts::drv_output();
}

/// A hash part, which names a path without its name.
impl Wire for HashPart {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        Ok(Self::parse(&from.bytes(MAX_SHORT)?)?)
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.bytes(&self.to_text());
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        arb::paths::hash_part().boxed()
    }
}

/// The empty string is none.
impl Wire for Option<ContentAddress> {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        match from.text(MAX_SHORT)? {
            text if text.is_empty() => Ok(None),
            text => Ok(Some(text.parse()?)),
        }
    }
    fn write(&self, to: &mut Encoder<'_>) {
        match self {
            Some(address) => to.text(&address.to_string()),
            None => to.text(""),
        }
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        proptest::option::of(arb::paths::content_address()).boxed()
    }
}

impl Wire for ContentMethod {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        let text = from.text(MAX_SHORT)?;
        let parse = || {
            if let Some(algorithm) = text.strip_prefix("text:") {
                return (algorithm == "sha256").then_some(Self::Text);
            }
            let (method, algorithm) = Method::split_prefix(text.strip_prefix("fixed:")?);
            let algorithm: Algorithm = algorithm.parse().ok()?;
            (method != Method::Git || algorithm == Algorithm::Sha1).then_some(Self::Fixed(method, algorithm))
        };
        parse().ok_or_else(|| WireError::ContentMethod { text: text.clone() })
    }
    fn write(&self, to: &mut Encoder<'_>) {
        match self {
            Self::Text => to.text("text:sha256"),
            Self::Fixed(method, algorithm) => to.text(&format!("fixed:{}{algorithm}", method.prefix())),
        }
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        prop_oneof![
            Just(Self::Text),
            Just(Self::Fixed(Method::Git, Algorithm::Sha1)),
            (any::<bool>(), arb::paths::algorithm()).prop_map(|(recursive, algorithm)| {
                Self::Fixed(if recursive { Method::Recursive } else { Method::Flat }, algorithm)
            }),
        ]
        .boxed()
    }
}

/// SHA-256 of a NAR. Hexadecimal in requests and in all of the worker protocol.
fn read_nar_hash(from: &mut Decoder<'_>) -> Result<Sha256Digest, WireError> {
    let text = from.text(MAX_SHORT)?;
    let hash = Hash::parse(&text, Some(Algorithm::Sha256))?;
    Ok(hash.sha256().expect("SHA-256 was asked for"))
}

/// The record of a path whose path comes elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    pub deriver: Option<StorePath>,
    pub nar_hash: Sha256Digest,
    pub references: BTreeSet<StorePath>,
    pub registration_time_s: u64,
    pub nar_size_bytes: u64,
    pub ultimate: bool,
    pub signatures: BTreeSet<Signature>,
    pub content_address: Option<ContentAddress>,
}

impl Info {
    pub fn new(info: PathInfo) -> Self {
        Self {
            deriver: info.deriver,
            nar_hash: info.nar_hash,
            references: info.references,
            registration_time_s: info.registration_time_s,
            nar_size_bytes: info.nar_size_bytes,
            ultimate: info.ultimate,
            signatures: info.signatures,
            content_address: info.content_address,
        }
    }

    pub fn of(self, path: StorePath) -> PathInfo {
        PathInfo {
            path,
            nar_hash: self.nar_hash,
            nar_size_bytes: self.nar_size_bytes,
            references: self.references,
            deriver: self.deriver,
            registration_time_s: self.registration_time_s,
            ultimate: self.ultimate,
            signatures: self.signatures,
            content_address: self.content_address,
        }
    }

    fn read_as(from: &mut Decoder<'_>, whole: bool) -> Result<Self, WireError> {
        let mut info = Self {
            deriver: Wire::read(from)?,
            nar_hash: read_nar_hash(from)?,
            references: Wire::read(from)?,
            registration_time_s: from.word()?,
            nar_size_bytes: from.word()?,
            ultimate: false,
            signatures: BTreeSet::new(),
            content_address: None,
        };
        if whole {
            info.ultimate = Flag::read(from)?.0;
            info.signatures = Wire::read(from)?;
            info.content_address = Wire::read(from)?;
        }
        Ok(info)
    }

    fn write_as(&self, to: &mut Encoder<'_>, whole: bool) {
        self.deriver.write(to);
        to.text(&self.nar_hash.to_hex());
        self.references.write(to);
        to.word(self.registration_time_s);
        to.word(self.nar_size_bytes);
        if whole {
            to.bool(self.ultimate);
            self.signatures.write(to);
            self.content_address.write(to);
        }
    }

    #[cfg(any(test, feature = "testing"))]
    fn arb_as(whole: bool) -> BoxedStrategy<Self> {
        let dir = larder_core::store_dir::StoreDir::new("/nix/store").expect("an absolute path");
        arb::paths::path_info(dir)
            .prop_map(move |info| {
                let mut info = Self::new(info);
                if !whole {
                    info.ultimate = false;
                    info.signatures.clear();
                    info.content_address = None;
                }
                info
            })
            .boxed()
    }
}

impl Wire for Info {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        let whole = from.protocol().is_worker(16);
        Self::read_as(from, whole)
    }
    fn write(&self, to: &mut Encoder<'_>) {
        let whole = to.protocol().is_worker(16);
        self.write_as(to, whole);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        Self::arb_as(protocol.is_worker(16))
    }
}

/// A record and its path, with all fields at every version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WholeInfo(pub PathInfo);

impl Wire for WholeInfo {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        let path = StorePath::read(from)?;
        Ok(Self(Info::read_as(from, true)?.of(path)))
    }
    fn write(&self, to: &mut Encoder<'_>) {
        self.0.path.write(to);
        Info::new(self.0.clone()).write_as(to, true);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        (arb::paths::store_path(), Info::arb_as(true)).prop_map(|(path, info)| Self(info.of(path))).boxed()
    }
}

impl Wire for DerivedPath {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        let (dir, old) = (from.dir(), !from.protocol().is_worker(30));
        Ok(Self::parse(dir, &from.bytes(MAX_LONG)?, old)?)
    }
    fn write(&self, to: &mut Encoder<'_>) {
        let text = self.to_text(to.dir(), !to.protocol().is_worker(30));
        to.text(&text);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        let new = protocol.is_worker(30);
        let can_say = move |target: &Self| new || !matches!(target, Self::Opaque(path) if path.is_derivation());
        arb::api::derived_path().prop_filter("old versions cannot ask for a .drv file", can_say).boxed()
    }
}

impl Wire for BuildMode {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        match from.word()? {
            0 => Ok(Self::Normal),
            1 => Ok(Self::Repair),
            2 => Ok(Self::Check),
            found => Err(WireError::Choice { what: "the build mode", found }),
        }
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.word(match self {
            Self::Normal => 0,
            Self::Repair => 1,
            Self::Check => 2,
        });
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        proptest::sample::select(vec![Self::Normal, Self::Repair, Self::Check]).boxed()
    }
}

/// 0 for none, or 1 and microseconds.
impl Wire for Option<i64> {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        match from.word()? {
            0 => Ok(None),
            1 => Ok(Some(from.word()?.cast_signed())),
            found => Err(WireError::Choice { what: "the tag of an optional number", found }),
        }
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.bool(self.is_some());
        if let Some(number) = self {
            to.word(number.cast_unsigned());
        }
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        any::<Self>().boxed()
    }
}

impl Wire for Realisation {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        Ok(Self::from_json(&from.bytes(MAX_LONG)?)?)
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.text(&self.to_json());
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        arb::texts::realisation().boxed()
    }
}

/// Which parts of a build's result a version has.
struct ResultParts {
    times: bool,
    cpu: bool,
    outputs: bool,
}

impl ResultParts {
    const fn at(protocol: Protocol) -> Self {
        Self {
            times: protocol.is_worker(29) || protocol.is_serve(3),
            cpu: protocol.is_worker(37),
            outputs: protocol.is_worker(28) || protocol.is_serve(6),
        }
    }
}

impl Wire for BuildResult {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        let parts = ResultParts::at(from.protocol());
        let found = from.word()?;
        let status = usize::try_from(found).ok().and_then(|n| BuildStatus::ALL.get(n).copied());
        let status = status.ok_or(WireError::Choice { what: "the status of a build", found })?;
        let error = String::from_utf8_lossy(&from.bytes(MAX_LONG)?).into_owned();
        let mut result = Self { status, error, ..Self::default() };
        if parts.times {
            result.times_built = from.word()?;
            result.is_non_deterministic = from.bool()?;
            result.start_time_s = from.word()?;
            result.stop_time_s = from.word()?;
        }
        if parts.cpu {
            result.cpu_user_us = Wire::read(from)?;
            result.cpu_system_us = Wire::read(from)?;
        }
        if parts.outputs {
            result.built_outputs = Wire::read(from)?;
        }
        Ok(result)
    }
    fn write(&self, to: &mut Encoder<'_>) {
        let parts = ResultParts::at(to.protocol());
        to.word(self.status as u64);
        to.text(&self.error);
        if parts.times {
            to.word(self.times_built);
            to.bool(self.is_non_deterministic);
            to.word(self.start_time_s);
            to.word(self.stop_time_s);
        }
        if parts.cpu {
            self.cpu_user_us.write(to);
            self.cpu_system_us.write(to);
        }
        if parts.outputs {
            self.built_outputs.write(to);
        }
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        let parts = ResultParts::at(protocol);
        arb::api::build_result()
            .prop_map(move |result| Self {
                times_built: if parts.times { result.times_built } else { 0 },
                is_non_deterministic: parts.times && result.is_non_deterministic,
                start_time_s: if parts.times { result.start_time_s } else { 0 },
                stop_time_s: if parts.times { result.stop_time_s } else { 0 },
                cpu_user_us: result.cpu_user_us.filter(|_| parts.cpu),
                cpu_system_us: result.cpu_system_us.filter(|_| parts.cpu),
                built_outputs: if parts.outputs { result.built_outputs } else { BTreeMap::new() },
                ..result
            })
            .boxed()
    }
}

/// A target and what came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyedResult {
    pub target: DerivedPath,
    pub result: BuildResult,
}

impl Wire for KeyedResult {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        Ok(Self { target: Wire::read(from)?, result: Wire::read(from)? })
    }
    fn write(&self, to: &mut Encoder<'_>) {
        self.target.write(to);
        self.result.write(to);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        (DerivedPath::arb(protocol), BuildResult::arb(protocol))
            .prop_map(|(target, result)| Self { target, result })
            .boxed()
    }
}

/// A derivation without derivations as inputs, and the path it would have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BasicDerivation {
    pub path: StorePath,
    pub drv: Derivation,
}

impl Wire for BasicDerivation {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        let path = StorePath::read(from)?;
        let name = name_of(&path)?;
        let (count, _) = from.count(MAX_ITEMS)?;
        let mut outputs = BTreeMap::new();
        for _ in 0..count {
            from.charge_item(256)?;
            let output = OutputName::read(from)?;
            let fields = [from.bytes(MAX_SHORT)?, from.bytes(MAX_SHORT)?, from.bytes(MAX_SHORT)?];
            let [path, algorithm, hash] = &fields;
            let found = output_from_fields(from.dir(), &name, &output, [path, algorithm, hash])?;
            outputs.insert(output, found);
        }
        let drv = Derivation {
            name,
            outputs,
            input_drvs: BTreeMap::new(),
            input_srcs: Wire::read(from)?,
            system: Wire::read(from)?,
            builder: Wire::read(from)?,
            args: Wire::read(from)?,
            env: Wire::read(from)?,
        };
        Ok(Self { path, drv })
    }
    fn write(&self, to: &mut Encoder<'_>) {
        self.path.write(to);
        to.count(self.drv.outputs.len());
        for (name, output) in &self.drv.outputs {
            name.write(to);
            output.path().cloned().write(to);
            let (algorithm, hash) = output.hash_fields();
            to.text(&algorithm);
            to.text(&hash);
        }
        self.drv.input_srcs.write(to);
        self.drv.system.write(to);
        self.drv.builder.write(to);
        self.drv.args.write(to);
        self.drv.env.write(to);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        let dir = larder_core::store_dir::StoreDir::new("/nix/store").expect("an absolute path");
        (arb::paths::hash_part(), arb::derivation::derivation(dir))
            .prop_filter_map("room for the suffix", |(hash, mut drv)| {
                drv.input_drvs.clear();
                let name = Name::new(&format!("{}.drv", drv.name)).ok()?;
                Some(Self { path: StorePath::new(hash, name), drv })
            })
            .boxed()
    }
}

impl Wire for RootLink {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        Ok(Self { link: from.bytes(MAX_SHORT)?, path: Wire::read(from)?, is_private: false })
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.bytes(&self.link);
        self.path.write(to);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        (FilePath::arb(protocol), arb::paths::store_path())
            .prop_map(|(link, path)| Self { link: link.0, path, is_private: false })
            .boxed()
    }
}

impl Wire for Missing {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        Ok(Self {
            will_build: Wire::read(from)?,
            will_substitute: Wire::read(from)?,
            unknown: Wire::read(from)?,
            download_size_bytes: from.word()?,
            nar_size_bytes: from.word()?,
        })
    }
    fn write(&self, to: &mut Encoder<'_>) {
        self.will_build.write(to);
        self.will_substitute.write(to);
        self.unknown.write(to);
        to.word(self.download_size_bytes);
        to.word(self.nar_size_bytes);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        let set = || BTreeSet::<StorePath>::arb(protocol);
        (set(), set(), set(), any::<u64>(), any::<u64>())
            .prop_map(|(will_build, will_substitute, unknown, download_size_bytes, nar_size_bytes)| Self {
                will_build,
                will_substitute,
                unknown,
                download_size_bytes,
                nar_size_bytes,
            })
            .boxed()
    }
}

impl Wire for Substitutable {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        Ok(Self {
            path: Wire::read(from)?,
            deriver: Wire::read(from)?,
            references: Wire::read(from)?,
            download_size_bytes: from.word()?,
            nar_size_bytes: from.word()?,
        })
    }
    fn write(&self, to: &mut Encoder<'_>) {
        self.path.write(to);
        self.deriver.write(to);
        self.references.write(to);
        to.word(self.download_size_bytes);
        to.word(self.nar_size_bytes);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        (
            arb::paths::store_path(),
            Option::<StorePath>::arb(protocol),
            BTreeSet::arb(protocol),
            any::<u64>(),
            any::<u64>(),
        )
            .prop_map(|(path, deriver, references, download_size_bytes, nar_size_bytes)| Self {
                path,
                deriver,
                references,
                download_size_bytes,
                nar_size_bytes,
            })
            .boxed()
    }
}
