//! Communicates with a guest over a serial port or console.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::wait::wait_for;

/// Time limit for sending a line, which the guest reads or the VMM buffers.
const SEND_DEADLINE: Duration = Duration::from_secs(30);

/// The host's end of a guest's serial port; stores everything that was read.
#[derive(Debug)]
pub struct Serial {
    /// A socket or a terminal that does not block.
    stream: File,
    text: String,
    /// Up to where `text` has been consumed by [`Serial::expect`].
    seen: usize,
}

impl Serial {
    /// Connects; the VMM must have created the socket.
    ///
    /// # Errors
    /// There is no listener within the deadline.
    pub fn connect(path: &Path, deadline: Duration) -> Result<Serial> {
        let stream = wait_for("serial socket", deadline, || {
            Ok(UnixStream::connect(path).ok())
        })
        .with_context(|| path.display().to_string())?;
        stream.set_nonblocking(true)?;
        Ok(Self::over(OwnedFd::from(stream).into()))
    }

    /// Opens a terminal device.
    ///
    /// # Errors
    /// It does not open.
    pub fn open(path: &Path) -> Result<Serial> {
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .with_context(|| path.display().to_string())?;
        Ok(Self::over(file))
    }

    /// Uses an open non-blocking descriptor.
    pub fn over(stream: File) -> Serial {
        Serial {
            stream,
            text: String::new(),
            seen: 0,
        }
    }

    /// Waits for a complete line that contains `pattern`, after the previously expected text, and returns it.
    ///
    /// # Errors
    /// No such line arrived in time; the error shows the end of the received text.
    pub fn expect(&mut self, pattern: &str, deadline: Duration) -> Result<String> {
        self.expect_line(&format!("{pattern:?}"), deadline, |line| {
            line.contains(pattern)
        })
    }

    /// Waits for the command server's response to `verb`: `ok VERB …` after the command's output, or `err …`.
    ///
    /// # Errors
    /// The response is an error, or none arrived in time.
    ///
    /// # Panics
    /// The guest verified data and found that they are wrong.
    pub fn expect_answer(&mut self, verb: &str, deadline: Duration) -> Result<String> {
        let good = format!("ok {verb}");
        let line = self.expect_line(&format!("{good:?}"), deadline, |line| {
            line.contains(&good) || line.starts_with("err ")
        })?;
        let is_good = line.contains(&good);
        // Wrong data are never tried again, as a failed command is on a slow host.
        assert!(
            is_good || !verb.ends_with("verify") && !line.contains(" reads "),
            "the guest found wrong data: {line}"
        );
        ensure!(is_good, "the guest answered: {line}");
        Ok(line)
    }

    fn expect_line(
        &mut self,
        what: &str,
        deadline: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let found = wait_for(&format!("serial line with {what}"), deadline, || {
            let open = self.read_available()?;
            match self.take_line(&wanted) {
                Some(line) => Ok(Some(line)),
                None if open => Ok(None),
                None => bail!("the serial port was closed before a line with {what}"),
            }
        });
        found.with_context(|| self.last_words())
    }

    /// Waits for text that need not end a line, such as a prompt, after the previously expected text.
    ///
    /// # Errors
    /// It did not arrive in time; the error shows the end of the received text.
    pub fn expect_text(&mut self, text: &str, deadline: Duration) -> Result<()> {
        let found = wait_for(&format!("{text:?} on the serial port"), deadline, || {
            let open = self.read_available()?;
            match self.text[self.seen..].find(text) {
                Some(at) => {
                    self.seen += at + text.len();
                    Ok(Some(()))
                }
                None if open => Ok(None),
                None => bail!("the serial port was closed before {text:?}"),
            }
        });
        found.with_context(|| self.last_words())
    }

    /// Sends one line.
    ///
    /// # Errors
    /// The guest's side is closed or does not read.
    pub fn send(&mut self, line: &str) -> Result<()> {
        let bytes = format!("{line}\n").into_bytes();
        let mut sent = 0;
        wait_for("room for a line to the guest", SEND_DEADLINE, || {
            match self.stream.write(&bytes[sent..]) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => (),
                Err(error) => bail!("serial: {error}"),
            }
            Ok((sent == bytes.len()).then_some(()))
        })
    }

    /// Everything read so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The guest's last output, for the message of a failed test.
    pub fn last_words(&mut self) -> String {
        // Errors do not matter here.
        let _ = self.read_available();
        format!("the guest printed: …{}", tail(&self.text))
    }

    /// Reads available data; false at the end of the stream.
    fn read_available(&mut self) -> Result<bool> {
        let mut block = [0u8; 4096];
        loop {
            match self.stream.read(&mut block) {
                Ok(0) => return Ok(false),
                Ok(count) => self
                    .text
                    .push_str(&String::from_utf8_lossy(&block[..count])),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(false),
                Err(error) => bail!("serial: {error}"),
            }
        }
    }

    /// The first new complete line that matches `wanted`.
    fn take_line(&mut self, wanted: &impl Fn(&str) -> bool) -> Option<String> {
        let mut at = self.seen;
        while let Some(length) = self.text[at..].find('\n') {
            let line = self.text[at..at + length].trim_end();
            at += length + 1;
            if wanted(line) {
                let line = line.to_owned();
                self.seen = at;
                return Some(line);
            }
        }
        None
    }
}

/// The last lines, for an error message.
fn tail(text: &str) -> &str {
    let start = text.char_indices().rev().nth(1500).map_or(0, |(at, _)| at);
    &text[start..]
}
