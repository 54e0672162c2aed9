//! The system calls of each thread kind, with reasons.
//!
//! A thread inherits its ancestors' filters: it may make a call only if its own filter *and* those of all its ancestors
//! allow it. Therefore the list of a thread that starts others includes their lists.
//!
//! If a call can do more than the thread needs, conditions on its arguments follow it. Several lines for one call are
//! alternatives; a line without conditions allows any arguments.

use libc::c_long;

use machine::threads::{DeviceKind, MachineThread};

use crate::threads::ThreadKind;

/// A system call that a thread may make, if all conditions hold.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    /// Its name in the generated document.
    #[cfg(test)]
    pub(super) name: &'static str,
    pub(super) number: c_long,
    pub(super) conditions: &'static [Condition],
}

/// A condition on an argument, counted from 0. All of them are integers of 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Condition {
    pub(super) argument: u8,
    pub(super) test: Test,
    pub(super) text: &'static str,
}

/// The test of an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Test {
    /// It has this value.
    Is(u64),
    /// It does not have this value.
    IsNot(u64),
    /// None of these bits is set.
    Without(u64),
    /// All of these bits are set.
    With(u64),
    /// It is the id of this process.
    OwnProcess,
    /// It is the signal that interrupts vCPUs.
    KickSignal,
}

/// The values that conditions use.
mod values {
    pub(super) use libc::*;

    pub(super) const PUNCH_HOLE: c_int = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    pub(super) const DATAGRAM: c_int = SOCK_DGRAM | SOCK_CLOEXEC;
    pub(super) const STREAM: c_int = SOCK_STREAM | SOCK_CLOEXEC;
    pub(super) const NO_FLAGS: c_int = 0;
    pub(super) const THIS_PROCESS: pid_t = 0;
    pub(super) const NO_ADDRESS: c_int = 0;
    /// As in linux/fcntl.h.
    pub(super) const F_SETOWN_EX: c_int = 15;
    /// As in asm/prctl.h.
    pub(super) const ARCH_REQ_XCOMP_GUEST_PERM: c_int = 0x1025;
}

macro_rules! condition {
    ($argument:literal is $value:ident) => {
        condition!(@ $argument, Test::Is(values::$value as u64), concat!("is ", stringify!($value)))
    };
    ($argument:literal not $value:ident) => {
        condition!(@ $argument, Test::IsNot(values::$value as u64), concat!("is not ", stringify!($value)))
    };
    ($argument:literal without $($bit:ident)|+) => {
        condition!(@ $argument, Test::Without($(values::$bit as u64)|+), concat!("has none of", $(" ", stringify!($bit)),+))
    };
    ($argument:literal with $($bit:ident)|+) => {
        condition!(@ $argument, Test::With($(values::$bit as u64)|+), concat!("has", $(" ", stringify!($bit)),+))
    };
    ($argument:literal own_process) => {
        condition!(@ $argument, Test::OwnProcess, "is the id of this process")
    };
    ($argument:literal kick_signal) => {
        condition!(@ $argument, Test::KickSignal, "is the signal that interrupts vCPUs")
    };
    (@ $argument:literal, $test:expr, $text:expr) => {
        Condition { argument: $argument, test: $test, text: $text }
    };
}

macro_rules! calls {
    ($($name:ident $([$($condition:tt)+])*),* $(,)?) => {
        &[$(Call {
            #[cfg(test)]
            name: stringify!($name),
            number: libc::$name,
            conditions: &[$(condition!($($condition)+)),*],
        }),*]
    };
}

