//! Worker threads: one per queue handler, created with the device, driven by commands.
//!
//! Threads are made before the guest runs because seccomp filters are inherited:
//! a thread born on a vCPU thread would carry that filter too.

use std::os::fd::RawFd;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::device::WorkerError;

/// Where a handler registers further descriptors to be woken by (readable,
/// level-triggered). All are dropped at reset.
#[derive(Debug)]
pub struct EventSources {
    epoll: Epoll,
    sources: Vec<(RawFd, u32)>,
}

impl EventSources {
    /// An empty set.
    ///
    /// # Errors
    /// `epoll_create1` failed.
    pub fn new() -> Result<Self, WorkerError> {
        let epoll = Epoll::new().map_err(|source| WorkerError::Host {
            what: "epoll_create1",
            source,
        })?;
        Ok(Self {
            epoll,
            sources: Vec::new(),
        })
    }

    /// Wakes the handler with `token` whenever `fd` is readable.
    ///
    /// # Errors
    /// `epoll_ctl` failed.
    pub fn add(&mut self, fd: RawFd, token: u32) -> Result<(), WorkerError> {
        self.epoll
            .ctl(
                ControlOperation::Add,
                fd,
                EpollEvent::new(EventSet::IN, u64::from(token)),
            )
            .map_err(|source| WorkerError::Host {
                what: "epoll_ctl(ADD)",
                source,
            })?;
        self.sources.push((fd, token));
        Ok(())
    }

    /// Stops watching `fd`; unknown descriptors are ignored.
    ///
    /// # Errors
    /// `epoll_ctl` failed.
    pub fn remove(&mut self, fd: RawFd) -> Result<(), WorkerError> {
        let Some(at) = self.sources.iter().position(|(known, _)| *known == fd) else {
            return Ok(());
        };
        self.sources.swap_remove(at);
        self.epoll
            .ctl(ControlOperation::Delete, fd, EpollEvent::default())
            .map_err(|source| WorkerError::Host {
                what: "epoll_ctl(DEL)",
                source,
            })
    }
}
