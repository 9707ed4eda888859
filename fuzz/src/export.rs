//! Export streams, all but the NARs.

use larder_core::export::{ExportError, Lead, Next, Object, Step, Trailer, write_lead, write_trailer};
use larder_core::store_dir::StoreDir;

/// The first byte says how the rest is cut into pieces. A lead or a trailer must read the same at
/// any cut; what a trailer says must read back.
pub fn export(data: &[u8]) {
    let Some((&cut, stream)) = data.split_first() else { return };
    let cut = usize::from(cut).max(1);
    let dir = StoreDir::new("/nix/store").expect("an absolute path");
    let (mut whole, mut pieces) = (Lead::new(), Lead::new());
    let lead = push_all(stream, usize::MAX, |piece| whole.push(piece));
    assert_eq!(push_all(stream, cut, |piece| pieces.push(piece)), lead);
    if let Ok((next, taken)) = lead {
        let mut out = Vec::new();
        write_lead(&mut out, next);
        assert_eq!((out.as_slice(), 8), (stream.split_at(taken).0, taken));
        // The trailer of an object without a NAR.
        if next == Next::Object {
            trailer(&dir, stream.split_at(taken).1, cut);
        }
    }
    trailer(&dir, stream, cut);
}

fn trailer(dir: &StoreDir, stream: &[u8], cut: usize) {
    let (mut whole, mut pieces) = (Trailer::new(dir), Trailer::new(dir));
    let read = push_all(stream, usize::MAX, |piece| whole.push(piece));
    assert_eq!(push_all(stream, cut, |piece| pieces.push(piece)), read);
    if let Ok((object, _)) = read {
        let out = write(dir, &object);
        let mut again = Trailer::new(dir);
        assert_eq!(push_all(&out, cut, |piece| again.push(piece)), Ok((object, out.len())));
    }
}

fn write(dir: &StoreDir, object: &Object) -> Vec<u8> {
    let mut out = Vec::new();
    let references = object.references.iter().map(Into::into);
    write_trailer(&mut out, dir, (&object.path).into(), references, object.deriver.as_ref().map(Into::into));
    out
}

/// The value and how many bytes it took.
fn push_all<T>(
    stream: &[u8],
    cut: usize,
    mut push: impl FnMut(&[u8]) -> Result<Step<T>, ExportError>,
) -> Result<(T, usize), ExportError> {
    let mut at = 0;
    for piece in stream.chunks(cut) {
        match push(piece)? {
            Step::More => at += piece.len(),
            Step::Done { taken, value } => return Ok((value, at + taken)),
        }
    }
    Err(ExportError::UnexpectedEnd)
}
