//! Decodes arbitrary bytes as guests, for ordinary tests and for a fuzzer.
//!
//! The bytes are decisions of a guest and of the host. A hypervisor that only records calls replaces KVM.

pub mod legacy;
pub mod pci;
mod plain_function;
