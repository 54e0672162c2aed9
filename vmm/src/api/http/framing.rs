//! Splits a byte stream into HTTP requests (RFC 9112), with a limit on every part.
//!
//! `micro_http` parses; this file only finds where a request ends. The crate's connection type is not used because it
//! bounds neither the number of header lines nor the descriptors that come with them.

use micro_http::{Body, Headers, Request, RequestError};

/// Maximum length of request line and headers together. Clients of this API send a few hundred bytes.
pub(super) const HEAD_BYTES_MAX: usize = 16 << 10;
/// Maximum length of a body, the same as upstream's limit.
pub(super) const PAYLOAD_BYTES_MAX: usize = 4 << 20;

/// Maximum length of the line before a chunk: its size and extensions, which no known client sends.
const CHUNK_LINE_BYTES_MAX: usize = 1 << 10;

const LINE_END: &[u8] = b"\r\n";
const HEAD_END: &[u8] = b"\r\n\r\n";

/// Reasons for rejecting the bytes. The connection cannot be used any more, because the start of the next request is
/// unknown.
#[derive(Debug, thiserror::Error)]
pub(super) enum FramingError {
    /// The head does not end.
    #[error("Request line and headers are longer than {HEAD_BYTES_MAX} bytes.")]
    HeadTooLong,
    /// The announced body exceeds the limit.
    #[error(
        "Request payload with size {bytes} is larger than the limit of {PAYLOAD_BYTES_MAX} allowed by server."
    )]
    PayloadTooLarge {
        /// The announced size.
        bytes: usize,
    },
    /// A coding that is not `chunked`.
    #[error("The only supported Transfer-Encoding is chunked.")]
    TransferEncoding,
    /// Two different lengths, or a length together with a transfer coding: another reader may split the stream
    /// elsewhere.
    #[error("The request gives more than one length of its body.")]
    AmbiguousLength,
    /// Missing start of a chunk.
    #[error("The chunks of the request body are malformed.")]
    Chunk,
    /// Not HTTP. `RequestError` does not implement `std::error::Error`, so its text is stored here.
    #[error("{0}")]
    Malformed(RequestError),
}

/// Bytes received and not yet handed out as a request.
#[derive(Debug, Default)]
pub(super) struct Framer {
    bytes: Vec<u8>,
    /// Where the search for the end of the head continues: a client that sends single bytes must not cause a quadratic
    /// scan.
    scanned: usize,
    head: Option<Head>,
}

/// The framing decided by a complete head.
#[derive(Debug)]
struct Head {
    body: BodyFrame,
    continue_due: bool,
}

/// How the end of the body is found.
#[derive(Debug)]
enum BodyFrame {
    /// Head and body together have this many bytes.
    RequestBytes(usize),
    /// The body comes in chunks.
    Chunked(Box<Chunks>),
}

/// A request whose body comes in chunks (RFC 9112 section 7.1), and its progress.
#[derive(Debug)]
struct Chunks {
    /// Without its body, until that is complete.
    request: Option<Request>,
    body: Vec<u8>,
    /// Set by the last chunk: trailer fields follow, which are ignored.
    trailer_bytes: Option<usize>,
}

