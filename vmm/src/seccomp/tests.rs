//! Filters of a legal size, total naming, and a thread that breaks its filter.

#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

use machine::threads::{DeviceKind, MachineThread};
use virtio_devices::GuestRam;
use virtio_devices::reclaim::{DiscardEngine, Expected, GuestRange, ResidencyProbe};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::threads::EVENT_THREAD;

/// The kernel's limit (`BPF_MAXINSNS` in uapi/linux/bpf_common.h).
const BPF_INSTRUCTIONS_MAX: usize = 4096;

#[test]
fn filters_of_every_kind_fit_the_kernels_limit() {
    let seccomp = Seccomp::new(SeccompMode::Errno).unwrap();
    assert_eq!(seccomp.filters.len(), ThreadKind::all().count());
    for (kind, filter) in &seccomp.filters {
        assert!(
            (50..BPF_INSTRUCTIONS_MAX).contains(&filter.len()),
            "{kind:?}: {}",
            filter.len()
        );
    }
    assert!(Seccomp::new(SeccompMode::Off).unwrap().filters.is_empty());
}

#[test]
fn filters_of_parents_allow_what_their_children_do() {
    for kind in ThreadKind::all() {
        let parent = rules(kind).unwrap();
        for child in calls::children(kind) {
            for (number, conditions) in rules(child).unwrap() {
                let allowed = parent.get(&number);
                assert!(
                    allowed.is_some(),
                    "{kind:?} starts {child:?}: call {number}"
                );
                if conditions.is_empty() {
                    assert!(allowed.unwrap().is_empty(), "{kind:?}, {child:?}: {number}");
                }
            }
        }
    }
}

/// A filter cannot be taken off and a trap ends the process, so each case runs in a process of its own: this very
/// test program, told by the environment which case to play.
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

/// Runs `action` under the filter of this kind of thread, on one that is called as the message of a trap shall say.
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

/// What any thread does: allocate, lock, tell the time, log, start over.
fn lives() -> bool {
    let large = vec![1u8; 8 << 20];
    let locked = std::sync::Mutex::new(large);
    std::thread::sleep(std::time::Duration::from_millis(1));
    eprintln!("alive at {:?}", std::time::Instant::now());
    locked.lock().unwrap().len() == 8 << 20
}

fn starts_a_query() -> bool {
    let hook = Arc::new(Seccomp::new(SeccompMode::Trap).unwrap()).hook();
    let query = std::thread::Builder::new()
        .name("api-query".into())
        .spawn(move || {
            hook(ThreadKind::ApiQuery);
            std::fs::read("/proc/self/statm").is_ok() && lives()
        });
    query.unwrap().join().unwrap()
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

/// What the balloon's worker does, with and without the vector call, and what an API thread measures.
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
        "query" => confined(SeccompMode::Trap, ThreadKind::HttpServer, starts_a_query),
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
fn threads_live_under_their_filters_and_start_their_children() {
    for case in ["query", "discard", "live"] {
        let output = play(case);
        assert!(output.status.success(), "{case}: {output:?}");
    }
}
