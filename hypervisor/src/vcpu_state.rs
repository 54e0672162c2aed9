//! The saved state of a vCPU: read from KVM and written to another vCPU.
//!
//! Registers have names. A layout that only the processor or KVM defines (XSAVE area, local APIC page, nested state) is
//! a block of bytes. KVM checks every value it receives.
#![allow(unsafe_code)]
// UNSAFETY: KVM copies as many bytes of an XSAVE area as the features of the process require, and the nested state is a
// union that is copied as bytes.

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, Msrs, Xsave, kvm_cpuid_entry2,
    kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment,
    kvm_sregs, kvm_vcpu_events, kvm_vcpu_events__bindgen_ty_1, kvm_vcpu_events__bindgen_ty_2,
    kvm_vcpu_events__bindgen_ty_3, kvm_vcpu_events__bindgen_ty_4, kvm_vcpu_events__bindgen_ty_5,
    kvm_xcr, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize};
use state::{Bytes, Part, State, StateError, parts, require};

use crate::error::{Error, Result, ioctl};
use crate::vcpu::Vcpu;

const PART: Part = parts::VCPU;

/// `sizeof(struct kvm_xsave)` without its tail, which only AMX needs.
const XSAVE_BYTES: usize = size_of::<kvm_xsave>();
/// `KVM_APIC_REG_SIZE`.
const LAPIC_BYTES: usize = 1024;
/// Far more than the length of any of KVM's lists.
const MSRS_MAX: usize = 4096;

/// Offset of the timer's register in the local APIC page, its mask bit and its mode field (Intel SDM volume 3, figure
/// 11-8).
const APIC_LVT_TIMER: usize = 0x320;
const LVT_MASKED: u32 = 1 << 16;
const LVT_TIMER_MODE: u32 = 3 << 17;
const LVT_TIMER_TSC_DEADLINE: u32 = 2 << 17;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Memory type range registers. KVM emulates them but does not list them: 8 variable pairs, 11 fixed registers, default
/// type.
const MTRRS: [u32; 28] = [
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20a, 0x20b, 0x20c,
    0x20d, 0x20e, 0x20f, 0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e,
    0x26f, 0x2ff,
];

/// Registers of Hyper-V's interrupt controller and timers, in the order to set them. KVM does not list them; they belong
/// to a vCPU with [`Vcpu::enable_hyperv_synic`]: pages for events and messages, 16 interrupt sources, 4 timers.
pub const HYPERV_MSRS: [u32; 25] = [
    0x4000_0082,
    0x4000_0083,
    0x4000_0090,
    0x4000_0091,
    0x4000_0092,
    0x4000_0093,
    0x4000_0094,
    0x4000_0095,
    0x4000_0096,
    0x4000_0097,
    0x4000_0098,
    0x4000_0099,
    0x4000_009a,
    0x4000_009b,
    0x4000_009c,
    0x4000_009d,
    0x4000_009e,
    0x4000_009f,
    0x4000_00b1,
    0x4000_00b2,
    0x4000_00b3,
    0x4000_00b4,
    0x4000_00b5,
    0x4000_00b6,
    0x4000_00b7,
];