/// Calls that the runtimes of Rust and glibc make on every thread: memory, locks, time, signals, the thread's own end,
/// and reading, writing and waiting on open descriptors.
pub(super) const EVERY_THREAD: &[Call] = calls![
    SYS_brk,
    SYS_clock_getres,
    SYS_clock_gettime,
    SYS_clock_nanosleep,
    SYS_close,
    SYS_epoll_ctl,
    SYS_epoll_pwait,
    SYS_epoll_wait,
    SYS_exit,
    SYS_exit_group,
    // Used, among others, by the standard library in debug builds to check that a descriptor is open before it closes
    // it. Setting an owner is forbidden: a descriptor sends signals to its owner, which can be any process.
    SYS_fcntl [1 not F_SETOWN] [1 not F_SETOWN_EX],
    SYS_futex,
    SYS_getpid,
    SYS_getrandom,
    SYS_gettid,
    SYS_gettimeofday,
    SYS_lseek,
    SYS_madvise,
    SYS_membarrier,
    // The VMM generates no code at run time, so no mapping needs to be executable.
    SYS_mmap [2 without PROT_EXEC],
    SYS_mprotect [2 without PROT_EXEC],
    SYS_mremap,
    SYS_munmap,
    SYS_nanosleep,
    SYS_poll,
    SYS_ppoll,
    SYS_prctl [0 is PR_SET_NAME],
    SYS_prctl [0 is PR_GET_NAME],
    // glibc names mappings if GLIBC_TUNABLES requests it.
    SYS_prctl [0 is PR_SET_VMA],
    SYS_read,
    SYS_readv,
    SYS_restart_syscall,
    SYS_rseq,
    // The code that ends a process resets its own handler first.
    SYS_rt_sigaction [0 is SIGABRT],
    SYS_rt_sigaction [0 is SIGBUS],
    SYS_rt_sigaction [0 is SIGSEGV],
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sched_getaffinity,
    SYS_sched_yield,
    SYS_set_robust_list,
    SYS_sigaltstack,
    // Stopping a vCPU and aborting both send a signal to a thread of this process.
    SYS_tgkill [0 own_process],
    SYS_write,
    SYS_writev,
];

/// Starts threads.
const STARTS_THREADS: &[Call] = calls![
    SYS_clone [0 with CLONE_THREAD | CLONE_VM],
    // Its flags are in memory, which a filter cannot read.
    SYS_clone3,
    SYS_set_tid_address,
];

/// Installs the narrower filter of a thread that was started.
const FILTERS: &[Call] = calls![
    SYS_prctl [0 is PR_SET_NO_NEW_PRIVS],
    SYS_seccomp [0 is SECCOMP_SET_MODE_FILTER],
];

/// Accepts the clients of a listener.
const ACCEPTS: &[Call] = calls![SYS_accept4];

/// Transfers bytes over a connected socket.
const SOCKET_IO: &[Call] = calls![
    SYS_getsockopt,
    SYS_recvfrom,
    SYS_recvmsg,
    SYS_sendmsg,
    SYS_sendto [5 is NO_ADDRESS],
    SYS_shutdown,
];

/// Creates sockets for migrations between hosts.
const TCP: &[Call] = calls![
    SYS_socket [0 is AF_INET] [1 is STREAM],
    SYS_socket [0 is AF_INET6] [1 is STREAM],
];

/// Returns guest memory to the host and measures residency.
const DISCARD: &[Call] = calls![
    SYS_fallocate [1 is PUNCH_HOLE],
    SYS_fstatfs,
    SYS_mincore,
    SYS_process_madvise [3 is MADV_DONTNEED] [4 is NO_FLAGS],
    // Splits huge pages of which a part was discarded.
    SYS_process_madvise [3 is MADV_COLD] [4 is NO_FLAGS],
];

/// Measures how much of guest memory is resident.
const RESIDENCY: &[Call] = calls![
    SYS_fstat,
    SYS_fstatfs,
    SYS_mincore,
    // glibc's `fstat` in versions before 2.39.
    SYS_newfstatat,
    SYS_pread64,
    SYS_statx,
    SYS_sysinfo,
];

/// Reads what the host reports about itself and this process.
const READ_FILES: &[Call] = calls![
    SYS_openat [2 without O_WRONLY | O_RDWR | O_CREAT | O_TRUNC],
];

