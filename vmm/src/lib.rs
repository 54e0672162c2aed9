//! The virtual machine monitor: turns a configuration into a running guest and serves its API.

pub mod alerts;
pub mod api;
mod balloon_events;
pub mod config;
pub mod control;
mod device_ids;
pub mod event_monitor;
pub mod events;
mod figures_thread;
mod inherited_fd;
pub mod jail;
pub mod landlock;
pub mod migration;
pub mod own_memory;
pub mod reporting_policy;
pub mod seccomp;
pub mod signals;
pub mod snapshot;
pub mod threads;
pub mod thresholds;
pub mod view;
pub mod vm;

#[cfg(test)]
#[global_allocator]
static ALLOCATOR: test_alloc::Recording = test_alloc::Recording;

pub use virtio_devices::Unpoisoned;