/// Defines a structure with the fields of a KVM structure and conversions in both directions.
macro_rules! mirror {
    ($(#[$doc:meta])* $name:ident of $kvm:ty { $($field:ident: $type:ty),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        #[allow(missing_docs)]
        pub struct $name {
            $(pub $field: $type,)+
        }

        impl From<$kvm> for $name {
            #[allow(clippy::useless_conversion)]
            fn from(kvm: $kvm) -> Self {
                Self { $($field: kvm.$field.into(),)+ }
            }
        }

        impl From<$name> for $kvm {
            #[allow(clippy::useless_conversion, clippy::needless_update)]
            fn from(state: $name) -> Self {
                Self { $($field: state.$field.into(),)+ ..Default::default() }
            }
        }
    };
}

mirror! {
    /// General registers.
    RegsState of kvm_regs {
        rax: u64, rbx: u64, rcx: u64, rdx: u64, rsi: u64, rdi: u64, rsp: u64, rbp: u64,
        r8: u64, r9: u64, r10: u64, r11: u64, r12: u64, r13: u64, r14: u64, r15: u64,
        rip: u64, rflags: u64,
    }
}
mirror! {
    /// A segment register with its hidden part.
    SegmentState of kvm_segment {
        base: u64, limit: u32, selector: u16, type_: u8, present: u8, dpl: u8, db: u8, s: u8,
        l: u8, g: u8, avl: u8, unusable: u8,
    }
}
mirror! {
    /// A descriptor table register.
    TableState of kvm_dtable { base: u64, limit: u16 }
}
mirror! {
    /// Segments, control registers, descriptor tables.
    SregsState of kvm_sregs {
        cs: SegmentState, ds: SegmentState, es: SegmentState, fs: SegmentState, gs: SegmentState,
        ss: SegmentState, tr: SegmentState, ldt: SegmentState, gdt: TableState, idt: TableState,
        cr0: u64, cr2: u64, cr3: u64, cr4: u64, cr8: u64, efer: u64, apic_base: u64,
        interrupt_bitmap: [u64; 4],
    }
}
mirror! {
    /// An extended control register.
    XcrState of kvm_xcr { xcr: u32, value: u64 }
}
mirror! {
    /// Debug registers.
    DebugRegsState of kvm_debugregs { db: [u64; 4], dr6: u64, dr7: u64, flags: u64 }
}
mirror! {
    /// A model specific register.
    MsrState of kvm_msr_entry { index: u32, data: u64 }
}
mirror! {
    /// One leaf of the CPUID the guest sees.
    CpuidState of kvm_cpuid_entry2 {
        function: u32, index: u32, flags: u32, eax: u32, ebx: u32, ecx: u32, edx: u32,
    }
}
mirror! {
    /// A pending exception.
    ExceptionState of kvm_vcpu_events__bindgen_ty_1 {
        injected: u8, nr: u8, has_error_code: u8, pending: u8, error_code: u32,
    }
}
mirror! {
    /// A pending interrupt, and the interrupt shadow.
    InterruptState of kvm_vcpu_events__bindgen_ty_2 { injected: u8, nr: u8, soft: u8, shadow: u8 }
}
mirror! {
    /// Non-maskable interrupts.
    NmiState of kvm_vcpu_events__bindgen_ty_3 { injected: u8, pending: u8, masked: u8 }
}
mirror! {
    /// System management mode.
    SmiState of kvm_vcpu_events__bindgen_ty_4 {
        smm: u8, pending: u8, smm_inside_nmi: u8, latched_init: u8,
    }
}
mirror! {
    /// A pending triple fault.
    TripleFaultState of kvm_vcpu_events__bindgen_ty_5 { pending: u8 }
}
mirror! {
    /// Events between two instructions.
    EventsState of kvm_vcpu_events {
        exception: ExceptionState, interrupt: InterruptState, nmi: NmiState, sipi_vector: u32,
        flags: u32, smi: SmiState, triple_fault: TripleFaultState, exception_has_payload: u8,
        exception_payload: u64,
    }
}

/// A vCPU that is not running.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// The CPUID the guest sees.
    pub cpuid: Vec<CpuidState>,
    /// Frequency of the time stamp counter; absent if the host does not report it.
    pub tsc_khz: Option<u32>,
    /// `KVM_MP_STATE_*`: running, halted, waiting for its start-up interrupt.
    pub mp_state: u32,
    /// General registers.
    pub regs: RegsState,
    /// Segments, control registers, descriptor tables.
    pub sregs: SregsState,
    /// XSAVE area: FPU, SSE, AVX.
    pub xsave: Bytes,
    /// Extended control registers.
    pub xcrs: Vec<XcrState>,
    /// Debug registers.
    pub debug_regs: DebugRegsState,
    /// The local APIC's page.
    pub lapic: Bytes,
    /// Every model specific register that KVM can save.
    pub msrs: Vec<MsrState>,
    /// Events between two instructions.
    pub events: EventsState,
    /// State of nested virtualization; absent if the guest does not use it.
    pub nested: Option<Bytes>,
}

impl State for VcpuState {
    const PART: Part = PART;
}

impl VcpuState {
    /// Replaces the time stamp counter by a later value.
    pub fn set_tsc(&mut self, tsc: u64) {
        for msr in self.msrs.iter_mut().filter(|msr| msr.index == MSR_TSC) {
            msr.data = tsc;
        }
    }

