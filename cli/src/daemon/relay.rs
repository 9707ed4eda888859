//! `nix-daemon --stdio` for a user whose store is a daemon's: bytes go both ways, unread.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::path::Path;

/// Bytes at a time.
const BLOCK: usize = 64 << 10;

/// Connects standard input and output to a socket until the daemon hangs up.
///
/// When the client hangs up, the daemon is told, and ends the connection itself.
pub fn relay(socket: &Path) -> io::Result<()> {
    let stream = crate::remote::connect(socket)?;
    let there = stream.try_clone()?;
    // It may wait for the client for ever; the process ends without it.
    std::thread::Builder::new().name("from client".to_owned()).spawn(move || {
        let _ = copy(&mut io::stdin(), &mut &there);
        let _ = there.shutdown(Shutdown::Write);
    })?;
    let mut output = super::socket::StdoutWriter::new()?;
    copy(&mut &stream, &mut output)
}

fn copy(from: &mut dyn Read, to: &mut dyn Write) -> io::Result<()> {
    let mut block = vec![0; BLOCK];
    loop {
        let n = match from.read(&mut block) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        to.write_all(block.get(..n).unwrap_or_default())?;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn all_bytes_pass() {
        let (mut near, far) = UnixStream::pair().unwrap();
        near.write_all(b"hello").unwrap();
        near.shutdown(Shutdown::Write).unwrap();
        let mut out = Vec::new();
        copy(&mut &far, &mut out).unwrap();
        assert_eq!(out, b"hello");
    }
}
