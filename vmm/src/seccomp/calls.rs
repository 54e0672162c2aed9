//! Which system calls each kind of thread makes, and why.
//!
//! Filters are inherited and add up: what a thread may do is what its own filter *and* those of all its ancestors
//! allow. So a thread that starts others has their lists in its own.

use libc::c_long;

use machine::threads::{DeviceKind, MachineThread};

use crate::threads::ThreadKind;

/// What Rust's and glibc's run time need on every thread: memory, locks, time, signals, the thread's own end, and
/// reading, writing and waiting on descriptors that are open already.
const EVERY_THREAD: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // The standard library's check, in debug builds, that what it closes is open.
    libc::SYS_fcntl,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_prctl,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    // A thread stops a vCPU, or aborts, by a signal to a thread of this process.
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Starts threads, which then take a narrower filter.
const STARTS_THREADS: &[c_long] = &[
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_seccomp,
    libc::SYS_set_tid_address,
];

/// Bytes over a connected socket or a terminal.
const SOCKET_IO: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
];

/// Gives guest memory back to the host and looks where it is.
const DISCARD: &[c_long] = &[
    libc::SYS_fallocate,
    libc::SYS_fstatfs,
    libc::SYS_mincore,
    libc::SYS_pidfd_open,
    libc::SYS_process_madvise,
];

/// Finds out how much of guest memory is resident.
const RESIDENCY: &[c_long] = &[
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_mincore,
    // What glibc makes of `fstat`, in versions before 2.39.
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_pread64,
    libc::SYS_statx,
    libc::SYS_sysinfo,
];

/// Reads and writes a disk image, by io_uring or by plain calls.
const DISK_IO: &[c_long] = &[
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_io_uring_enter,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_statx,
];

/// Wakes by timers.
const TIMERS: &[c_long] = &[
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
];

/// Makes a machine and takes it down: descriptors, memory, files, taps, threads' affinity.
const MACHINE: &[c_long] = &[
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_eventfd2,
    libc::SYS_flock,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
    libc::SYS_getcwd,
    // Whether this process may change the terminal that it is on.
    libc::SYS_getpgrp,
    libc::SYS_getuid,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_listen,
    libc::SYS_mbind,
    libc::SYS_memfd_create,
    libc::SYS_mkdir,
    libc::SYS_mlock,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_pipe2,
    libc::SYS_prlimit64,
    libc::SYS_readlink,
    libc::SYS_rename,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sched_setaffinity,
    libc::SYS_setsockopt,
    libc::SYS_signalfd4,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_uname,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
];

/// Restores the terminal and removes the sockets at the end.
const CLEANUP: &[c_long] = &[libc::SYS_munlock, libc::SYS_unlink, libc::SYS_unlinkat];

/// The threads a thread of this kind starts.
pub(super) fn children(kind: ThreadKind) -> Vec<ThreadKind> {
    match kind {
        ThreadKind::HttpServer => vec![ThreadKind::ApiQuery],
        ThreadKind::Control => MachineThread::all().map(ThreadKind::Machine).collect(),
        _ => Vec::new(),
    }
}

/// The lists of a kind, without those of its children.
pub(super) fn own(kind: ThreadKind) -> Vec<&'static [c_long]> {
    let mut lists = vec![EVERY_THREAD];
    lists.extend_from_slice(match kind {
        ThreadKind::Main => &[CLEANUP],
        ThreadKind::Control => &[
            MACHINE,
            STARTS_THREADS,
            SOCKET_IO,
            DISCARD,
            DISK_IO,
            TIMERS,
            RESIDENCY,
        ],
        ThreadKind::HttpServer => &[SOCKET_IO, STARTS_THREADS],
        ThreadKind::ApiQuery => &[RESIDENCY, &[libc::SYS_eventfd2]],
        ThreadKind::EventMonitor => &[],
        ThreadKind::Thresholds => &[RESIDENCY],
        ThreadKind::Machine(thread) => of_machine(thread),
    });
    lists
}

fn of_machine(thread: MachineThread) -> &'static [&'static [c_long]] {
    match thread {
        // Serial output leaves on the vCPU thread; MSI-X vectors get their descriptors when the guest unmasks them.
        MachineThread::Vcpu => &[SOCKET_IO, &[libc::SYS_eventfd2]],
        MachineThread::Serial => &[SOCKET_IO, TIMERS, &[libc::SYS_eventfd2]],
        MachineThread::Worker(DeviceKind::Balloon) => &[DISCARD, TIMERS, RESIDENCY],
        MachineThread::Worker(DeviceKind::Mem) => &[DISCARD],
        MachineThread::Worker(DeviceKind::Block) => &[DISK_IO, TIMERS],
        MachineThread::Worker(DeviceKind::Net) => &[SOCKET_IO, TIMERS],
        MachineThread::Worker(DeviceKind::Rng) => &[TIMERS, &[libc::SYS_pread64]],
        MachineThread::Worker(DeviceKind::Console) => &[SOCKET_IO, TIMERS],
        MachineThread::Worker(DeviceKind::Watchdog) => &[TIMERS],
        // Connects to programs of the host, and removes its socket when it ends.
        MachineThread::Worker(DeviceKind::Vsock) => {
            &[SOCKET_IO, CLEANUP, &[libc::SYS_connect, libc::SYS_socket]]
        }
    }
}
