//! The queue half of a disk: one per virtqueue, each on its own worker.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_OK,
};
use vm_memory::GuestAddressSpace;

use super::config_space::has;
use super::counters::BlockCounters;
use super::disk::DiskState;
use super::flights::{Flights, Landed};
use super::job::{Job, Kind, Range, Step, Transfer};
use super::request::{Operation, Refusal, Request};
use crate::device::{Activation, GuestRam, HandlerState, QueueHandler, WorkerError};
use crate::queue::{GuestBuffers, Next, Popped, RamGuard, ServedQueue};
use crate::taken::with_taken;
use crate::worker::{EventSources, Throttle, Turn};

/// Event source: the engine has completions.
const COMPLETIONS: u32 = 0;
/// Event source: the rate limit allows requests again.
const TOKENS: u32 = 1;

/// One queue of a disk.
pub(super) struct BlockQueue {
    name: String,
    host_cpus: Vec<usize>,
    disk: Arc<DiskState>,
    flights: Flights,
    throttle: Throttle,
    landed: Vec<Landed>,
    active: Option<Active>,
}

/// The reason why no more chains are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stopped {
    /// The ring is empty: wait for the guest.
    Empty,
    /// Too many jobs are in flight: wait for the engine.
    NoRoom,
    /// The rate limit is reached: wait for its timer.
    Throttled,
    /// The turn is over; the queue has signalled its own doorbell.
    TurnOver,
}

/// State between activation and reset.
struct Active {
    ram: GuestRam,
    features: u64,
    queue: ServedQueue,
}

impl BlockQueue {
    pub(super) fn new(
        name: String,
        host_cpus: Vec<usize>,
        disk: Arc<DiskState>,
        flights: Flights,
        throttle: Throttle,
    ) -> Self {
        Self {
            name,
            host_cpus,
            disk,
            flights,
            throttle,
            landed: Vec::new(),
            active: None,
        }
    }

    /// Takes available chains while there is space, starts them, and completes ended jobs.
    fn run(&mut self, turn: &mut Turn) -> Result<(), WorkerError> {
        let result = with_taken(
            self,
            |it| &mut it.active,
            |it, active| {
                let ram = active.ram.memory();
                it.run_active(active, &ram, turn)
            },
        );
        if result.is_err() {
            // The queue is not served again before its reset, for which an UNMAP must not wait.
            self.flights.abandon();
            self.landed.clear();
        }
        result
    }

    fn run_active(
        &mut self,
        active: &mut Active,
        ram: &RamGuard,
        turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        self.flights.go_on(&mut self.landed, turn);
        self.land(&mut active.queue, ram, turn)?;
        active.queue.disable_doorbell(ram)?;
        let stopped = loop {
            let stopped = self.take_all(active, ram, turn)?;
            self.flights.flush().map_err(engine_failed)?;
            let before = self.flights.len();
            self.land(&mut active.queue, ram, turn)?;
            let made_room = self.flights.len() < before;
            if stopped != Stopped::NoRoom || !made_room || turn.is_over() {
                break stopped;
            }
        };
        active.queue.signal(ram)?;
        let again = match stopped {
            Stopped::Empty => active.queue.enable_doorbell(ram)?,
            // Otherwise the engine reports completions, and this runs again.
            Stopped::NoRoom => self.flights.is_empty(),
            // The timer will wake the queue.
            Stopped::Throttled => false,
            // The doorbell is already signalled.
            Stopped::TurnOver => false,
        };
        if again || self.flights.has_suspended() {
            active.queue.ring_again()?;
        }
        Ok(())
    }

    /// Takes chains until a limit or a command stops it.
    fn take_all(
        &mut self,
        active: &mut Active,
        ram: &RamGuard,
        turn: &mut Turn,
    ) -> Result<Stopped, WorkerError> {
        while self.flights.has_room() {
            if !self.admits() {
                return Ok(Stopped::Throttled);
            }
            match active.queue.next(ram, turn)? {
                Next::Chain(popped) => {
                    let Some(job) = self.take(active, ram, popped)? else {
                        // It was answered without the image, but it is a request.
                        self.throttle.charge(0);
                        continue;
                    };
                    if !self.flights.has_room_for(&job) {
                        active.queue.unpop(1);
                        break;
                    }
                    self.throttle.charge(job.data_bytes());
                    self.flights.start(job, &mut self.landed, turn);
                }
                Next::Empty => return Ok(Stopped::Empty),
                Next::TurnOver => return Ok(Stopped::TurnOver),
            }
        }
        Ok(Stopped::NoRoom)
    }