    /// Moves the time stamp counter by the ticks of `ns` nanoseconds, if its frequency is known.
    pub fn move_tsc(&mut self, ns: i64) {
        let ticks = self.ticks(ns);
        for msr in self.msrs.iter_mut().filter(|msr| msr.index == MSR_TSC) {
            msr.data = msr.data.wrapping_add(ticks);
        }
    }

    /// The nanoseconds from the saved time stamp counter to `tsc`. `None` if the counter or its frequency is unknown.
    #[must_use]
    pub fn ns_until(&self, tsc: u64) -> Option<i64> {
        let khz = i128::from(self.tsc_khz.filter(|khz| *khz > 0)?);
        let saved = self.msrs.iter().find(|msr| msr.index == MSR_TSC)?;
        let ticks = i128::from(tsc.wrapping_sub(saved.data).cast_signed());
        i64::try_from(ticks * 1_000_000 / khz).ok()
    }

    /// Modulo 2^64, as the counter itself; 0 if its frequency is unknown.
    fn ticks(&self, ns: i64) -> u64 {
        let khz = i128::from(self.tsc_khz.unwrap_or(0));
        (i128::from(ns) * khz / 1_000_000) as u64
    }
}

impl Vcpu {
    /// The guest-visible state of this vCPU, which must not run during the call. `msr_indices` come from
    /// [`crate::Kvm::msr_indices`].
    ///
    /// # Errors
    /// KVM refused to return a part.
    pub fn state(&self, msr_indices: &[u32]) -> Result<VcpuState> {
        // First: KVM then processes pending start-up interrupts, which change all other state.
        let mp_state = self.mp_state()?.mp_state;
        let regs = self.regs()?.into();
        let sregs = self.sregs()?.into();
        let fd = self.fd();
        let xsave = self.xsave()?;
        let xcrs = fd.get_xcrs().map_err(ioctl("KVM_GET_XCRS"))?;
        let xcr_count = (xcrs.nr_xcrs as usize).min(xcrs.xcrs.len());
        let debug_regs = fd.get_debug_regs().map_err(ioctl("KVM_GET_DEBUGREGS"))?;
        let lapic = self.lapic()?;
        let mut msrs = self.readable_msrs(msr_indices)?;
        keep_expired_timer(&lapic, &mut msrs);
        let events = fd.get_vcpu_events().map_err(ioctl("KVM_GET_VCPU_EVENTS"))?;
        let cpuid = self.cpuid()?;
        Ok(VcpuState {
            cpuid: cpuid.as_slice().iter().copied().map(Into::into).collect(),
            tsc_khz: self.tsc_khz().ok(),
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs: xcrs.xcrs[..xcr_count]
                .iter()
                .copied()
                .map(Into::into)
                .collect(),
            debug_regs: debug_regs.into(),
            lapic: Bytes(lapic.regs.iter().map(|byte| byte.cast_unsigned()).collect()),
            msrs,
            events: events.into(),
            nested: self.nested_state(),
        })
    }

    /// Gives this vCPU, which has not run yet, the saved `state`.
    ///
    /// # Errors
    /// A field has a value that no vCPU can have, or KVM refuses one. The vCPU must not run then.
    pub fn restore(&self, state: &VcpuState) -> std::result::Result<(), StateError> {
        self.restore_after(state, &|| 0)
    }

    /// The same some nanoseconds after the state was saved, which `passed_ns` returns. Its time stamp counter has counted
    /// on since. The rest of this takes longer than a guest tolerates as a difference between its clocks, so the time is
    /// asked for immediately before the counter is written.
    ///
    /// # Errors
    /// As for [`Vcpu::restore`].
    pub fn restore_after(
        &self,
        state: &VcpuState,
        passed_ns: &dyn Fn() -> i64,
    ) -> std::result::Result<(), StateError> {
        let converted = Converted::of(state, self.xsave_bytes())?;
        self.restore_converted(state, &converted, passed_ns)
            .map_err(|error| StateError::host(PART, error))
    }

    /// The time stamp counter.
    ///
    /// # Errors
    /// `KVM_GET_MSRS` failed.
    pub fn tsc(&self) -> Result<u64> {
        let found = self.msrs(&[MSR_TSC])?;
        Ok(found.first().map_or(0, |msr| msr.data))
    }

