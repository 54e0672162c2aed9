//! The virtual machine monitor: from a configuration to a running guest and the API that steers it.

use ::machine::{acpi, boot, bus, cpu, interrupt, legacy, memory, pci, serial};

pub mod api;
pub mod config;
pub mod control;
pub mod event_monitor;
mod inherited_fd;
pub mod seccomp;
pub mod signals;
pub mod thresholds;
pub mod vm;
