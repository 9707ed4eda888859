//! The commands of the serve protocol, a row each. Source: protocols, section 3.

use std::collections::BTreeSet;

use larder_core::api::{BuildResult, DerivedPath};
use larder_core::hash::{Algorithm, Hash};
use larder_core::path_info::PathInfo;
use larder_core::store_path::StorePath;

#[cfg(any(test, feature = "testing"))]
use crate::codec::Protocol;
use crate::codec::{Decoder, Encoder, MAX_LONG, MAX_SHORT, WireError};
#[cfg(any(test, feature = "testing"))]
use crate::value::gen_prelude::{BoxedStrategy, Just, Strategy, any, arb, prop_oneof};
use crate::value::{BasicDerivation, Info, Obsolete, One, Wire};

/// A command: its request, and the type of its reply.
pub trait Command: Wire {
    const CODE: u64;
    type Reply: Wire;
}

macro_rules! commands {
    ($($(#[$doc:meta])* $code:literal $name:ident { $($field:ident : $type:ty;)* } -> $reply:ty;)*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, PartialEq, Eq)]
            pub struct $name {
                $(pub $field: $type,)*
            }

            impl Command for $name {
                const CODE: u64 = $code;
                type Reply = $reply;
            }

            impl Wire for $name {
                fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
                    let _ = &from;
                    Ok(Self { $($field: <$type as Wire>::read(from)?,)* })
                }
                fn write(&self, to: &mut Encoder<'_>) {
                    let _ = &to;
                    $(self.$field.write(to);)*
                }
                #[cfg(any(test, feature = "testing"))]
                fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
                    let _ = protocol;
                    (Just(()), $(<$type as Wire>::arb(protocol),)*)
                        .prop_map(|(_nothing, $($field,)*)| Self { $($field,)* })
                        .boxed()
                }
            }
        )*

        /// Any request.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum Request {
            $($name($name),)*
        }

        impl Request {
            /// Reads the fields of the command with this number.
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
        }
    };
}

commands! {
    /// The valid ones among the paths, after some were locked or fetched.
    1 QueryValidPaths { lock: bool; substitute: bool; paths: BTreeSet<StorePath>; } -> BTreeSet<StorePath>;
    2 QueryPathInfos { paths: BTreeSet<StorePath>; } -> Infos;
    /// The NAR follows.
    3 DumpStorePath { path: StorePath; } -> ();
    /// An export stream follows the number.
    4 ImportPaths {} -> One;
    /// An export stream is the reply.
    5 ExportPaths { sign: Obsolete; paths: BTreeSet<StorePath>; } -> ();
    6 BuildPaths { targets: Vec<DerivedPath>; options: BuildOptions; } -> BuildOutcome;
    7 QueryClosure { include_outputs: bool; paths: BTreeSet<StorePath>; } -> BTreeSet<StorePath>;
    8 BuildDerivation { derivation: BasicDerivation; options: BuildOptions; } -> BuildResult;
    /// As many bytes of NAR follow as the record says.
    9 AddToStoreNar { info: NarRecord; } -> One;
}

/// A record as clients send it: all fields, hash in hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NarRecord(pub PathInfo);

impl Wire for NarRecord {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        crate::value::WholeInfo::read(from).map(|info| Self(info.0))
    }
    fn write(&self, to: &mut Encoder<'_>) {
        crate::value::WholeInfo(self.0.clone()).write(to);
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        crate::value::WholeInfo::arb(protocol).prop_map(|info| Self(info.0)).boxed()
    }
}

/// How a build is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BuildOptions {
    pub max_silent_time_s: u64,
    pub build_timeout_s: u64,
    /// From 2.2 on.
    pub max_log_size_bytes: u64,
    /// From 2.3 on. Building more than once is not done any more.
    pub repeats: u64,
    pub enforce_determinism: bool,
    /// From 2.7 on.
    pub keep_failed: bool,
}

impl Wire for BuildOptions {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        let mut options = Self { max_silent_time_s: from.word()?, build_timeout_s: from.word()?, ..Self::default() };
        if from.protocol().is_serve(2) {
            options.max_log_size_bytes = from.word()?;
        }
        if from.protocol().is_serve(3) {
            options.repeats = from.word()?;
            options.enforce_determinism = from.bool()?;
        }
        if from.protocol().is_serve(7) {
            options.keep_failed = from.bool()?;
        }
        Ok(options)
    }
    fn write(&self, to: &mut Encoder<'_>) {
        to.word(self.max_silent_time_s);
        to.word(self.build_timeout_s);
        if to.protocol().is_serve(2) {
            to.word(self.max_log_size_bytes);
        }
        if to.protocol().is_serve(3) {
            to.word(self.repeats);
            to.bool(self.enforce_determinism);
        }
        if to.protocol().is_serve(7) {
            to.bool(self.keep_failed);
        }
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        (any::<[u64; 4]>(), any::<bool>(), any::<bool>())
            .prop_map(move |([silent, timeout, log, repeats], enforce, keep)| Self {
                max_silent_time_s: silent,
                build_timeout_s: timeout,
                max_log_size_bytes: if protocol.is_serve(2) { log } else { 0 },
                repeats: if protocol.is_serve(3) { repeats } else { 0 },
                enforce_determinism: protocol.is_serve(3) && enforce,
                keep_failed: protocol.is_serve(7) && keep,
            })
            .boxed()
    }
}

