//! One vCPU: its registers and one step of its run loop.
#![allow(unsafe_code)]
// UNSAFETY: three fields of the run page are in unions that kvm-ioctls does not expose (the size of one port access, the
// suberror of an internal error, Hyper-V's hypercalls).

use kvm_bindings::{
    CpuId, KVM_CAP_HYPERV_SYNIC, KVM_EXIT_DEBUG, KVM_EXIT_EXCEPTION, KVM_EXIT_HYPERCALL,
    KVM_EXIT_HYPERV_HCALL, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_NMI, KVM_EXIT_SET_TPR,
    KVM_EXIT_TPR_ACCESS, KVM_EXIT_UNKNOWN, KVM_EXIT_WATCHDOG, KVM_MAX_CPUID_ENTRIES,
    KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_enable_cap, kvm_fpu,
    kvm_hyperv_exit, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_run, kvm_sregs,
    kvm_xsave,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::error::{Error, Result, ioctl};
use crate::exit::VmExit;
use crate::fault_stats::FaultStats;

/// Hyper-V's status of a hypercall that does not exist (TLFS, appendix B).
const HV_STATUS_INVALID_HYPERCALL_CODE: u64 = 2;

/// A vCPU. Belongs to the thread that runs it; another thread may set it up.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    /// Size of the XSAVE area, which grows with the features that the process has requested.
    xsave_bytes: usize,
}

impl Vcpu {
    /// `xsave_bytes` is what `KVM_CAP_XSAVE2` returns; 0 on a kernel without it.
    pub(crate) fn new(fd: VcpuFd, xsave_bytes: usize) -> Self {
        Self {
            fd,
            xsave_bytes: xsave_bytes.max(size_of::<kvm_xsave>()),
        }
    }

    pub(crate) fn xsave_bytes(&self) -> usize {
        self.xsave_bytes
    }

