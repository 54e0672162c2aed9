//! Assembles an HTTP response from pieces of any size; `httparse` parses its head.
//!
//! Only the subset that this API uses is supported. The reason phrase of the status line may be absent (RFC 9112
//! section 4), headers may be in any case, and a body has a `Content-Length`. Without a length, there is no body;
//! upstream's client behaves the same.

use httparse::Status;
use thiserror::Error;

/// Maximum length of status line and headers together.
pub const RESPONSE_HEAD_BYTES_MAX: usize = 64 << 10;
/// Maximum length of a body. `vm.info` of the largest VM is below a megabyte.
pub const RESPONSE_BODY_BYTES_MAX: usize = 16 << 20;
/// Maximum number of characters of a line that an error shows.
const LINE_CHARS_SHOWN: usize = 80;
/// Maximum number of headers. Servers of this API send at most four.
const HEADERS_MAX: usize = 64;
const HEAD_END: &[u8] = b"\r\n\r\n";

/// Reasons why bytes are not a response.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ResponseError {
    /// Closed before the first byte.
    #[error("the connection was closed without a response")]
    Nothing,
    /// Closed within the headers or the body.
    #[error("the connection was closed after {bytes} bytes of an incomplete response")]
    Truncated {
        /// Received bytes.
        bytes: usize,
    },
    /// The first line is not a status line.
    #[error("{line:?} is not an HTTP status line")]
    StatusLine {
        /// The line, shortened.
        line: String,
    },
    /// A line that is not a header, or too many headers.
    #[error("the headers are malformed")]
    Headers(#[from] httparse::Error),
    /// The headers do not end within the limit.
    #[error("the headers are longer than {RESPONSE_HEAD_BYTES_MAX} bytes")]
    HeadTooLong,
    /// A length that is not a number, or two different lengths.
    #[error("{value:?} is not a body length")]
    ContentLength {
        /// The value, shortened.
        value: String,
    },
    /// A body above the limit.
    #[error("a body of {bytes} bytes is more than {RESPONSE_BODY_BYTES_MAX}")]
    BodyTooLong {
        /// Its length.
        bytes: u64,
    },
    /// A transfer coding, which no server of this API uses.
    #[error("the transfer coding {coding:?} is not supported")]
    TransferEncoding {
        /// The coding, shortened.
        coding: String,
    },
    /// A body that is not UTF-8.
    #[error("the body is not UTF-8")]
    NotText,
}

/// A complete response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Response {
    pub(super) status: u16,
    pub(super) body: String,
}

impl Response {
    pub(super) fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }
}

/// Collects bytes until they are a response.
#[derive(Debug, Default)]
pub(super) struct ResponseReader {
    bytes: Vec<u8>,
    head: Option<Head>,
    /// Where the search for the end of the head continues: a response that arrives in single bytes must not cause a
    /// quadratic scan.
    searched: usize,
}

#[derive(Clone, Copy, Debug)]
struct Head {
    status: u16,
    length: usize,
    body_length: usize,
}

impl ResponseReader {
    pub(super) fn push(&mut self, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
    }

    /// The response, once it is complete. Bytes after its end are ignored, because each connection carries one
    /// response.
    pub(super) fn response(&mut self) -> Result<Option<Response>, ResponseError> {
        loop {
            let Some(head) = self.head()? else {
                return Ok(None);
            };
            // `100 Continue` precedes the response and is not itself one.
            if (100..200).contains(&head.status) {
                self.bytes.drain(..head.length);
                self.head = None;
                self.searched = 0;
                continue;
            }
            let end = head.length + head.body_length;
            if self.bytes.len() < end {
                return Ok(None);
            }
            let body = std::str::from_utf8(&self.bytes[head.length..end])
                .map_err(|_| ResponseError::NotText)?;
            return Ok(Some(Response {
                status: head.status,
                body: body.to_owned(),
            }));
        }
    }

    /// The error if the connection was closed in the current state.
    pub(super) fn closed(&self) -> ResponseError {
        match self.bytes.len() {
            0 => ResponseError::Nothing,
            bytes => ResponseError::Truncated { bytes },
        }
    }

    fn head(&mut self) -> Result<Option<Head>, ResponseError> {
        if self.head.is_some() {
            return Ok(self.head);
        }
        let from = self.searched.saturating_sub(HEAD_END.len() - 1);
        let end = self.bytes[from..]
            .windows(HEAD_END.len())
            .position(|window| window == HEAD_END);
        self.searched = self.bytes.len();
        match end {
            Some(end) if from + end <= RESPONSE_HEAD_BYTES_MAX => {
                let length = from + end + HEAD_END.len();
                self.head = Some(parse_head(&self.bytes[..length])?);
                Ok(self.head)
            }
            None if self.bytes.len() <= RESPONSE_HEAD_BYTES_MAX => {
                // Invalid data is detected as early as possible, not when the sender closes the connection.
                check_start(&self.bytes)?;
                Ok(None)
            }
            _ => Err(ResponseError::HeadTooLong),
        }
    }
}

fn check_start(bytes: &[u8]) -> Result<(), ResponseError> {
    let start = b"HTTP/1.";
    if bytes
        .iter()
        .zip(start)
        .all(|(byte, expected)| byte == expected)
    {
        return Ok(());
    }
    Err(ResponseError::StatusLine {
        line: shorten(&String::from_utf8_lossy(bytes)),
    })
}

fn parse_head(head: &[u8]) -> Result<Head, ResponseError> {
    check_start(head)?;
    let status_line = || {
        let text = String::from_utf8_lossy(head);
        let line = shorten(text.lines().next().unwrap_or_default());
        ResponseError::StatusLine { line }
    };
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Response::new(&mut headers);
    let parse_result = parsed.parse(head);
    let status = parsed.code.filter(|status| *status >= 100);
    let status = status.ok_or_else(status_line)?;
    // `httparse` accepts lines that end in a bare LF, and may thus find an earlier end. Such a head is rejected.
    match parse_result? {
        Status::Complete(length) if length == head.len() => {}
        _ => return Err(httparse::Error::NewLine.into()),
    }
    let mut body_length = None;
    for header in parsed.headers {
        let value = String::from_utf8_lossy(header.value);
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        if is("transfer-encoding") && !value.eq_ignore_ascii_case("identity") {
            return Err(ResponseError::TransferEncoding {
                coding: shorten(&value),
            });
        }
        if is("content-length") {
            let bytes = parse_length(&value)?;
            if body_length.is_some_and(|first| first != bytes) {
                return Err(ResponseError::ContentLength {
                    value: shorten(&value),
                });
            }
            body_length = Some(bytes);
        }
    }
    // These statuses have no body, regardless of the headers (RFC 9112 section 6.3).
    let bodyless = status == 204 || status == 304 || status < 200;
    let body_length = if bodyless {
        0
    } else {
        body_length.unwrap_or(0)
    };
    Ok(Head {
        status,
        length: head.len(),
        body_length,
    })
}

fn parse_length(value: &str) -> Result<usize, ResponseError> {
    let malformed = || ResponseError::ContentLength {
        value: shorten(value),
    };
    if value.is_empty() || !value.bytes().all(|digit| digit.is_ascii_digit()) {
        return Err(malformed());
    }
    let bytes: u64 = value.parse().map_err(|_| malformed())?;
    usize::try_from(bytes)
        .ok()
        .filter(|bytes| *bytes <= RESPONSE_BODY_BYTES_MAX)
        .ok_or(ResponseError::BodyTooLong { bytes })
}

fn shorten(text: &str) -> String {
    text.chars().take(LINE_CHARS_SHOWN).collect()
}
