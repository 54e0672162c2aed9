//! A small synchronous client of the API.
//!
//! One connection per request, over the UNIX socket of the VMM. It talks to this VMM and to upstream's: it sends
//! what upstream's own client sends, and accepts a status line without a reason phrase, headers in any case, and
//! answers in any number of pieces. Nothing the other side does makes it wait longer than its timeout or hold more
//! than [`RESPONSE_BODY_BYTES_MAX`].

mod connect;
mod error;
mod exchange;
mod response;
#[cfg(test)]
mod tests;

pub use error::{ClientError, ServerError};
pub use response::{RESPONSE_BODY_BYTES_MAX, RESPONSE_HEAD_BYTES_MAX, ResponseError};

use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

use crate::{
    API_PREFIX, BalloonStatsResponse, Endpoint, Method, ReclaimStats, ReclaimThresholds,
    ReclaimThresholdsChange, VmConfig, VmCounters, VmInfo, VmResize, VmmPingResponse,
    to_ascii_json,
};
use exchange::Request;

/// How long a request may take unless the caller says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// Who listens at the other end of a connection, as the kernel noted it when the socket began to listen. For a listener
/// that was inherited that is whoever made it.
#[derive(Debug)]
pub struct Peer {
    /// Process id, in this process's pid namespace: what `vmm.ping` says of itself is its id in its own.
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// The process itself, which no later one of the same id can be mistaken for; absent before Linux 6.5. It may have
    /// ended: a listener can be inherited.
    pub process: Option<OwnedFd>,
    /// Whether the kernel says that it has ended and gives no descriptor. Its id may be another process's by now.
    pub has_ended: bool,
}

/// Which file a socket is. Its path may lead to another one at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketFile {
    /// The file system.
    pub device: u64,
    /// The file in it.
    pub inode: u64,
}

/// A client of one VMM.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    /// Which file the socket is, if not whatever its path leads to.
    file: Option<SocketFile>,
    timeout: Option<Duration>,
    /// Whom requests are for, if not for whoever listens.
    peer: Option<i32>,
}

