//! Which requests each kind of thread may make with `ioctl`, which is not one system call but hundreds.

use machine::threads::{DeviceKind, MachineThread};

use crate::threads::ThreadKind;

/// Requests of one kind of device share the second byte of their number (`_IOC_TYPE` in asm-generic/ioctl.h).
const TYPE_MASK: u64 = 0xff00;

/// Type byte of KVM.
const KVM: u64 = 0xae << 8;
/// Type byte of taps and of terminals.
const TTY_AND_TUN: u64 = b'T' as u64 * 0x100;
/// Type byte of network interfaces (`SIOC…`).
const SOCKET: u64 = 0x89 << 8;
/// Type byte of block devices.
const BLOCK: u64 = 0x12 << 8;

const FIONBIO: u64 = 0x5421;
const TCGETS: u64 = 0x5401;
const TCSETS: u64 = 0x5402;
const TCSETSW: u64 = 0x5403;
const TCSETSF: u64 = 0x5404;
const TIOCGWINSZ: u64 = 0x5413;
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
const TUNSETQUEUE: u64 = 0x4004_54d9;
const PAGEMAP_SCAN: u64 = 0xc060_6610;
const BLKDISCARD: u64 = 0x1277;
const BLKZEROOUT: u64 = 0x127f;
const KVM_SIGNAL_MSI: u64 = 0x4020_aea5;

/// Requests of linux/kvm.h that a vCPU thread makes for itself, or for the interrupts and notifications its guest sets
/// up by writing to device registers.
const KVM_OF_VCPU: &[u64] = &[
    0xae80,      // KVM_RUN
    0xae9a,      // KVM_NMI
    0xaead,      // KVM_KVMCLOCK_CTRL
    0x8090_ae81, // KVM_GET_REGS
    0x4090_ae82, // KVM_SET_REGS
    0x8138_ae83, // KVM_GET_SREGS
    0x4138_ae84, // KVM_SET_SREGS
    0xc008_ae88, // KVM_GET_MSRS
    0x4008_ae89, // KVM_SET_MSRS
    0x4004_ae8b, // KVM_SET_SIGNAL_MASK
    0x81a0_ae8c, // KVM_GET_FPU
    0x41a0_ae8d, // KVM_SET_FPU
    0x8400_ae8e, // KVM_GET_LAPIC
    0x4400_ae8f, // KVM_SET_LAPIC
    0x4008_ae90, // KVM_SET_CPUID2
    0x8004_ae98, // KVM_GET_MP_STATE
    0x4004_ae99, // KVM_SET_MP_STATE
    0x8040_ae9f, // KVM_GET_VCPU_EVENTS
    0x4040_aea0, // KVM_SET_VCPU_EVENTS
    0x4008_ae61, // KVM_IRQ_LINE
    0x4008_ae6a, // KVM_SET_GSI_ROUTING
    0x4020_ae76, // KVM_IRQFD
    0x4040_ae79, // KVM_IOEVENTFD
    KVM_SIGNAL_MSI,
];

/// One allowed request, or a whole type of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ioctl {
    /// Exactly this number.
    Request(u64),
    /// Every request of this type, given with its byte in place.
    Type(u64),
}

impl Ioctl {
    /// Mask of the bits that count.
    pub(super) const TYPE_MASK: u64 = TYPE_MASK;
}

/// The requests of a kind, without those of its children.
pub(super) fn own(kind: ThreadKind) -> Vec<Ioctl> {
    use Ioctl::{Request, Type};
    // The terminal is put back before the process ends at a forbidden call, on whichever thread that was.
    let requests = |numbers: &[u64]| {
        let numbers = numbers.iter().chain(&[TCSETS]);
        numbers.copied().map(Request).collect()
    };
    match kind {
        ThreadKind::Control => vec![
            Type(KVM),
            Type(TTY_AND_TUN),
            Type(SOCKET),
            Type(BLOCK),
            Request(PAGEMAP_SCAN),
        ],
        ThreadKind::Machine(MachineThread::Vcpu) => requests(KVM_OF_VCPU),
        ThreadKind::Main => requests(&[TCGETS, TCSETSW, TCSETSF]),
        ThreadKind::HttpServer | ThreadKind::Machine(MachineThread::Worker(DeviceKind::Vsock)) => {
            requests(&[FIONBIO])
        }
        ThreadKind::ApiQuery | ThreadKind::Thresholds => requests(&[PAGEMAP_SCAN]),
        // Input raises the serial port's interrupt, which is a message of the I/O APIC.
        ThreadKind::Machine(MachineThread::Serial) => requests(&[
            FIONBIO,
            TCGETS,
            TCSETSW,
            TCSETSF,
            TIOCGWINSZ,
            KVM_SIGNAL_MSI,
        ]),
        ThreadKind::Machine(MachineThread::Worker(DeviceKind::Console)) => {
            requests(&[FIONBIO, TCGETS, TCSETSW, TCSETSF, TIOCGWINSZ])
        }
        ThreadKind::Machine(MachineThread::Worker(DeviceKind::Balloon)) => {
            requests(&[PAGEMAP_SCAN])
        }
        ThreadKind::Machine(MachineThread::Worker(DeviceKind::Block)) => {
            requests(&[BLKDISCARD, BLKZEROOUT])
        }
        ThreadKind::Machine(MachineThread::Worker(DeviceKind::Net)) => {
            requests(&[TUNSETOFFLOAD, TUNSETQUEUE])
        }
        ThreadKind::EventMonitor
        | ThreadKind::Machine(MachineThread::Worker(DeviceKind::Mem))
        | ThreadKind::Machine(MachineThread::Worker(DeviceKind::Watchdog))
        | ThreadKind::Machine(MachineThread::Worker(DeviceKind::Rng)) => requests(&[]),
    }
}
