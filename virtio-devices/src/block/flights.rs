//! The jobs in flight in an I/O engine.
//!
//! A pause waits for all of them, so [`COST_MAX`] limits their total cost. A long job runs alone: no further chain is
//! taken from the ring before the job has ended. A pause then waits only for the job's current operation, and the chain
//! goes back to the ring to be served again from the start.

#![allow(unsafe_code)]
// UNSAFETY: fulfils the contract of `IoEngine::submit`: a job, and the memory its operation points to, stays unmodified
// in its slot until the engine has reported the operation's completion, even if this is dropped.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_S_IOERR;

use super::engine::{Completion, IoEngine};
use super::job::{Job, Progress};
use crate::worker::Turn;

/// Delay before a retry if the kernel rejects operations that must be waited for. Seen only under memory pressure.
const WAIT_RETRY: Duration = Duration::from_millis(1);

/// Maximum number of submission attempts, [`WAIT_RETRY`] apart, before the disk stops: one second in total. A shortage
/// of memory is temporary, and Linux never resets a disk that requests a reset.
const FLUSH_TRIES_MAX: u32 = 1000;

/// Maximum total cost of the jobs in flight, see [`Job::cost`]. A disk of 500 MB/s moves as many bytes in 32 ms, and
/// this number of the shortest jobs (256) keeps any disk busy.
const COST_MAX: u64 = 16 << 20;

/// A job that has ended.
#[derive(Debug)]
pub(super) struct Landed {
    pub(super) job: Job,
    /// Status byte for the guest.
    pub(super) status: u8,
    /// Set if the error is the host's.
    pub(super) host_errno: Option<i32>,
}

/// Jobs in flight and the engine that executes them.
pub(super) struct Flights {
    engine: Box<dyn IoEngine>,
    slots: Vec<Option<Job>>,
    free: Vec<u16>,
    /// Jobs that have further operations but none in the engine.
    suspended: Vec<u16>,
    /// Total cost of all jobs.
    cost: u64,
    /// The only job in flight is a long one.
    has_long: bool,
    completions: Vec<Completion>,
}

impl Flights {
    /// Space for `depth` jobs; `engine` must have been created for as many.
    pub(super) fn new(engine: Box<dyn IoEngine>, depth: u16) -> Self {
        Self {
            engine,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            suspended: Vec::new(),
            cost: 0,
            has_long: false,
            completions: Vec::new(),
        }
    }

    pub(super) fn completion_fd(&self) -> Option<RawFd> {
        self.engine.completion_fd()
    }