    /// Whether the rate limit admits another request.
    fn admits(&mut self) -> bool {
        let waited = self.throttle.is_waiting();
        let admits = self.throttle.admits();
        if !admits && !waited {
            self.disk.counters().counts.throttled.count();
        }
        admits
    }

    /// Converts a chain into a job, or completes it immediately.
    fn take(
        &mut self,
        active: &mut Active,
        ram: &RamGuard,
        popped: Popped,
    ) -> Result<Option<Job>, WorkerError> {
        let head = popped.head;
        let rules = self.disk.rules();
        let parsed = popped
            .buffers
            .map_err(Into::into)
            .and_then(|buffers| Request::parse(buffers, &rules));
        let Request { status, operation } = match parsed {
            Ok(request) => request,
            Err(error) => {
                self.bad_request(&error);
                active.queue.push_used(ram, head, 0)?;
                return Ok(None);
            }
        };
        let answer = match operation {
            Ok(Operation::GetId { data }) => {
                data.copy_in(self.disk.serial());
                (VIRTIO_BLK_S_OK as u8, VIRTIO_BLK_ID_BYTES)
            }
            Ok(operation) => {
                let write_through = !self.disk.is_write_back(active.features);
                return Ok(Some(self.job(head, status, operation, write_through)));
            }
            Err(refusal) => {
                match refusal {
                    Refusal::Signature(_) => self.signature_refused(&refusal),
                    _ => self.bad_request(&refusal),
                }
                (refusal.status(), 0)
            }
        };
        status.copy_in(&[answer.0]);
        active.queue.push_used(ram, head, answer.1 + 1)?;
        Ok(None)
    }

    fn job(
        &self,
        head: u16,
        status: GuestBuffers,
        operation: Operation,
        write_through: bool,
    ) -> Job {
        let (kind, step) = match operation {
            Operation::Read { offset, data } => (
                Kind::Read(data.bytes() as u64),
                Step::Read(Transfer::new(offset, data)),
            ),
            Operation::Write {
                offset,
                front: None,
                data,
            } => (
                Kind::Write(data.bytes() as u64),
                Step::Write(Transfer::new(offset, data)),
            ),
            Operation::Write {
                offset,
                front: Some(front),
                data,
            } => (
                Kind::Write((front.bytes() + data.bytes()) as u64),
                Step::Write(Transfer::with_front(offset, front, data)),
            ),
            Operation::Flush | Operation::GetId { .. } => (Kind::Flush, Step::Sync),
            Operation::Discard { offset, bytes } => (
                Kind::Discard(bytes),
                Step::Discard {
                    range: Range { offset, bytes },
                    own: self.disk.has_own_discard(),
                },
            ),
            Operation::WriteZeroes {
                offset,
                bytes,
                unmap,
            } => {
                let range = Range { offset, bytes };
                let step = if unmap {
                    Step::PunchHole(range)
                } else {
                    Step::ZeroRange(range)
                };
                (Kind::WriteZeroes(bytes), step)
            }
        };
        Job {
            head,
            status,
            kind,
            started: Instant::now(),
            write_through,
            discard_piece_bytes: self.disk.discard_piece_bytes(),
            step,
            retries: 0,
            zero_bytes: 0,
        }
    }

    /// Returns finished chains to the driver.
    fn land(
        &mut self,
        queue: &mut ServedQueue,
        ram: &RamGuard,
        turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        let landed = self.flights.land(&mut self.landed, turn);
        landed.map_err(engine_failed)?;
        self.answer_landed(queue, ram)
    }

    fn answer_landed(
        &mut self,
        queue: &mut ServedQueue,
        ram: &RamGuard,
    ) -> Result<(), WorkerError> {
        for landed in self.landed.drain(..) {
            let Landed {
                job,
                status,
                host_errno,
            } = landed;
            account(&self.disk, &job, status, host_errno);
            self.throttle.charge_bytes(job.zero_bytes);
            job.status.copy_in(&[status]);
            // The number of bytes that the device has written: data of a read, and the status. A failed read may have
            // written part of its data; reporting all of it is safe for the driver.
            let data = match job.kind {
                Kind::Read(bytes) => u32::try_from(bytes).unwrap_or(u32::MAX - 1),
                _ => 0,
            };
            queue.push_used(ram, job.head, data + 1)?;
        }
        Ok(())
    }

