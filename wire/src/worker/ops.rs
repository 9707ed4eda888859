//! The operations of the worker protocol, a row each: number, name, fields of the request, reply.
//!
//! `field: Type = default, before N` is a field that is there from minor version N on. `data` is
//! what follows the fields. Source: protocols, section 2.6.

use std::collections::{BTreeMap, BTreeSet};

use larder_core::api::{BuildMode, ContentMethod, DerivedPath, Missing, RootLink, Substitutable};
use larder_core::content_address::{ContentAddress, Method};
use larder_core::derivation::{Bytes, OutputName};
use larder_core::hash::{Algorithm, Sha256Digest};
use larder_core::hash_part::HashPart;
use larder_core::path_info::PathInfo;
use larder_core::realisation::{DrvOutput, Realisation};
use larder_core::signature::Signature;
use larder_core::store_path::{Name, StorePath};

#[cfg(any(test, feature = "testing"))]
use crate::codec::Protocol;
use crate::codec::{Decoder, Encoder, MAX_SETTINGS, MAX_SHORT, WireError};
#[cfg(any(test, feature = "testing"))]
use crate::value::gen_prelude::{BoxedStrategy, Just, Strategy, any, arb, prop_oneof};
use crate::value::{
    BaseName, BasicDerivation, FilePath, Flag, Info, KeyedResult, Obsolete, One, Text, WholeInfo, Wire,
};

/// An operation: its request, and the type of its reply.
pub trait Operation: Wire {
    const CODE: u64;
    const NAME: &'static str;
    type Reply: Wire;
}

/// What comes after the fields of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Data {
    Nothing,
    /// Frames.
    Framed,
    /// A NAR whose end is where it ends.
    Nar,
    /// The server asks for it in pieces, while it works.
    Pulled,
}

macro_rules! read_field {
    ($from:ident, $type:ty) => {
        <$type as Wire>::read($from)?
    };
    ($from:ident, $type:ty, $default:expr, $minor:literal) => {
        if $from.protocol().is_worker($minor) { <$type as Wire>::read($from)? } else { $default }
    };
}

macro_rules! write_field {
    ($to:ident, $value:expr) => {
        $value.write($to)
    };
    ($to:ident, $value:expr, $minor:literal) => {
        if $to.protocol().is_worker($minor) {
            $value.write($to);
        }
    };
}

#[cfg(any(test, feature = "testing"))]
macro_rules! arb_field {
    ($protocol:ident, $type:ty) => {
        <$type as Wire>::arb($protocol)
    };
    ($protocol:ident, $type:ty, $default:expr, $minor:literal) => {
        if $protocol.is_worker($minor) { <$type as Wire>::arb($protocol) } else { Just($default).boxed() }
    };
}

macro_rules! data_of {
    () => {
        |_: u8| Data::Nothing
    };
    ($data:expr) => {
        $data
    };
}

