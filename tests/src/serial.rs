//! Talking to a guest over a serial port that is a UNIX socket.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::wait::wait_for;

/// The host's end of a guest's serial port; keeps all that was read.
#[derive(Debug)]
pub struct Serial {
    stream: UnixStream,
    text: String,
    /// Up to where `text` has been consumed by [`Serial::expect`].
    seen: usize,
}

impl Serial {
    /// Connects; the VMM must have created the socket.
    ///
    /// # Errors
    /// Nobody listens within the deadline.
    pub fn connect(path: &Path, deadline: Duration) -> Result<Serial> {
        let stream = wait_for("serial socket", deadline, || {
            Ok(UnixStream::connect(path).ok())
        })
        .with_context(|| path.display().to_string())?;
        stream.set_nonblocking(true)?;
        Ok(Serial {
            stream,
            text: String::new(),
            seen: 0,
        })
    }

    /// Waits for a complete line that contains `pattern`, behind what was
    /// expected before, and returns it.
    ///
    /// # Errors
    /// No such line came in time; the end of what did come is shown.
    pub fn expect(&mut self, pattern: &str, deadline: Duration) -> Result<String> {
        let what = format!("serial line with {pattern:?}");
        let found = wait_for(&what, deadline, || {
            self.read_available()?;
            Ok(self.take_line(pattern))
        });
        found.with_context(|| format!("the guest printed: …{}", tail(&self.text)))
    }

    /// Sends one line.
    ///
    /// # Errors
    /// The guest's side is gone or does not read.
    pub fn send(&mut self, line: &str) -> Result<()> {
        self.stream.set_nonblocking(false)?;
        self.stream
            .set_write_timeout(Some(Duration::from_secs(10)))?;
        self.stream.write_all(line.as_bytes())?;
        self.stream.write_all(b"\n")?;
        self.stream.set_nonblocking(true)?;
        Ok(())
    }

    /// Everything read so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    fn read_available(&mut self) -> Result<()> {
        let mut block = [0u8; 4096];
        loop {
            match self.stream.read(&mut block) {
                Ok(0) => return Ok(()),
                Ok(count) => self
                    .text
                    .push_str(&String::from_utf8_lossy(&block[..count])),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(()),
                Err(error) => bail!("serial: {error}"),
            }
        }
    }

    fn take_line(&mut self, pattern: &str) -> Option<String> {
        let unseen = &self.text[self.seen..];
        let at = unseen.find(pattern)?;
        let end = at + unseen[at..].find('\n')?;
        let start = unseen[..at].rfind('\n').map_or(0, |newline| newline + 1);
        let line = unseen[start..end].trim_end().to_owned();
        self.seen += end + 1;
        Some(line)
    }
}

/// The last lines, for an error message.
fn tail(text: &str) -> &str {
    let start = text.char_indices().rev().nth(1500).map_or(0, |(at, _)| at);
    &text[start..]
}
