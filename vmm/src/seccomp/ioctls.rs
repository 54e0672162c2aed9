//! The `ioctl` requests of each thread kind. They are listed separately because `ioctl` multiplexes hundreds of
//! operations.

use machine::threads::{DeviceKind, MachineThread};

use super::calls::{Condition, Test};
use crate::threads::ThreadKind;

/// An allowed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) name: &'static str,
    pub(super) number: u64,
}

impl Request {
    /// The condition on the arguments of `ioctl`.
    pub(super) fn condition(self) -> Condition {
        Condition {
            argument: 1,
            test: Test::Is(self.number),
            text: self.name,
        }
    }
}

macro_rules! requests {
    ($($name:ident = $number:literal),* $(,)?) => {
        &[$(Request { name: stringify!($name), number: $number }),*]
    };
}

/// Requests of linux/kvm.h that a vCPU thread makes for itself, or for the interrupts and notifications its guest sets
/// up by writing to device registers. The first is by far the most frequent.
const KVM_OF_VCPU: &[Request] = requests![
    KVM_RUN = 0xae80,
    KVM_NMI = 0xae9a,
    KVM_KVMCLOCK_CTRL = 0xaead,
    KVM_GET_REGS = 0x8090_ae81,
    KVM_SET_REGS = 0x4090_ae82,
    KVM_GET_SREGS = 0x8138_ae83,
    KVM_SET_SREGS = 0x4138_ae84,
    KVM_GET_MSRS = 0xc008_ae88,
    KVM_SET_MSRS = 0x4008_ae89,
    KVM_SET_SIGNAL_MASK = 0x4004_ae8b,
    KVM_GET_FPU = 0x81a0_ae8c,
    KVM_SET_FPU = 0x41a0_ae8d,
    KVM_GET_LAPIC = 0x8400_ae8e,
    KVM_SET_LAPIC = 0x4400_ae8f,
    KVM_SET_CPUID2 = 0x4008_ae90,
    KVM_GET_MP_STATE = 0x8004_ae98,
    KVM_SET_MP_STATE = 0x4004_ae99,
    KVM_GET_VCPU_EVENTS = 0x8040_ae9f,
    KVM_SET_VCPU_EVENTS = 0x4040_aea0,
    KVM_IRQ_LINE = 0x4008_ae61,
    KVM_SET_GSI_ROUTING = 0x4008_ae6a,
    KVM_IRQFD = 0x4020_ae76,
    KVM_IOEVENTFD = 0x4040_ae79,
    KVM_SIGNAL_MSI = 0x4020_aea5,
];

/// Enables and disables interrupts of assigned devices. The guest moves their registers: see [`SLOTS`].
const VFIO_OF_VCPU: &[Request] = requests![VFIO_DEVICE_SET_IRQS = 0x3b6e];
/// Opens and closes assigned devices (linux/vfio.h), and registers them with KVM.
const VFIO: &[Request] = requests![
    VFIO_GET_API_VERSION = 0x3b64,
    VFIO_CHECK_EXTENSION = 0x3b65,
    VFIO_SET_IOMMU = 0x3b66,
    VFIO_GROUP_GET_STATUS = 0x3b67,
    VFIO_GROUP_SET_CONTAINER = 0x3b68,
    VFIO_GROUP_UNSET_CONTAINER = 0x3b69,
    VFIO_GROUP_GET_DEVICE_FD = 0x3b6a,
    VFIO_DEVICE_GET_INFO = 0x3b6b,
    VFIO_DEVICE_GET_REGION_INFO = 0x3b6c,
    VFIO_DEVICE_GET_IRQ_INFO = 0x3b6d,
    VFIO_DEVICE_RESET = 0x3b6f,
    VFIO_IOMMU_GET_INFO = 0x3b70,
    KVM_CREATE_DEVICE = 0xc00c_aee0,
    KVM_SET_DEVICE_ATTR = 0x4018_aee1,
];

/// Maps guest memory for assigned devices.
const VFIO_MAP: &[Request] = requests![VFIO_IOMMU_MAP_DMA = 0x3b71, VFIO_IOMMU_UNMAP_DMA = 0x3b72];

