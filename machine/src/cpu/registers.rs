//! The initial state of a vCPU: registers of the boot protocol, MSRs, FPU, local interrupts.

use hypervisor::Vcpu;
use hypervisor::bindings::{kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment};

use crate::boot::{
    BOOT_GDT, BootProtocol, BootSegment, CODE_SEGMENT, DATA_SEGMENT, EntryPoint, TASK_SEGMENT,
};
use crate::memory::layout::{
    BOOT_GDT_START, BOOT_IDT_START, BOOT_STACK_POINTER, PVH_INFO_START, ZERO_PAGE_START,
};

/// Bit 1 of RFLAGS is always one.
const RFLAGS_RESERVED: u64 = 1 << 1;
/// Protected mode.
const CR0_PE: u64 = 1;

/// FPU control word after FINIT: all exceptions masked, double extended precision.
const FPU_CONTROL_WORD: u16 = 0x37f;
/// SSE control after reset: all exceptions masked.
const MXCSR: u32 = 0x1f80;

const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_SYSENTER_CS: u32 = 0x174;
const MSR_IA32_SYSENTER_ESP: u32 = 0x175;
const MSR_IA32_SYSENTER_EIP: u32 = 0x176;
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_CSTAR: u32 = 0xc000_0083;
const MSR_SYSCALL_MASK: u32 = 0xc000_0084;
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;

/// `rep movs` and `rep stos` may be fast.
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs on; memory is write-back unless a range specifies otherwise.
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Offsets of the local interrupt registers in the local APIC's page (Intel SDM volume 3, table 11-1).
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
/// Delivery modes, bits 8–10.
const DELIVERY_MODE_MASK: u32 = 7 << 8;
const DELIVERY_NMI: u32 = 4 << 8;
const DELIVERY_EXTINT: u32 = 7 << 8;

const MSRS: [(u32, u64); 11] = [
    (MSR_IA32_SYSENTER_CS, 0),
    (MSR_IA32_SYSENTER_ESP, 0),
    (MSR_IA32_SYSENTER_EIP, 0),
    (MSR_STAR, 0),
    (MSR_CSTAR, 0),
    (MSR_KERNEL_GS_BASE, 0),
    (MSR_SYSCALL_MASK, 0),
    (MSR_LSTAR, 0),
    (MSR_IA32_TSC, 0),
    (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    (MSR_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
];

/// The initial state of every vCPU. All except the boot vCPU then wait for their start-up interrupt, which KVM handles.
pub(super) fn set_common(vcpu: &Vcpu) -> hypervisor::Result<()> {
    let msrs = MSRS.map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    vcpu.set_msrs(&msrs)?;
    let mut lapic = vcpu.lapic()?;
    set_delivery_mode(&mut lapic, APIC_LVT_LINT0, DELIVERY_EXTINT);
    set_delivery_mode(&mut lapic, APIC_LVT_LINT1, DELIVERY_NMI);
    vcpu.set_lapic(&lapic)
}

/// Puts the boot vCPU at the entry point.
pub(super) fn set_entry(vcpu: &Vcpu, entry: EntryPoint) -> hypervisor::Result<()> {
    vcpu.set_regs(&entry_regs(entry))?;
    vcpu.set_fpu(&kvm_fpu {
        fcw: FPU_CONTROL_WORD,
        mxcsr: MXCSR,
        ..Default::default()
    })?;

    let mut sregs = vcpu.sregs()?;
    sregs.cr0 = CR0_PE;
    sregs.cr4 = 0;
    sregs.efer = 0;
    sregs.gdt.base = BOOT_GDT_START;
    sregs.gdt.limit = (size_of_val(&BOOT_GDT) - 1) as u16;
    sregs.idt.base = BOOT_IDT_START;
    sregs.idt.limit = (size_of::<u64>() - 1) as u16;
    sregs.cs = segment(&CODE_SEGMENT);
    let data = segment(&DATA_SEGMENT);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(&TASK_SEGMENT);
    vcpu.set_sregs(&sregs)
}

fn entry_regs(entry: EntryPoint) -> kvm_regs {
    let mut regs = kvm_regs {
        rflags: RFLAGS_RESERVED,
        rip: entry.address,
        rsp: BOOT_STACK_POINTER,
        ..Default::default()
    };
    match entry.protocol {
        BootProtocol::Pvh => regs.rbx = PVH_INFO_START,
        BootProtocol::Linux32 => regs.rsi = ZERO_PAGE_START,
    }
    regs
}

fn segment(segment: &BootSegment) -> kvm_segment {
    kvm_segment {
        base: u64::from(segment.base),
        limit: segment.limit_bytes(),
        selector: segment.selector,
        type_: segment.kind(),
        s: segment.bit(4),
        dpl: segment.bit(5) | segment.bit(6) << 1,
        present: segment.bit(7),
        avl: segment.bit(12),
        l: segment.bit(13),
        db: segment.bit(14),
        g: segment.bit(15),
        ..Default::default()
    }
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, offset: usize, mode: u32) {
    let bytes: [u8; 4] = std::array::from_fn(|at| lapic.regs[offset + at].cast_unsigned());
    let value = u32::from_le_bytes(bytes) & !DELIVERY_MODE_MASK | mode;
    for (at, byte) in value.to_le_bytes().into_iter().enumerate() {
        lapic.regs[offset + at] = byte.cast_signed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regs_point_to_what_the_protocol_says() {
        let entry = |protocol| EntryPoint {
            protocol,
            address: 0x100_0000,
        };
        let pvh = entry_regs(entry(BootProtocol::Pvh));
        assert_eq!((pvh.rip, pvh.rbx, pvh.rsi), (0x100_0000, 0x6000, 0));
        let linux = entry_regs(entry(BootProtocol::Linux32));
        assert_eq!((linux.rbx, linux.rsi), (0, 0x7000));
        assert_eq!((linux.rflags, linux.rbp, linux.rdi), (2, 0, 0));
    }

    #[test]
    fn segment_code_is_flat_32_bit() {
        let code = segment(&CODE_SEGMENT);
        assert_eq!((code.base, code.limit, code.selector), (0, u32::MAX, 0x10));
        assert_eq!((code.type_, code.s, code.present), (0xb, 1, 1));
        assert_eq!((code.l, code.db, code.g, code.dpl), (0, 1, 1, 0));
        let task = segment(&TASK_SEGMENT);
        assert_eq!((task.type_, task.s, task.limit), (0xb, 0, 0x67));
    }

    #[test]
    fn delivery_mode_changes_nothing_else() {
        let mut lapic = kvm_lapic_state::default();
        for (at, byte) in 0x0001_0030u32.to_le_bytes().into_iter().enumerate() {
            lapic.regs[APIC_LVT_LINT1 + at] = byte.cast_signed();
        }
        set_delivery_mode(&mut lapic, APIC_LVT_LINT1, DELIVERY_NMI);
        assert_eq!(lapic.regs[APIC_LVT_LINT1..][..4], [0x30, 4, 1, 0]);
    }
}
