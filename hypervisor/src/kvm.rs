//! The system handle: opens `/dev/kvm`, queries its capabilities, creates virtual machines.
#![allow(unsafe_code)]
// UNSAFETY: libc has no safe wrapper of arch_prctl.

use std::ffi::CString;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::Cap;

use crate::error::{Error, Result, ioctl};
use crate::vm::Vm;

/// The device of KVM.
pub const KVM_PATH: &str = "/dev/kvm";

/// `KVM_API_VERSION` in the type of the kernel's reply. Frozen at 12 since 2007.
const API_VERSION: i32 = KVM_API_VERSION.cast_signed();

/// Linux's arch/x86/include/uapi/asm/prctl.h.
const ARCH_REQ_XCOMP_GUEST_PERM: libc::c_ulong = 0x1025;
/// Number of the tile data among the parts of an XSAVE area (Intel SDM volume 1, section 13.1).
const XFEATURE_XTILEDATA: libc::c_ulong = 18;

/// The capabilities the VMM relies on. If one is missing, no machine is created.
pub const REQUIRED_CAPABILITIES: [(&str, Cap); 18] = [
    ("ADJUST_CLOCK", Cap::AdjustClock),
    ("EXT_CPUID", Cap::ExtCpuid),
    ("GET_TSC_KHZ", Cap::GetTscKhz),
    ("IMMEDIATE_EXIT", Cap::ImmediateExit),
    ("IOEVENTFD", Cap::Ioeventfd),
    ("IRQCHIP", Cap::Irqchip),
    ("IRQFD", Cap::Irqfd),
    ("IRQ_ROUTING", Cap::IrqRouting),
    ("MP_STATE", Cap::MpState),
    ("SET_IDENTITY_MAP_ADDR", Cap::SetIdentityMapAddr),
    ("SET_TSS_ADDR", Cap::SetTssAddr),
    ("SIGNAL_MSI", Cap::SignalMsi),
    ("SPLIT_IRQCHIP", Cap::SplitIrqchip),
    ("TSC_DEADLINE_TIMER", Cap::TscDeadlineTimer),
    ("USER_MEMORY", Cap::UserMemory),
    ("USER_NMI", Cap::UserNmi),
    ("VCPU_EVENTS", Cap::VcpuEvents),
    ("XSAVE", Cap::Xsave),
];

/// An open `/dev/kvm` with all of [`REQUIRED_CAPABILITIES`].
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
}

impl Kvm {
    /// Opens `/dev/kvm` and checks that this host can run our machines.
    ///
    /// # Errors
    /// The device is missing, not permitted, implements another API version or lacks a capability; each case is a
    /// separate [`Error`].
    pub fn open() -> Result<Self> {
        Self::open_at(Path::new(KVM_PATH))
    }

    /// As [`Kvm::open`], with the device at another path.
    ///
    /// # Errors
    /// As [`Kvm::open`].
    pub fn open_at(path: &Path) -> Result<Self> {
        let open_error = |source: io::Error| {
            let path = path.to_path_buf();
            match source.kind() {
                io::ErrorKind::NotFound => Error::DeviceMissing { path, source },
                io::ErrorKind::PermissionDenied => Error::DeviceNotPermitted { path, source },
                _ => Error::DeviceOpen { path, source },
            }
        };
        let c_path = CString::new(path.as_os_str().as_bytes())
            .map_err(|nul| open_error(io::Error::new(io::ErrorKind::InvalidInput, nul)))?;
        let fd =
            kvm_ioctls::Kvm::new_with_path(&c_path).map_err(|error| open_error(error.into()))?;
        let kvm = Self { fd };
        kvm.check_api_version(path)?;
        kvm.check_capabilities()?;
        Ok(kvm)
    }

    fn check_api_version(&self, path: &Path) -> Result<()> {
        match self.fd.get_api_version() {
            API_VERSION => Ok(()),
            found if found < 0 => Err(Error::NotKvm {
                path: path.to_path_buf(),
            }),
            found => Err(Error::ApiVersion {
                found,
                expected: API_VERSION,
            }),
        }
    }

