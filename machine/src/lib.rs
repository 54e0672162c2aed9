//! A PC: memory, vCPUs, buses, PCI, interrupts, ACPI tables, legacy devices, the serial port, and how it boots.
//!
//! It knows no configuration text, no HTTP and no control thread: who runs it tells it what it is made of, and hears of
//! it through [`signals`], [`threads`] and [`events`].

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod cpu;
pub mod events;
pub mod interrupt;
pub mod legacy;
pub mod memory;
pub mod pc;
pub mod pci;
pub mod serial;
pub mod signals;
pub mod threads;
pub mod token_bucket;