    /// Sets the time stamp counter, if the state has one. The timer's deadline, which comes later, depends on it.
    fn restore_tsc(&self, state: &VcpuState, passed_ns: &dyn Fn() -> i64) -> Result<()> {
        let is_tsc = |msr: &&MsrState| msr.index == MSR_TSC;
        let Some(saved) = state.msrs.iter().find(is_tsc).copied() else {
            return Ok(());
        };
        self.restore_msrs(&[MsrState {
            data: saved.data.wrapping_add(state.ticks(passed_ns())),
            ..saved
        }])
    }

    /// Restores in the order KVM needs: CPUID first because it decides which registers exist, the time stamp counter after
    /// its rate, the APIC's base with the system registers, the timer's deadline after the APIC page, and events last.
    fn restore_converted(
        &self,
        state: &VcpuState,
        converted: &Converted,
        passed_ns: &dyn Fn() -> i64,
    ) -> Result<()> {
        let fd = self.fd();
        self.set_cpuid(&converted.cpuid)?;
        if let Some(khz) = state.tsc_khz
            && self.tsc_khz().ok() != Some(khz)
        {
            fd.set_tsc_khz(khz).map_err(ioctl("KVM_SET_TSC_KHZ"))?;
        }
        self.restore_tsc(state, passed_ns)?;
        self.set_mp_state(kvm_mp_state {
            mp_state: state.mp_state,
        })?;
        self.set_regs(&state.regs.into())?;
        self.set_sregs(&state.sregs.into())?;
        // SAFETY: `Converted::of` made the area as large as KVM said when this vCPU was created.
        unsafe { fd.set_xsave2(&converted.xsave) }.map_err(ioctl("KVM_SET_XSAVE"))?;
        fd.set_xcrs(&converted.xcrs)
            .map_err(ioctl("KVM_SET_XCRS"))?;
        fd.set_debug_regs(&state.debug_regs.into())
            .map_err(ioctl("KVM_SET_DEBUGREGS"))?;
        self.set_lapic(&converted.lapic)?;
        let others = state.msrs.iter().filter(|msr| msr.index != MSR_TSC);
        self.restore_msrs(&others.copied().collect::<Vec<_>>())?;
        if let Some(nested) = &converted.nested {
            fd.set_nested_state(nested)
                .map_err(ioctl("KVM_SET_NESTED_STATE"))?;
        }
        fd.set_vcpu_events(&state.events.into())
            .map_err(ioctl("KVM_SET_VCPU_EVENTS"))
    }

    /// The XSAVE area without the zeros at its end, so that a host with fewer features can continue a guest that did not
    /// use the others.
    fn xsave(&self) -> Result<Bytes> {
        let fd = self.fd();
        let mut area = xsave_area(self.xsave_bytes());
        if area.as_slice().is_empty() {
            let plain = fd.get_xsave().map_err(ioctl("KVM_GET_XSAVE"))?;
            // SAFETY: the length stays as it is.
            unsafe { area.as_mut_fam_struct() }.xsave = plain;
        } else {
            // SAFETY: the area is as large as KVM said when this vCPU was created.
            unsafe { fd.get_xsave2(&mut area) }.map_err(ioctl("KVM_GET_XSAVE2"))?;
        }
        let used = area.as_slice().iter().rposition(|&dword| dword != 0);
        let tail = &area.as_slice()[..used.map_or(0, |last| last + 1)];
        let dwords = area.as_fam_struct_ref().xsave.region.iter().chain(tail);
        Ok(Bytes(
            dwords.flat_map(|dword| dword.to_le_bytes()).collect(),
        ))
    }

    /// Registers to read: KVM's list without those that this guest's CPUID does not have.
    fn readable_msrs(&self, indices: &[u32]) -> Result<Vec<MsrState>> {
        let mut found = Vec::with_capacity(indices.len());
        let mut rest = indices;
        while !rest.is_empty() {
            let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
            let entries: Vec<kvm_msr_entry> = batch
                .iter()
                .map(|&index| MsrState { index, data: 0 }.into())
                .collect();
            let mut msrs = Msrs::from_entries(&entries).expect("at most KVM_MAX_MSR_ENTRIES");
            let done = self
                .fd()
                .get_msrs(&mut msrs)
                .map_err(ioctl("KVM_GET_MSRS"))?;
            found.extend(msrs.as_slice()[..done].iter().copied().map(MsrState::from));
            let skipped = usize::from(done < batch.len());
            rest = &rest[done + skipped..];
        }
        Ok(found)
    }