/// 0, or the exit status of a failed build and its error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildOutcome(pub Result<(), (u64, String)>);

impl Wire for BuildOutcome {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        match from.word()? {
            0 => Ok(Self(Ok(()))),
            status => {
                let text = String::from_utf8_lossy(&from.bytes(MAX_LONG)?).into_owned();
                Ok(Self(Err((status, text))))
            }
        }
    }
    fn write(&self, to: &mut Encoder<'_>) {
        match &self.0 {
            Ok(()) => to.word(0),
            Err((status, text)) => {
                to.word(*status);
                to.text(text);
            }
        }
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(_: Protocol) -> BoxedStrategy<Self> {
        prop_oneof![Just(Self(Ok(()))), (1..=u64::MAX, ".{0,30}").prop_map(|(status, text)| Self(Err((status, text))))]
            .boxed()
    }
}

/// The records of the valid ones among some paths; an empty path ends them.
///
/// Before 2.4 a record has neither hash, content address nor signatures. It never has a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Infos(pub Vec<Record>);

/// A record as servers send it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub path: StorePath,
    pub deriver: Option<StorePath>,
    pub references: BTreeSet<StorePath>,
    pub nar_size_bytes: u64,
    /// From 2.4 on.
    pub rest: Option<RecordRest>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordRest {
    pub nar_hash: larder_core::hash::Sha256Digest,
    pub content_address: Option<larder_core::content_address::ContentAddress>,
    pub signatures: BTreeSet<larder_core::signature::Signature>,
}

impl Record {
    pub fn new(info: PathInfo) -> Self {
        Self {
            path: info.path,
            deriver: info.deriver,
            references: info.references,
            nar_size_bytes: info.nar_size_bytes,
            rest: Some(RecordRest {
                nar_hash: info.nar_hash,
                content_address: info.content_address,
                signatures: info.signatures,
            }),
        }
    }

    /// The whole record, if the version has it.
    pub fn into_info(self) -> Option<PathInfo> {
        let rest = self.rest?;
        let info = Info {
            deriver: self.deriver,
            nar_hash: rest.nar_hash,
            references: self.references,
            registration_time_s: 0,
            nar_size_bytes: self.nar_size_bytes,
            ultimate: false,
            signatures: rest.signatures,
            content_address: rest.content_address,
        };
        Some(info.of(self.path))
    }
}

impl Wire for Infos {
    fn read(from: &mut Decoder<'_>) -> Result<Self, WireError> {
        let mut list = Vec::new();
        while let Some(path) = Option::<StorePath>::read(from)? {
            from.charge_item(size_of::<Record>())?;
            let mut record = Record {
                path,
                deriver: Wire::read(from)?,
                references: Wire::read(from)?,
                nar_size_bytes: 0,
                rest: None,
            };
            // What a download would be, which is nothing else.
            from.word()?;
            record.nar_size_bytes = from.word()?;
            if from.protocol().is_serve(4) {
                let hash = Hash::parse(&from.text(MAX_SHORT)?, Some(Algorithm::Sha256))?;
                record.rest = Some(RecordRest {
                    nar_hash: hash.sha256().expect("SHA-256 was asked for"),
                    content_address: Wire::read(from)?,
                    signatures: Wire::read(from)?,
                });
            }
            list.push(record);
        }
        Ok(Self(list))
    }
    fn write(&self, to: &mut Encoder<'_>) {
        for record in &self.0 {
            record.path.write(to);
            record.deriver.write(to);
            record.references.write(to);
            to.word(record.nar_size_bytes);
            to.word(record.nar_size_bytes);
            if let Some(rest) = &record.rest
                && to.protocol().is_serve(4)
            {
                to.text(&format!("sha256:{}", rest.nar_hash.to_base32()));
                rest.content_address.write(to);
                rest.signatures.write(to);
            }
        }
        to.text("");
    }
    #[cfg(any(test, feature = "testing"))]
    fn arb(protocol: Protocol) -> BoxedStrategy<Self> {
        let dir = larder_core::store_dir::StoreDir::new("/nix/store").expect("an absolute path");
        proptest::collection::vec(arb::paths::path_info(dir), 0..4)
            .prop_map(move |infos| {
                let mut list: Vec<Record> = infos.into_iter().map(Record::new).collect();
                if !protocol.is_serve(4) {
                    for record in &mut list {
                        record.rest = None;
                    }
                }
                Self(list)
            })
            .boxed()
    }
}