    /// Whether any job could be started.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty() && self.cost < COST_MAX && !self.has_long
    }

    /// Whether this job can be started in addition to the current ones.
    pub(super) fn has_room_for(&self, job: &Job) -> bool {
        let beside = !job.is_long() && self.cost + job.cost() <= COST_MAX;
        self.has_room() && (self.is_empty() || beside)
    }

    /// Jobs in flight.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether jobs wait for [`Flights::go_on`].
    pub(super) fn has_suspended(&self) -> bool {
        !self.suspended.is_empty()
    }

    /// Starts a job; requires space for it. A job that the engine rejects ends immediately and is added to `landed`.
    pub(super) fn start(&mut self, job: Job, landed: &mut Vec<Landed>, turn: &mut Turn) {
        let id = self.free.pop().expect("callers check for room");
        self.cost += job.cost();
        self.has_long |= job.is_long();
        self.slots[usize::from(id)] = Some(job);
        self.submit(id, landed, turn);
    }

    /// Continues the jobs that a command suspended.
    pub(super) fn go_on(&mut self, landed: &mut Vec<Landed>, turn: &mut Turn) {
        for id in std::mem::take(&mut self.suspended) {
            self.submit(id, landed, turn);
        }
    }

    /// Submits started operations to the kernel.
    ///
    /// # Errors
    /// The kernel rejected them, and the condition is not temporary.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        for _ in 1..FLUSH_TRIES_MAX {
            match self.engine.flush() {
                Err(error) if is_momentary(&error) => std::thread::sleep(WAIT_RETRY),
                result => return result,
            }
        }
        self.engine.flush()
    }

    /// Collects ended jobs and continues those with further operations, unless a command is pending.
    ///
    /// # Errors
    /// The kernel rejected the continuation; it is still pending.
    pub(super) fn land(&mut self, landed: &mut Vec<Landed>, turn: &mut Turn) -> io::Result<()> {
        self.land_and(landed, turn, |_, turn| !turn.is_called())
    }

    /// Waits until the engine has no operation left. All jobs have then ended and are collected in `landed`, except for
    /// a long one, which is dropped; returns true in this case. No chain was taken after the long job.
    pub(super) fn settle(&mut self, landed: &mut Vec<Landed>) -> bool {
        // The other jobs are not interrupted, because their cost is bounded.
        let mut turn = Turn::default();
        if !self.has_long {
            self.go_on(landed, &mut turn);
        }
        self.drain(landed, &mut turn, |job| !job.is_long());
        self.forget_suspended()
    }

    /// Waits until the engine has no operation left, and drops all jobs.
    pub(super) fn abandon(&mut self) {
        self.drain(&mut Vec::new(), &mut Turn::default(), |_| false);
        self.forget_suspended();
    }

    fn drain(
        &mut self,
        landed: &mut Vec<Landed>,
        turn: &mut Turn,
        may_go_on: impl Fn(&Job) -> bool,
    ) {
        while self.len() > self.suspended.len() {
            let waited = self.engine.wait();
            let result = waited.and_then(|()| self.land_and(landed, turn, |job, _| may_go_on(job)));
            if let Err(error) = result {
                // Only waiting is safe: the kernel may still write guest RAM.
                log::warn!("waiting for disk I/O in flight: {error}");
                std::thread::sleep(WAIT_RETRY);
            }
        }
    }

    fn forget_suspended(&mut self) -> bool {
        let any = self.has_suspended();
        for id in std::mem::take(&mut self.suspended) {
            self.take_out(id);
        }
        any
    }

    fn land_and(
        &mut self,
        landed: &mut Vec<Landed>,
        turn: &mut Turn,
        mut may_go_on: impl FnMut(&Job, &mut Turn) -> bool,
    ) -> io::Result<()> {
        loop {
            let mut completions = std::mem::take(&mut self.completions);
            self.engine.reap(&mut completions);
            let any = !completions.is_empty();
            for Completion { id, result } in completions.drain(..) {
                let job = self.slots[usize::from(id)]
                    .as_mut()
                    .expect("engines report each id once");
                match job.advance(result) {
                    Progress::Again if may_go_on(job, turn) => self.submit(id, landed, turn),
                    Progress::Again => self.suspended.push(id),
                    Progress::Done { status, host_errno } => {
                        self.finish(id, status, host_errno, landed);
                    }
                }
            }
            self.completions = completions;
            if !any {
                return self.flush();
            }
        }
    }

    fn submit(&mut self, id: u16, landed: &mut Vec<Landed>, turn: &mut Turn) {
        let job = self.slots[usize::from(id)]
            .as_ref()
            .expect("submit is called on filled slots");
        turn.charge_call(1, job.piece().bytes);
        // SAFETY: the job stays in its slot, and its vectors on their heap, until `land_and` receives this id; `drop`
        // waits for that too. Until then nothing modifies the job. On an error the engine does not have the operation.
        if let Err(error) = unsafe { self.engine.submit(id, &job.operation()) } {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            self.finish(id, VIRTIO_BLK_S_IOERR as u8, Some(errno), landed);
        }
    }

    fn take_out(&mut self, id: u16) -> Job {
        let job = self.slots[usize::from(id)]
            .take()
            .expect("only filled slots are emptied");
        self.free.push(id);
        self.cost -= job.cost();
        self.has_long &= !job.is_long();
        job
    }

    fn finish(&mut self, id: u16, status: u8, host_errno: Option<i32>, landed: &mut Vec<Landed>) {
        let job = self.take_out(id);
        landed.push(Landed {
            job,
            status,
            host_errno,
        });
    }
}

