//! The virtual machine monitor: from a configuration to a running guest and the API that steers it.

pub mod acpi;
pub mod api;
pub mod boot;
pub mod bus;
pub mod config;
pub mod control;
pub mod cpu;
pub mod event_monitor;
mod inherited_fd;
pub mod interrupt;
pub mod legacy;
pub mod memory;
pub mod pci;
pub mod seccomp;
pub mod serial;
pub mod signals;
pub mod thresholds;
pub mod vm;
