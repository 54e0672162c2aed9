//! A thin typed layer over the system calls of KVM.
//!
//! ```text
//!   Kvm (/dev/kvm) ──create_vm──► Vm (slots, routes, event descriptors)
//!                                  └──create_vcpu──► Vcpu (registers, run)
//! ```
//!
//! Nothing here decides anything about a machine: which memory, which CPUID,
//! which routes is the caller's business. What this crate adds to
//! `kvm-ioctls` is one error type that names the failed operation, exits as an
//! enum that has only what an x86-64 VMM can meet, and a safe way to interrupt
//! a running vCPU ([`kick`]).

mod error;
mod exit;
mod irq;
pub mod kick;
mod kvm;
mod vcpu;
mod vcpu_state;
mod vm;
mod vm_state;

pub use error::{Error, Result};
pub use exit::{SystemEvent, VmExit};
pub use irq::{GsiRoute, IoAddress, MsiMessage};
pub use kvm::{Kvm, REQUIRED_CAPABILITIES};
pub use vcpu::Vcpu;
pub use vcpu_state::{
    CpuidState, DebugRegsState, EventsState, MsrState, RegsState, SegmentState, SregsState,
    TableState, VcpuState, XcrState,
};
pub use vm::{MemorySlot, Vm};
pub use vm_state::ClockState;

/// The KVM structures that appear in this crate's signatures.
pub use kvm_bindings as bindings;
