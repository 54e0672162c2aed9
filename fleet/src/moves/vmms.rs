//! What moves need from VMMs and the host, so that tests can replace both.

use std::path::{Path, PathBuf};

use crate::cluster::Needs;
use crate::host::ProcessIdentity;
use crate::model::Bytes;

use super::step::ReceiveOrder;

/// What listens at a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Nobody,
    /// It does not respond, or not intelligibly.
    Silent,
    /// A VMM without a VM.
    Empty(Option<ProcessIdentity>),
    Vm(SeenVm),
}

/// A VM at a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SeenVm {
    pub(crate) process: Option<ProcessIdentity>,
    pub(crate) is_paused: bool,
    /// Bytes sent so far, while the VM is being sent.
    pub(crate) sending: Option<Bytes>,
}

/// The result of a request to send a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    Accepted,
    Refused(String),
    Unknown,
}

/// A request to send a VM.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SendRequest<'a> {
    /// Where its target waits.
    pub(crate) url: &'a str,
    pub(crate) bytes_per_second_max: Option<Bytes>,
}

/// VMMs and the host.
pub(crate) trait Vmms {
    /// What listens at this socket.
    fn look(&mut self, socket: &Path) -> Seen;

    /// Whether a process is known to have ended.
    fn has_ended(&mut self, process: ProcessIdentity) -> bool;

    /// What this VM needs on each host.
    ///
    /// # Errors
    /// It cannot be moved, or its VMM does not tell.
    fn needs(&mut self, socket: &Path) -> Result<Needs, String>;

    /// What this host lacks.
    fn missing(&mut self, needs: &Needs) -> Option<String>;

    /// The socket at which this host's agent finds the VM of this name.
    ///
    /// # Errors
    /// No pattern of sockets allows the name.
    fn socket_of(&mut self, vm: &str) -> Result<PathBuf, String>;

    /// Starts a VMM without a VM.
    ///
    /// # Errors
    /// It cannot be started.
    fn start(&mut self, socket: &Path) -> Result<(), String>;

    /// Asks a VMM to receive a VM, at `url` or a new address. [`Vmms::received`] tells what becomes of it. A request in
    /// progress is cancelled first if the address is new.
    fn receive(&mut self, socket: &Path, url: Option<&str>);

    /// What became of the last request to receive a VM.
    fn received(&mut self, socket: &Path) -> ReceiveOrder;

    /// Asks a VMM to send its VM.
    fn send(&mut self, socket: &Path, process: ProcessIdentity, request: &SendRequest<'_>) -> Sent;

    /// Ends a VMM that has no VM.
    fn end(&mut self, socket: &Path);
}
