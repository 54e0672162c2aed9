//! Every way in which a request can fail.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use super::response::ResponseError;

/// Most characters shown of an error body that is not in the form the API has.
const FOREIGN_BODY_CHARS_MAX: usize = 512;
/// Most links taken over from a server's chain of causes.
const CHAIN_LINKS_MAX: usize = 32;

/// Why a request did not succeed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The socket does not exist.
    #[error("There is no API socket at {}", socket.display())]
    NoSocket {
        /// Its path.
        socket: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The socket exists and no VMM listens on it.
    #[error("No VMM listens on the API socket {}", socket.display())]
    Refused {
        /// Its path.
        socket: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Connecting failed otherwise.
    #[error("Cannot connect to the API socket {}", socket.display())]
    Connect {
        /// Its path.
        socket: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Somebody else listens than the request is for. Nothing was sent.
    #[error("The request is for process {expected}, and process {found} listens")]
    OtherPeer {
        /// Whom it is for.
        expected: i32,
        /// Who listens.
        found: i32,
    },
    /// No complete answer in time.
    #[error("The VMM did not respond within {} ms", timeout.as_millis())]
    TimedOut {
        /// The time it had.
        timeout: Duration,
    },
    /// The request could not be sent.
    #[error("Cannot send the request")]
    Send {
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The answer could not be read.
    #[error("Cannot read the response")]
    Receive {
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// What came back is not an answer.
    #[error("The response cannot be parsed")]
    Response(#[source] ResponseError),
    /// The request has no JSON form.
    #[error("The request cannot be written as JSON")]
    Encode {
        /// What the serializer said.
        #[source]
        source: serde_json::Error,
    },
    /// Success without the body that belongs to it.
    #[error("The response to {endpoint} has no body")]
    MissingBody {
        /// The endpoint.
        endpoint: &'static str,
    },
    /// A body of another form.
    #[error("Unexpected response to {endpoint}")]
    Decode {
        /// The endpoint.
        endpoint: &'static str,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
    /// The server answered with an error.
    #[error(transparent)]
    Server(#[from] ServerError),
}

/// An error the server answered with. Its sources are the links of the server's chain of causes.
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
    /// Takes over the chain in `body`: an array of texts, or upstream's `{"error": text}` for malformed HTTP, or any
    /// other text as it stands.
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

/// The name of a status, as upstream's client spells those it knows.
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
