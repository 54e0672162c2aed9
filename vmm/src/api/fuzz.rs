//! Entry point of the fuzz target `http`, and of ordinary tests with random bytes.

use api::{Endpoint, ReclaimThresholdsChange, RestoreConfig, VmConfig};

use super::body;
use super::http::fuzz::requests;

/// Splits the bytes into requests, and parses each body as the endpoints with the largest structures do. Returns the
/// number of requests and of parsed bodies.
///
/// # Panics
/// The server keeps more data than its limits allow.
#[must_use]
pub fn run(bytes: &[u8]) -> (usize, usize) {
    let (choice, stream) = bytes.split_first().unwrap_or((&0, &[]));
    let bodies = requests(stream, usize::from(*choice) + 1);
    let read = bodies.iter().filter(|body| read(body)).count();
    (bodies.len(), read)
}

fn read(body: &[u8]) -> bool {
    let config = body::read::<VmConfig>(Endpoint::VmCreate, body);
    if let Ok(config) = &config {
        // The result does not matter: validation must only not panic.
        crate::config::validate(config).ok();
    }
    let restore = body::read::<RestoreConfig>(Endpoint::VmRestore, body);
    let change = body::read::<ReclaimThresholdsChange>(Endpoint::VmSetReclaimThresholds, body);
    config.is_ok() || restore.is_ok() || change.is_ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_in_pieces_are_found_and_their_bodies_read() {
        let body = r#"{"payload":{"kernel":"/k"}}"#;
        let request = format!(
            "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        for piece in [0, 6, 255] {
            let stream = [&[piece], request.as_bytes(), request.as_bytes()].concat();
            assert_eq!(run(&stream), (2, 2));
        }
    }

    proptest! {
        #[test]
        fn random_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _counts = run(&bytes);
        }

        #[test]
        fn random_bodies_are_read_or_refused(body in r#"[{}\[\]",:a-z0-9.-]{0,200}"#) {
            read(body.as_bytes());
        }
    }
}
