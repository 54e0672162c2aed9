//! A small synchronous client of the API.
//!
//! One connection per request, over the UNIX socket of the VMM. The client works with this VMM and with upstream's,
//! because it sends the same bytes as upstream's client. It accepts a status line without a reason phrase, headers in
//! any case, and responses in any number of pieces. Regardless of the server's behaviour, the client never waits longer
//! than its timeout and never stores more than [`RESPONSE_BODY_BYTES_MAX`].

mod connect;
mod deadline;
mod error;
mod exchange;
mod response;
#[cfg(test)]
mod tests;

pub use connect::{Peer, SocketInode};
pub use error::{ClientError, ServerError};
pub use response::{RESPONSE_BODY_BYTES_MAX, RESPONSE_HEAD_BYTES_MAX, ResponseError};

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::{
    API_PREFIX, BalloonStatsResponse, Endpoint, Method, ReclaimStats, ReclaimThresholds,
    ReclaimThresholdsChange, VmConfig, VmCounters, VmInfo, VmResize, VmmPingResponse,
    to_ascii_json,
};
use deadline::Deadline;
use exchange::Request;

/// Default time limit of a request.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// A client of one VMM.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    /// The required socket file; if `None`, any file at the path.
    file: Option<SocketInode>,
    timeout: Option<Duration>,
    /// The process that may receive requests; if `None`, any listener.
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

    /// Sets the time limit of a request, from connecting to the last byte of the response; `None` waits forever.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Option<Duration>) -> Self {
        self.timeout = timeout;
        self
    }

    /// The socket of the VMM.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Restricts the client to this file: it does not connect to another file that is at the path by then or that a
    /// link refers to. Needs `/proc`.
    #[must_use]
    pub fn at_file(self, file: SocketInode) -> Self {
        Self {
            file: Some(file),
            ..self
        }
    }

    /// A client that sends requests to this process only: see [`Peer::pid`]. If another process listens by now, nothing
    /// is sent.
    #[must_use]
    pub fn to_peer(&self, pid: i32) -> Self {
        Self {
            peer: Some(pid),
            ..self.clone()
        }
    }

    /// `GET`s an endpoint, and returns the peer of the connection together with the response.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn get_with_peer(&self, endpoint: Endpoint) -> Result<(Option<String>, Peer), ClientError> {
        self.exchange(Method::Get, endpoint.name(), None, &[])
    }

    /// Calls an endpoint of the table. Returns the body of the response, if it has one.
    ///
    /// # Errors
    /// The request failed, see [`ClientError`].
    pub fn call(
        &self,
        endpoint: Endpoint,
        body: Option<&str>,
    ) -> Result<Option<String>, ClientError> {
        self.call_with_fds(endpoint, body, &[])
    }

    /// Calls an endpoint of the table and passes descriptors with the request.
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

    /// `PUT`s to an endpoint by name and passes descriptors with the request.
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

    /// Name and version of the VMM.
    ///
    /// # Errors
    /// As [`Client::call`], or an unexpected response.
    pub fn ping(&self) -> Result<VmmPingResponse, ClientError> {
        self.read(Endpoint::VmmPing)
    }

    /// The configuration and the state of the VM.
    ///
    /// # Errors
    /// As [`Client::call`], or an unexpected response.
    pub fn info(&self) -> Result<VmInfo, ClientError> {
        self.read(Endpoint::VmInfo)
    }

    /// Counters of the devices.
    ///
    /// # Errors
    /// As [`Client::call`], or an unexpected response.
    pub fn counters(&self) -> Result<VmCounters, ClientError> {
        self.read(Endpoint::VmCounters)
    }

    /// The guest's statistics of its memory.
    ///
    /// # Errors
    /// As [`Client::call`], or an unexpected response.
    pub fn balloon_stats(&self) -> Result<BalloonStatsResponse, ClientError> {
        self.read(Endpoint::VmBalloonStats)
    }

    /// How much memory returned to the host.
    ///
    /// # Errors
    /// As [`Client::call`], or an unexpected response.
    pub fn reclaim_stats(&self) -> Result<ReclaimStats, ClientError> {
        self.read(Endpoint::VmReclaimStats)
    }

    /// Changes the thresholds atomically; returns their new status.
    ///
    /// # Errors
    /// As [`Client::call`], or an unexpected response.
    pub fn set_reclaim_thresholds(
        &self,
        change: &ReclaimThresholdsChange,
    ) -> Result<ReclaimThresholds, ClientError> {
        self.read_after(Endpoint::VmSetReclaimThresholds, Some(&encode(change)?))
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
        let deadline = self.timeout.map(Deadline::after);
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