/// Requests of linux/kvm.h that create a machine, save its state and restore it.
const KVM_OF_MACHINE: &[Request] = requests![
    KVM_GET_API_VERSION = 0xae00,
    KVM_CREATE_VM = 0xae01,
    KVM_GET_MSR_INDEX_LIST = 0xc004_ae02,
    KVM_CHECK_EXTENSION = 0xae03,
    KVM_GET_VCPU_MMAP_SIZE = 0xae04,
    KVM_GET_SUPPORTED_CPUID = 0xc008_ae05,
    KVM_CREATE_VCPU = 0xae41,
    KVM_GET_DIRTY_LOG = 0x4010_ae42,
    KVM_SET_USER_MEMORY_REGION = 0x4020_ae46,
    KVM_SET_TSS_ADDR = 0xae47,
    KVM_SET_IDENTITY_MAP_ADDR = 0x4008_ae48,
    KVM_SET_CLOCK = 0x4030_ae7b,
    KVM_GET_CLOCK = 0x8030_ae7c,
    KVM_GET_CPUID2 = 0xc008_ae91,
    KVM_GET_DEBUGREGS = 0x8080_aea1,
    KVM_SET_DEBUGREGS = 0x4080_aea2,
    KVM_SET_TSC_KHZ = 0xaea2,
    KVM_GET_TSC_KHZ = 0xaea3,
    KVM_ENABLE_CAP = 0x4068_aea3,
    KVM_GET_XSAVE = 0x9000_aea4,
    KVM_SET_XSAVE = 0x5000_aea5,
    KVM_GET_XCRS = 0x8188_aea6,
    KVM_SET_XCRS = 0x4188_aea7,
    KVM_GET_NESTED_STATE = 0xc080_aebe,
    KVM_SET_NESTED_STATE = 0x4080_aebf,
    KVM_GET_STATS_FD = 0xaece,
    KVM_GET_XSAVE2 = 0x9000_aecf,
];

/// Attributes of a terminal. Every thread may restore them: the process does so before a forbidden call ends it. Since
/// version 2.42, glibc uses the requests whose names contain a 2.
const RESTORE_TERMINAL: &[Request] = requests![TCSETS = 0x5402, TCSETS2 = 0x402c_542b];
const TERMINAL: &[Request] = requests![
    TCGETS = 0x5401,
    TCSETSW = 0x5403,
    TCSETSF = 0x5404,
    TCGETS2 = 0x802c_542a,
    TCSETSW2 = 0x402c_542c,
    TCSETSF2 = 0x402c_542d,
];
const TERMINAL_SIZE: &[Request] = requests![TIOCGWINSZ = 0x5413];
/// Creates a pseudo-terminal, and determines who owns this terminal.
const NEW_TERMINAL: &[Request] = requests![
    TIOCGPGRP = 0x540f,
    TIOCGPTN = 0x8004_5430,
    TIOCSPTLCK = 0x4004_5431,
    TIOCGPTPEER = 0x5441,
];

/// Flags of descriptors, as the standard library sets them.
const NONBLOCKING: &[Request] = requests![FIONBIO = 0x5421];
const CLOSE_ON_EXEC: &[Request] = requests![FIOCLEX = 0x5451];

/// Opens taps and configures interfaces.
const NEW_TAP: &[Request] = requests![
    TUNSETIFF = 0x4004_54ca,
    TUNGETIFF = 0x8004_54d2,
    TUNSETVNETHDRSZ = 0x4004_54d8,
    SIOCGIFFLAGS = 0x8913,
    SIOCSIFFLAGS = 0x8914,
    SIOCSIFADDR = 0x8916,
    SIOCSIFNETMASK = 0x891c,
    SIOCSIFMTU = 0x8922,
    SIOCSIFHWADDR = 0x8924,
];
const TAP: &[Request] = requests![TUNSETOFFLOAD = 0x4004_54d0, TUNSETQUEUE = 0x4004_54d9];

