//! A balloon with its own memory, and the bare system calls to compare it with.
#![allow(unsafe_code)]
// UNSAFETY: the bare system calls are the baseline.

use std::fs::File;
use std::hint::black_box;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use strum::VariantArray as _;
use virtio_devices::balloon::spec::{
    VIRTIO_BALLOON_F_REPORTING, VIRTIO_BALLOON_F_STATS_VQ, VIRTIO_F_VERSION_1,
};
use virtio_devices::balloon::{Balloon, BalloonParams};
use virtio_devices::testing::{HandlerHarness, Segment, TestRam};
use virtio_devices::{GuestRam, QueueHandler, VirtioDevice};
use vm_memory::{FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap};

pub(crate) const PAGE: u64 = 4096;
pub(crate) const MIB: u64 = 1 << 20;
/// Rings and lists are below, the memory to return above.
pub(crate) const FREE_START: u64 = 16 * MIB;
pub(crate) const INFLATE: u16 = 0;
pub(crate) const REPORTING: u16 = 3;
/// `UIO_MAXIOV`: the longest vector that the kernel accepts.
const VECTOR_SPANS_MAX: usize = 1024;

#[derive(Clone, Copy, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "kebab-case")]
pub(crate) enum Backing {
    Private,
    #[strum(serialize = "private-thp")]
    PrivateHuge,
    Memfd,
}

impl Backing {
    pub(crate) const ALL: &'static [Self] = Self::VARIANTS;

    pub(crate) fn name(self) -> &'static str {
        self.into()
    }
}

/// A balloon with fresh RAM, and the same RAM as plain memory of this process.
pub(crate) struct Bench {
    pub(crate) harness: HandlerHarness<Box<dyn QueueHandler>>,
    /// Keeps the device alive.
    _balloon: Balloon,
    host_start: *mut u8,
    file: Option<File>,
    pidfd: i32,
}

