//! Tests that no memory is discarded while it is exported, loaded on demand or pinned.
#![allow(unsafe_code)]
// UNSAFETY: `userfaultfd` has no safe wrapper among our dependencies.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use strum::VariantArray;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use crate::reclaim::guarded_ram::{GuardedRam, Kind, PAGE, RamArea};
use crate::reclaim::{
    DiscardEngine, DiscardSwitch, Expected, GuestRange, InhibitReason, SkipReason,
};

const DEADLINE: Duration = Duration::from_secs(60);
const PAGES: usize = 16;

fn pages(first: usize, count: usize) -> GuestRange {
    GuestRange {
        start: (first * PAGE) as u64,
        bytes: (count * PAGE) as u64,
    }
}

fn guarded(kind: Kind) -> GuardedRam {
    GuardedRam::new(&[RamArea {
        guest_page: 0,
        pages: PAGES,
        kind,
    }])
}

#[test]
fn switch_for_each_reason_keeps_every_kind_of_memory() {
    for &reason in InhibitReason::VARIANTS {
        for kind in [Kind::Anonymous, Kind::Memfd, Kind::PrivateFile] {
            let switch = Arc::<DiscardSwitch>::default();
            let mut engine = DiscardEngine::new(Arc::clone(&switch));
            let guarded = guarded(kind);
            let guard = switch.inhibit(reason);
            assert_eq!(switch.inhibited(), Some(reason));
            let outcome = engine.discard(&guarded.ram, &mut [pages(0, PAGES)], Expected::Anything);
            assert_eq!(
                outcome.skipped.get(SkipReason::Inhibited),
                (PAGES * PAGE) as u64
            );
            assert_eq!((outcome.syscalls, guarded.discarded()), (0, vec![]));
            drop(guard);
            engine.discard(&guarded.ram, &mut [pages(0, PAGES)], Expected::Anything);
            assert_eq!(guarded.discarded().len(), PAGES, "{kind:?}");
        }
    }
}

/// The guarantee for an exporter: while a settled guard exists no page changes, however much memory the guest returns.
#[test]
fn guard_that_has_settled_keeps_memory_under_a_busy_engine() {
    let switch = Arc::<DiscardSwitch>::default();
    let guarded = guarded(Kind::Anonymous);
    let (ram, stop) = (guarded.ram.clone(), AtomicBool::new(false));
    thread::scope(|scope| {
        let busy = scope.spawn(|| {
            let mut engine = DiscardEngine::new(Arc::clone(&switch));
            let mut discarded = 0;
            while !stop.load(Ordering::Relaxed) {
                let outcome = engine.discard(&ram, &mut [pages(0, PAGES)], Expected::Zeros);
                discarded += outcome.discarded.ranges;
            }
            discarded
        });
        for _ in 0..100 {
            let guard = switch.inhibit(InhibitReason::MemoryExport);
            let start = Instant::now();
            while !guard.is_settled() {
                assert!(start.elapsed() < DEADLINE, "a batch does not end");
                thread::yield_now();
            }
            guarded.refill();
            for _ in 0..20 {
                assert_eq!(guarded.discarded(), []);
            }
            drop(guard);
            thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
        assert!(busy.join().unwrap() > 0, "the engine never got a turn");
    });
}

/// The view of an on-demand restore: a discarded page is an event that must be read.
#[test]
fn inhibited_discard_tells_a_userfaultfd_nothing() {
    let guarded = guarded(Kind::Anonymous);
    let mem = guarded.ram.memory().into_inner();
    let region = mem.iter().next().unwrap();
    let (start, bytes) = (region.as_ptr() as u64, region.len());
    let mut faults = match Faults::watch(start, bytes) {
        Ok(faults) => faults,
        Err(error) => {
            test_skip::skip(format!("no userfaultfd here: {error}"));
            return;
        }
    };
    let switch = Arc::<DiscardSwitch>::default();
    let mut engine = DiscardEngine::new(Arc::clone(&switch));
    let guard = switch.inhibit(InhibitReason::MemoryImport);
    // The call would block forever, because the event is not read.
    engine.discard(&guarded.ram, &mut [pages(2, 3)], Expected::Zeros);
    assert_eq!(faults.removed(Duration::ZERO).unwrap(), None);
    drop(guard);
    let removed = thread::scope(|scope| {
        let reader = scope.spawn(|| faults.removed(DEADLINE).unwrap());
        let outcome = engine.discard(&guarded.ram, &mut [pages(2, 3)], Expected::Zeros);
        assert_eq!(outcome.discarded.bytes, 3 * PAGE as u64);
        reader.join().unwrap()
    });
    let (first, end) = (start + 2 * PAGE as u64, start + 5 * PAGE as u64);
    assert_eq!(removed, Some((first, end)));
    // Without it, absent pages read as zeros again and cause no events.
    drop(faults);
    assert_eq!(guarded.discarded(), [(0, 2), (0, 3), (0, 4)]);
}

/// A userfaultfd (include/uapi/linux/userfaultfd.h) that is notified of discarded memory.
struct Faults {
    file: File,
}

const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const UFFD_EVENT_REMOVE: u8 = 0x15;
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;

impl Faults {
    fn watch(start: u64, bytes: u64) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
        // SAFETY: the call takes and returns integers.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just returned this descriptor, and it has no other owner.
        let file = unsafe { File::from_raw_fd(i32::try_from(fd).unwrap()) };
        let faults = Self { file };
        // API version, requested features, and space for the kernel's reply.
        faults.ioctl(UFFDIO_API, &mut [UFFD_API, UFFD_FEATURE_EVENT_REMOVE, 0])?;
        // Start, length, mode, and space for the kernel's reply.
        faults.ioctl(
            UFFDIO_REGISTER,
            &mut [start, bytes, UFFDIO_REGISTER_MODE_MISSING, 0],
        )?;
        Ok(faults)
    }

    fn ioctl(&self, request: libc::Ioctl, words: &mut [u64]) -> io::Result<()> {
        assert_eq!((request as usize >> 16) & 0x3fff, size_of_val(words));
        // SAFETY: the request takes a structure of as many words as given, as just checked, and registers a range,
        // which does not change its content.
        let ret = unsafe { libc::ioctl(self.file.as_raw_fd(), request, words.as_mut_ptr()) };
        if ret == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// The next range that was discarded, if one arrives within `wait`.
    fn removed(&mut self, wait: Duration) -> io::Result<Option<(u64, u64)>> {
        let mut poll = libc::pollfd {
            fd: self.file.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let wait_ms = i32::try_from(wait.as_millis()).unwrap();
        // SAFETY: one structure, which outlives the call.
        if unsafe { libc::poll(&raw mut poll, 1, wait_ms) } == 0 {
            return Ok(None);
        }
        let mut message = [0; 32];
        self.file.read_exact(&mut message)?;
        assert_eq!(message[0], UFFD_EVENT_REMOVE, "another event");
        let word = |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().unwrap());
        Ok(Some((word(8), word(16))))
    }
}
