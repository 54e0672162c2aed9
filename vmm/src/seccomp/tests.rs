//! Tests the size of the filters, the names of calls, and threads that violate their filters.

#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

use hypervisor::kick;
use machine::serial::{Endpoint, EndpointMode, SerialManager};
use machine::threads::{DeviceKind, MachineThread};
use seccompiler::{
    SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use virtio_devices::reclaim::{DiscardEngine, Expected, GuestRange, ResidencyProbe};
use virtio_devices::{GuestRam, ListeningSocket};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::calls::Test;
use super::*;
use crate::threads::EVENT_THREAD;

/// The kernel's limit (`BPF_MAXINSNS` in uapi/linux/bpf_common.h).
const BPF_INSTRUCTIONS_MAX: usize = 4096;

#[test]
fn filters_of_every_kind_fit_the_kernels_limit() {
    for kind in ThreadKind::all() {
        for action in [SeccompAction::Trap, SeccompAction::Log] {
            let filter = program(&allowed(kind), &action);
            assert!(
                (50..BPF_INSTRUCTIONS_MAX).contains(&filter.len()),
                "{kind:?}: {}",
                filter.len()
            );
        }
    }
}

#[test]
fn filter_is_created_once_when_its_thread_starts() {
    let seccomp = Seccomp::new(SeccompMode::Log).unwrap();
    let created = || seccomp.filters.lock().unpoisoned().len();
    assert_eq!(created(), 0);
    let filter = |kind| seccomp.filter(kind, &SeccompAction::Log);
    let first = filter(ThreadKind::Main);
    assert!(Arc::ptr_eq(&first, &filter(ThreadKind::Main)));
    filter(ThreadKind::Control);
    assert_eq!(created(), 2);
}

/// The same filter, from another compiler.
fn reference(allowed: Allowed, on_mismatch: SeccompAction) -> BpfProgram {
    let condition = |condition: &Condition| {
        let (operator, value) = match condition.test {
            Test::Is(value) => (SeccompCmpOp::Eq, value),
            Test::IsNot(value) => (SeccompCmpOp::Ne, value),
            Test::Without(bits) => (SeccompCmpOp::MaskedEq(bits), 0),
            Test::With(bits) => (SeccompCmpOp::MaskedEq(bits), bits),
            Test::OwnProcess => (SeccompCmpOp::Eq, u64::from(std::process::id())),
            Test::KickSignal => (SeccompCmpOp::Eq, u64::from(kick::signal().unsigned_abs())),
        };
        let length = SeccompCmpArgLen::Dword;
        SeccompCondition::new(condition.argument, length, operator, value).unwrap()
    };
    let rules = allowed.into_iter().map(|(number, alternatives)| {
        // An empty list of rules means any arguments.
        let is_free = alternatives.iter().any(Vec::is_empty);
        let alternatives = alternatives.iter().filter(|_| !is_free);
        let rule = |it: &Vec<Condition>| SeccompRule::new(it.iter().map(condition).collect());
        (number, alternatives.map(|it| rule(it).unwrap()).collect())
    });
    let target = TargetArch::x86_64;
    SeccompFilter::new(rules.collect(), on_mismatch, SeccompAction::Allow, target)
        .unwrap()
        .try_into()
        .unwrap()
}

/// The answer of a program to a call, as the kernel finds it.
fn answer(program: &BpfProgram, architecture: u32, number: u32, arguments: [u32; 6]) -> u32 {
    let (mut at, mut value) = (0, 0);
    loop {
        let it = &program[at];
        at += 1;
        match it.code {
            0x20 => {
                value = match it.k {
                    0 => number,
                    4 => architecture,
                    // Offsets of the lower halves.
                    offset => arguments[(offset as usize - 16) / 8],
                }
            }
            0x54 => value &= it.k,
            0x05 => at += it.k as usize,
            0x15 if value == it.k => at += usize::from(it.jt),
            0x35 if value >= it.k => at += usize::from(it.jt),
            0x15 | 0x35 => at += usize::from(it.jf),
            0x06 => return it.k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

/// Arguments on both sides of each condition of a call.
fn interesting(alternatives: &[Vec<Condition>]) -> Vec<[u32; 6]> {
    let mut all = vec![[0; 6], [u32::MAX; 6]];
    for conditions in alternatives {
        // One combination for each alternative, then one in which each single condition is changed.
        let mut arguments = [0; 6];
        for condition in conditions {
            let own = u64::from(std::process::id());
            let value = match condition.test {
                Test::Is(value) | Test::With(value) => value,
                Test::IsNot(value) => value + 1,
                Test::Without(bits) => !bits,
                Test::OwnProcess => own,
                Test::KickSignal => u64::from(kick::signal().unsigned_abs()),
            };
            arguments[usize::from(condition.argument)] = value as u32;
        }
        all.push(arguments);
        for condition in conditions {
            for bit in 0..32 {
                let mut other = arguments;
                other[usize::from(condition.argument)] ^= 1 << bit;
                all.push(other);
            }
            let mut other = arguments;
            let at = usize::from(condition.argument);
            for changed in [other[at].wrapping_add(1), other[at].wrapping_sub(1)] {
                other[at] = changed;
                all.push(other);
            }
        }
    }
    all
}

#[test]
fn filters_answer_like_those_of_another_compiler_and_are_shorter() {
    const X86_64: u32 = 0xc000_003e;
    for kind in ThreadKind::all() {
        let calls = allowed(kind);
        let own = program(&calls, &SeccompAction::Trap);
        let other = reference(calls.clone(), SeccompAction::Trap);
        assert!(own.len() * 3 < other.len() * 2, "{kind:?}: {}", own.len());
        let numbers = (0..600).chain([1 << 30, 1 << 30 | 1, u32::MAX - 1, u32::MAX]);
        for number in numbers {
            let known = calls.get(&i64::from(number));
            for arguments in interesting(known.map_or(&[], |it| it)) {
                let [found, expected] =
                    [&own, &other].map(|it| answer(it, X86_64, number, arguments));
                assert_eq!(found, expected, "{kind:?}: call {number} {arguments:x?}");
            }
        }
        // Programs of 32 bits.
        let killed = answer(&own, 0x4000_0003, 0, [0; 6]);
        assert_eq!(killed, u32::from(SeccompAction::KillProcess));
    }
}

#[test]
fn filters_of_parents_allow_what_their_children_do() {
    for kind in ThreadKind::all() {
        let parent = allowed(kind);
        for child in calls::children(kind) {
            for (number, alternatives) in allowed(child) {
                let of_parent = parent.get(&number);
                assert!(
                    of_parent.is_some(),
                    "{kind:?} starts {child:?}: call {number}"
                );
                let of_parent = of_parent.unwrap();
                let all = of_parent.iter().any(Vec::is_empty);
                for conditions in alternatives {
                    assert!(
                        all || of_parent.contains(&conditions),
                        "{kind:?}, {child:?}: {number}"
                    );
                }
            }
        }
    }
}

#[test]
fn document_shows_the_filters() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/seccomp.md");
    let text = document::text();
    if std::env::var_os("UPDATE_SECCOMP").is_some() {
        std::fs::write(path, text).unwrap();
        return;
    }
    assert!(
        std::fs::read_to_string(path).unwrap() == text,
        "docs/seccomp.md is out of date; run UPDATE_SECCOMP=1 cargo test -p vmm seccomp"
    );
}

#[test]
fn terminals_work_with_the_requests_of_every_glibc() {
    let requests = |kind| {
        let requests = ioctls::own(kind).into_iter();
        requests.map(|request| request.number).collect::<Vec<_>>()
    };
    for kind in ThreadKind::all() {
        let requests = requests(kind);
        for (old, new) in [
            (libc::TCGETS, libc::TCGETS2),
            (libc::TCSETS, libc::TCSETS2),
            (libc::TCSETSW, libc::TCSETSW2),
            (libc::TCSETSF, libc::TCSETSF2),
        ] {
            let of = |number: libc::Ioctl| requests.contains(&number);
            assert_eq!(of(old), of(new), "{kind:?}: {old:#x}");
        }
        assert!(requests.contains(&libc::TCSETS), "{kind:?}");
    }
}

/// A filter cannot be removed and a trap ends the process, so each case runs in a separate process: this test program,
/// with the case in its environment.
const CASE: &str = "SECCOMP_TEST_CASE";

fn play(case: &str) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "seccomp::tests::case_runner",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(CASE, case)
        .output()
        .unwrap()
}

/// Runs `action` under the filter of this kind of thread, on a thread whose name the message of a trap must contain.
fn confined(
    mode: SeccompMode,
    kind: ThreadKind,
    action: impl FnOnce() -> bool + Send + 'static,
) -> bool {
    let hook = Arc::new(Seccomp::new(mode).unwrap()).hook();
    std::thread::Builder::new()
        .name(EVENT_THREAD.to_owned())
        .spawn(move || {
            hook(kind);
            action()
        })
        .unwrap()
        .join()
        .unwrap()
}

fn opens_a_socket() -> bool {
    std::net::UdpSocket::bind("127.0.0.1:0").is_ok()
}

/// Common actions of every thread: allocate, lock, read the clock, log, restart system calls.
fn lives() -> bool {
    let large = vec![1u8; 8 << 20];
    let locked = std::sync::Mutex::new(large);
    std::thread::sleep(std::time::Duration::from_millis(1));
    eprintln!("alive at {:?}", std::time::Instant::now());
    locked.lock().unwrap().len() == 8 << 20
}

fn starts_a_query(hook: &ThreadStart) -> bool {
    let hook = Arc::clone(hook);
    let query = std::thread::Builder::new()
        .name("api-query".into())
        .spawn(move || {
            hook(ThreadKind::ApiQuery);
            std::fs::read("/proc/self/statm").is_ok() && lives()
        });
    query.unwrap().join().unwrap()
}

/// As the path of an assigned device.
fn resolves_any_path() -> bool {
    ["/proc/self", "/proc/self/", "."]
        .into_iter()
        .all(|path| std::fs::canonicalize(path).is_ok())
}

/// Makes the calls that `--console pty` needs.
fn makes_a_terminal() -> bool {
    let hook = Arc::new(Seccomp::new(SeccompMode::Off).unwrap()).hook();
    let start = Arc::new(move |thread| hook(ThreadKind::Machine(thread)));
    let manager = SerialManager::new(start).unwrap();
    let endpoint = Endpoint::open(&EndpointMode::Pty, &manager).unwrap();
    endpoint.pty_path().is_some_and(std::path::Path::exists)
}

/// Private and shared memory, 64 KiB each, all of it touched.
fn two_kinds_of_ram() -> GuestRam {
    const BYTES: usize = 64 << 10;
    let file = FileOffset::new(tempfile::tempfile_in("/dev/shm").unwrap(), 0);
    file.file().set_len(BYTES as u64).unwrap();
    let shared = GuestAddress(BYTES as u64);
    let ranges = [(GuestAddress(0), BYTES, None), (shared, BYTES, Some(file))];
    let mem = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
    mem.write_slice(&[1; 2 * BYTES], GuestAddress(0)).unwrap();
    GuestRam::new(mem)
}

/// Discards memory like the balloon's worker, with and without the vector call, and measures residency like an API
/// thread.
fn gives_memory_back_and_measures_it() -> bool {
    let ram = two_kinds_of_ram();
    let balloon = MachineThread::Worker(DeviceKind::Balloon);
    let probe = Arc::new(ResidencyProbe::new(ram.clone()).unwrap());
    let engines = [
        DiscardEngine::new(Arc::default()),
        DiscardEngine::without_vectors(Arc::default()),
    ];
    let worked = engines.into_iter().zip([0, 8]).all(|(mut engine, first)| {
        let ram = ram.clone();
        confined(SeccompMode::Trap, ThreadKind::Machine(balloon), move || {
            // Scattered pages, two of each kind of memory.
            let mut claims = [first, first + 2, first + 16, first + 18].map(|page| GuestRange {
                start: page * 4096,
                bytes: 4096,
            });
            engine
                .discard(&ram, &mut claims, Expected::Zeros)
                .discarded
                .bytes
                == 4 * 4096
        })
    });
    worked
        && [ThreadKind::ApiQuery, ThreadKind::Thresholds]
            .into_iter()
            .all(|kind| {
                let probe = Arc::clone(&probe);
                confined(SeccompMode::Trap, kind, move || {
                    probe.measure().unwrap().resident_bytes == (32 - 8) * 4096
                })
            })
}

/// The serial thread may hold the last reference to the console's socket; the vsock device's worker holds the last one
/// to its own.
fn removes_its_socket() -> bool {
    let vsock = MachineThread::Worker(DeviceKind::Vsock);
    [MachineThread::Serial, vsock].into_iter().all(|thread| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let socket = ListeningSocket::bind(&path).unwrap();
        let kind = ThreadKind::Machine(thread);
        confined(SeccompMode::Trap, kind, move || {
            drop(socket);
            true
        }) && !path.exists()
    })
}

/// Calls that none of the named kinds may make; each is harmless if it succeeds.
fn forbidden() -> Vec<Forbidden> {
    let every = |_: ThreadKind| true;
    let but_control = |kind| kind != ThreadKind::Control;
    let call =
        |name, whose: fn(ThreadKind) -> bool, number, arguments: [libc::c_long; 6]| Forbidden {
            name,
            whose,
            number,
            arguments,
        };
    let path = c"/proc/self/no-such-file".as_ptr() as libc::c_long;
    let at_cwd = libc::c_long::from(libc::AT_FDCWD);
    let flags = |flags: libc::c_int| libc::c_long::from(flags);
    let but_migrating =
        |kind: ThreadKind| !matches!(kind, ThreadKind::Control | ThreadKind::Migration);
    let stream = flags(libc::SOCK_STREAM | libc::SOCK_CLOEXEC);
    let code = flags(libc::PROT_WRITE | libc::PROT_EXEC);
    let private = flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let parent = libc::c_long::from(std::os::unix::process::parent_id());
    vec![
        call(
            "mmap",
            every,
            libc::SYS_mmap,
            [0, 4096, code, private, -1, 0],
        ),
        call("mprotect", every, libc::SYS_mprotect, [0, 0, code, 0, 0, 0]),
        call("execve", every, libc::SYS_execve, [path, 0, 0, 0, 0, 0]),
        call("ptrace", every, libc::SYS_ptrace, [-1, 0, 0, 0, 0, 0]),
        call(
            "open to write",
            but_control,
            libc::SYS_openat,
            [at_cwd, path, flags(libc::O_RDWR), 0, 0, 0],
        ),
        call(
            "TCP socket",
            but_migrating,
            libc::SYS_socket,
            [flags(libc::AF_INET), stream, 0, 0, 0, 0],
        ),
        call(
            "TCP socket over IPv6",
            but_migrating,
            libc::SYS_socket,
            [flags(libc::AF_INET6), stream, 0, 0, 0, 0],
        ),
        call(
            "netlink socket",
            every,
            libc::SYS_socket,
            [
                flags(libc::AF_NETLINK),
                flags(libc::SOCK_RAW | libc::SOCK_CLOEXEC),
                0,
                0,
                0,
                0,
            ],
        ),
        call(
            "tgkill",
            every,
            libc::SYS_tgkill,
            [parent, parent, 0, 0, 0, 0],
        ),
        call("kill", every, libc::SYS_kill, [parent, 0, 0, 0, 0, 0]),
        call(
            "pidfd_open",
            every,
            libc::SYS_pidfd_open,
            [parent, 0, 0, 0, 0, 0],
        ),
        call(
            "fcntl",
            every,
            libc::SYS_fcntl,
            [-1, flags(libc::F_SETOWN), parent, 0, 0, 0],
        ),
        call(
            "prlimit64",
            every,
            libc::SYS_prlimit64,
            [libc::c_long::from(libc::pid_t::MAX), 0, 0, 0, 0, 0],
        ),
        call(
            "MADV_PAGEOUT",
            every,
            libc::SYS_process_madvise,
            [-1, 0, 0, flags(libc::MADV_PAGEOUT), 0, 0],
        ),
        call(
            "prctl",
            every,
            libc::SYS_prctl,
            [flags(libc::PR_GET_DUMPABLE), 0, 0, 0, 0, 0],
        ),
        call(
            "rt_sigaction",
            every,
            libc::SYS_rt_sigaction,
            [flags(libc::SIGTERM), 0, 0, 8, 0, 0],
        ),
        call("TIOCSTI", every, libc::SYS_ioctl, [-1, 0x5412, 0, 0, 0, 0]),
        call(
            "KVM_CREATE_VM",
            but_control,
            libc::SYS_ioctl,
            [-1, 0xae01, 0, 0, 0, 0],
        ),
        call(
            "memory slot",
            |kind| {
                let opens_blocks = MachineThread::Worker(DeviceKind::Mem);
                let records_writes = [ThreadKind::Migration, ThreadKind::Snapshot];
                // The guest places the registers of assigned devices.
                let places_registers = ThreadKind::Machine(MachineThread::Vcpu);
                let may = [
                    ThreadKind::Control,
                    places_registers,
                    ThreadKind::Machine(opens_blocks),
                ];
                !may.contains(&kind) && !records_writes.contains(&kind)
            },
            libc::SYS_ioctl,
            [-1, 0x4020_ae46, 0, 0, 0, 0],
        ),
        call(
            "accept4",
            |kind| {
                let may = [DeviceKind::VhostUser, DeviceKind::Vsock]
                    .map(MachineThread::Worker)
                    .into_iter()
                    .chain([MachineThread::Serial])
                    .map(ThreadKind::Machine)
                    .chain([
                        ThreadKind::Control,
                        ThreadKind::HttpServer,
                        ThreadKind::Migration,
                    ]);
                !may.into_iter().any(|may| may == kind)
            },
            libc::SYS_accept4,
            [-1, 0, 0, 0, 0, 0],
        ),
        call("sendto", every, libc::SYS_sendto, [-1, 0, 0, 0, path, 16]),
        call(
            "sendmsg",
            |kind| {
                let may_not = [
                    MachineThread::Vcpu,
                    MachineThread::Serial,
                    MachineThread::Worker(DeviceKind::Console),
                    MachineThread::Worker(DeviceKind::Net),
                ];
                may_not.map(ThreadKind::Machine).contains(&kind)
            },
            libc::SYS_sendmsg,
            [-1, 0, 0, 0, 0, 0],
        ),
        call(
            "memfd_create",
            but_control,
            libc::SYS_memfd_create,
            [0, 0, 0, 0, 0, 0],
        ),
    ]
}

struct Forbidden {
    name: &'static str,
    whose: fn(ThreadKind) -> bool,
    number: libc::c_long,
    arguments: [libc::c_long; 6],
}

impl Forbidden {
    /// Whether a filter rejects the call. With these arguments, nothing else causes this result.
    #[allow(unsafe_code)]
    fn is_refused(&self) -> bool {
        let [a, b, c, d, e, f] = self.arguments;
        // SAFETY: with these arguments every call fails, reads a value, or creates a mapping or descriptor that stays
        // unused.
        let result = unsafe { libc::syscall(self.number, a, b, c, d, e, f) };
        result == -1 && std::io::Error::last_os_error().raw_os_error() == Some(libc::EPERM)
    }
}

/// Tries all forbidden calls on a thread of each kind.
fn forbidden_is_refused() -> bool {
    let tried = ThreadKind::all().all(|kind| {
        confined(SeccompMode::Errno, kind, move || {
            forbidden().iter().all(|call| {
                let refused = !(call.whose)(kind) || call.is_refused();
                if !refused {
                    eprintln!("{kind:?} may make the call {}", call.name);
                }
                refused
            })
        })
    });
    // Without a filter no call may be rejected; otherwise the test above would prove nothing.
    let canary = confined(SeccompMode::Off, ThreadKind::Main, || {
        forbidden().iter().all(|call| !call.is_refused())
    });
    tried && canary
}

#[test]
fn case_runner() {
    let Ok(case) = std::env::var(CASE) else {
        return;
    };
    let fine = match case.as_str() {
        "trap" => confined(SeccompMode::Trap, ThreadKind::EventMonitor, opens_a_socket),
        "errno" => !confined(
            SeccompMode::Errno,
            ThreadKind::Machine(MachineThread::Vcpu),
            opens_a_socket,
        ),
        "log" => confined(SeccompMode::Log, ThreadKind::EventMonitor, opens_a_socket),
        "off" => confined(SeccompMode::Off, ThreadKind::EventMonitor, opens_a_socket),
        "discard" => gives_memory_back_and_measures_it(),
        "query" => {
            // Created before the filter is installed, as in the program, because it installs a signal handler.
            let hook = Arc::new(Seccomp::new(SeccompMode::Trap).unwrap()).hook();
            confined(SeccompMode::Trap, ThreadKind::HttpServer, move || {
                starts_a_query(&hook)
            })
        }
        "path" => confined(SeccompMode::Trap, ThreadKind::Control, resolves_any_path),
        "socket" => removes_its_socket(),
        "terminal" => confined(SeccompMode::Trap, ThreadKind::Control, makes_a_terminal),
        "forbidden" => forbidden_is_refused(),
        "live" => ThreadKind::all().all(|kind| confined(SeccompMode::Trap, kind, lives)),
        unknown => panic!("{unknown}"),
    };
    assert!(fine, "{case}");
}

#[test]
fn thread_that_breaks_its_filter_is_trapped_and_named() {
    let output = play("trap");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(128 + libc::SIGSYS), "{text}");
    assert!(text.contains("thread event-monitor"), "{text}");
    assert!(
        text.contains(&format!("system call {};", libc::SYS_socket)),
        "{text}"
    );
}

#[test]
fn thread_that_breaks_its_filter_goes_on_in_the_other_modes() {
    for case in ["errno", "log", "off"] {
        let output = play(case);
        assert!(output.status.success(), "{case}: {output:?}");
    }
}

#[test]
fn thread_of_each_kind_is_refused_what_it_must_not_do() {
    let output = play("forbidden");
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn threads_live_under_their_filters_and_start_their_children() {
    for case in ["query", "discard", "terminal", "path", "socket", "live"] {
        let output = play(case);
        assert!(output.status.success(), "{case}: {output:?}");
    }
}