/// Sizes of a block device.
const NEW_DISK: &[Request] = requests![
    BLKSSZGET = 0x1268,
    BLKIOMIN = 0x1278,
    BLKIOOPT = 0x1279,
    BLKPBSZGET = 0x127b,
    // A backing file may be a block device.
    BLKGETSIZE64 = 0x8008_1272,
];
const DISK: &[Request] = requests![BLKDISCARD = 0x1277, BLKZEROOUT = 0x127f];

const PAGEMAP: &[Request] = requests![PAGEMAP_SCAN = 0xc060_6610];
/// Has page faults reported, and answers them.
const NEW_FAULTS: &[Request] = requests![
    USERFAULTFD_IOC_NEW = 0xaa00,
    UFFDIO_API = 0xc018_aa3f,
    UFFDIO_REGISTER = 0xc020_aa00,
];
const FAULTS: &[Request] = requests![
    UFFDIO_UNREGISTER = 0x8010_aa01,
    UFFDIO_WAKE = 0x8010_aa02,
    UFFDIO_COPY = 0xc028_aa03,
    UFFDIO_ZEROPAGE = 0xc020_aa04,
];
/// Opens and closes blocks of hot-plugged memory; ends the record of the guest's writes.
const SLOTS: &[Request] = requests![KVM_SET_USER_MEMORY_REGION = 0x4020_ae46];
/// Reads which pages the guest has written.
const WRITES: &[Request] = requests![KVM_GET_DIRTY_LOG = 0x4010_ae42];
const MESSAGE: &[Request] = requests![KVM_SIGNAL_MSI = 0x4020_aea5];

/// The requests of a kind, without those of its children.
pub(super) fn own(kind: ThreadKind) -> Vec<Request> {
    let lists: &[&[Request]] = match kind {
        // The first entry also comes first in the filters of vCPUs, which start on this thread.
        ThreadKind::Control => &[
            KVM_OF_VCPU,
            KVM_OF_MACHINE,
            VFIO_OF_VCPU,
            VFIO,
            VFIO_MAP,
            TERMINAL,
            TERMINAL_SIZE,
            NEW_TERMINAL,
            NONBLOCKING,
            CLOSE_ON_EXEC,
            NEW_TAP,
            NEW_DISK,
            NEW_FAULTS,
            PAGEMAP,
        ],
        ThreadKind::Main => &[TERMINAL],
        ThreadKind::HttpServer => &[NONBLOCKING],
        ThreadKind::ApiQuery | ThreadKind::Thresholds => &[PAGEMAP],
        ThreadKind::EventMonitor => &[],
        ThreadKind::Migration => &[NONBLOCKING, PAGEMAP, SLOTS, WRITES],
        ThreadKind::Snapshot => &[PAGEMAP, SLOTS, WRITES],
        ThreadKind::Machine(thread) => of_machine(thread),
    };
    lists
        .iter()
        .chain(&[RESTORE_TERMINAL])
        .copied()
        .flatten()
        .copied()
        .collect()
}

fn of_machine(thread: MachineThread) -> &'static [&'static [Request]] {
    match thread {
        MachineThread::Vcpu => &[KVM_OF_VCPU, VFIO_OF_VCPU, SLOTS],
        MachineThread::Fill => &[FAULTS],
        // Input raises the serial port's interrupt, which the I/O APIC sends as a message.
        MachineThread::Serial => &[NONBLOCKING, TERMINAL, TERMINAL_SIZE, MESSAGE],
        MachineThread::Worker(DeviceKind::Console) => &[NONBLOCKING, TERMINAL, TERMINAL_SIZE],
        MachineThread::Worker(DeviceKind::VhostUser | DeviceKind::Vsock) => &[NONBLOCKING],
        MachineThread::Worker(DeviceKind::Balloon) => &[PAGEMAP],
        MachineThread::Worker(DeviceKind::Block) => &[DISK],
        MachineThread::Worker(DeviceKind::Net) => &[TAP],
        MachineThread::Worker(DeviceKind::Mem) => &[SLOTS, VFIO_MAP],
        MachineThread::Worker(DeviceKind::Iommu) => &[VFIO_MAP],
        MachineThread::Worker(_) => &[],
    }
}
