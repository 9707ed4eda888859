//! Validity registration texts.

use larder_core::registration::{Form, Parser, Record, RegistrationError};
use larder_core::store_dir::StoreDir;

/// The first byte chooses the form and how the text is cut into pieces: the records must be the
/// same at any cut, and read back.
pub fn registration(data: &[u8]) {
    let Some((&first, text)) = data.split_first() else { return };
    let form = if first & 1 == 0 { Form::WithHash } else { Form::WithoutHash };
    let cut = usize::from(first >> 1).max(1);
    let dir = StoreDir::new("/nix/store").expect("an absolute path");
    let whole = parse(&dir, form, text, usize::MAX);
    assert_eq!(parse(&dir, form, text, cut), whole);
    if let Ok(records) = whole {
        let mut out = Vec::new();
        for record in &records {
            record.write(&mut out, &dir);
        }
        assert_eq!(parse(&dir, form, &out, cut), Ok(records));
    }
}

fn parse(dir: &StoreDir, form: Form, text: &[u8], cut: usize) -> Result<Vec<Record>, RegistrationError> {
    let mut parser = Parser::new(dir, form);
    let mut records = Vec::new();
    for piece in text.chunks(cut) {
        parser.push(piece);
        while let Some(record) = parser.next_record()? {
            records.push(record.to_record());
        }
    }
    parser.finish()?;
    Ok(records)
}
