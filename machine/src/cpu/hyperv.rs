//! The CPUID leaves of Hyper-V, for guests that support no other hypervisor (`kvm_hyperv=on`).
//!
//! Names and bits: Microsoft, Hypervisor Top-Level Functional Specification, chapter 2. KVM emulates each feature below
//! in the kernel. The guest's registers for these features are part of a vCPU's state.

use hypervisor::bindings::kvm_cpuid_entry2;

const VENDOR_AND_MAX: u32 = 0x4000_0000;
const INTERFACE: u32 = 0x4000_0001;
const VERSION: u32 = 0x4000_0002;
const FEATURES: u32 = 0x4000_0003;
const RECOMMENDATIONS: u32 = 0x4000_0004;
const LIMITS: u32 = 0x4000_0005;

/// Windows Server 2016, the oldest version with all features below; guests only show it.
const MAJOR_VERSION: u32 = 10;
const BUILD: u32 = 14_393;

/// Privileges of `FEATURES` EAX.
const REFERENCE_COUNTER: u32 = 1 << 1;
const SYNTHETIC_INTERRUPT_CONTROLLER: u32 = 1 << 2;
const SYNTHETIC_TIMERS: u32 = 1 << 3;
const APIC_REGISTERS: u32 = 1 << 4;
const HYPERCALL_REGISTERS: u32 = 1 << 5;
const VP_INDEX: u32 = 1 << 6;
const REFERENCE_TSC: u32 = 1 << 9;
const FREQUENCIES: u32 = 1 << 11;
/// `FEATURES` EDX: vCPUs can be added, and frequencies read.
const DYNAMIC_PARTITIONING: u32 = 1 << 3;
const FREQUENCIES_AVAILABLE: u32 = 1 << 8;

/// `RECOMMENDATIONS` EAX: the guest's watchdogs are patient, because a host may not run a vCPU for a while.
const RELAXED_TIMING: u32 = 1 << 5;
/// `RECOMMENDATIONS` EBX: a spinning vCPU sends no notification.
const SPIN_FOREVER: u32 = u32::MAX;

/// The leaves of a guest with at most `vcpus` vCPUs.
pub(super) fn leaves(vcpus: u32) -> [kvm_cpuid_entry2; 6] {
    let [ebx, ecx, edx] = [b"Micr", b"osof", b"t Hv"].map(|it| u32::from_le_bytes(*it));
    let features = REFERENCE_COUNTER
        | SYNTHETIC_INTERRUPT_CONTROLLER
        | SYNTHETIC_TIMERS
        | APIC_REGISTERS
        | HYPERCALL_REGISTERS
        | VP_INDEX
        | REFERENCE_TSC
        | FREQUENCIES;
    [
        (VENDOR_AND_MAX, [LIMITS, ebx, ecx, edx]),
        (INTERFACE, [u32::from_le_bytes(*b"Hv#1"), 0, 0, 0]),
        (VERSION, [BUILD, MAJOR_VERSION << 16, 0, 0]),
        (
            FEATURES,
            [features, 0, 0, DYNAMIC_PARTITIONING | FREQUENCIES_AVAILABLE],
        ),
        (RECOMMENDATIONS, [RELAXED_TIMING, SPIN_FOREVER, 0, 0]),
        (LIMITS, [vcpus, vcpus, 0, 0]),
    ]
    .map(|(function, [eax, ebx, ecx, edx])| kvm_cpuid_entry2 {
        function,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    })
}
