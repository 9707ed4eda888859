//! Files of binary caches.

use larder_core::narinfo::{CacheInfo, NarInfo};
use larder_core::store_dir::StoreDir;

/// What a file says must read back from what we write of it.
pub fn narinfo(data: &[u8]) {
    let dir = StoreDir::new("/nix/store").expect("an absolute path");
    if let Ok(narinfo) = NarInfo::parse(&dir, data, "fuzz.narinfo") {
        assert!(narinfo.answers(narinfo.info.path.hash_part(), Some(narinfo.info.path.name())));
        assert!(narinfo.info.nar_size_bytes != 0 && !narinfo.url.is_empty());
        let text = narinfo.to_text(&dir);
        assert_eq!(NarInfo::parse(&dir, text.as_bytes(), "fuzz.narinfo"), Ok(narinfo));
    }
    if let Ok(info) = CacheInfo::parse(&dir, data, "file:///fuzz") {
        assert_eq!(CacheInfo::parse(&dir, info.to_text(&dir).as_bytes(), "file:///fuzz"), Ok(info));
    }
}