    /// Sets the registers. One that cannot be set must have the saved value already.
    fn restore_msrs(&self, msrs: &[MsrState]) -> Result<()> {
        let mut rest = msrs;
        while !rest.is_empty() {
            let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
            let entries: Vec<kvm_msr_entry> = batch.iter().copied().map(Into::into).collect();
            let entries = Msrs::from_entries(&entries).expect("at most KVM_MAX_MSR_ENTRIES");
            let done = self
                .fd()
                .set_msrs(&entries)
                .map_err(ioctl("KVM_SET_MSRS"))?;
            let Some(refused) = batch.get(done) else {
                rest = &rest[done..];
                continue;
            };
            let present = self.readable_msrs(&[refused.index])?;
            if present != [*refused] {
                return Err(Error::MsrRefused {
                    index: refused.index,
                    data: refused.data,
                });
            }
            rest = &rest[done + 1..];
        }
        Ok(())
    }

    /// The nested state; absent if KVM has none or the guest has never used it.
    fn nested_state(&self) -> Option<Bytes> {
        let mut buffer = KvmNestedStateBuffer::empty();
        let bytes = self.fd().nested_state(&mut buffer).ok()??.get();
        let bytes = bytes.min(size_of::<KvmNestedStateBuffer>());
        // SAFETY: plain bytes of an initialised structure, not beyond its end.
        let data = unsafe { std::slice::from_raw_parts((&raw const buffer).cast::<u8>(), bytes) };
        Some(Bytes(data.to_vec()))
    }
}

/// Preserves an expired timer. A deadline that has passed reads as zero although its interrupt may still be pending
/// inside KVM and would be lost. With the current time as its deadline the timer fires immediately.
fn keep_expired_timer(lapic: &kvm_lapic_state, msrs: &mut [MsrState]) {
    let lvt: [u8; 4] = std::array::from_fn(|at| lapic.regs[APIC_LVT_TIMER + at].cast_unsigned());
    let lvt = u32::from_le_bytes(lvt);
    if lvt & LVT_TIMER_MODE != LVT_TIMER_TSC_DEADLINE || lvt & LVT_MASKED != 0 {
        return;
    }
    let tsc = msrs.iter().find(|msr| msr.index == MSR_TSC).copied();
    let deadline = msrs.iter_mut().find(|msr| msr.index == MSR_TSC_DEADLINE);
    if let (Some(tsc), Some(deadline)) = (tsc, deadline)
        && deadline.data == 0
    {
        deadline.data = tsc.data;
    }
}

/// The parts that KVM accepts only in its own types.
struct Converted {
    cpuid: CpuId,
    xsave: Xsave,
    xcrs: kvm_xcrs,
    lapic: kvm_lapic_state,
    nested: Option<KvmNestedStateBuffer>,
}

impl Converted {
    fn of(state: &VcpuState, xsave_bytes: usize) -> std::result::Result<Self, StateError> {
        let cpuid: Vec<kvm_cpuid_entry2> = state.cpuid.iter().copied().map(Into::into).collect();
        let cpuid = (cpuid.len() <= KVM_MAX_CPUID_ENTRIES)
            .then(|| CpuId::from_entries(&cpuid).ok())
            .flatten()
            .ok_or_else(|| {
                StateError::invalid(PART, "cpuid", format!("has {} leaves", cpuid.len()))
            })?;
        let xsave = xsave_of(&state.xsave, xsave_bytes)?;
        let count = state.lapic.0.len();
        require(count == LAPIC_BYTES, PART, "lapic", || {
            format!("has {count} bytes instead of {LAPIC_BYTES}")
        })?;
        require(state.msrs.len() <= MSRS_MAX, PART, "msrs", || {
            format!("has {} registers", state.msrs.len())
        })?;
        let mut xcrs = kvm_xcrs::default();
        require(state.xcrs.len() <= xcrs.xcrs.len(), PART, "xcrs", || {
            format!("has {} registers", state.xcrs.len())
        })?;
        xcrs.nr_xcrs = state.xcrs.len() as u32;
        for (slot, xcr) in xcrs.xcrs.iter_mut().zip(&state.xcrs) {
            *slot = (*xcr).into();
        }
        let mut lapic = kvm_lapic_state::default();
        for (slot, byte) in lapic.regs.iter_mut().zip(&state.lapic.0) {
            *slot = byte.cast_signed();
        }
        Ok(Self {
            cpuid,
            xsave,
            xcrs,
            lapic,
            nested: state.nested.as_ref().map(nested_buffer).transpose()?,
        })
    }
}

