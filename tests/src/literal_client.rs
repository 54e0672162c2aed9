//! An HTTP client that parses responses exactly like upstream's `ch-remote`.
//!
//! An ordinary HTTP library would hide differences that break upstream's tools, so this client follows their rules. The
//! status is the text between `HTTP/1.1 ` and the first carriage return, parsed as a number, so a reason phrase breaks
//! it. `Content-Length: ` is matched case-sensitively; without it, there is no body. Bytes are read in blocks of 256,
//! each of which must be valid UTF-8. The request is sent in several writes.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

const BLOCK_BYTES: usize = 256;
const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);

/// A response: status and body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status code.
    pub status: u16,
    /// Body, if there was a `Content-Length`.
    pub body: Option<String>,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Errors
    /// There is none, or it is not JSON.
    pub fn json(&self) -> Result<serde_json::Value> {
        let body = self.body.as_deref().context("the answer has no body")?;
        serde_json::from_str(body).with_context(|| format!("not JSON: {body}"))
    }
}

/// Sends one request to `/api/v1/{endpoint}` on a separate connection.
///
/// # Errors
/// The connection failed, or the response violates one of the rules.
pub fn request(socket: &Path, method: &str, endpoint: &str, body: Option<&str>) -> Result<Answer> {
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    stream.write_all(
        format!("{method} /api/v1/{endpoint} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n")
            .as_bytes(),
    )?;
    if let Some(body) = body {
        stream.write_all(format!("Content-Length: {}\r\n", body.len()).as_bytes())?;
    }
    stream.write_all(b"\r\n")?;
    if let Some(body) = body {
        stream.write_all(body.as_bytes())?;
    }
    stream.flush()?;
    read_answer(&mut stream).with_context(|| format!("{method} {endpoint}"))
}

/// Reads one response by the rules above.
///
/// # Errors
/// The connection failed, or the response violates one of the rules.
pub fn read_answer(stream: &mut UnixStream) -> Result<Answer> {
    let mut text = String::new();
    let mut expected = None;
    let mut header_end = None;
    loop {
        let mut block = [0u8; BLOCK_BYTES];
        let count = stream.read(&mut block)?;
        ensure!(count > 0, "connection closed early; so far: {text:?}");
        text.push_str(
            std::str::from_utf8(&block[..count]).context("a block of 256 bytes is not UTF-8")?,
        );
        if header_end.is_none() {
            header_end = text.find("\r\n\r\n").map(|at| at + 4);
            expected = content_length(&text)?;
        }
        if let Some(start) = header_end {
            let body = &text[start..];
            match expected {
                None => {
                    ensure!(body.is_empty(), "a body without Content-Length: {body:?}");
                    return Ok(Answer {
                        status: status(&text)?,
                        body: None,
                    });
                }
                Some(bytes) if body.len() >= bytes => {
                    ensure!(body.len() == bytes, "more body than Content-Length");
                    return Ok(Answer {
                        status: status(&text)?,
                        body: Some(body.to_owned()),
                    });
                }
                Some(_) => {}
            }
        }
    }
}

fn status(text: &str) -> Result<u16> {
    let Some(start) = text.strip_prefix("HTTP/1.1 ") else {
        bail!("no status line: {text:?}");
    };
    let end = start.find('\r').context("no end of the status line")?;
    start[..end]
        .trim()
        .parse()
        .with_context(|| format!("status is not a number: {:?}", &start[..end]))
}

fn content_length(text: &str) -> Result<Option<usize>> {
    let Some(at) = text.find("Content-Length: ") else {
        return Ok(None);
    };
    let value = &text[at + "Content-Length: ".len()..];
    let Some(end) = value.find('\r') else {
        return Ok(None);
    };
    Ok(Some(value[..end].trim().parse()?))
}
