//! The virtual machine monitor: from a configuration to a running guest and the API that steers it.

pub mod acpi;
pub mod api;
pub mod boot;
pub mod bus;
pub mod config;
pub mod control;
pub mod cpu;
pub mod interrupt;
pub mod legacy;
pub mod memory;
pub mod pci;
pub mod serial;
pub mod vm;
