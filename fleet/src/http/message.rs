//! HTTP requests and responses: parsing, limits and headers.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Maximum length of request line and headers.
const HEAD_BYTES_MAX: usize = 8 << 10;
/// Maximum number of headers; a browser sends about twenty.
const HEADERS_MAX: usize = 64;
/// Maximum length of a body.
const BODY_BYTES_MAX: usize = 64 << 10;
/// Headers of every response. The page may load resources only from the agent and runs no inline script, so that a name
/// cannot inject one.
const FIXED_HEADERS: &str = "Connection: close\r\n\
     Cache-Control: no-store\r\n\
     Content-Security-Policy: default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
     img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'\r\n\
     Referrer-Policy: no-referrer\r\n\
     X-Content-Type-Options: nosniff\r\n";

/// The method of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Reads state.
    Get,
    /// Changes state.
    Put,
    /// An unsupported method.
    Other,
}

/// The client of a UNIX socket, as reported by the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Process id.
    pub pid: i32,
    /// User id.
    pub uid: u32,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    /// The method.
    pub method: Method,
    /// The path without the query.
    pub path: String,
    /// The text after `?`; empty if there is none.
    pub query: String,
    /// The header `Host`.
    pub host: Option<String>,
    /// The header `Authorization`.
    pub authorization: Option<String>,
    /// The body.
    pub body: Vec<u8>,
    /// The client; absent over TCP.
    pub peer: Option<Peer>,
}

impl Request {
    /// A value of the query, undecoded.
    pub fn query_value(&self, name: &str) -> Option<&str> {
        self.query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .find_map(|(key, value)| (key == name).then_some(value))
    }

    /// The body as JSON.
    ///
    /// # Errors
    /// The response to send: 400 with the reason.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Response> {
        serde_json::from_slice(&self.body).map_err(|error| {
            let chain = [
                "Cannot parse the request".to_owned(),
                format!("{error}{}", api::suggestion(&error.to_string())),
            ];
            Response::error(400, &chain)
        })
    }
}

/// One response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// HTTP status.
    pub status: u16,
    /// Content type of the body.
    pub content_type: &'static str,
    /// The body; empty with status 204.
    pub body: Vec<u8>,
}

impl Response {
    /// Success without a body.
    pub fn done() -> Self {
        Self {
            status: 204,
            content_type: "",
            body: Vec::new(),
        }
    }

    /// Success with text of any kind.
    pub fn text(content_type: &'static str, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status: 200,
            content_type,
            body: body.into(),
        }
    }

    /// Success with JSON.
    pub fn json(value: &impl Serialize) -> Self {
        Self::json_with(200, value)
    }

    /// A failure with its chain of causes, outermost first: a JSON array, as in the VMM's API.
    pub fn error(status: u16, chain: &[String]) -> Self {
        Self::json_with(status, &chain)
    }

    fn json_with(status: u16, value: &impl Serialize) -> Self {
        match api::to_ascii_json(value) {
            Ok(body) => Self {
                status,
                content_type: "application/json",
                body: body.into_bytes(),
            },
            Err(error) => Self {
                status: 500,
                content_type: "application/json",
                body: format!("[\"The answer has no JSON form\",{:?}]", error.to_string()).into(),
            },
        }
    }

    pub(super) fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let mut bytes = format!(
            "HTTP/1.1 {} {}\r\n{FIXED_HEADERS}",
            self.status,
            reason_phrase(self.status)
        );
        if self.status == 401 {
            bytes.push_str("WWW-Authenticate: Bearer\r\n");
        }
        if self.status != 204 {
            bytes.push_str(&format!(
                "Content-Type: {}\r\nContent-Length: {}\r\n",
                self.content_type,
                self.body.len()
            ));
        }
        bytes.push_str("\r\n");
        let mut bytes = bytes.into_bytes();
        bytes.extend_from_slice(&self.body);
        to.write_all(&bytes)
    }
}