/// Reads and writes a disk image, by io_uring, Linux AIO or plain calls.
const DISK_IO: &[Call] = calls![
    SYS_fallocate,
    SYS_fdatasync,
    SYS_fstat,
    SYS_fsync,
    // An image of another format than raw grows.
    SYS_ftruncate,
    SYS_io_destroy,
    SYS_io_getevents,
    SYS_io_submit,
    SYS_io_uring_enter,
    SYS_pread64,
    SYS_preadv,
    SYS_preadv2,
    SYS_pwrite64,
    SYS_pwritev,
    SYS_pwritev2,
    SYS_statx,
];

/// Creates and sets timers.
const TIMERS: &[Call] = calls![SYS_timerfd_create, SYS_timerfd_gettime, SYS_timerfd_settime,];

/// Creates and destroys a machine: descriptors, memory, files, taps, threads' affinity.
const MACHINE: &[Call] = calls![
    // AMX for guests.
    SYS_arch_prctl [0 is ARCH_REQ_XCOMP_GUEST_PERM],
    SYS_bind,
    SYS_connect,
    SYS_dup,
    SYS_epoll_create1,
    SYS_eventfd2,
    // Resolves a path that ends with a slash.
    SYS_faccessat2,
    SYS_flock,
    SYS_fstatfs,
    SYS_ftruncate,
    SYS_getcwd,
    // The other devices of an IOMMU group, for an error.
    SYS_getdents64,
    // Checks whether this process may change its terminal.
    SYS_getpgrp,
    SYS_getuid,
    SYS_io_setup,
    SYS_io_uring_register,
    SYS_io_uring_setup,
    SYS_listen,
    SYS_mbind,
    SYS_memfd_create,
    SYS_mkdir,
    SYS_mlock,
    SYS_newfstatat,
    SYS_open,
    SYS_openat,
    // The discard engine probes the kernel's features once.
    SYS_pidfd_open [0 own_process],
    SYS_pipe2,
    SYS_prlimit64 [0 is THIS_PROCESS],
    SYS_readlink,
    SYS_rename,
    SYS_rt_sigaction [0 kick_signal],
    SYS_rt_sigpending,
    SYS_rt_sigtimedwait,
    SYS_sched_setaffinity,
    SYS_setsockopt,
    SYS_signalfd4,
    SYS_socket [0 is AF_UNIX],
    // Interfaces are configured through a socket that sends no data.
    SYS_socket [0 is AF_INET] [1 is DATAGRAM],
    SYS_socketpair [0 is AF_UNIX],
    SYS_uname,
    SYS_unlink,
    SYS_unlinkat,
    SYS_userfaultfd,
];

/// Confines this thread further.
const CONFINES: &[Call] = calls![
    SYS_landlock_add_rule,
    SYS_landlock_create_ruleset,
    SYS_landlock_restrict_self,
];

/// Restores the terminal and removes the sockets at the end, if they are still those of this process.
const CLEANUP: &[Call] = calls![SYS_munlock, SYS_statx, SYS_unlink, SYS_unlinkat];

/// The threads a thread of this kind starts.
pub(super) fn children(kind: ThreadKind) -> Vec<ThreadKind> {
    match kind {
        ThreadKind::HttpServer => vec![ThreadKind::ApiQuery],
        ThreadKind::Control => MachineThread::all()
            .map(ThreadKind::Machine)
            .chain([ThreadKind::Migration, ThreadKind::Snapshot])
            .collect(),
        _ => Vec::new(),
    }
}

