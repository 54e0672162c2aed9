//! A PC: memory, vCPUs, buses, PCI, interrupts, ACPI tables, legacy devices, the serial port, and booting.
//!
//! The crate does not depend on configuration syntax, HTTP or the control thread. Its owner passes in the parts, and
//! receives reports through [`signals`], [`threads`] and [`events`].

pub mod acpi;
pub mod assigned;
pub mod attempt_limit;
pub mod boot;
pub mod bus;
pub mod cpu;
pub mod events;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod interrupt;
pub mod legacy;
pub mod memory;
pub mod pc;
pub mod pci;
pub mod random;
mod regular_file;
pub mod serial;
pub mod signals;
pub mod threads;

pub use regular_file::open_regular_file;
