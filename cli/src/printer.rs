//! The single place that writes standard output.
//!
//! Results only: whatever else there is to say goes to the [`Terminal`](crate::terminal).
//! Output is gathered into writes of 64 KiB, except on a terminal, where each line is shown at
//! once. When the reader has gone, a listing stops being written and nobody minds (`... | head`),
//! while a stream, such as a NAR, was cut short and that is an error. Source: cli, rule 1.13.

use std::fmt;
use std::io::{self, IsTerminal as _, Write};
use std::os::fd::AsFd as _;
use std::process::ChildStdin;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use crate::conf::Env;
use crate::interrupt::Interrupt;
use crate::pager::Pager;

/// Size of a write, in bytes.
const BUFFER: usize = 64 * 1024;

/// What the output is, which decides what it means that nobody reads it to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Lines for people and scripts: enough is enough.
    Listing,
    /// Data of which a part is worth nothing.
    Stream,
}

#[derive(Debug, thiserror::Error)]
#[error("writing to file")]
pub struct PrintError(#[source] io::Error);

/// Standard output, or a pager before it.
#[derive(Debug)]
pub struct Printer {
    sink: Sink,
    output: Output,
    buffer: Vec<u8>,
    /// Write after each line.
    by_line: bool,
    /// The reader has gone.
    closed: bool,
}

#[derive(Debug)]
enum Sink {
    Stdout,
    Pager(Pager, ChildStdin),
}

impl Printer {
    pub fn new(output: Output) -> Self {
        Self {
            sink: Sink::Stdout,
            output,
            buffer: Vec::with_capacity(BUFFER),
            by_line: io::stdout().is_terminal(),
            closed: false,
        }
    }

    /// A listing that goes through a pager if standard output is a terminal.
    pub fn paged(env: &Env, interrupt: &Interrupt) -> Self {
        let mut printer = Self::new(Output::Listing);
        if printer.by_line
            && let Some((pager, stdin)) = Pager::start(env, interrupt)
        {
            printer.sink = Sink::Pager(pager, stdin);
            printer.by_line = false;
        }
        printer
    }

    /// Has the reader of a listing gone, so that there is no point in making more of it?
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// One line; the line feed is added.
    pub fn line(&mut self, text: impl fmt::Display) -> Result<(), PrintError> {
        writeln!(self, "{text}").map_err(PrintError)
    }

    /// Text or data as it is.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<(), PrintError> {
        self.write_all(bytes).map_err(PrintError)
    }

    /// Writes what is left and, if there is a pager, waits until the user is done with it.
    ///
    /// Dropping does the same without telling of errors: after an error what was found so far is
    /// shown, before the error is.
    pub fn finish(mut self) -> Result<(), PrintError> {
        self.end().map_err(PrintError)
    }

    fn end(&mut self) -> io::Result<()> {
        let result = self.write_out();
        if let Sink::Pager(pager, stdin) = std::mem::replace(&mut self.sink, Sink::Stdout) {
            drop(stdin);
            pager.wait();
        }
        result
    }

    fn write_out(&mut self) -> io::Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let result = self.write_now(&buffer);
        buffer.clear();
        self.buffer = buffer;
        result
    }

    fn write_now(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.closed || bytes.is_empty() {
            return Ok(());
        }
        let result = match &mut self.sink {
            Sink::Stdout => write_stdout(bytes),
            Sink::Pager(_, stdin) => stdin.write_all(bytes),
        };
        match result {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe && self.output == Output::Listing => {
                self.closed = true;
                Ok(())
            }
            result => result,
        }
    }
}

impl Drop for Printer {
    fn drop(&mut self) {
        drop(self.end());
    }
}

impl Write for Printer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.buffer.len() + bytes.len() > BUFFER {
            self.write_out()?;
        }
        if bytes.len() >= BUFFER {
            self.write_now(bytes)?;
        } else {
            self.buffer.extend_from_slice(bytes);
            if self.by_line && bytes.last() == Some(&b'\n') {
                self.write_out()?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.write_out()
    }
}

/// Writes all, also where standard output was made non-blocking by some other program.
fn write_stdout(mut bytes: &[u8]) -> io::Result<()> {
    let stdout = io::stdout();
    let fd = stdout.as_fd();
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let mut ready = [PollFd::new(&stdout, PollFlags::OUT)];
                match rustix::event::poll(&mut ready, None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