macro_rules! operations {
    ($(
        $(#[$doc:meta])*
        $code:literal $name:ident {
            $($(#[$field_doc:meta])* $field:ident : $type:ty $(= $default:expr, before $minor:literal)?;)*
        } -> $reply:ty $(, data $data:expr)?;
    )*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, PartialEq, Eq)]
            pub struct $name {
                $($(#[$field_doc])* pub $field: $type,)*
            }

            impl Operation for $name {
                const CODE: u64 = $code;
                const NAME: &'static str = stringify!($name);
                type Reply = $reply;
            }

            impl Wire for $name {
                fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
                    let _ = &from;
                    Ok(Self { $($field: read_field!(from, $type $(, $default, $minor)?),)* })
                }
                fn write(&self, to: &mut Encoder<'_>) {
                    let _ = &to;
                    $(write_field!(to, self.$field $(, $minor)?);)*
                }
                #[cfg(any(test, feature = "testing"))]
                fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
                    let _ = protocol;
                    let whole = Just(());
                    $(let whole = (whole, arb_field!(protocol, $type $(, $default, $minor)?));)*
                    whole.prop_map(|parts| {
                        operations!(@unpack parts; []; $($field)*);
                        Self { $($field,)* }
                    }).boxed()
                }
            }
        )*

        /// Any request.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum Request {
            $($name($name),)*
        }

        impl Request {
            /// Reads the fields of the operation with this number.
            pub fn read(code: u64, from: &mut Decoder<'_>) -> Result<Self, WireError> {
                match code {
                    $($code => $name::read(from).map(Self::$name),)*
                    _ => Err(WireError::UnknownOperation { code }),
                }
            }

            /// Writes the number and the fields.
            pub fn write(&self, to: &mut Encoder<'_>) {
                match self {
                    $(Self::$name(request) => {
                        to.word($code);
                        request.write(to);
                    })*
                }
            }

            pub const fn name(&self) -> &'static str {
                match self {
                    $(Self::$name(_) => stringify!($name),)*
                }
            }

            /// What follows the fields.
            pub fn data(&self, minor: u8) -> Data {
                match self {
                    $(Self::$name(_) => {
                        let data: fn(u8) -> Data = data_of!($($data)?);
                        data(minor)
                    })*
                }
            }

            /// Reads the reply to this request and writes it again.
            #[cfg(any(test, feature = "testing"))]
            pub fn copy_reply(&self, from: &mut Decoder<'_>, to: &mut Encoder<'_>) -> Result<(), WireError> {
                match self {
                    $(Self::$name(_) => <$reply as Wire>::read(from)?.write(to),)*
                }
                Ok(())
            }

            /// Any request that a version can say.
            #[cfg(any(test, feature = "testing"))]
            pub fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
                proptest::strategy::Union::new([
                    $($name::arb(protocol).prop_map(Self::$name).boxed(),)*
                ]).boxed()
            }

            /// Any reply to any operation, as bytes, with the number of the operation.
            #[cfg(any(test, feature = "testing"))]
            pub fn arb_reply(protocol: Protocol) -> BoxedStrategy<(u64, Vec<u8>)> {
                let encode = move |write: &dyn Fn(&mut Encoder<'_>)| {
                    let dir = larder_core::store_dir::StoreDir::new("/nix/store").expect("an absolute path");
                    let mut out = Vec::new();
                    write(&mut Encoder::new(&mut out, &dir, protocol));
                    out
                };
                proptest::strategy::Union::new([
                    $(<$reply as Wire>::arb(protocol)
                        .prop_map(move |reply| ($code, encode(&|to| reply.write(to))))
                        .boxed(),)*
                ]).boxed()
            }
        }

        /// Numbers and names of all operations.
        pub const TABLE: &[(u64, &str)] = &[$(($code, stringify!($name)),)*];

        /// Reads the reply to the operation with this number and writes it again.
        #[cfg(any(test, feature = "testing"))]
        pub fn copy_reply(code: u64, from: &mut Decoder<'_>, to: &mut Encoder<'_>) -> Result<(), WireError> {
            match code {
                $($code => <$reply as Wire>::read(from)?.write(to),)*
                _ => return Err(WireError::UnknownOperation { code }),
            }
            Ok(())
        }
    };
    // The fields are nested pairs, the last one outermost: collected backwards, then taken apart.
    (@unpack $parts:ident; [$($done:ident)*]; $first:ident $($rest:ident)*) => {
        operations!(@unpack $parts; [$first $($done)*]; $($rest)*);
    };
    (@unpack $parts:ident; [$($done:ident)*];) => {
        $(let ($parts, $done) = $parts;)*
        let () = $parts;
    };
}