impl Bench {
    pub(crate) fn new(backing: Backing, bytes: u64) -> Self {
        let ram = map(backing, bytes);
        let params = BalloonParams {
            ram: ram.mem(),
            size_bytes: 0,
            deflate_on_oom: false,
            free_page_reporting: true,
            free_page_hinting: false,
            reporting_policy: false,
            device_init: false,
        };
        let (mut balloon, _) = Balloon::new(params).expect("descriptors are to be had");
        let handler = balloon.take_handlers().remove(0);
        let features = VIRTIO_F_VERSION_1 | VIRTIO_BALLOON_F_STATS_VQ | VIRTIO_BALLOON_F_REPORTING;
        let mut harness = HandlerHarness::with_ram(handler, features, ram);
        for (index, size) in [(0, 128), (1, 128), (2, 64), (3, 32)] {
            harness.add_queue(index, size);
        }
        harness.activate().expect("queues are sound");
        let mem = harness.ram.mem().memory().into_inner();
        let region = mem.iter().next().expect("there is one region");
        // SAFETY: a plain system call; the descriptor lives as long as the process.
        let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) };
        Self {
            host_start: region.as_ptr(),
            file: region
                .file_offset()
                .map(|file| file.file().try_clone().expect("descriptors are to be had")),
            harness,
            _balloon: balloon,
            pidfd: i32::try_from(pidfd).expect("a descriptor"),
        }
    }

    pub(crate) fn touch(&self, ranges: &[(u64, u64)]) {
        for (start, bytes) in ranges {
            for at in (*start..start + bytes).step_by(PAGE as usize) {
                // SAFETY: inside the region, which is writable.
                unsafe { self.host_start.add(at as usize).write_volatile(1) };
            }
        }
    }

    /// Time for one chain of these segments, from kick to completion.
    pub(crate) fn device(&mut self, queue: u16, segments: &[Segment<'_>]) -> Duration {
        self.device_chains(queue, [segments])
    }

    /// Time for chains that are all available at one kick, until all are completed.
    pub(crate) fn device_chains<'s>(
        &mut self,
        queue: u16,
        chains: impl IntoIterator<Item = &'s [Segment<'s>]>,
    ) -> Duration {
        let mut count = 0;
        for segments in chains {
            self.harness.queue(queue).push(segments);
            count += 1;
        }
        let took = timed(|| self.harness.kick(queue).expect("queues are sound"));
        for _ in 0..count {
            assert!(self.harness.queue(queue).pop_used().is_some());
        }
        took
    }

    /// Time for the minimum number of system calls that free these ranges, and nothing else.
    pub(crate) fn bare(&self, ranges: &[(u64, u64)]) -> Duration {
        if let Some(file) = &self.file {
            return timed(|| punch_each(file, ranges));
        }
        let spans: Vec<_> = ranges
            .iter()
            .map(|(at, bytes)| libc::iovec {
                iov_base: self.host_start.wrapping_add(*at as usize).cast(),
                iov_len: *bytes as usize,
            })
            .collect();
        let mut done = true;
        let took = timed(|| {
            let mut vectors = spans.chunks(VECTOR_SPANS_MAX);
            done = vectors.all(|vector| self.discard_vector(vector));
        });
        if done {
            return took;
        }
        // A kernel without vectors needs one call per range.
        self.discard_each(ranges)
    }

    fn discard_vector(&self, spans: &[libc::iovec]) -> bool {
        // SAFETY: frees pages of the benchmark's own RAM.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                self.pidfd,
                spans.as_ptr(),
                spans.len(),
                libc::MADV_DONTNEED,
                0,
            )
        };
        ret > 0
    }

    /// Time for one call per range.
    pub(crate) fn discard_each(&self, ranges: &[(u64, u64)]) -> Duration {
        timed(|| {
            for (at, bytes) in ranges {
                let start = self.host_start.wrapping_add(*at as usize).cast();
                // SAFETY: frees pages of the benchmark's own RAM.
                let ret = unsafe { libc::madvise(start, *bytes as usize, libc::MADV_DONTNEED) };
                assert_eq!(ret, 0);
            }
        })
    }
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn punch_each(file: &File, ranges: &[(u64, u64)]) {
    for (at, bytes) in ranges {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: frees pages of the benchmark's own file.
        let ret = unsafe { libc::fallocate(file.as_raw_fd(), mode, *at as i64, *bytes as i64) };
        assert_eq!(ret, 0);
    }
}

pub(crate) fn map(backing: Backing, bytes: u64) -> TestRam {
    let file = match backing {
        Backing::Memfd => {
            // SAFETY: the name is a C string; the descriptor is ours alone.
            let file = unsafe { File::from_raw_fd(libc::memfd_create(c"bench".as_ptr(), 0)) };
            file.set_len(bytes).expect("memory files grow");
            Some(FileOffset::new(file, 0))
        }
        Backing::Private | Backing::PrivateHuge => None,
    };
    let regions = [(GuestAddress(0), bytes as usize, file)];
    let mem = GuestMemoryMmap::from_ranges_with_files(regions).expect("RAM can be mapped");
    let advice = match backing {
        Backing::PrivateHuge => libc::MADV_HUGEPAGE,
        Backing::Private | Backing::Memfd => libc::MADV_NOHUGEPAGE,
    };
    let region = mem.iter().next().expect("there is one region");
    // SAFETY: changes the page size of the region, not its content. A kernel without huge pages rejects the call, which
    // does not matter.
    unsafe { libc::madvise(region.as_ptr().cast(), bytes as usize, advice) };
    TestRam::around(GuestRam::new(mem), 0, FREE_START)
}

/// Keeps a second thread of this process running while it exists, so that the kernel must flush the TLB of another
/// processor.
pub(crate) struct BusyThread(Arc<AtomicBool>, Option<std::thread::JoinHandle<()>>);

impl BusyThread {
    pub(crate) fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !seen.load(Ordering::Relaxed) {
                black_box(0);
            }
        });
        Self(stop, Some(thread))
    }
}

impl Drop for BusyThread {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        if let Some(thread) = self.1.take() {
            thread.join().expect("it only spins");
        }
    }
}