impl Framer {
    /// True if no request has begun.
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.head.is_none()
    }

    /// Bytes held for the request that has begun.
    #[cfg(any(test, fuzzing))]
    pub(super) fn kept_bytes(&self) -> usize {
        let body = match &self.head {
            Some(Head {
                body: BodyFrame::Chunked(chunks),
                ..
            }) => chunks.body.len(),
            _ => 0,
        };
        self.bytes.len() + body
    }

    /// Appends received bytes. The caller calls [`Framer::next`] after each push, which bounds the buffer.
    pub(super) fn push(&mut self, received: &[u8]) {
        self.bytes.extend_from_slice(received);
    }

    /// The next complete request, if there is one.
    ///
    /// # Errors
    /// The stream is not HTTP, or a part is too large.
    pub(super) fn next(&mut self) -> Result<Option<Request>, FramingError> {
        if self.head.is_none() {
            self.head = self.find_head()?;
        }
        let Some(head) = &mut self.head else {
            return Ok(None);
        };
        let request = match &mut head.body {
            BodyFrame::RequestBytes(len) if self.bytes.len() < *len => None,
            BodyFrame::RequestBytes(len) => {
                let request = Request::try_from(&self.bytes[..*len], None)
                    .map_err(FramingError::Malformed)?;
                self.bytes.drain(..*len);
                Some(request)
            }
            BodyFrame::Chunked(chunks) => chunks.take(&mut self.bytes)?,
        };
        if request.is_some() {
            // A large body must not stay allocated on a connection that is kept alive.
            self.bytes.shrink_to(HEAD_BYTES_MAX);
            self.scanned = 0;
            self.head = None;
        }
        Ok(request)
    }

    /// True once per request, when the client waits for `100 Continue` before it sends the body.
    pub(super) fn take_continue_due(&mut self) -> bool {
        match &mut self.head {
            Some(head) => std::mem::take(&mut head.continue_due),
            None => false,
        }
    }

    fn find_head(&mut self) -> Result<Option<Head>, FramingError> {
        // RFC 9112 section 2.2: an empty line before a request is ignored.
        while self.bytes.starts_with(LINE_END) {
            self.bytes.drain(..LINE_END.len());
            self.scanned = 0;
        }
        let from = self.scanned.saturating_sub(HEAD_END.len() - 1);
        let Some(at) = find(&self.bytes[from..], HEAD_END) else {
            self.scanned = self.bytes.len();
            if self.bytes.len() > HEAD_BYTES_MAX {
                return Err(FramingError::HeadTooLong);
            }
            return Ok(None);
        };
        let fields_end = from + at;
        if fields_end > HEAD_BYTES_MAX {
            return Err(FramingError::HeadTooLong);
        }
        self.parse_head(fields_end).map(Some)
    }

    fn parse_head(&mut self, fields_end: usize) -> Result<Head, FramingError> {
        let fields = match find(&self.bytes[..fields_end], LINE_END) {
            Some(line_end) => &self.bytes[line_end + LINE_END.len()..fields_end],
            None => &[],
        };
        let headers = Headers::try_from(fields).map_err(FramingError::Malformed)?;
        let head_len = fields_end + HEAD_END.len();
        if is_chunked(fields)? {
            let head: Vec<u8> = self.bytes.drain(..head_len).collect();
            let request = Request::try_from(&head, None).map_err(FramingError::Malformed)?;
            return Ok(Head {
                continue_due: headers.expect(),
                body: BodyFrame::Chunked(Box::new(Chunks {
                    request: Some(request),
                    body: Vec::new(),
                    trailer_bytes: None,
                })),
            });
        }
        let body_len = headers.content_length() as usize;
        if body_len > PAYLOAD_BYTES_MAX {
            return Err(FramingError::PayloadTooLarge { bytes: body_len });
        }
        Ok(Head {
            continue_due: headers.expect() && body_len > 0,
            body: BodyFrame::RequestBytes(head_len + body_len),
        })
    }
}

impl Chunks {
    /// Moves chunks out of `bytes`. Returns the request when its body is complete.
    fn take(&mut self, bytes: &mut Vec<u8>) -> Result<Option<Request>, FramingError> {
        loop {
            if let Some(seen) = &mut self.trailer_bytes {
                let Some(line_bytes) = find(bytes, LINE_END) else {
                    return match *seen + bytes.len() > HEAD_BYTES_MAX {
                        true => Err(FramingError::HeadTooLong),
                        false => Ok(None),
                    };
                };
                bytes.drain(..line_bytes + LINE_END.len());
                *seen += line_bytes + LINE_END.len();
                if *seen > HEAD_BYTES_MAX {
                    return Err(FramingError::HeadTooLong);
                }
                if line_bytes == 0 {
                    return Ok(self.finish());
                }
                continue;
            }
            let Some((data_at, chunk_bytes)) = chunk_line(bytes)? else {
                return Ok(None);
            };
            if chunk_bytes == 0 {
                bytes.drain(..data_at);
                self.trailer_bytes = Some(0);
                continue;
            }
            let total = self.body.len().saturating_add(chunk_bytes);
            if total > PAYLOAD_BYTES_MAX {
                return Err(FramingError::PayloadTooLarge { bytes: total });
            }
            let data_end = data_at + chunk_bytes;
            let Some(end) = bytes.get(data_end..data_end + LINE_END.len()) else {
                return Ok(None);
            };
            if end != LINE_END {
                return Err(FramingError::Chunk);
            }
            self.body.extend_from_slice(&bytes[data_at..data_end]);
            bytes.drain(..data_end + LINE_END.len());
        }
    }

    fn finish(&mut self) -> Option<Request> {
        let mut request = self.request.take()?;
        // An empty chunked body counts as no body, as with a length of 0.
        let body = std::mem::take(&mut self.body);
        request.body = (!body.is_empty()).then(|| Body::new(body));
        Some(request)
    }
}

/// The start and length of the next chunk's data; `None` while its line is incomplete.
fn chunk_line(bytes: &[u8]) -> Result<Option<(usize, usize)>, FramingError> {
    let parsed = httparse::parse_chunk_size(bytes).map_err(|_| FramingError::Chunk)?;
    match parsed {
        httparse::Status::Complete((at, size)) if at <= CHUNK_LINE_BYTES_MAX => {
            Ok(Some((at, usize::try_from(size).unwrap_or(usize::MAX))))
        }
        httparse::Status::Partial if bytes.len() <= CHUNK_LINE_BYTES_MAX => Ok(None),
        _ => Err(FramingError::Chunk),
    }
}

