//! Derivations.

use std::convert::Infallible;

use larder_core::derivation::check::check;
use larder_core::derivation::modulo::{Mask, Memo, ModuloError};
use larder_core::derivation::options::{Attributes, print_env};
use larder_core::derivation::{Derivation, json, parse};
use larder_core::store_dir::StoreDir;
use larder_core::store_path::{Name, StorePath};

/// What is read is written and read as the same; whatever is asked of it has an answer.
pub fn drv(data: &[u8]) {
    let dir = StoreDir::new("/nix/store").expect("absolute");
    let name = Name::new("x").expect("a name");
    let Ok(drv) = parse(&dir, &name, data) else { return };
    let text = drv.to_aterm(&dir);
    let again = parse(&dir, &name, &text);
    assert_eq!(again.as_ref(), Ok(&drv), "read, written and read");
    assert_eq!(again.map(|drv| drv.to_aterm(&dir)), Ok(text));
    if let Ok(value) = json::to_json(&drv, &dir) {
        assert_eq!(json::from_json(&dir, &value), Ok(drv.clone()));
        assert!(json::to_json_2_8(&drv, &dir).is_ok());
    }
    let path: StorePath = "0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x.drv".parse().expect("a path");
    // Every input is this derivation itself: an end must be found all the same.
    let modulo = |mask| Memo::new().modulo(&dir, &drv, mask, |_| -> Result<&Derivation, Infallible> { Ok(&drv) });
    let (masked, plain) = (modulo(Mask::On), modulo(Mask::Off));
    assert_eq!(masked.is_ok(), plain.is_ok());
    let cyclic = matches!(masked, Err(ModuloError::Cycle { .. }));
    assert!(!cyclic || !drv.input_drvs.is_empty());
    let _ = check(&dir, &path, &drv, || masked);
    let _ = Attributes::new(&path, &drv).map(|attributes| attributes.strings("allowedReferences").map(drop));
    assert!(print_env(&drv).ends_with(b"'\n"));
}
