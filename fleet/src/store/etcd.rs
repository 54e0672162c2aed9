//! etcd 3.4 and later, over the JSON interface that every member serves on its client port.
//!
//! JSON over HTTP needs no generated code and no async runtime. It is fast enough, because a host queries its store
//! only a few times in ten seconds. Connections are not reused: if an idle connection had died, it would be unknown
//! whether a change was made. Reads try one member after another until one responds. A change is sent to the next
//! member only if it cannot have reached the previous one.

use std::io::{self, BufRead, BufReader, Read};
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde_json::Value;
use thiserror::Error;
use ureq::tls::TlsConfig;

use super::etcd_wire as wire;
use super::{Committed, LeaseId, Listing, Revision, Store, StoreError, Txn};
use crate::secret_file::{SECRET_BYTES_MAX, read_secret};

/// Number of keys per page; 512 keys of some KiB stay far below etcd's own limits.
const PAGE_KEYS: usize = 512;
/// Maximum length of a response. A page of values of etcd's maximum size would exceed it, but we never write such
/// values.
const ANSWER_BYTES_MAX: u64 = 64 << 20;
/// Time limit of an attempt with one member, if there is another member and time is left.
const ATTEMPT: Duration = Duration::from_millis(1000);
/// Minimum time for an attempt.
const ATTEMPT_MIN: Duration = Duration::from_millis(50);
/// Maximum length of a line in a stream of changes.
const LINE_BYTES_MAX: u64 = 16 << 20;

/// Maximum length that is read of an error response.
const FAILURE_BYTES_MAX: u64 = 4096;

/// Reasons why a string is not an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum EndpointError {
    /// A scheme other than HTTP or HTTPS.
    #[error("{0:?} must start with http:// or https://")]
    Scheme(String),
    /// There is no host.
    #[error("{0:?} has no host and port")]
    Host(String),
}

/// The client URL of a member: `http://host:port` or `https://host:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint(String);

impl Endpoint {
    /// Whether it uses TLS.
    pub fn has_tls(&self) -> bool {
        self.0.starts_with("https:")
    }

    /// Whether data sent to it is encrypted or stays on this machine.
    pub fn is_private(&self) -> bool {
        let place = self.0.trim_start_matches("http://");
        let host = place.rsplit_once(':').map_or(place, |(host, _)| host);
        let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
        self.has_tls() || host == "localhost" || address.is_ok_and(|address| address.is_loopback())
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (scheme, rest) = ["http://", "https://"]
            .into_iter()
            .find_map(|scheme| Some((scheme, text.strip_prefix(scheme)?)))
            .ok_or_else(|| EndpointError::Scheme(text.to_owned()))?;
        let place = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = place.rsplit_once(':').unwrap_or((place, ""));
        let odd = |c: char| c.is_whitespace() || c.is_control() || "/?#@".contains(c);
        if host.is_empty() || place.contains(odd) || port.parse::<u16>().is_err() {
            return Err(EndpointError::Host(text.to_owned()));
        }
        Ok(Self(format!("{scheme}{place}")))
    }
}

/// Credentials of an etcd user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Login {
    /// Name of the user.
    pub user: String,
    /// File with the password. It is read for every login, so that it can be changed.
    pub password_file: PathBuf,
}

/// A cluster of etcd members.
#[derive(Debug)]
pub struct EtcdStore {
    agent: ureq::Agent,
    endpoints: Vec<Endpoint>,
    login: Option<Login>,
    /// The token of the last login. Locked only to copy it.
    token: Mutex<Option<String>>,
    /// The member that is tried first; moves to the next one if it does not respond.
    first: AtomicUsize,
}

/// The result of one attempt with one member.
enum Attempt {
    /// The request has certainly not reached the member.
    NotSent(String),
    /// The request may have reached the member.
    NoAnswer(String),
    /// The member could not execute it now, or the result is unknown.
    Unable(String),
    /// The login has expired; nothing was done.
    LoginOver(String),
    /// The member responded with a final error.
    Final(StoreError),
}