operations! {
    /// Is the path valid?
    1 IsValidPath { path: StorePath; } -> bool;
    /// Has some substituter the path?
    3 HasSubstitutes { path: StorePath; } -> bool;
    4 QueryPathHash { path: StorePath; } -> HexHash;
    5 QueryReferences { path: StorePath; } -> BTreeSet<StorePath>;
    /// Valid paths that refer to it.
    6 QueryReferrers { path: StorePath; } -> BTreeSet<StorePath>;
    /// Adds an object under the path that follows from its contents.
    7 AddToStore { what: AddWhat; } -> Added, data |minor| if minor >= 25 { Data::Framed } else { Data::Nar };
    8 AddTextToStore { name: Name; contents: Text; references: BTreeSet<StorePath>; } -> StorePath;
    /// Builds or fetches; any failure fails it all.
    9 BuildPaths { targets: Vec<DerivedPath>; mode: BuildMode = BuildMode::Normal, before 15; } -> One;
    /// Fetches the path if it is not valid.
    10 EnsurePath { path: StorePath; } -> One;
    /// Protects the path, valid or not, as long as the session lives.
    11 AddTempRoot { path: StorePath; } -> One;
    12 AddIndirectRoot { link: FilePath; } -> One;
    13 SyncWithGc {} -> One;
    14 FindRoots {} -> Vec<RootLink>;
    /// The export record is sent by messages.
    16 ExportPath { path: StorePath; sign: Obsolete; } -> One;
    18 QueryDeriver { path: StorePath; } -> Option<StorePath>;
    /// Settings for the rest of the session.
    19 SetOptions {
        keep_failed: bool;
        keep_going: bool;
        try_fallback: bool;
        verbosity: u32;
        max_build_jobs: u32;
        max_silent_time_s: u64;
        use_build_hook: One;
        /// 0 to show what builders print.
        verbose_build: u32;
        log_type: Obsolete;
        print_build_trace: Obsolete;
        build_cores: u32;
        use_substitutes: bool;
        overrides: Overrides = Overrides::default(), before 12;
    } -> ();
    20 CollectGarbage {
        action: GcAction;
        paths: BTreeSet<StorePath>;
        ignore_liveness: Flag;
        max_freed_bytes: u64;
        obsolete_1: Obsolete;
        obsolete_2: Obsolete;
        obsolete_3: Obsolete;
    } -> GcReply;
    21 QuerySubstitutablePathInfo { path: StorePath; } -> OptionalSubstitutable;
    22 QueryDerivationOutputs { drv: StorePath; } -> BTreeSet<StorePath>;
    23 QueryAllValidPaths {} -> BTreeSet<StorePath>;
    26 QueryPathInfo { path: StorePath; } -> OptionalInfo;
    /// Adds the objects of an export stream.
    27 ImportPaths {} -> Vec<StorePath>, data |_| Data::Pulled;
    28 QueryDerivationOutputNames { drv: StorePath; } -> BTreeSet<OutputName>;
    29 QueryPathFromHashPart { hash_part: HashPart; } -> Option<StorePath>;
    30 QuerySubstitutablePathInfos { paths: Wanted; } -> Vec<Substitutable>;
    /// The valid ones among the paths; may fetch some first.
    31 QueryValidPaths { paths: BTreeSet<StorePath>; substitute: bool = false, before 27; } -> BTreeSet<StorePath>;
    32 QuerySubstitutablePaths { paths: BTreeSet<StorePath>; } -> BTreeSet<StorePath>;
    33 QueryValidDerivers { path: StorePath; } -> BTreeSet<StorePath>;
    34 OptimiseStore {} -> One;
    /// Gives whether there are faults.
    35 VerifyStore { check_contents: Flag; repair: Flag; } -> bool;
    36 BuildDerivation { derivation: BasicDerivation; mode: BuildMode; } -> larder_core::api::BuildResult;
    37 AddSignatures { path: StorePath; signatures: BTreeSet<Signature>; } -> One;
    /// The NAR follows the end of the messages.
    38 NarFromPath { path: StorePath; } -> ();
    39 AddToStoreNar { info: WholeInfo; repair: Flag; dont_check_signatures: Flag; } -> (),
        data |minor| match minor { 23.. => Data::Framed, 21.. => Data::Pulled, _ => Data::Nar };
    40 QueryMissing { targets: Vec<DerivedPath>; } -> Missing;
    41 QueryDerivationOutputMap { drv: StorePath; } -> BTreeMap<OutputName, Option<StorePath>>;
    42 RegisterDrvOutput { realisation: RegisteredOutput; } -> ();
    43 QueryRealisation { id: DrvOutput; } -> FoundRealisation;
    /// In the frames: a count, and for each object its record and its NAR.
    44 AddMultipleToStore { repair: Flag; dont_check_signatures: Flag; } -> (), data |_| Data::Framed;
    /// In the frames: the log.
    45 AddBuildLog { drv: BaseName; } -> One, data |_| Data::Framed;
    46 BuildPathsWithResults { targets: Vec<DerivedPath>; mode: BuildMode; } -> Vec<KeyedResult>;
    47 AddPermRoot { path: StorePath; link: FilePath; } -> FilePath;
    /// All that some valid paths need, themselves among them, references before referrers and otherwise by
    /// name; with `include_outputs` also the outputs of derivations. Larder's own ("lard" as the number),
    /// for those who have agreed on it (see [`super::handshake::Agreed::closures`]).
    0x6c61_7264 QueryClosure { paths: BTreeSet<StorePath>; include_outputs: Flag; } -> Vec<StorePath>;
}

