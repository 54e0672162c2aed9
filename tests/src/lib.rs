//! Shared code of tests that run whole machines. It has a VMM as a child process, its serial console, waits for
//! conditions, and a client that parses responses like upstream's.

pub mod adopters;
pub mod bare_metal;
pub mod chaos;
pub mod chart;
pub mod control_group;
pub mod descriptors;
pub mod ended;
pub mod fleet;
pub mod guest_at_work;
pub mod huge_pages;
mod idle;
pub mod linux;
pub mod literal_client;
pub mod mappings;
pub mod migration;
pub mod other_user;
pub mod outcome;
pub mod overhead;
pub mod paths;
pub mod qemu;
pub mod random;
pub mod serial;
pub mod shared;
pub mod two_hosts;
pub mod vmm;
pub mod wait;

/// A mebibyte, in bytes.
pub const MIB: u64 = 1 << 20;
