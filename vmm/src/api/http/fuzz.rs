//! Feeds a stream of arbitrary bytes to the framer, for `api::fuzz`.

use super::framing::{Framer, HEAD_BYTES_MAX, PAYLOAD_BYTES_MAX};

/// Returns the bodies of the requests in `stream`, which arrives in pieces of `piece_bytes` bytes.
///
/// # Panics
/// The framer keeps more data than its limits allow.
pub(in crate::api) fn requests(stream: &[u8], piece_bytes: usize) -> Vec<Vec<u8>> {
    let mut framer = Framer::default();
    let mut bodies = Vec::new();
    for piece in stream.chunks(piece_bytes) {
        framer.push(piece);
        loop {
            framer.take_continue_due();
            match framer.next() {
                Ok(Some(request)) => {
                    let body = request.body.map(|body| body.raw().to_vec());
                    bodies.push(body.unwrap_or_default());
                }
                Ok(None) => break,
                Err(_) => return bodies,
            }
        }
        assert!(framer.kept_bytes() <= HEAD_BYTES_MAX + PAYLOAD_BYTES_MAX + piece_bytes);
    }
    bodies
}