/// A SHA-256 hash in hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HexHash(pub Sha256Digest);

impl Wire for HexHash {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        let hash = larder_core::hash::Hash::parse(&from.text(MAX_SHORT)?, Some(Algorithm::Sha256))?;
        Ok(Self(hash.sha256().expect("SHA-256 was asked for")))
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.text(&self.0.to_hex());
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        arb::paths::sha256().prop_map(Self).boxed()
    }
}

/// What is to be added: in another form before 1.25.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AddWhat {
    Content {
        name: Name,
        method: ContentMethod,
        references: BTreeSet<StorePath>,
        repair: bool,
    },
    /// The data is a NAR in any case.
    Old {
        name: Name,
        method: Method,
        algorithm: Algorithm,
    },
}

impl Wire for AddWhat {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        let name = Wire::read(from)?;
        if from.protocol().is_worker(25) {
            return Ok(Self::Content {
                name,
                method: Wire::read(from)?,
                references: Wire::read(from)?,
                repair: Flag::read(from)?.0,
            });
        }
        let fixed = from.bool()?;
        let recursive = match from.word()? {
            0 => Method::Flat,
            1 => Method::Recursive,
            found => return Err(WireError::Choice { what: "the method of hashing", found }),
        };
        let algorithm: Algorithm = from.text(MAX_SHORT)?.parse()?;
        // Without "fixed" the other two say nothing.
        let (method, algorithm) = if fixed { (recursive, algorithm) } else { (Method::Recursive, Algorithm::Sha256) };
        Ok(Self::Old { name, method, algorithm })
    }
    fn write(&self, to: &mut Encoder<'_>) {
        match self {
            Self::Content { name, method, references, repair } => {
                name.write(to);
                method.write(to);
                references.write(to);
                to.bool(*repair);
            }
            Self::Old { name, method, algorithm } => {
                name.write(to);
                to.bool((*method, *algorithm) != (Method::Recursive, Algorithm::Sha256));
                to.bool(*method == Method::Recursive);
                to.text(algorithm.name());
            }
        }
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        if protocol.is_worker(25) {
            let parts = (Name::arb(protocol), ContentMethod::arb(protocol), BTreeSet::arb(protocol), any::<bool>());
            return parts
                .prop_map(|(name, method, references, repair)| Self::Content { name, method, references, repair })
                .boxed();
        }
        (Name::arb(protocol), any::<bool>(), arb::paths::algorithm())
            .prop_map(|(name, recursive, algorithm)| Self::Old {
                name,
                method: if recursive { Method::Recursive } else { Method::Flat },
                algorithm,
            })
            .boxed()
    }
}

