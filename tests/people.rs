//! `larder` itself.

use crate::house::{House, LARDER, run};

#[test]
fn links_lead_to_the_applets() {
    let house = House::new();
    let made = house.words("larder", "links bin");
    assert_eq!(made.status, Some(0), "{made:?}");
    assert!(made.stdout.contains(&format!("bin/nix-store -> {LARDER}\n")), "{}", made.stdout);
    let link = house.work().join("bin/nix-hash");
    run(&mut house.command(&link), b"").prints("");
    let version = run(house.command(&link).arg("--version"), b"");
    assert!(version.stdout.starts_with("nix-hash (Nix) "), "{version:?}");
}

#[test]
fn help_and_mistakes() {
    let house = House::new();
    let help = house.words("larder", "--help");
    assert_eq!((help.status, help.stderr.as_str()), (Some(0), ""));
    assert!(help.stdout.contains("path-info") && help.stdout.contains("larder nix-store"));
    let version = house.words("larder", "--version");
    assert_eq!(version.stdout, format!("larder {}\n", env!("CARGO_PKG_VERSION")));
    let wrong = house.words("larder", "zork");
    assert_eq!((wrong.status, wrong.stdout.as_str()), (Some(1), ""));
    assert!(wrong.stderr.starts_with("error: unrecognized subcommand 'zork'"), "{}", wrong.stderr);
}

#[test]
fn completions_and_manual_pages() {
    let house = House::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = house.words("larder", &format!("completions {shell}"));
        assert!(script.status == Some(0) && script.stdout.contains("path-info"), "{shell}");
    }
    let page = house.words("larder", "man");
    assert!(page.status == Some(0) && page.stdout.contains(".TH larder 1"), "{}", page.stdout);
    house.words("larder", "man --dir man1").prints("");
    for name in ["larder.1", "larder-add.1", "larder-path-info.1"] {
        assert!(house.work().join("man1").join(name).exists(), "{name}");
    }
}
