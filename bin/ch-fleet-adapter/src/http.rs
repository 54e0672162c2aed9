//! Requests to the scheduler's service, each with a deadline, a size limit for the response, and the current token.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use thiserror::Error;
use ureq::http;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

/// Maximum size of a response. A node of a large cluster with all its images takes some 100 KiB.
const ANSWER_BYTES_MAX: u64 = 4 << 20;
/// Maximum number of characters shown of an error response.
const SHOWN_CHARS_MAX: usize = 300;

/// Reasons why a request failed.
#[derive(Debug, Error)]
pub(crate) enum HttpError {
    /// A required file cannot be read.
    #[error("Cannot read {}", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A file that contains no certificate.
    #[error("{} contains no certificate", path.display())]
    NoCertificate { path: PathBuf },
    /// No response.
    #[error("{method} {path}: no response")]
    Request {
        method: &'static str,
        path: String,
        #[source]
        source: Box<ureq::Error>,
    },
    /// A response that is not JSON.
    #[error("{method} {path}: the response is not JSON")]
    Form {
        method: &'static str,
        path: String,
        #[source]
        source: serde_json::Error,
    },
    /// An error response.
    #[error("{method} {path}: {status} {reason}")]
    Refused {
        method: &'static str,
        path: String,
        status: u16,
        reason: String,
        /// The requested delay before a retry, if the response has one.
        retry_after: Option<Duration>,
    },
    /// Every attempt conflicted with another client's change.
    #[error("{path} changed during each of {attempts} attempts")]
    Contended { path: String, attempts: u32 },
    /// A required object does not exist.
    #[error("{0}")]
    Missing(String),
}

impl HttpError {
    /// The delay that the service requested before a retry.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

/// A response.
#[derive(Debug)]
pub(crate) struct Answer {
    method: &'static str,
    path: String,
    pub(crate) status: u16,
    pub(crate) body: Value,
    retry_after: Option<Duration>,
}

impl Answer {
    pub(crate) fn is_good(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// The body, or the error if the response is one.
    pub(crate) fn good(self) -> Result<Value, HttpError> {
        if self.is_good() {
            return Ok(self.body);
        }
        // Kubernetes returns the reason in `message`, placement in `errors`.
        let reason = match (&self.body["message"], &self.body["errors"][0]["detail"]) {
            (Value::String(text), _) | (_, Value::String(text)) => text.clone(),
            _ => self.body.to_string(),
        };
        Err(HttpError::Refused {
            method: self.method,
            path: self.path,
            status: self.status,
            reason: reason.chars().take(SHOWN_CHARS_MAX).collect(),
            retry_after: self.retry_after,
        })
    }
}

/// Address and credentials of a service.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) url: String,
    pub(crate) token_file: Option<PathBuf>,
    pub(crate) ca_file: Option<PathBuf>,
    pub(crate) timeout: Duration,
}

/// The header that carries the token, and the token's prefix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TokenHeader(pub(crate) &'static str, pub(crate) &'static str);

/// A client of one service.
#[derive(Debug)]
pub(crate) struct Http {
    agent: ureq::Agent,
    url: String,
    token_file: Option<PathBuf>,
    token_header: TokenHeader,
}

impl Http {
    pub(crate) fn new(service: &Service, token_header: TokenHeader) -> Result<Self, HttpError> {
        let mut config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_idle_connections(0)
            .timeout_global(Some(service.timeout))
            .user_agent(concat!("ch-fleet-adapter/", env!("CARGO_PKG_VERSION")));
        if let Some(file) = &service.ca_file {
            let tls = TlsConfig::builder()
                .root_certs(RootCerts::Specific(Arc::new(certificates(file)?)))
                .unversioned_rustls_crypto_provider(Arc::new(
                    rustls::crypto::ring::default_provider(),
                ))
                .build();
            config = config.tls_config(tls);
        } else if service.url.starts_with("https:") {
            return Err(HttpError::Missing(format!(
                "{} is https: --ca-file must say whom to believe",
                service.url
            )));
        }
        Ok(Self {
            agent: ureq::Agent::new_with_config(config.build()),
            url: service.url.trim_end_matches('/').to_owned(),
            token_file: service.token_file.clone(),
            token_header,
        })
    }

    /// Sends one request. A body is sent as `content_type`.
    pub(crate) fn send(
        &self,
        method: &'static str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&Value>,
    ) -> Result<Answer, HttpError> {
        let mut request = http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url))
            .header("Accept", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(token) = self.token()? {
            let TokenHeader(name, before) = self.token_header;
            request = request.header(name, format!("{before}{token}"));
        }
        let failed = |source: ureq::Error| HttpError::Request {
            method,
            path: path.to_owned(),
            source: Box::new(source),
        };
        let answer = match body {
            Some(body) => {
                let request = request.body(body.to_string());
                self.agent
                    .run(request.map_err(|error| failed(error.into()))?)
            }
            None => {
                let request = request.body(());
                self.agent
                    .run(request.map_err(|error| failed(error.into()))?)
            }
        };
        read(method, path, answer.map_err(failed)?)
    }

    /// Read for each request, because tokens are replaced while the program runs.
    fn token(&self) -> Result<Option<String>, HttpError> {
        let Some(path) = &self.token_file else {
            return Ok(None);
        };
        match fs::read_to_string(path) {
            Ok(token) => Ok(Some(token.trim().to_owned())),
            Err(source) => Err(HttpError::File {
                path: path.clone(),
                source,
            }),
        }
    }
}

fn read(
    method: &'static str,
    path: &str,
    mut answer: http::Response<ureq::Body>,
) -> Result<Answer, HttpError> {
    let status = answer.status().as_u16();
    let retry_after = answer
        .headers()
        .get("Retry-After")
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .map(Duration::from_secs);
    let text = answer
        .body_mut()
        .with_config()
        .limit(ANSWER_BYTES_MAX)
        .read_to_string()
        .map_err(|source| HttpError::Request {
            method,
            path: path.to_owned(),
            source: Box::new(source),
        })?;
    let body = match serde_json::from_str(&text) {
        Ok(body) => body,
        // No content, or an error page of a proxy.
        Err(_) if text.is_empty() || !(200..300).contains(&status) => Value::String(text),
        Err(source) => {
            return Err(HttpError::Form {
                method,
                path: path.to_owned(),
                source,
            });
        }
    };
    Ok(Answer {
        method,
        path: path.to_owned(),
        status,
        body,
        retry_after,
    })
}

fn certificates(path: &Path) -> Result<Vec<Certificate<'static>>, HttpError> {
    let text = fs::read(path).map_err(|source| HttpError::File {
        path: path.to_owned(),
        source,
    })?;
    let found: Vec<_> = parse_pem(&text)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if found.is_empty() {
        return Err(HttpError::NoCertificate {
            path: path.to_owned(),
        });
    }
    Ok(found)
}