/// What was added: before 1.25 the path alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Added {
    pub path: StorePath,
    pub info: Option<Info>,
}

impl Added {
    pub fn new(info: PathInfo) -> Self {
        Self { path: info.path.clone(), info: Some(Info::new(info)) }
    }
}

impl Wire for Added {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        let path = Wire::read(from)?;
        let info = if from.protocol().is_worker(25) { Some(Info::read(from)?) } else { None };
        Ok(Self { path, info })
    }
    fn write(&self, to: &mut Encoder<'_>) {
        self.path.write(to);
        if let Some(info) = &self.info
            && to.protocol().is_worker(25)
        {
            info.write(to);
        }
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        let new = protocol.is_worker(25);
        (StorePath::arb(protocol), Info::arb(protocol))
            .prop_map(move |(path, info)| Self { path, info: new.then_some(info) })
            .boxed()
    }
}

/// Names and values of settings, in the order in which they were sent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Overrides(pub Vec<(String, Bytes)>);

impl Wire for Overrides {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        let (count, slots) = from.count(MAX_SETTINGS)?;
        let mut list = Vec::with_capacity(slots);
        for _ in 0..count {
            from.charge_item(64)?;
            list.push((Wire::read(from)?, Wire::read(from)?));
        }
        Ok(Self(list))
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.count(self.0.len());
        for (name, value) in &self.0 {
            name.write(to);
            value.write(to);
        }
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        proptest::collection::vec((String::arb(protocol), Bytes::arb(protocol)), 0..4).prop_map(Self).boxed()
    }
}

/// What a collector is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GcAction {
    ReturnLive = 0,
    ReturnDead = 1,
    DeleteDead = 2,
    DeleteSpecific = 3,
}

impl Wire for GcAction {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        match from.word32()? {
            0 => Ok(Self::ReturnLive),
            1 => Ok(Self::ReturnDead),
            2 => Ok(Self::DeleteDead),
            3 => Ok(Self::DeleteSpecific),
            found => Err(WireError::Choice { what: "the action of a collector", found: found.into() }),
        }
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.word(*self as u64);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        prop_oneof![Just(Self::ReturnLive), Just(Self::ReturnDead), Just(Self::DeleteDead), Just(Self::DeleteSpecific)]
            .boxed()
    }
}

/// What a collector has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GcReply {
    /// Full paths, not all of them store paths.
    pub paths: BTreeSet<FilePath>,
    pub bytes_freed: u64,
}

impl Wire for GcReply {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        let reply = Self { paths: Wire::read(from)?, bytes_freed: from.word()? };
        Obsolete::read(from)?;
        Ok(reply)
    }
    fn write(&self, to: &mut Encoder<'_>) {
        self.paths.write(to);
        to.word(self.bytes_freed);
        Obsolete.write(to);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        (BTreeSet::arb(protocol), any::<u64>()).prop_map(|(paths, bytes_freed)| Self { paths, bytes_freed }).boxed()
    }
}

/// What a substituter has of the path that was asked for: 0, or 1 and the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptionalSubstitutable(pub Option<NamelessSubstitutable>);

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamelessSubstitutable {
    pub deriver: Option<StorePath>,
    pub references: BTreeSet<StorePath>,
    pub download_size_bytes: u64,
    pub nar_size_bytes: u64,
}

impl Wire for OptionalSubstitutable {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        if !from.bool()? {
            return Ok(Self(None));
        }
        Ok(Self(Some(NamelessSubstitutable {
            deriver: Wire::read(from)?,
            references: Wire::read(from)?,
            download_size_bytes: from.word()?,
            nar_size_bytes: from.word()?,
        })))
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.bool(self.0.is_some());
        if let Some(found) = &self.0 {
            found.deriver.write(to);
            found.references.write(to);
            to.word(found.download_size_bytes);
            to.word(found.nar_size_bytes);
        }
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        proptest::option::of(Substitutable::arb(protocol))
            .prop_map(|found| {
                Self(found.map(|found| NamelessSubstitutable {
                    deriver: found.deriver,
                    references: found.references,
                    download_size_bytes: found.download_size_bytes,
                    nar_size_bytes: found.nar_size_bytes,
                }))
            })
            .boxed()
    }
}