    /// The guest may be right and the image meant to be raw, which only the operator knows.
    fn signature_refused(&self, why: &Refusal) {
        if self
            .disk
            .counters()
            .counts
            .refused_signatures
            .count_loudly()
        {
            log::warn!(
                "Disk {}, {}: {why}. The disk has no image_type, so the write was rejected. To allow it, set \
                 image_type=raw",
                self.disk.id(),
                self.disk.path().display()
            );
        }
    }

    fn bad_request(&self, why: &dyn std::error::Error) {
        if self.disk.counters().counts.bad_requests.count_loudly() {
            log::warn!("{}: guest sent a bad request: {why}", self.name);
        }
    }
}

fn account(disk: &DiskState, job: &Job, status: u8, host_errno: Option<i32>) {
    let BlockCounters {
        read,
        write,
        counts,
    } = disk.counters();
    if let Some(errno) = host_errno
        && counts.io_errors.count_loudly()
    {
        let error = std::io::Error::from_raw_os_error(errno);
        log::error!("{}: disk I/O failed: {error}", disk.path().display());
    }
    if status != VIRTIO_BLK_S_OK as u8 {
        return;
    }
    match job.kind {
        Kind::Read(bytes) => read.add(bytes, job.started.elapsed()),
        Kind::Write(bytes) => write.add(bytes, job.started.elapsed()),
        Kind::Flush => counts.flush_ops.count(),
        Kind::Discard(bytes) => counts.discard_bytes.add(bytes),
        Kind::WriteZeroes(bytes) => counts.write_zeroes_bytes.add(bytes),
    }
}

fn engine_failed(source: std::io::Error) -> WorkerError {
    WorkerError::Host {
        what: "handing disk I/O to the kernel",
        source,
    }
}

impl QueueHandler for BlockQueue {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn host_cpus(&self) -> &[usize] {
        &self.host_cpus
    }

    fn activate(
        &mut self,
        activation: Activation,
        sources: &mut EventSources,
    ) -> Result<(), WorkerError> {
        // A queue that the driver leaves disabled has nothing to serve.
        let Some(queue) = activation.queues.into_iter().next() else {
            return Ok(());
        };
        if let Some(fd) = self.flights.completion_fd() {
            sources.add(fd, COMPLETIONS)?;
        }
        sources.add(self.throttle.as_raw_fd(), TOKENS)?;
        self.active = Some(Active {
            queue: ServedQueue::new(
                queue,
                activation.features,
                activation.interrupt,
                &activation.mem,
            ),
            ram: activation.mem,
            features: activation.features,
        });
        Ok(())
    }

    fn queue_ready(&mut self, _queue_index: u16, turn: &mut Turn) -> Result<(), WorkerError> {
        self.run(turn)
    }

    fn source_ready(
        &mut self,
        token: u32,
        _: &mut EventSources,
        turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        if token == TOKENS {
            self.throttle.release();
        }
        self.run(turn)
    }

    fn reset(&mut self) {
        self.throttle.release();
        self.flights.abandon();
        self.landed.clear();
        self.active = None;
    }

    fn state(&self) -> HandlerState {
        HandlerState::of_queues(self.active.iter().map(|active| active.queue.position()))
    }

    fn pause(&mut self) {
        let unfinished = self.flights.settle(&mut self.landed);
        let Some(mut active) = self.active.take() else {
            self.landed.clear();
            return;
        };
        if unfinished {
            active.queue.unpop(1);
        }
        let ram = active.ram.memory();
        let answered = self
            .answer_landed(&mut active.queue, &ram)
            .and_then(|()| active.queue.signal(&ram));
        if let Err(error) = answered {
            // The error is reported again, and handled, at the next run.
            log::warn!("{}: while pausing: {error}", self.name);
        }
        self.active = Some(active);
    }

    /// The limit may have changed during the pause.
    fn resume(&mut self) {
        self.throttle.release();
    }
}

impl DiskState {
    /// Whether a completed write may still be in a volatile cache. It may not if the driver cannot flush, or requested
    /// write-through (virtio 1.2 §5.2.5.2).
    fn is_write_back(&self, features: u64) -> bool {
        if has(features, VIRTIO_BLK_F_CONFIG_WCE) {
            return self.writeback();
        }
        has(features, VIRTIO_BLK_F_FLUSH)
    }
}