/// The lists of a kind, without those of its children.
pub(super) fn own(kind: ThreadKind) -> Vec<&'static [Call]> {
    let mut lists = vec![EVERY_THREAD];
    lists.extend_from_slice(match kind {
        ThreadKind::Main => &[CLEANUP],
        ThreadKind::Control => &[
            MACHINE,
            CONFINES,
            STARTS_THREADS,
            FILTERS,
            ACCEPTS,
            SOCKET_IO,
            DISCARD,
            DISK_IO,
            TIMERS,
            RESIDENCY,
            TCP,
        ],
        ThreadKind::HttpServer => &[ACCEPTS, SOCKET_IO, STARTS_THREADS, FILTERS],
        ThreadKind::ApiQuery => &[RESIDENCY, READ_FILES, calls![SYS_eventfd2]],
        ThreadKind::EventMonitor => &[],
        ThreadKind::Thresholds => &[RESIDENCY, READ_FILES],
        // Connects to the peer, reads RAM and discards parts of it, and syncs disks. Its threads for further connections have its filter.
        ThreadKind::Migration => &[
            STARTS_THREADS,
            ACCEPTS,
            SOCKET_IO,
            CLEANUP,
            RESIDENCY,
            READ_FILES,
            DISCARD,
            TCP,
            calls![SYS_connect, SYS_fdatasync, SYS_setsockopt, SYS_socket [0 is AF_UNIX]],
        ],
        // Reads RAM, creates files and names the last one.
        ThreadKind::Snapshot => &[
            RESIDENCY,
            CLEANUP,
            READ_FILES,
            calls![
                // Resolves a path that ends with a slash.
                SYS_faccessat2,
                SYS_fallocate [1 is PUNCH_HOLE],
                SYS_fdatasync,
                SYS_fsync,
                SYS_ftruncate,
                SYS_openat [2 with O_CREAT | O_EXCL],
                SYS_pwrite64,
                SYS_readlink,
                SYS_rename,
            ],
        ],
        ThreadKind::Machine(thread) => of_machine(thread),
    });
    lists
}

fn of_machine(thread: MachineThread) -> &'static [&'static [Call]] {
    match thread {
        // Serial output leaves on the vCPU thread, by `write`; MSI-X vectors get their descriptors when the guest unmasks
        // them.
        MachineThread::Vcpu => &[
            calls![SYS_eventfd2, SYS_prctl [0 is PR_SCHED_CORE]],
            // Registers of assigned devices that are not mapped.
            calls![SYS_pread64, SYS_pwrite64],
        ],
        // Records the order in which RAM was touched in a new file.
        MachineThread::Fill => &[
            SOCKET_IO,
            calls![
                SYS_fsync,
                SYS_openat [2 with O_CREAT | O_EXCL],
                SYS_pread64,
                SYS_rename,
                SYS_unlink,
            ],
        ],
        // The console's socket is removed here if a client connects just as the control thread closes it.
        // Input of a console goes through a pair of sockets.
        MachineThread::Serial => &[
            ACCEPTS,
            TIMERS,
            calls![SYS_eventfd2, SYS_sendto [5 is NO_ADDRESS], SYS_statx, SYS_unlink],
        ],
        MachineThread::Worker(DeviceKind::Balloon) => &[DISCARD, TIMERS, RESIDENCY],
        MachineThread::Worker(DeviceKind::Mem) => &[DISCARD],
        MachineThread::Worker(DeviceKind::Block) => &[DISK_IO, TIMERS],
        MachineThread::Worker(DeviceKind::Net) => &[TIMERS],
        MachineThread::Worker(DeviceKind::Rng) => &[TIMERS, calls![SYS_pread64]],
        MachineThread::Worker(DeviceKind::Console) => &[TIMERS],
        MachineThread::Worker(DeviceKind::Watchdog) => &[TIMERS],
        MachineThread::Worker(DeviceKind::Rtc) => &[TIMERS],
        // Requests and faults need no further call but `ioctl`; an assigned device has no worker.
        MachineThread::Worker(DeviceKind::Iommu | DeviceKind::Assigned) => &[],
        // Connects to the back end, or waits for it on a socket, which it removes when it ends.
        MachineThread::Worker(DeviceKind::VhostUser) => &[
            ACCEPTS,
            SOCKET_IO,
            CLEANUP,
            TIMERS,
            calls![SYS_connect, SYS_eventfd2, SYS_socket [0 is AF_UNIX]],
        ],
        MachineThread::Worker(DeviceKind::Pmem) => &[calls![SYS_fdatasync]],
        // Connects to programs of the host, and removes its socket when it ends.
        MachineThread::Worker(DeviceKind::Vsock) => &[
            ACCEPTS,
            SOCKET_IO,
            CLEANUP,
            TIMERS,
            calls![SYS_connect, SYS_socket [0 is AF_UNIX]],
        ],
    }
}
