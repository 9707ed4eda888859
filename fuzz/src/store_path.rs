//! Store paths, hashes and content addresses.

use larder_core::content_address::ContentAddress;
use larder_core::hash::{Algorithm, Encoding, Hash};
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

/// Each text form has one value, and what is read in any is written and read as the same.
pub fn store_path(data: &[u8]) {
    let dir = StoreDir::new("/nix/store").expect("absolute");
    if let Ok(path) = StorePath::from_base_name(data) {
        assert_eq!(path.to_string().as_bytes(), data);
        assert_eq!(dir.parse(dir.full(&path)).as_ref(), Ok(&path));
    }
    if let Ok(path) = dir.parse(data) {
        assert_eq!(StorePath::from_base_name(path.to_string().as_bytes()), Ok(path));
    }
    if let Ok((path, inner)) = dir.parse_inside(data) {
        assert!(inner.is_empty() || inner.starts_with(b"/"));
        assert_eq!([dir.full(&path).as_bytes(), inner].concat(), data);
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(dir) = StoreDir::new(text) {
        assert_eq!(StoreDir::new(dir.as_str()), Ok(dir));
    }
    if let Ok(address) = text.parse::<ContentAddress>() {
        assert_eq!(address.to_string().parse(), Ok(address));
    }
    for wanted in [None].into_iter().chain(Algorithm::ALL.map(Some)) {
        let Ok(hash) = Hash::parse(text, wanted) else { continue };
        for encoding in [Encoding::Base16, Encoding::Base32, Encoding::Base64, Encoding::Sri] {
            assert_eq!(Hash::parse(&hash.encode_prefixed(encoding), wanted), Ok(hash));
            let bare = Hash::parse_bare(&hash.encode(encoding), hash.algorithm());
            assert_eq!(bare.is_ok(), encoding != Encoding::Sri);
        }
    }
}
