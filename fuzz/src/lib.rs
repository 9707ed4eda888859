//! Fuzz bodies as ordinary functions: `cargo test` replays `corpus/NAME/*` through them.

pub mod export;
pub mod narinfo;
pub mod registration;
pub mod settings;

#[cfg(test)]
mod tests {
    /// The committed inputs, through their bodies.
    #[test]
    fn corpus() {
        type Body = fn(&[u8]);
        let bodies: [(&str, Body); 4] = [
            ("export", super::export::export),
            ("narinfo", super::narinfo::narinfo),
            ("registration", super::registration::registration),
            ("settings", super::settings::settings),
        ];
        for (name, body) in bodies {
            let dir = format!("{}/corpus/{name}", env!("CARGO_MANIFEST_DIR"));
            let mut count = 0;
            for entry in std::fs::read_dir(&dir).unwrap() {
                body(&std::fs::read(entry.unwrap().path()).unwrap());
                count += 1;
            }
            println!("{name}: {count} inputs");
            assert!(count > 0, "{dir} is empty");
        }
    }
}