/// Whether the body comes in chunks. `micro_http` uses the last of several lengths and ignores unknown codings. A
/// request that another reader would split elsewhere is rejected here.
fn is_chunked(fields: &[u8]) -> Result<bool, FramingError> {
    let text = String::from_utf8_lossy(fields);
    let mut length = None;
    let mut chunked = false;
    for (name, value) in text.split("\r\n").filter_map(|line| line.split_once(':')) {
        let (name, value) = (name.trim(), value.trim());
        if name.eq_ignore_ascii_case("content-length") {
            if length.is_some_and(|first| first != value) {
                return Err(FramingError::AmbiguousLength);
            }
            length = Some(value);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            match value {
                "identity" => {}
                _ if value.eq_ignore_ascii_case("chunked") && !chunked => chunked = true,
                _ => return Err(FramingError::TransferEncoding),
            }
        }
    }
    match (chunked, length) {
        (true, Some(_)) => Err(FramingError::AmbiguousLength),
        _ => Ok(chunked),
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use micro_http::Method;
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const PUT: &[u8] = b"PUT /api/v1/vm.resize HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}";

    fn framer(bytes: &[u8]) -> Framer {
        let mut framer = Framer::default();
        framer.push(bytes);
        framer
    }

    #[test]
    fn framer_request_byte_by_byte_is_complete_with_the_last_byte() {
        let mut framer = Framer::default();
        for (index, byte) in PUT.iter().enumerate() {
            framer.push(&[*byte]);
            let request = framer.next().unwrap();
            assert_eq!(request.is_some(), index + 1 == PUT.len(), "byte {index}");
            if let Some(request) = request {
                assert_eq!(request.method(), Method::Put);
                assert_eq!(request.uri().get_abs_path(), "/api/v1/vm.resize");
                assert_eq!(request.body.unwrap().raw(), b"{}");
            }
        }
        assert!(framer.is_empty());
    }

    #[test]
    fn framer_pipelined_requests_come_out_one_by_one() {
        let mut framer = framer(&[PUT, b"GET /a HTTP/1.1\r\n\r\n\r\n", PUT].concat());
        assert!(framer.next().unwrap().unwrap().body.is_some());
        assert_eq!(framer.next().unwrap().unwrap().uri().get_abs_path(), "/a");
        assert!(framer.next().unwrap().is_some());
        assert!(framer.next().unwrap().is_none());
    }

    #[test]
    fn framer_oversized_parts_are_refused() {
        let body = format!("PUT /a HTTP/1.1\r\nContent-Length: {}\r\n\r\n", 5 << 20);
        assert!(matches!(
            framer(body.as_bytes()).next(),
            Err(FramingError::PayloadTooLarge { bytes: 0x50_0000 })
        ));
        let endless = [b"GET /a HTTP/1.1\r\n".as_slice(), &[b'a'; HEAD_BYTES_MAX]].concat();
        assert!(matches!(
            framer(&endless).next(),
            Err(FramingError::HeadTooLong)
        ));
        let many = format!(
            "GET /a HTTP/1.1\r\n{}\r\n",
            "a: b\r\n".repeat(HEAD_BYTES_MAX / 6)
        );
        assert!(matches!(
            framer(many.as_bytes()).next(),
            Err(FramingError::HeadTooLong)
        ));
    }

    #[test]
    fn framer_garbage_is_refused() {
        for garbage in [
            b"\x16\x03\x01\x02\r\n\r\n".as_slice(),
            b"GET\r\n\r\n",
            b"GET /a HTTP/9.9\r\n\r\n",
            b"GET /a HTTP/1.1\r\nno colon\r\n\r\n",
            b"PUT /a HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            b"PUT /a HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        ] {
            assert!(
                matches!(framer(garbage).next(), Err(FramingError::Malformed(_))),
                "{garbage:?}"
            );
        }
        assert!(matches!(
            framer(b"PUT /a HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n").next(),
            Err(FramingError::TransferEncoding)
        ));
    }

    #[test]
    fn framer_conflicting_lengths_are_refused() {
        for fields in [
            "Content-Length: 2\r\nContent-Length: 3",
            "content-length: 2\r\nX: y\r\nContent-Length: 02",
            "Content-Length: 2\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: chunked\r\nContent-Length: 0",
        ] {
            let request = format!("PUT /a HTTP/1.1\r\n{fields}\r\n\r\n{{}}}}");
            assert!(
                matches!(
                    framer(request.as_bytes()).next(),
                    Err(FramingError::AmbiguousLength)
                ),
                "{fields}"
            );
        }
        let same = b"PUT /a HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n{}";
        assert!(framer(same).next().unwrap().is_some());
    }

    const CHUNKED: &[u8] = b"PUT /a HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n";

    #[test]
    fn framer_chunks_become_one_body() {
        let body = b"2\r\n{\"\r\n3;x=y\r\na\":\r\n02\r\n1}\r\n0\r\nTrailer: t\r\n\r\n";
        let mut framer = Framer::default();
        let bytes = [CHUNKED, body].concat();
        for (index, byte) in bytes.iter().enumerate() {
            assert_eq!(framer.is_empty(), index == 0);
            framer.push(&[*byte]);
            let request = framer.next().unwrap();
            assert_eq!(request.is_some(), index + 1 == bytes.len(), "byte {index}");
            if let Some(request) = request {
                assert_eq!(request.body.unwrap().raw(), b"{\"a\":1}");
            }
        }
        assert!(framer.is_empty());
        framer.push(PUT);
        assert!(framer.next().unwrap().is_some());
    }

    #[test]
    fn framer_chunked_body_that_is_empty_is_none() {
        let mut framer = framer(&[CHUNKED, b"0\r\n\r\n", PUT].concat());
        assert!(framer.next().unwrap().unwrap().body.is_none());
        assert!(framer.next().unwrap().unwrap().body.is_some());
    }

    #[test]
    fn framer_chunks_have_the_bounds_of_other_bodies() {
        let refused = |body: &str| {
            framer(&[CHUNKED, body.as_bytes()].concat())
                .next()
                .unwrap_err()
        };
        for body in [
            "x\r\n",
            "-1\r\n",
            "2\r\nabc\r\n",
            "fffffffffffffffff\r\n",
            &format!("1;{}", "x".repeat(CHUNK_LINE_BYTES_MAX)),
        ] {
            assert!(matches!(refused(body), FramingError::Chunk), "{body}");
        }
        for body in ["ffffffffffffffff\r\n", "1\r\nx\r\n400000\r\n"] {
            assert!(
                matches!(refused(body), FramingError::PayloadTooLarge { .. }),
                "{body}"
            );
        }
        let trailers = "a: b\r\n".repeat(HEAD_BYTES_MAX / 6 + 1);
        for rest in ["", "x"] {
            let body = format!("0\r\n{trailers}{rest}");
            assert!(matches!(refused(&body), FramingError::HeadTooLong));
        }
    }

    #[test]
    fn framer_expectation_is_due_once() {
        let mut framer =
            framer(b"PUT /a HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n");
        assert!(framer.next().unwrap().is_none());
        assert!(framer.take_continue_due());
        assert!(!framer.take_continue_due());
        framer.push(b"{}");
        assert!(framer.next().unwrap().is_some());
    }

    /// Valid and invalid pieces of requests, of which a stream is composed.
    fn piece() -> impl Strategy<Value = Vec<u8>> {
        let known = |text: &'static str| Just(text.as_bytes().to_vec());
        prop_oneof![
            known("GET /api/v1/vmm.ping HTTP/1.1\r\n"),
            known("PUT /api/v1/vm.create HTTP/1.0\r\n"),
            known("GET  HTTP/1.1\r\n"),
            known("Content-Length: 3\r\n"),
            known("Content-Length: 4194305\r\n"),
            known("Content-Length:\r\n"),
            known("Expect: 100-continue\r\n"),
            known("Transfer-Encoding: chunked\r\n"),
            known("2\r\n{}\r\n"),
            known("0\r\n\r\n"),
            known("Accept-Encoding: *;q=0\r\n"),
            known(":\r\n"),
            known("\r\n"),
            known("\r"),
            known("{}"),
            vec(any::<u8>(), 0..64),
        ]
    }

    /// Feeds `bytes` in steps of `step`. Returns the number of requests before the end or an error.
    fn feed(bytes: &[u8], step: usize) -> (usize, bool) {
        let mut framer = Framer::default();
        let mut requests = 0;
        for part in bytes.chunks(step) {
            framer.push(part);
            loop {
                match framer.next() {
                    Ok(Some(_)) => requests += 1,
                    Ok(None) => break,
                    Err(_) => return (requests, true),
                }
            }
            assert!(framer.bytes.len() <= HEAD_BYTES_MAX + PAYLOAD_BYTES_MAX + step);
        }
        (requests, false)
    }

    proptest! {
        #[test]
        fn framer_any_stream_means_the_same_however_it_is_cut(
            pieces in vec(piece(), 0..24),
            step in 1usize..80,
        ) {
            let bytes = pieces.concat();
            prop_assert_eq!(feed(&bytes, step), feed(&bytes, bytes.len().max(1)));
        }
    }
}