impl Client {
    /// A client of the VMM that listens at `socket`. Nothing is opened before the first request.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            file: None,
            timeout: Some(DEFAULT_TIMEOUT),
            peer: None,
        }
    }

    /// Sets how long one request may take from connecting to the last byte of the answer; `None` waits for ever.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Option<Duration>) -> Self {
        self.timeout = timeout;
        self
    }

    /// The socket it talks to.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The same client for this file only: another one that stands at the path by then, or that a link leads to, is not
    /// connected to. Needs `/proc`.
    #[must_use]
    pub fn at_file(self, file: SocketFile) -> Self {
        Self {
            file: Some(file),
            ..self
        }
    }

    /// A client that sends requests to this process only: see [`Peer::pid`]. Another one that listens at the socket by
    /// now is sent nothing.
    #[must_use]
    pub fn to_peer(&self, pid: i32) -> Self {
        Self {
            peer: Some(pid),
            ..self.clone()
        }
    }

    /// `GET`s an endpoint by name and says who is at the other end of the connection that carried the answer.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn get_with_peer(&self, name: &str) -> Result<(Option<String>, Peer), ClientError> {
        self.exchange(Method::Get, name, None, &[])
    }

    /// Calls an endpoint of the table. Returns the body of the answer, if it has one.
    ///
    /// # Errors
    /// Every way in which no answer of success came back, see [`ClientError`].
    pub fn call(
        &self,
        endpoint: Endpoint,
        body: Option<&str>,
    ) -> Result<Option<String>, ClientError> {
        self.call_with_fds(endpoint, body, &[])
    }

    /// Calls an endpoint of the table and hands over descriptors beside the request.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn call_with_fds(
        &self,
        endpoint: Endpoint,
        body: Option<&str>,
        fds: &[RawFd],
    ) -> Result<Option<String>, ClientError> {
        self.request(endpoint.method(), endpoint.name(), body, fds)
    }

    /// `GET`s an endpoint by name, `vm.info`.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn get(&self, name: &str) -> Result<Option<String>, ClientError> {
        self.request(Method::Get, name, None, &[])
    }

    /// `PUT`s to an endpoint by name, `vm.resize`.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn put(&self, name: &str, body: Option<&str>) -> Result<Option<String>, ClientError> {
        self.request(Method::Put, name, body, &[])
    }

    /// `PUT`s to an endpoint by name and hands over descriptors beside the request.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn put_with_fds(
        &self,
        name: &str,
        body: Option<&str>,
        fds: &[RawFd],
    ) -> Result<Option<String>, ClientError> {
        self.request(Method::Put, name, body, fds)
    }

    /// Stores a configuration.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn create(&self, config: &VmConfig) -> Result<(), ClientError> {
        self.call(Endpoint::VmCreate, Some(&encode(config)?))
            .map(drop)
    }

    /// Changes vCPUs, RAM or balloon.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn resize(&self, resize: &VmResize) -> Result<(), ClientError> {
        self.call(Endpoint::VmResize, Some(&encode(resize)?))
            .map(drop)
    }

    /// Which VMM answers.
    ///
    /// # Errors
    /// As [`Client::call`], or an answer of another form.
    pub fn ping(&self) -> Result<VmmPingResponse, ClientError> {
        self.read(Endpoint::VmmPing)
    }

    /// The configuration and the state of the VM.
    ///
    /// # Errors
    /// As [`Client::call`], or an answer of another form.
    pub fn info(&self) -> Result<VmInfo, ClientError> {
        self.read(Endpoint::VmInfo)
    }

    /// Counters of the devices.
    ///
    /// # Errors
    /// As [`Client::call`], or an answer of another form.
    pub fn counters(&self) -> Result<VmCounters, ClientError> {
        self.read(Endpoint::VmCounters)
    }

    /// The guest's statistics of its memory.
    ///
    /// # Errors
    /// As [`Client::call`], or an answer of another form.
    pub fn balloon_stats(&self) -> Result<BalloonStatsResponse, ClientError> {
        self.read(Endpoint::VmBalloonStats)
    }

    /// How much memory came back to the host.
    ///
    /// # Errors
    /// As [`Client::call`], or an answer of another form.
    pub fn reclaim_stats(&self) -> Result<ReclaimStats, ClientError> {
        self.read(Endpoint::VmReclaimStats)
    }

    /// Changes these, all or nothing; returns what came of it.
    ///
    /// # Errors
    /// As [`Client::call`], or an answer of another form.
    pub fn set_reclaim_thresholds(
        &self,
        change: &ReclaimThresholdsChange,
    ) -> Result<ReclaimThresholds, ClientError> {
        self.read_after(Endpoint::VmSetReclaimThresholds, Some(&encode(change)?))
    }

    fn deadline(&self) -> Option<Deadline> {
        self.timeout.map(|timeout| Deadline {
            at: Instant::now() + timeout,
            timeout,
        })
    }

    fn read<T: DeserializeOwned>(&self, endpoint: Endpoint) -> Result<T, ClientError> {
        self.read_after(endpoint, None)
    }

    fn read_after<T: DeserializeOwned>(
        &self,
        endpoint: Endpoint,
        body: Option<&str>,
    ) -> Result<T, ClientError> {
        let body = self.call(endpoint, body)?.ok_or(ClientError::MissingBody {
            endpoint: endpoint.name(),
        })?;
        serde_json::from_str(&body).map_err(|source| ClientError::Decode {
            endpoint: endpoint.name(),
            source,
        })
    }

    fn request(
        &self,
        method: Method,
        name: &str,
        body: Option<&str>,
        fds: &[RawFd],
    ) -> Result<Option<String>, ClientError> {
        self.exchange(method, name, body, fds).map(|(body, _)| body)
    }

    fn exchange(
        &self,
        method: Method,
        name: &str,
        body: Option<&str>,
        fds: &[RawFd],
    ) -> Result<(Option<String>, Peer), ClientError> {
        let deadline = self.deadline();
        let stream = connect::connect(&self.socket, self.file, deadline)?;
        let peer = connect::peer(&stream).map_err(|source| ClientError::Connect {
            socket: self.socket.clone(),
            source,
        })?;
        if let Some(expected) = self.peer
            && peer.pid != expected
        {
            return Err(ClientError::OtherPeer {
                expected,
                found: peer.pid,
            });
        }
        let path = format!("{API_PREFIX}{name}");
        let response = exchange::exchange(
            &stream,
            &Request {
                method,
                path: &path,
                body,
                fds,
            },
            deadline,
        )?;
        if !response.is_success() {
            return Err(ClientError::Server(ServerError::new(
                response.status,
                &response.body,
            )));
        }
        Ok(((!response.body.is_empty()).then_some(response.body), peer))
    }
}

fn encode<T: serde::Serialize>(body: &T) -> Result<String, ClientError> {
    to_ascii_json(body).map_err(|source| ClientError::Encode { source })
}

/// When a request has to be over.
#[derive(Clone, Copy, Debug)]
struct Deadline {
    at: Instant,
    timeout: Duration,
}

impl Deadline {
    /// What is left, never zero: a socket takes a timeout of zero for none at all.
    fn remaining(self) -> Result<Duration, ClientError> {
        let left = self.at.saturating_duration_since(Instant::now());
        if left.is_zero() {
            Err(self.missed())
        } else {
            Ok(left)
        }
    }

    fn missed(self) -> ClientError {
        ClientError::TimedOut {
            timeout: self.timeout,
        }
    }
}