    pub(crate) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Runs the guest until it exits.
    ///
    /// # Errors
    /// `KVM_RUN` failed. Interruption by a signal is not an error but [`VmExit::Interrupted`].
    pub fn run(&mut self) -> Result<VmExit<'_>> {
        let run_page: *mut kvm_run = self.fd.get_kvm_run();
        let exit = match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => VmExit::IoIn {
                port,
                size: io_access_bytes(run_page, data.len()),
                data,
            },
            Ok(VcpuExit::IoOut(port, data)) => VmExit::IoOut {
                port,
                size: io_access_bytes(run_page, data.len()),
                data,
            },
            Ok(VcpuExit::InternalError) => VmExit::InternalError {
                // SAFETY: the run page is mapped as long as `self.fd` lives, and the exit
                // reason says that `internal` is the valid member of the union.
                suberror: unsafe { (*run_page).__bindgen_anon_1.internal.suberror },
            },
            Ok(VcpuExit::Hyperv) => {
                // SAFETY: the run page is mapped as long as `self.fd` lives, and the exit reason says that `hyperv` is
                // the valid member of the union. KVM reads only the result, in the next run.
                reject_hypercall(unsafe { &mut (*run_page).__bindgen_anon_1.hyperv });
                VmExit::Hyperv
            }
            Ok(VcpuExit::MmioRead(address, data)) => VmExit::MmioRead { address, data },
            Ok(VcpuExit::MmioWrite(address, data)) => VmExit::MmioWrite { address, data },
            Ok(other) => plain_exit(&other),
            // EAGAIN: a vCPU waiting for its start-up interrupt was woken without one.
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                VmExit::Interrupted
            }
            Err(error) if matches!(error.errno(), libc::EFAULT | libc::EHWPOISON) => {
                VmExit::MemoryUnavailable
            }
            Err(error) => return Err(ioctl("KVM_RUN")(error)),
        };
        Ok(exit)
    }

    /// The counters of its page faults, if the kernel has them.
    pub fn fault_stats(&self) -> Option<FaultStats> {
        FaultStats::open(&self.fd)
    }

    /// Makes the next `KVM_RUN` return without entering the guest. KVM applies the data of a read only in that call.
    /// After it the registers are those of an instruction boundary, unless the access continues, which is another exit.
    pub fn set_immediate_exit(&mut self, on: bool) {
        self.fd.set_kvm_immediate_exit(u8::from(on));
    }

    /// Gives the guest the synthetic interrupt controller and timers of Hyper-V (TLFS, chapters 11 and 12).
    ///
    /// # Errors
    /// `KVM_ENABLE_CAP(KVM_CAP_HYPERV_SYNIC)` failed.
    pub fn enable_hyperv_synic(&self) -> Result<()> {
        let capability = kvm_enable_cap {
            cap: KVM_CAP_HYPERV_SYNIC,
            ..Default::default()
        };
        self.fd
            .enable_cap(&capability)
            .map_err(ioctl("KVM_ENABLE_CAP(KVM_CAP_HYPERV_SYNIC)"))
    }

    /// Address of `immediate_exit` in the run page; valid while `self` exists.
    pub(crate) fn immediate_exit_address(&mut self) -> *mut u8 {
        &raw mut self.fd.get_kvm_run().immediate_exit
    }

    /// Sets the CPUID the guest sees. Must come before the first run.
    ///
    /// # Errors
    /// `KVM_SET_CPUID2` failed.
    pub fn set_cpuid(&self, cpuid: &CpuId) -> Result<()> {
        self.fd.set_cpuid2(cpuid).map_err(ioctl("KVM_SET_CPUID2"))
    }

    /// The CPUID the guest sees.
    ///
    /// # Errors
    /// `KVM_GET_CPUID2` failed.
    pub fn cpuid(&self) -> Result<CpuId> {
        self.fd
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(ioctl("KVM_GET_CPUID2"))
    }

    /// Sets all given model specific registers.
    ///
    /// # Errors
    /// `KVM_SET_MSRS` failed or took only some of them.
    pub fn set_msrs(&self, entries: &[kvm_msr_entry]) -> Result<()> {
        let refused = |done| Error::MsrsRefused {
            done,
            count: entries.len(),
        };
        let msrs = Msrs::from_entries(entries).map_err(|_too_many| refused(0))?;
        match self.fd.set_msrs(&msrs).map_err(ioctl("KVM_SET_MSRS"))? {
            done if done == entries.len() => Ok(()),
            done => Err(refused(done)),
        }
    }

    /// Reads all model specific registers with these indices.
    ///
    /// # Errors
    /// `KVM_GET_MSRS` failed or knew only some of them.
    pub fn msrs(&self, indices: &[u32]) -> Result<Vec<kvm_msr_entry>> {
        let refused = |done| Error::MsrsRefused {
            done,
            count: indices.len(),
        };
        let entries: Vec<kvm_msr_entry> = indices
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_too_many| refused(0))?;
        match self.fd.get_msrs(&mut msrs).map_err(ioctl("KVM_GET_MSRS"))? {
            done if done == indices.len() => Ok(msrs.as_slice().to_vec()),
            done => Err(refused(done)),
        }
    }

    /// General registers.
    ///
    /// # Errors
    /// `KVM_GET_REGS` failed.
    pub fn regs(&self) -> Result<kvm_regs> {
        self.fd.get_regs().map_err(ioctl("KVM_GET_REGS"))
    }

    /// Sets the general registers.
    ///
    /// # Errors
    /// `KVM_SET_REGS` failed.
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<()> {
        self.fd.set_regs(regs).map_err(ioctl("KVM_SET_REGS"))
    }

    /// Segments, control registers, descriptor tables.
    ///
    /// # Errors
    /// `KVM_GET_SREGS` failed.
    pub fn sregs(&self) -> Result<kvm_sregs> {
        self.fd.get_sregs().map_err(ioctl("KVM_GET_SREGS"))
    }

    /// Sets segments, control registers, descriptor tables.
    ///
    /// # Errors
    /// `KVM_SET_SREGS` failed: the combination is not a valid processor state.
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<()> {
        self.fd.set_sregs(sregs).map_err(ioctl("KVM_SET_SREGS"))
    }

    /// Floating point state.
    ///
    /// # Errors
    /// `KVM_GET_FPU` failed.
    pub fn fpu(&self) -> Result<kvm_fpu> {
        self.fd.get_fpu().map_err(ioctl("KVM_GET_FPU"))
    }

    /// Sets the floating point state.
    ///
    /// # Errors
    /// `KVM_SET_FPU` failed.
    pub fn set_fpu(&self, fpu: &kvm_fpu) -> Result<()> {
        self.fd.set_fpu(fpu).map_err(ioctl("KVM_SET_FPU"))
    }

    /// Registers of the local APIC.
    ///
    /// # Errors
    /// `KVM_GET_LAPIC` failed: no local APIC in the kernel.
    pub fn lapic(&self) -> Result<kvm_lapic_state> {
        self.fd.get_lapic().map_err(ioctl("KVM_GET_LAPIC"))
    }

    /// Sets the registers of the local APIC.
    ///
    /// # Errors
    /// `KVM_SET_LAPIC` failed.
    pub fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<()> {
        self.fd.set_lapic(lapic).map_err(ioctl("KVM_SET_LAPIC"))
    }

    /// Whether the vCPU is running, halted or waiting for its start-up interrupt.
    ///
    /// # Errors
    /// `KVM_GET_MP_STATE` failed.
    pub fn mp_state(&self) -> Result<kvm_mp_state> {
        self.fd.get_mp_state().map_err(ioctl("KVM_GET_MP_STATE"))
    }

    /// Sets whether the vCPU is running, halted or waiting.
    ///
    /// # Errors
    /// `KVM_SET_MP_STATE` failed.
    pub fn set_mp_state(&self, state: kvm_mp_state) -> Result<()> {
        self.fd
            .set_mp_state(state)
            .map_err(ioctl("KVM_SET_MP_STATE"))
    }

    /// Frequency of the guest's time stamp counter in kHz.
    ///
    /// # Errors
    /// `KVM_GET_TSC_KHZ` failed: the host's counter is not stable.
    pub fn tsc_khz(&self) -> Result<u32> {
        self.fd.get_tsc_khz().map_err(ioctl("KVM_GET_TSC_KHZ"))
    }

    /// Notifies the guest that it was paused, so that its soft lockup watchdog does not count the pause. `false`: the
    /// guest does not use kvmclock.
    ///
    /// # Errors
    /// `KVM_KVMCLOCK_CTRL` failed.
    pub fn kvmclock_ctrl(&self) -> Result<bool> {
        match self.fd.kvmclock_ctrl() {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == libc::EINVAL => Ok(false),
            Err(error) => Err(ioctl("KVM_KVMCLOCK_CTRL")(error)),
        }
    }

    /// Whether the vCPU is no longer waiting for its start-up interrupt.
    ///
    /// # Errors
    /// As [`Vcpu::mp_state`].
    pub fn has_started(&self) -> Result<bool> {
        let waiting = [KVM_MP_STATE_UNINITIALIZED, KVM_MP_STATE_INIT_RECEIVED];
        Ok(!waiting.contains(&self.mp_state()?.mp_state))
    }

    /// Makes the vCPU wait for its start-up interrupt, as at power-on.
    ///
    /// # Errors
    /// As [`Vcpu::set_mp_state`].
    pub fn power_off(&self) -> Result<()> {
        self.set_mp_state(kvm_mp_state {
            mp_state: KVM_MP_STATE_UNINITIALIZED,
        })
    }

    /// Sends a non-maskable interrupt.
    ///
    /// # Errors
    /// `KVM_NMI` failed.
    pub fn nmi(&self) -> Result<()> {
        self.fd.nmi().map_err(ioctl("KVM_NMI"))
    }
}

