//! Replays the corpus of every body.

use std::path::Path;

#[test]
fn corpora() {
    for (name, body) in larder_fuzz::BODIES {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
        let mut files: Vec<_> = std::fs::read_dir(&folder)
            .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        assert!(!files.is_empty(), "{name} has no corpus");
        println!("{name}: {} files", files.len());
        for file in files {
            let data = std::fs::read(&file).unwrap();
            if let Err(panic) = std::panic::catch_unwind(|| body(&data)) {
                eprintln!("in {}", file.display());
                std::panic::resume_unwind(panic);
            }
        }
    }
}

/// Every target has a body and the other way round.
#[test]
fn targets_and_bodies_match() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz_targets");
    let mut targets: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    targets.sort();
    let mut bodies: Vec<_> = larder_fuzz::BODIES.iter().map(|(name, _)| *name).collect();
    bodies.sort_unstable();
    assert_eq!(targets, bodies);
}