fn reason_phrase(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        409 => "Conflict",
        422 => "Unprocessable Content",
        413 => "Content Too Large",
        421 => "Misdirected Request",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    }
}

/// Reasons why a request could not be read.
pub(super) enum ReadError {
    /// The client disconnected or is too slow; no response is sent.
    Gone,
    /// The client receives an error.
    Refused(Response),
}

impl From<io::Error> for ReadError {
    fn from(_: io::Error) -> Self {
        Self::Gone
    }
}

/// Reads one request. The stream bounds how long that takes.
pub(super) fn read_request(stream: &mut impl Read) -> Result<Request, ReadError> {
    let refuse =
        |status, text: &str| ReadError::Refused(Response::error(status, &[text.to_owned()]));
    let mut bytes = Vec::new();
    loop {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut head = httparse::Request::new(&mut headers);
        let parsed = head
            .parse(&bytes)
            .map_err(|error| refuse(400, &format!("This is not an HTTP request: {error}")))?;
        let httparse::Status::Complete(head_bytes) = parsed else {
            if bytes.len() >= HEAD_BYTES_MAX {
                return Err(refuse(413, "The headers are too long"));
            }
            read_more(stream, &mut bytes, HEAD_BYTES_MAX)?;
            continue;
        };
        let header = |name| only(head.headers, name).map_err(|text| refuse(400, &text));
        if header("Transfer-Encoding")?.is_some() {
            return Err(refuse(400, "A body needs a Content-Length"));
        }
        let body_bytes = header("Content-Length")?
            .map_or(Some(0), number)
            .ok_or_else(|| refuse(400, "Content-Length is not a number"))?;
        if body_bytes > BODY_BYTES_MAX {
            return Err(refuse(413, "The body is too long"));
        }
        let (path, query) = head.path.unwrap_or("/").split_once('?').map_or_else(
            || (head.path.unwrap_or("/"), ""),
            |(path, query)| (path, query),
        );
        let mut request = Request {
            method: match head.method {
                Some("GET") => Method::Get,
                Some("PUT") => Method::Put,
                _ => Method::Other,
            },
            path: path.to_owned(),
            query: query.to_owned(),
            host: header("Host")?.map(str::to_owned),
            authorization: header("Authorization")?.map(str::to_owned),
            body: Vec::new(),
            peer: None,
        };
        let whole = head_bytes + body_bytes;
        while bytes.len() < whole {
            read_more(stream, &mut bytes, whole)?;
        }
        request.body = bytes[head_bytes..whole].to_vec();
        return Ok(request);
    }
}

/// A header that may occur at most once: with two, a proxy might use the other one.
fn only<'a>(headers: &[httparse::Header<'a>], name: &str) -> Result<Option<&'a str>, String> {
    let mut found = headers
        .iter()
        .filter(|header| header.name.eq_ignore_ascii_case(name));
    let Some(header) = found.next() else {
        return Ok(None);
    };
    if found.next().is_some() {
        return Err(format!("{name} occurs twice"));
    }
    std::str::from_utf8(header.value)
        .map(|value| Some(value.trim()))
        .map_err(|_| format!("{name} is not text"))
}

/// Parses a number that consists only of digits.
fn number(text: &str) -> Option<usize> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    // A number that does not fit is too large in any case.
    digits.then(|| text.parse().unwrap_or(usize::MAX))
}

fn read_more(
    stream: &mut impl Read,
    bytes: &mut Vec<u8>,
    bytes_max: usize,
) -> Result<(), ReadError> {
    let mut buffer = [0; 2048];
    let wanted = buffer
        .len()
        .min(bytes_max.saturating_sub(bytes.len()).max(1));
    match stream.read(&mut buffer[..wanted]) {
        Ok(0) => Err(ReadError::Gone),
        Ok(count) => {
            bytes.extend_from_slice(&buffer[..count]);
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        Err(_) => Err(ReadError::Gone),
    }
}