/// An XSAVE area of zeros.
fn xsave_area(bytes: usize) -> Xsave {
    let tail = (bytes - XSAVE_BYTES).div_ceil(size_of::<u32>());
    Xsave::new(tail).expect("KVM's XSAVE area has a few kilobytes")
}

fn xsave_of(saved: &Bytes, host_bytes: usize) -> std::result::Result<Xsave, StateError> {
    let count = saved.0.len();
    let possible = (XSAVE_BYTES..=host_bytes).contains(&count) && count.is_multiple_of(4);
    require(possible, PART, "xsave", || {
        format!("has {count} bytes, {XSAVE_BYTES} to {host_bytes} are possible on this host")
    })?;
    let mut area = xsave_area(host_bytes);
    let mut dwords = saved.0.chunks_exact(4);
    let mut fill = |region: &mut [u32]| {
        for (dword, bytes) in region.iter_mut().zip(&mut dwords) {
            *dword = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        }
    };
    // SAFETY: the length stays as it is.
    fill(&mut unsafe { area.as_mut_fam_struct() }.xsave.region);
    fill(area.as_mut_slice());
    Ok(area)
}

fn nested_buffer(bytes: &Bytes) -> std::result::Result<KvmNestedStateBuffer, StateError> {
    let mut buffer = KvmNestedStateBuffer::empty();
    let max = size_of::<KvmNestedStateBuffer>();
    let count = bytes.0.len();
    require(count <= max, PART, "nested", || {
        format!("has {count} bytes, at most {max} are possible")
    })?;
    // SAFETY: the structure is plain bytes of any value, and `count` is within it.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.0.as_ptr(), (&raw mut buffer).cast::<u8>(), count);
    }
    require(buffer.size as usize == count, PART, "nested", || {
        format!("claims {} bytes and has {count}", buffer.size)
    })?;
    Ok(buffer)
}

/// The indices in `listed` and the registers that KVM does not list.
pub(crate) fn with_unlisted(listed: &[u32]) -> Vec<u32> {
    let mut indices = listed.to_vec();
    indices.extend(MTRRS.iter().filter(|index| !listed.contains(index)));
    // The deadline is compared with the counter, so the counter must be set first.
    indices.sort_by_key(|&index| index == MSR_TSC_DEADLINE);
    indices
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadline_comes_last_and_memory_types_are_added_once() {
        let indices = with_unlisted(&[MSR_TSC_DEADLINE, MSR_TSC, 0x2ff]);
        assert_eq!(indices.first(), Some(&MSR_TSC));
        assert_eq!(indices.last(), Some(&MSR_TSC_DEADLINE));
        assert_eq!(indices.len(), MTRRS.len() + 2);
    }

    #[test]
    fn expired_deadline_becomes_the_present_only_in_deadline_mode() {
        let mut lapic = kvm_lapic_state::default();
        let mut msrs =
            [(MSR_TSC, 77), (MSR_TSC_DEADLINE, 0)].map(|(index, data)| MsrState { index, data });
        keep_expired_timer(&lapic, &mut msrs);
        assert_eq!(msrs[1].data, 0, "one-shot mode");
        lapic.regs[APIC_LVT_TIMER + 2] = 4;
        keep_expired_timer(&lapic, &mut msrs);
        assert_eq!(msrs[1].data, 77);
        msrs[1].data = 99;
        keep_expired_timer(&lapic, &mut msrs);
        assert_eq!(msrs[1].data, 99, "still to come");
    }
}
