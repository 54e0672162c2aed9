//! Cuts a byte stream into HTTP requests (RFC 9112), with a bound on every part.
//!
//! `micro_http` parses; this file only finds where a request ends. The crate's own connection type is not used because
//! it bounds neither the number of header lines nor the descriptors that come with them.

use micro_http::{Headers, Request, RequestError};

/// Longest request line and headers together. Clients of this API send a few hundred bytes.
pub(super) const HEAD_BYTES_MAX: usize = 16 << 10;
/// Longest body, the same as upstream's limit.
pub(super) const PAYLOAD_BYTES_MAX: usize = 4 << 20;

const LINE_END: &[u8] = b"\r\n";
const HEAD_END: &[u8] = b"\r\n\r\n";

/// Why the bytes are no request. The connection cannot be used any more, because nobody knows where the next one begins.
#[derive(Debug, thiserror::Error)]
pub(super) enum FramingError {
    /// The head does not end.
    #[error("Request line and headers are longer than {HEAD_BYTES_MAX} bytes.")]
    HeadTooLong,
    /// The body is announced as larger than allowed.
    #[error(
        "Request payload with size {bytes} is larger than the limit of {PAYLOAD_BYTES_MAX} allowed by server."
    )]
    PayloadTooLarge {
        /// Size that was announced.
        bytes: usize,
    },
    /// The body comes in chunks, which no client of this API does.
    #[error("Transfer-Encoding is not supported: send a Content-Length.")]
    Chunked,
    /// Not HTTP. `RequestError` is no `std::error::Error`, so its text stands here.
    #[error("{0}")]
    Malformed(RequestError),
}

/// Bytes received and not yet handed out as a request.
#[derive(Debug, Default)]
pub(super) struct Framer {
    bytes: Vec<u8>,
    /// How far the end of the head was looked for, so that a byte-by-byte client costs no quadratic scan.
    scanned: usize,
    head: Option<Head>,
}

/// What is known once the head is complete.
#[derive(Debug, Clone, Copy)]
struct Head {
    len: usize,
    body_len: usize,
    continue_due: bool,
}

impl Framer {
    /// True when no request has begun.
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Takes in what was received. The caller calls [`Framer::next`] after each push, which bounds the buffer.
    pub(super) fn push(&mut self, received: &[u8]) {
        self.bytes.extend_from_slice(received);
    }

    /// The next complete request, if there is one.
    ///
    /// # Errors
    /// The stream is no HTTP, or a part is too large.
    pub(super) fn next(&mut self) -> Result<Option<Request>, FramingError> {
        let head = match self.head {
            Some(head) => head,
            None => match self.find_head()? {
                Some(head) => *self.head.insert(head),
                None => return Ok(None),
            },
        };
        let request_len = head.len + head.body_len;
        if self.bytes.len() < request_len {
            return Ok(None);
        }
        let request =
            Request::try_from(&self.bytes[..request_len], None).map_err(FramingError::Malformed)?;
        self.bytes.drain(..request_len);
        // A large body must not stay allocated on a connection kept alive.
        self.bytes.shrink_to(HEAD_BYTES_MAX);
        self.scanned = 0;
        self.head = None;
        Ok(Some(request))
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

    fn parse_head(&self, fields_end: usize) -> Result<Head, FramingError> {
        let fields = match find(&self.bytes[..fields_end], LINE_END) {
            Some(line_end) => &self.bytes[line_end + LINE_END.len()..fields_end],
            None => &[],
        };
        let headers = Headers::try_from(fields).map_err(FramingError::Malformed)?;
        if headers.chunked() {
            return Err(FramingError::Chunked);
        }
        let body_len = headers.content_length() as usize;
        if body_len > PAYLOAD_BYTES_MAX {
            return Err(FramingError::PayloadTooLarge { bytes: body_len });
        }
        Ok(Head {
            len: fields_end + HEAD_END.len(),
            body_len,
            continue_due: headers.expect() && body_len > 0,
        })
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
            framer(b"PUT /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n").next(),
            Err(FramingError::Chunked)
        ));
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

    /// Pieces of requests, right and wrong, that a stream is made of.
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
            known("Accept-Encoding: *;q=0\r\n"),
            known(":\r\n"),
            known("\r\n"),
            known("\r"),
            known("{}"),
            vec(any::<u8>(), 0..64),
        ]
    }

    /// Feeds `bytes` in steps of `step`; the number of requests before the end or an error.
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