impl EtcdStore {
    /// A store with these members. `member` is the index of the member that is tried first, modulo their number, so
    /// that clients with different values spread over all members.
    pub fn new(endpoints: Vec<Endpoint>, member: usize) -> Self {
        Self::with_access(endpoints, member, TlsConfig::default(), None)
    }

    /// The same with trusted CAs, a client certificate, and credentials.
    pub fn with_access(
        endpoints: Vec<Endpoint>,
        member: usize,
        tls: TlsConfig,
        login: Option<Login>,
    ) -> Self {
        let config = ureq::Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(0)
            .max_idle_connections(0)
            // Members are contacted directly, regardless of proxy settings in the environment.
            .proxy(None)
            .user_agent(concat!("ch-fleet/", env!("CARGO_PKG_VERSION")))
            .build();
        Self {
            agent: ureq::Agent::new_with_config(config),
            endpoints,
            login,
            token: Mutex::default(),
            first: AtomicUsize::new(member),
        }
    }

    /// Makes the next request start with another member. If several threads fail at the same time, the index still
    /// advances by only one.
    fn pass_over(&self, member: usize) {
        let next = member.wrapping_add(1);
        let order = Ordering::Relaxed;
        // Another thread has already done so.
        let _ = self.first.compare_exchange(member, next, order, order);
    }

    /// Sends a request to a member, with a login if configured. An expired login is renewed once.
    fn call(
        &self,
        endpoint: &Endpoint,
        path: &str,
        body: &Value,
        limit: Duration,
    ) -> Result<ureq::Body, Attempt> {
        let until = Instant::now() + limit;
        let left = || {
            until
                .saturating_duration_since(Instant::now())
                .max(ATTEMPT_MIN)
        };
        let Some(login) = &self.login else {
            return self.post(endpoint, path, body, None, left());
        };
        let known = self.token.lock().clone();
        if let Some(token) = &known {
            match self.post(endpoint, path, body, Some(token), left()) {
                Err(Attempt::LoginOver(_)) => {}
                answer => return answer,
            }
        }
        let token = self.log_in(endpoint, login, left())?;
        self.post(endpoint, path, body, Some(&token), left())
    }

    /// Requests a new token. If this fails, the request itself was not sent.
    fn log_in(
        &self,
        endpoint: &Endpoint,
        login: &Login,
        limit: Duration,
    ) -> Result<String, Attempt> {
        let refused = |why: String| Attempt::Final(StoreError::Refused { why });
        let password = read_secret(&login.password_file).map_err(|error| {
            refused(format!(
                "{} contains no password: {error}",
                login.password_file.display()
            ))
        })?;
        let request = wire::authenticate(&login.user, &password);
        let answer = self.post(endpoint, "/v3/auth/authenticate", &request, None, limit);
        let body = match answer {
            Ok(body) => body,
            Err(Attempt::NoAnswer(why) | Attempt::Unable(why)) => {
                return Err(Attempt::NotSent(why));
            }
            Err(other) => return Err(other),
        };
        let told = read_first_json::<wire::AuthAnswer>(body)
            .map_err(|error| Attempt::NotSent(format!("{}: {error}", endpoint.0)))?;
        // The token becomes part of a header.
        let good = |c: char| c.is_ascii_graphic();
        if told.token.is_empty()
            || told.token.len() as u64 > SECRET_BYTES_MAX
            || !told.token.chars().all(good)
        {
            return Err(refused("it gave no token for the password".to_owned()));
        }
        *self.token.lock() = Some(told.token.clone());
        Ok(told.token)
    }

