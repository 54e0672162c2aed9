//! A thin typed layer over the system calls of KVM.
//!
//! ```text
//!   Kvm (/dev/kvm) ──create_vm──► Vm (slots, routes, event descriptors)
//!                                  └──create_vcpu──► Vcpu (registers, run)
//! ```
//!
//! This crate makes no decisions about a machine: the caller chooses memory, CPUID and routes. It adds three things to
//! `kvm-ioctls`: an error type that names the failed operation, an enum of the exits of an x86-64 VMM, and a safe way
//! to interrupt a running vCPU ([`kick`]).

mod error;
mod exit;
mod fault_stats;
mod irq;
pub mod kick;
mod kvm;
mod vcpu;
mod vcpu_state;
mod vm;
mod vm_state;

pub use error::{Error, Result};
pub use exit::{SystemEvent, VmExit};
pub use fault_stats::{FaultCounts, FaultStats};
pub use irq::{GsiRoute, IoAddress, MsiMessage};
pub use kvm::{KVM_PATH, Kvm, REQUIRED_CAPABILITIES};
pub use vcpu::Vcpu;
pub use vcpu_state::{
    CpuidState, DebugRegsState, EventsState, HYPERV_MSRS, MsrState, RegsState, SegmentState,
    SregsState, TableState, VcpuState, XcrState,
};
pub use vm::{MemorySlot, Vm};
pub use vm_state::ClockState;

/// The KVM structures that appear in this crate's signatures.
pub use kvm_bindings as bindings;