    fn check_capabilities(&self) -> Result<()> {
        for (name, capability) in REQUIRED_CAPABILITIES {
            if !self.fd.check_extension(capability) {
                return Err(Error::MissingCapability { name });
            }
        }
        Ok(())
    }

    /// Creates an empty machine: no memory, no interrupt controller, no vCPU.
    ///
    /// # Errors
    /// `KVM_CREATE_VM` failed.
    pub fn create_vm(&self) -> Result<Vm> {
        loop {
            match self.fd.create_vm() {
                Ok(fd) => return Ok(Vm::new(fd)),
                // The kernel aborts when a signal arrives and expects the call to be repeated.
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(ioctl("KVM_CREATE_VM")(error)),
            }
        }
    }

    /// The CPUID leaves that this host's KVM can provide to a guest.
    ///
    /// # Errors
    /// `KVM_GET_SUPPORTED_CPUID` failed.
    pub fn supported_cpuid(&self) -> Result<CpuId> {
        self.fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(ioctl("KVM_GET_SUPPORTED_CPUID"))
    }

    /// Lets the guests of this process have AMX, which enlarges the XSAVE area of every later vCPU. Linux grants it to a
    /// process on request (Documentation/arch/x86/xstate.rst); [`Kvm::supported_cpuid`] then includes the feature, if
    /// KVM has it.
    ///
    /// # Errors
    /// The host's processor or kernel has no AMX; or `EBUSY`: the process has had a vCPU without it.
    pub fn request_amx(&self) -> Result<()> {
        // SAFETY: this request takes no pointer.
        let done = unsafe {
            libc::syscall(
                libc::SYS_arch_prctl,
                ARCH_REQ_XCOMP_GUEST_PERM,
                XFEATURE_XTILEDATA,
            )
        };
        if done == 0 {
            return Ok(());
        }
        Err(Error::Ioctl {
            operation: "arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM)",
            source: io::Error::last_os_error(),
        })
    }

    /// Whether a guest can have the interrupt controller and the timers of Hyper-V (`KVM_CAP_HYPERV_SYNIC`).
    #[must_use]
    pub fn supports_hyperv_synic(&self) -> bool {
        self.fd.check_extension(Cap::HypervSynic)
    }

    /// The model specific registers that belong to the state of a vCPU, in the order to set them.
    ///
    /// # Errors
    /// `KVM_GET_MSR_INDEX_LIST` failed.
    pub fn msr_indices(&self) -> Result<Vec<u32>> {
        let listed = self
            .fd
            .get_msr_index_list()
            .map_err(ioctl("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(crate::vcpu_state::with_unlisted(listed.as_slice()))
    }

    /// Maximum number of vCPUs of one machine (`KVM_CAP_MAX_VCPUS`).
    #[must_use]
    pub fn max_vcpus(&self) -> usize {
        self.fd.get_max_vcpus()
    }

    /// Whether APIC ids above 254 are possible (`KVM_CAP_X2APIC_API`).
    #[must_use]
    pub fn supports_x2apic_api(&self) -> bool {
        self.fd.check_extension_int(Cap::X2ApicApi) > 0
    }

    /// Whether a guest's time stamp counter can run at another frequency than the host's (`KVM_CAP_TSC_CONTROL`).
    #[must_use]
    pub fn supports_tsc_scaling(&self) -> bool {
        self.fd.check_extension(Cap::TscControl)
    }

    /// The maximum that KVM can provide to a guest in a model specific register that describes features; `None` if the
    /// host has no such register.
    #[must_use]
    pub fn feature_msr(&self, index: u32) -> Option<u64> {
        let entry = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let mut msrs = Msrs::from_entries(&[entry]).ok()?;
        let read = self.fd.get_msrs(&mut msrs).ok()?;
        msrs.as_slice()[..read].first().map(|entry| entry.data)
    }

    /// Whether a guest can be notified of a pause (`KVM_CAP_KVMCLOCK_CTRL`).
    #[must_use]
    pub fn supports_kvmclock_ctrl(&self) -> bool {
        self.fd.check_extension(Cap::KvmclockCtrl)
    }
}

impl AsRawFd for Kvm {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}