    fn post(
        &self,
        endpoint: &Endpoint,
        path: &str,
        body: &Value,
        token: Option<&str>,
        limit: Duration,
    ) -> Result<ureq::Body, Attempt> {
        let mut request = self
            .agent
            .post(format!("{}{path}", endpoint.0))
            .config()
            .timeout_global(Some(limit))
            .build()
            .header("Content-Type", "application/json");
        if let Some(token) = token {
            request = request.header("Authorization", token);
        }
        let answer = request.send(body.to_string());
        let answer = answer.map_err(|error| attempt_of(endpoint, &error))?;
        let status = answer.status().as_u16();
        let body = answer.into_body();
        if status == 200 {
            return Ok(body);
        }
        let told = read_failure(body);
        Err(match told.code {
            wire::NOT_FOUND => Attempt::Final(StoreError::LeaseOver),
            code if token.is_some() && wire::is_login_over(code, &told.message) => {
                Attempt::LoginOver(told.message)
            }
            code if wire::NOT_DONE.contains(&code) => {
                Attempt::Final(StoreError::Refused { why: told.message })
            }
            _ => Attempt::Unable(format!("{}: {status} {}", endpoint.0, told.message)),
        })
    }

    /// Sends an administrator's request to the first member, for tests.
    #[cfg(test)]
    pub(super) fn administer(&self, path: &str, body: &Value) -> Result<(), String> {
        match self.call(&self.endpoints[0], path, body, Duration::from_secs(10)) {
            Ok(_) => Ok(()),
            Err(Attempt::Final(error)) => Err(error.to_string()),
            Err(
                Attempt::NotSent(why)
                | Attempt::NoAnswer(why)
                | Attempt::Unable(why)
                | Attempt::LoginOver(why),
            ) => Err(why),
        }
    }

    /// Sends a request to one member after another. `again` determines whether a request that may have arrived may be
    /// sent to another member.
    fn ask<T>(
        &self,
        (path, body): (&str, &Value),
        until: Instant,
        again: bool,
        read: impl Fn(ureq::Body) -> io::Result<T>,
    ) -> Result<T, StoreError> {
        let mut why = "no member is known".to_owned();
        let count = self.endpoints.len();
        for turn in 0.. {
            let left = until.saturating_duration_since(Instant::now());
            // Each member is tried at most twice, so that a call does not take too long.
            if turn >= 2 * count || (turn > 0 && left < ATTEMPT_MIN) {
                break;
            }
            let member = self.first.load(Ordering::Relaxed);
            let endpoint = &self.endpoints[member % count];
            let limit = if count > 1 { left.min(ATTEMPT) } else { left };
            let attempt = match self.call(endpoint, path, body, limit.max(ATTEMPT_MIN)) {
                Ok(body) => match read(body) {
                    Ok(answer) => return Ok(answer),
                    Err(error) if again && error.kind() == io::ErrorKind::InvalidData => {
                        Attempt::Final(StoreError::Form {
                            why: error.to_string(),
                        })
                    }
                    Err(error) => Attempt::NoAnswer(format!("{}: {error}", endpoint.0)),
                },
                Err(attempt) => attempt,
            };
            self.pass_over(member);
            match attempt {
                Attempt::NotSent(text) => why = text,
                // The new login has already expired.
                Attempt::LoginOver(why) => return Err(StoreError::Refused { why }),
                Attempt::NoAnswer(text) | Attempt::Unable(text) if again => why = text,
                Attempt::NoAnswer(why) | Attempt::Unable(why) => {
                    return Err(StoreError::Unknown { why });
                }
                Attempt::Final(error) => return Err(error),
            }
        }
        Err(StoreError::Unreachable { why })
    }
}

/// Classifies a failed request: whether it can have reached the member.
fn attempt_of(endpoint: &Endpoint, error: &ureq::Error) -> Attempt {
    let text = format!("{}: {error}", endpoint.0);
    let not_sent = match error {
        ureq::Error::Timeout(kind) => {
            matches!(kind, ureq::Timeout::Connect | ureq::Timeout::Resolve)
        }
        ureq::Error::HostNotFound | ureq::Error::ConnectionFailed | ureq::Error::BadUri(_) => true,
        ureq::Error::Io(error) => error.kind() == io::ErrorKind::ConnectionRefused,
        _ => false,
    };
    if not_sent {
        Attempt::NotSent(text)
    } else {
        Attempt::NoAnswer(text)
    }
}