/// Answers a hypercall: none that KVM does not handle itself exists.
fn reject_hypercall(exit: &mut kvm_hyperv_exit) {
    if exit.type_ == KVM_EXIT_HYPERV_HCALL {
        exit.u.hcall.result = HV_STATUS_INVALID_HYPERCALL_CODE;
    }
}

/// Size of one access of a port exit that carries `data_bytes`.
fn io_access_bytes(run_page: *mut kvm_run, data_bytes: usize) -> u8 {
    // SAFETY: called right after a port exit, while the vCPU that owns the run page is borrowed: the page is mapped and
    // `io` is the valid member of the union. The exit's data lies behind this structure, not in it.
    let size = unsafe { (*run_page).__bindgen_anon_1.io.size };
    // The kernel never reports 0; this avoids a division by zero.
    if size == 0 || data_bytes == 0 {
        1
    } else {
        size
    }
}

/// Exits without a reference into the run page.
fn plain_exit(exit: &VcpuExit<'_>) -> VmExit<'static> {
    match exit {
        VcpuExit::IoapicEoi(vector) => VmExit::IoapicEoi(*vector),
        VcpuExit::Shutdown => VmExit::Shutdown,
        VcpuExit::SystemEvent(kind, _data) => VmExit::SystemEvent((*kind).into()),
        VcpuExit::Hlt => VmExit::Hlt,
        VcpuExit::Intr => VmExit::Interrupted,
        VcpuExit::FailEntry(reason, _cpu) => VmExit::FailEntry { reason: *reason },
        VcpuExit::MemoryFault { gpa, size, .. } => VmExit::MemoryFault {
            address: *gpa,
            bytes: *size,
        },
        VcpuExit::Exception => VmExit::Unknown(KVM_EXIT_EXCEPTION),
        VcpuExit::Hypercall(_) => VmExit::Unknown(KVM_EXIT_HYPERCALL),
        VcpuExit::Debug(_) => VmExit::Unknown(KVM_EXIT_DEBUG),
        VcpuExit::IrqWindowOpen => VmExit::Unknown(KVM_EXIT_IRQ_WINDOW_OPEN),
        VcpuExit::SetTpr => VmExit::Unknown(KVM_EXIT_SET_TPR),
        VcpuExit::TprAccess => VmExit::Unknown(KVM_EXIT_TPR_ACCESS),
        VcpuExit::Nmi => VmExit::Unknown(KVM_EXIT_NMI),
        VcpuExit::Watchdog => VmExit::Unknown(KVM_EXIT_WATCHDOG),
        VcpuExit::Unsupported(reason) => VmExit::Unknown(*reason),
        _ => VmExit::Unknown(KVM_EXIT_UNKNOWN),
    }
}