/// The record of a path. Before 1.17 a missing path is an error, so `None` cannot be said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptionalInfo(pub Option<Info>);

impl Wire for OptionalInfo {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        if from.protocol().is_worker(17) && !from.bool()? {
            return Ok(Self(None));
        }
        Info::read(from).map(|info| Self(Some(info)))
    }
    fn write(&self, to: &mut Encoder<'_>) {
        if to.protocol().is_worker(17) {
            to.bool(self.0.is_some());
        }
        if let Some(info) = &self.0 {
            info.write(to);
        }
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        let some = Info::arb(protocol).prop_map(|info| Self(Some(info)));
        if protocol.is_worker(17) { prop_oneof![Just(Self(None)), some].boxed() } else { some.boxed() }
    }
}

/// Paths a substituter may have. Before 1.22 without content addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted(pub BTreeMap<StorePath, Option<ContentAddress>>);

impl Wire for Wanted {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        if from.protocol().is_worker(22) {
            return Wire::read(from).map(Self);
        }
        let paths: BTreeSet<StorePath> = Wire::read(from)?;
        Ok(Self(paths.into_iter().map(|path| (path, None)).collect()))
    }
    fn write(&self, to: &mut Encoder<'_>) {
        if to.protocol().is_worker(22) {
            return self.0.write(to);
        }
        to.count(self.0.len());
        self.0.keys().for_each(|path| path.write(to));
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        let new = protocol.is_worker(22);
        BTreeMap::<StorePath, Option<ContentAddress>>::arb(protocol)
            .prop_map(move |mut paths| {
                paths.values_mut().filter(|_| !new).for_each(|address| *address = None);
                Self(paths)
            })
            .boxed()
    }
}

/// A realisation: before 1.31 its id and the base name of its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegisteredOutput(pub Realisation);

impl Wire for RegisteredOutput {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        if from.protocol().is_worker(31) {
            return Wire::read(from).map(Self);
        }
        Ok(Self(Realisation {
            id: Wire::read(from)?,
            out_path: BaseName::read(from)?.0,
            signatures: BTreeSet::new(),
            dependent_realisations: BTreeMap::new(),
        }))
    }
    fn write(&self, to: &mut Encoder<'_>) {
        if to.protocol().is_worker(31) {
            return self.0.write(to);
        }
        self.0.id.write(to);
        BaseName(self.0.out_path.clone()).write(to);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        let new = protocol.is_worker(31);
        Realisation::arb(protocol)
            .prop_map(move |mut realisation| {
                if !new {
                    realisation.signatures.clear();
                    realisation.dependent_realisations.clear();
                }
                Self(realisation)
            })
            .boxed()
    }
}

/// None or one realisation, as a list; before 1.31 its path only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FoundRealisation {
    Whole(Vec<Realisation>),
    Paths(BTreeSet<StorePath>),
}

impl Wire for FoundRealisation {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        if from.protocol().is_worker(31) {
            Wire::read(from).map(Self::Whole)
        } else {
            Wire::read(from).map(Self::Paths)
        }
    }
    fn write(&self, to: &mut Encoder<'_>) {
        match self {
            Self::Whole(list) => list.write(to),
            Self::Paths(paths) => paths.write(to),
        }
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        if protocol.is_worker(31) {
            Vec::arb(protocol).prop_map(Self::Whole).boxed()
        } else {
            BTreeSet::arb(protocol).prop_map(Self::Paths).boxed()
        }
    }
}