/// The reason in an error response: JSON, or plain text if the JSON interface did not process the request.
fn read_failure(body: ureq::Body) -> wire::Failure {
    let mut text = Vec::new();
    // A partial body is better than none.
    let _ = body
        .into_reader()
        .take(FAILURE_BYTES_MAX)
        .read_to_end(&mut text);
    let mut values = serde_json::Deserializer::from_slice(&text).into_iter();
    match values.next() {
        Some(Ok(failure)) => failure,
        _ => wire::Failure {
            message: String::from_utf8_lossy(&text).trim().to_owned(),
            ..wire::Failure::default()
        },
    }
}

/// The first JSON value of a body. Streams have more values, and some members do not terminate theirs cleanly.
fn read_first_json<T: DeserializeOwned>(body: ureq::Body) -> io::Result<T> {
    let reader = BufReader::new(body.into_reader().take(ANSWER_BYTES_MAX));
    let mut values = serde_json::Deserializer::from_reader(reader).into_iter::<T>();
    match values.next() {
        Some(Ok(value)) => Ok(value),
        Some(Err(error)) => Err(error.into()),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

impl Store for EtcdStore {
    fn list(&self, prefix: &str, until: Instant) -> Result<Listing, StoreError> {
        let mut listing = Listing::default();
        loop {
            let last = listing.pairs.last().map(|pair| pair.key.as_str());
            // All pages use the revision of the first, so that the listing is consistent.
            let request = wire::range(prefix, last, listing.revision, PAGE_KEYS);
            let answer: wire::RangeAnswer =
                self.ask(("/v3/kv/range", &request), until, true, read_first_json)?;
            if listing.revision == Revision(0) {
                listing.revision = Revision(answer.header.revision);
            }
            for found in &answer.kvs {
                listing.pairs.push(wire::pair(found)?);
            }
            if !answer.more || answer.kvs.is_empty() {
                return Ok(listing);
            }
        }
    }

    fn commit(&self, txn: &Txn, until: Instant) -> Result<Committed, StoreError> {
        let request = wire::txn(txn);
        let answer: wire::TxnAnswer =
            self.ask(("/v3/kv/txn", &request), until, false, read_first_json)?;
        Ok(if answer.succeeded {
            Committed::Yes(Revision(answer.header.revision))
        } else {
            Committed::Conflict
        })
    }

    fn grant(&self, lasts: Duration, until: Instant) -> Result<LeaseId, StoreError> {
        let seconds = lasts.as_millis().div_ceil(1000).max(1);
        let request = wire::grant(u64::try_from(seconds).unwrap_or(u64::MAX));
        let answer: wire::LeaseAnswer =
            self.ask(("/v3/lease/grant", &request), until, true, read_first_json)?;
        wire::lease_of(answer.id).ok_or_else(|| StoreError::Form {
            why: "a lease without a number".to_owned(),
        })
    }

    fn keep_alive(&self, lease: LeaseId, until: Instant) -> Result<(), StoreError> {
        let request = wire::lease(lease);
        let answer: wire::Streamed<wire::LeaseAnswer> = self.ask(
            ("/v3/lease/keepalive", &request),
            until,
            true,
            read_first_json,
        )?;
        if answer.result.ttl == 0 {
            return Err(StoreError::LeaseOver);
        }
        Ok(())
    }

    fn revoke(&self, lease: LeaseId, until: Instant) -> Result<(), StoreError> {
        let request = wire::lease(lease);
        let ended = self.ask(
            ("/v3/lease/revoke", &request),
            until,
            true,
            read_first_json::<Value>,
        );
        match ended {
            Ok(_) | Err(StoreError::LeaseOver) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn await_change(
        &self,
        prefix: &str,
        after: Revision,
        until: Instant,
    ) -> Result<bool, StoreError> {
        let request = wire::watch(prefix, after);
        let member = self.first.load(Ordering::Relaxed);
        let Some(endpoint) = self.endpoints.get(member % self.endpoints.len().max(1)) else {
            return Err(StoreError::Unreachable {
                why: "no member is known".to_owned(),
            });
        };
        let left = until.saturating_duration_since(Instant::now());
        let body = match self.call(endpoint, "/v3/watch", &request, left.max(ATTEMPT_MIN)) {
            Ok(body) => body,
            // No stream began within the time, so no change is known.
            Err(_) if Instant::now() >= until => return Ok(false),
            Err(Attempt::Final(error)) => return Err(error),
            Err(Attempt::LoginOver(why)) => return Err(StoreError::Refused { why }),
            Err(Attempt::NotSent(why) | Attempt::NoAnswer(why) | Attempt::Unable(why)) => {
                self.pass_over(member);
                return Err(StoreError::Unreachable { why });
            }
        };
        let mut lines = BufReader::new(body.into_reader());
        loop {
            let mut line = Vec::new();
            match (&mut lines)
                .take(LINE_BYTES_MAX)
                .read_until(b'\n', &mut line)
            {
                Ok(1..) => {}
                _ if Instant::now() >= until => return Ok(false),
                Ok(_) => {
                    return Err(StoreError::Unreachable {
                        why: format!("{} ended the watch", endpoint.0),
                    });
                }
                Err(error) => {
                    return Err(StoreError::Unreachable {
                        why: format!("{}: {error}", endpoint.0),
                    });
                }
            }
            // A cancelled watch, usually because of a compaction, may have missed changes.
            let told: wire::Streamed<wire::WatchAnswer> =
                serde_json::from_slice(&line).unwrap_or_default();
            if told.result.canceled || !told.result.events.is_empty() {
                return Ok(true);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn endpoint_is_an_http_address() {
        for good in [
            "https://etcd:2379",
            "http://127.0.0.1:2379",
            "http://etcd-1:2379/",
            "http://[::1]:2379",
        ] {
            good.parse::<Endpoint>().unwrap();
        }
        for bad in [
            "ftp://etcd:2379",
            "https://etcd",
            "etcd:2379",
            "http://",
            "http://etcd",
            "http://u@etcd:2379",
            "http://etcd:2379/v3",
        ] {
            assert!(bad.parse::<Endpoint>().is_err(), "{bad}");
        }
    }

    #[test]
    fn password_goes_over_tls_or_stays_on_this_machine() {
        let private = |text: &str| text.parse::<Endpoint>().unwrap().is_private();
        for good in [
            "https://etcd:2379",
            "http://[::1]:2379",
            "http://127.0.0.2:1",
            "http://localhost:1",
        ] {
            assert!(private(good), "{good}");
        }
        for bad in [
            "http://etcd:2379",
            "http://10.0.0.1:2379",
            "http://localhost.example:2379",
        ] {
            assert!(!private(bad), "{bad}");
        }
    }

    #[test]
    fn member_that_refuses_connections_is_not_in_doubt() {
        // Bound but closed, so the kernel refuses connections.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let store = EtcdStore::new(vec![format!("http://{address}").parse().unwrap()], 0);
        let until = Instant::now() + Duration::from_secs(5);
        let error = store.commit(&Txn::default(), until).unwrap_err();
        assert!(matches!(error, StoreError::Unreachable { .. }), "{error:?}");
    }

    #[test]
    fn member_that_takes_a_change_and_says_nothing_is_in_doubt() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let store = EtcdStore::new(vec![format!("http://{address}").parse().unwrap()], 0);
        let until = Instant::now() + Duration::from_millis(300);
        let error = store.commit(&Txn::default(), until).unwrap_err();
        assert!(matches!(error, StoreError::Unknown { .. }), "{error:?}");
        // A failed read leaves no doubt about the state; it only has no response.
        let until = Instant::now() + Duration::from_millis(300);
        let error = store.list("/", until).unwrap_err();
        assert!(matches!(error, StoreError::Unreachable { .. }), "{error:?}");
    }
}