/// Whether the kernel is temporarily out of memory for requests, or has too many unseen completions
/// (io_uring_enter(2)).
fn is_momentary(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY))
}

impl Drop for Flights {
    fn drop(&mut self) {
        self.abandon();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use std::time::Instant;

    use super::*;
    use crate::block::engine::IoOperation;
    use crate::block::job::{Kind, Step, discard_piece_bytes};
    use crate::queue::GuestBuffers;
    use crate::testing::TestRam;
    use vm_memory::GuestAddressSpace;

    /// An engine that rejects a number of calls with an errno.
    struct Reluctant {
        errno: i32,
        refusals: Arc<AtomicU32>,
    }

    impl IoEngine for Reluctant {
        fn completion_fd(&self) -> Option<RawFd> {
            None
        }

        unsafe fn submit(&mut self, _id: u16, _operation: &IoOperation<'_>) -> io::Result<()> {
            Ok(())
        }

        fn flush(&mut self) -> io::Result<()> {
            self.refusals
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                    left.checked_sub(1)
                })
                .map_or(Ok(()), |_| Err(io::Error::from_raw_os_error(self.errno)))
        }

        fn wait(&mut self) -> io::Result<()> {
            Ok(())
        }

        fn reap(&mut self, _completions: &mut Vec<Completion>) {}
    }

    fn refusing(errno: i32, times: u32) -> (Flights, Arc<AtomicU32>) {
        let refusals = Arc::new(AtomicU32::new(times));
        let engine = Reluctant {
            errno,
            refusals: Arc::clone(&refusals),
        };
        (Flights::new(Box::new(engine), 4), refusals)
    }

    #[test]
    fn kernel_short_of_memory_is_asked_again() {
        for errno in [libc::EAGAIN, libc::EBUSY] {
            let (mut flights, refusals) = refusing(errno, 3);
            flights.flush().expect("the kernel takes it in the end");
            assert_eq!(refusals.load(Ordering::Relaxed), 0);
            let (mut flights, _) = refusing(errno, 3);
            flights
                .land(&mut Vec::new(), &mut Turn::default())
                .expect("as above");
        }
    }

    #[test]
    fn kernel_that_refuses_for_good_is_an_error() {
        let (mut flights, refusals) = refusing(libc::EBADF, 3);
        assert!(flights.flush().is_err());
        assert_eq!(refusals.load(Ordering::Relaxed), 2, "asked once");
    }

    /// A job of that kind; only its cost matters.
    fn job(kind: Kind) -> Job {
        let ram = TestRam::new(1 << 20);
        Job {
            head: 0,
            status: GuestBuffers::new(&ram.mem().memory(), None),
            kind,
            started: Instant::now(),
            write_through: false,
            discard_piece_bytes: discard_piece_bytes(None),
            step: Step::Sync,
            retries: 0,
            zero_bytes: 0,
        }
    }

    /// Starts jobs of one kind until there is no room for another.
    fn fill(kind: Kind) -> usize {
        let engine = Reluctant {
            errno: 0,
            refusals: Arc::default(),
        };
        let mut flights = Flights::new(Box::new(engine), 1024);
        while flights.has_room_for(&job(kind)) {
            flights.start(job(kind), &mut Vec::new(), &mut Turn::default());
        }
        let started = flights.len();
        // This engine never completes an operation, so a drop would wait forever.
        std::mem::forget(flights);
        started
    }

    #[test]
    fn jobs_in_flight_are_bounded_by_what_they_cost() {
        const MIB: u64 = 1 << 20;
        assert_eq!(fill(Kind::Read(512)), 256);
        assert_eq!(fill(Kind::Write(MIB)), 16);
        assert_eq!(fill(Kind::Read(4 * MIB)), 4);
        assert_eq!(fill(Kind::Flush), 16);
        assert_eq!(fill(Kind::Discard(256 * MIB)), 4);
        // Long jobs.
        assert_eq!(fill(Kind::Read(4 * MIB + 512)), 1);
        assert_eq!(fill(Kind::WriteZeroes(16 * MIB)), 1);
        assert_eq!(fill(Kind::Discard(1 << 40)), 1);
    }
}
