//! Paths that stand for others: placeholders before a path is known, and scratch paths where an
//! output is built that cannot be built in its place.
//!
//! Source: formats, section 5.6; modern, sections 2.4 and 5; `derivations.json`, `modern.json`.

use super::{OutputName, name_of};
use crate::base32;
use crate::hash::{Sha256Digest, fold};
use crate::store_dir::StoreDir;
use crate::store_path::{Name, NameError, StorePath};

/// A text such as `/1rz4g4znpzjwh1xymhjpm42vipw92pr73vdgl6xs1hycac8kf2n9`: a slash and 52
/// base-32 characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Placeholder(Sha256Digest);

impl Placeholder {
    /// Length of the text, in bytes.
    pub const LEN: usize = 53;

    /// A derivation's own output, in its builder, arguments and environment.
    pub fn own(output: &OutputName) -> Self {
        Self::of(&format!("nix-output:{output}"))
    }

    /// An output of an input derivation that is floating or deferred.
    pub fn upstream(drv: &StorePath, output: &OutputName) -> Result<Self, super::NotDerivation> {
        let name = output_path_name(&name_of(drv)?, output);
        Ok(Self::of(&format!("nix-upstream-output:{}:{name}", drv.hash_part())))
    }

    /// An output of the derivation that the output behind `upstream` will be.
    pub fn computed(upstream: Self, output: &OutputName) -> Self {
        let folded: [u8; 20] = fold(upstream.0.as_bytes());
        Self::of(&format!("nix-computed-output:{}:{output}", base32::encode(&folded)))
    }

    fn of(clear: &str) -> Self {
        Self(Sha256Digest::of(clear.as_bytes()))
    }

    pub fn to_text(self) -> String {
        format!("/{}", self.0.to_base32())
    }
}

impl std::fmt::Display for Placeholder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.to_text())
    }
}

/// The name an output's path has, unchecked: `out` adds nothing.
pub(super) fn output_path_name(drv_name: &Name, output: &OutputName) -> String {
    match output.as_str() {
        "out" => drv_name.to_string(),
        other => format!("{drv_name}-{other}"),
    }
}

/// Where output `output` of the derivation at `drv` is built when its final path is not known.
///
/// Errors: the name of the path would be too long.
pub fn scratch_path(
    dir: &StoreDir,
    drv: &StorePath,
    drv_name: &Name,
    output: &OutputName,
) -> Result<StorePath, NameError> {
    let name = drv_name.for_output(output.as_str())?;
    Ok(dir.make_path(&format!("rewrite:{drv}:name:{output}"), &Sha256Digest([0; 32]), &name))
}

/// Where an output is built that is valid already, to be repaired or checked.
pub fn scratch_path_beside(dir: &StoreDir, drv: &StorePath, output: &StorePath) -> StorePath {
    dir.make_path(&format!("rewrite:{drv}:{output}"), &Sha256Digest([0; 32]), output.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own() {
        for (output, text) in [
            ("out", "/1rz4g4znpzjwh1xymhjpm42vipw92pr73vdgl6xs1hycac8kf2n9"),
            ("dev", "/02qcpld1y6xhs5gz9bchpxaw0xdhmsp5dv88lh25r2ss44kh8dxz"),
            ("doc", "/071n0a2b0qpwijb2ws5nyvq1b3xyb0hgxbsh1cnzxj41mi8k1nyy"),
        ] {
            let placeholder = Placeholder::own(&OutputName::new(output).unwrap());
            assert_eq!(placeholder.to_text(), text);
            assert_eq!(placeholder.to_text().len(), Placeholder::LEN);
        }
    }
}
