//! Errors of the client's requests.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use super::response::ResponseError;

/// Maximum number of characters shown of an error body that is not in the API's format.
const FOREIGN_BODY_CHARS_MAX: usize = 512;
/// Maximum number of links copied from a server's chain of causes.
const CHAIN_LINKS_MAX: usize = 32;

/// Reasons why a request failed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The socket does not exist.
    #[error("There is no API socket at {}", socket.display())]
    NoSocket {
        /// Its path.
        socket: PathBuf,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// The socket exists, but no VMM listens on it.
    #[error("No VMM listens on the API socket {}", socket.display())]
    Refused {
        /// Its path.
        socket: PathBuf,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// Connecting failed for another reason.
    #[error("Cannot connect to the API socket {}", socket.display())]
    Connect {
        /// Its path.
        socket: PathBuf,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// A process other than the intended one listens. Nothing was sent.
    #[error("The request is for process {expected}, but process {found} listens on the socket")]
    OtherPeer {
        /// The intended process.
        expected: i32,
        /// The process that listens.
        found: i32,
    },
    /// No complete response in time.
    #[error("The VMM did not respond within {} ms", timeout.as_millis())]
    TimedOut {
        /// The time limit.
        timeout: Duration,
    },
    /// The request could not be sent.
    #[error("Cannot send the request")]
    Send {
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// The response could not be read.
    #[error("Cannot read the response")]
    Receive {
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// The received bytes are not a response.
    #[error("The response cannot be parsed")]
    Response(#[source] ResponseError),
    /// The request cannot be serialized to JSON.
    #[error("The request cannot be written as JSON")]
    Encode {
        /// The serializer's error.
        #[source]
        source: serde_json::Error,
    },
    /// A success response without the expected body.
    #[error("The response to {endpoint} has no body")]
    MissingBody {
        /// The endpoint.
        endpoint: &'static str,
    },
    /// An unexpected body.
    #[error("Unexpected response to {endpoint}")]
    Decode {
        /// The endpoint.
        endpoint: &'static str,
        /// The parser's error.
        #[source]
        source: serde_json::Error,
    },
    /// The server responded with an error.
    #[error(transparent)]
    Server(#[from] ServerError),
}

/// An error response from the server. Its sources are the links of the server's chain of causes.
#[derive(Debug, Error)]
#[error("Server responded with {}", status_name(*status))]
pub struct ServerError {
    /// The HTTP status.
    pub status: u16,
    #[source]
    cause: Option<Box<Cause>>,
}

/// One link of the server's chain.
#[derive(Debug, Error)]
#[error("{text}")]
struct Cause {
    text: String,
    source: Option<Box<Cause>>,
}

impl ServerError {
    /// Reads the chain in `body`: an array of strings, or upstream's `{"error": text}` for malformed HTTP, or any other
    /// text unchanged.
    pub(super) fn new(status: u16, body: &str) -> Self {
        let texts = read_chain(body);
        let cause = texts
            .into_iter()
            .rev()
            .fold(None, |source, text| Some(Box::new(Cause { text, source })));
        Self { status, cause }
    }

    /// The server's chain of causes, outermost first.
    pub fn chain(&self) -> impl Iterator<Item = &str> {
        std::iter::successors(self.cause.as_deref(), |cause| cause.source.as_deref())
            .map(|cause| cause.text.as_str())
    }
}

fn read_chain(body: &str) -> Vec<String> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Body {
        Chain(Vec<String>),
        Object { error: String },
    }
    match serde_json::from_str(body) {
        Ok(Body::Chain(mut texts)) => {
            texts.truncate(CHAIN_LINKS_MAX);
            texts
        }
        Ok(Body::Object { error }) => vec![error],
        Err(_) if body.trim().is_empty() => Vec::new(),
        Err(_) => vec![body.trim().chars().take(FOREIGN_BODY_CHARS_MAX).collect()],
    }
}

/// The name of a status, in the spelling of upstream's client if it has one.
fn status_name(status: u16) -> String {
    let name = match status {
        400 => "BadRequest",
        401 => "Unauthorized",
        404 => "NotFound",
        405 => "MethodNotAllowed",
        409 => "Conflict",
        413 => "PayloadTooLarge",
        429 => "TooManyRequests",
        500 => "InternalServerError",
        501 => "NotImplemented",
        503 => "ServiceUnavailable",
        _ => return format!("Unknown ({status})"),
    };
    name.to_owned()
}
