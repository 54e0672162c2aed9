//! The queue half of a disk: one per virtqueue, on a worker of its own.

use std::sync::Arc;
use std::time::Instant;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_OK,
};
use vm_memory::GuestAddressSpace;

use super::config_space::has;
use super::device::DiskState;
use super::flights::{Flights, Landed};
use super::job::{Job, Kind, Step};
use super::request::{Operation, Request};
use crate::device::{Activation, GuestRam, QueueHandler, WorkerError};
use crate::guest_buffers::{GuestBuffers, RamGuard};
use crate::served_queue::{Popped, ServedQueue};
use crate::worker::EventSources;

/// Event source: the engine has completions.
const COMPLETIONS: u32 = 0;

/// Every how many faults of a kind one is logged: the first, then ever fewer.
fn worth_logging(seen_before: u64) -> bool {
    seen_before == 0 || seen_before.is_multiple_of(1 << 20)
}

/// One queue of a disk.
pub(super) struct BlockQueue {
    name: String,
    disk: Arc<DiskState>,
    flights: Flights,
    landed: Vec<Landed>,
    active: Option<Active>,
}

/// What exists between activation and reset.
struct Active {
    ram: GuestRam,
    features: u64,
    queue: ServedQueue,
}

impl BlockQueue {
    pub(super) fn new(name: String, disk: Arc<DiskState>, flights: Flights) -> Self {
        Self {
            name,
            disk,
            flights,
            landed: Vec::new(),
            active: None,
        }
    }

    /// Takes what is available, at most one ring full, starts it and returns
    /// what has ended.
    fn run(&mut self) -> Result<(), WorkerError> {
        let Some(mut active) = self.active.take() else {
            return Ok(());
        };
        let ram = active.ram.memory();
        let result = self.run_active(&mut active, &ram);
        self.active = Some(active);
        result
    }

    fn run_active(&mut self, active: &mut Active, ram: &RamGuard) -> Result<(), WorkerError> {
        self.land(&mut active.queue, ram)?;
        active.queue.disable_doorbell(ram)?;
        let mut taken = 0;
        while !self.flights.is_full() && taken < active.queue.size() {
            let Some(popped) = active.queue.pop(ram)? else {
                break;
            };
            taken += 1;
            self.take(active, ram, popped)?;
        }
        self.flights.flush().map_err(engine_failed)?;
        self.land(&mut active.queue, ram)?;
        active.queue.signal(ram)?;
        // A full engine announces its completions, and then this runs again.
        if !self.flights.is_full() && active.queue.enable_doorbell(ram)? {
            active.queue.ring_again()?;
        }
        Ok(())
    }

    /// Turns a chain into a job, or answers it at once.
    fn take(
        &mut self,
        active: &mut Active,
        ram: &RamGuard,
        popped: Popped,
    ) -> Result<(), WorkerError> {
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
                return active.queue.push_used(ram, head, 0);
            }
        };
        let answer = match operation {
            Ok(Operation::GetId { data }) => {
                data.copy_in(self.disk.serial());
                (VIRTIO_BLK_S_OK as u8, VIRTIO_BLK_ID_BYTES)
            }
            Ok(operation) => {
                let write_through = !self.disk.is_write_back(active.features);
                let job = self.job(head, status, operation, write_through);
                self.flights.start(job, &mut self.landed);
                return Ok(());
            }
            Err(refusal) => {
                self.bad_request(&refusal);
                (refusal.status(), 0)
            }
        };
        status.copy_in(&[answer.0]);
        active.queue.push_used(ram, head, answer.1 + 1)
    }

    fn job(
        &self,
        head: u16,
        status: GuestBuffers,
        operation: Operation,
        write_through: bool,
    ) -> Job {
        let (kind, step) = match operation {
            Operation::Read { offset, data } => {
                (Kind::Read(data.bytes() as u64), Step::Read { offset, data })
            }
            Operation::Write { offset, data } => (
                Kind::Write(data.bytes() as u64),
                Step::Write { offset, data },
            ),
            Operation::Flush | Operation::GetId { .. } => (Kind::Flush, Step::Sync),
            Operation::Discard { offset, bytes } => (
                Kind::Discard(bytes),
                Step::Discard {
                    offset,
                    bytes,
                    device: self.disk.is_block_device(),
                },
            ),
            Operation::WriteZeroes {
                offset,
                bytes,
                unmap,
            } => {
                let step = if unmap {
                    Step::PunchHole { offset, bytes }
                } else {
                    Step::ZeroRange { offset, bytes }
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
            step,
            retries: 0,
        }
    }

    /// Returns to the driver what the engine has finished.
    fn land(&mut self, queue: &mut ServedQueue, ram: &RamGuard) -> Result<(), WorkerError> {
        self.flights.land(&mut self.landed).map_err(engine_failed)?;
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
            job.status.copy_in(&[status]);
            // What the device has written: data of a read, and the status. A failed
            // read may have written some; claiming all keeps the driver on the safe side.
            let data = match job.kind {
                Kind::Read(bytes) => u32::try_from(bytes).unwrap_or(u32::MAX - 1),
                _ => 0,
            };
            queue.push_used(ram, job.head, data + 1)?;
        }
        Ok(())
    }

    fn bad_request(&self, why: &dyn std::error::Error) {
        if worth_logging(self.disk.counters().add_bad_request()) {
            log::warn!("{}: guest sent a bad request: {why}", self.name);
        }
    }
}

fn account(disk: &DiskState, job: &Job, status: u8, host_errno: Option<i32>) {
    let counters = disk.counters();
    if let Some(errno) = host_errno
        && worth_logging(counters.add_io_error())
    {
        let error = std::io::Error::from_raw_os_error(errno);
        log::error!("{}: disk I/O failed: {error}", disk.path().display());
    }
    if status != VIRTIO_BLK_S_OK as u8 {
        return;
    }
    match job.kind {
        Kind::Read(bytes) => counters.add_read(bytes, job.started.elapsed()),
        Kind::Write(bytes) => counters.add_write(bytes, job.started.elapsed()),
        Kind::Flush => counters.add_flush(),
        Kind::Discard(bytes) => counters.add_discard(bytes),
        Kind::WriteZeroes(bytes) => counters.add_write_zeroes(bytes),
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

    fn activate(
        &mut self,
        activation: Activation,
        sources: &mut EventSources,
    ) -> Result<(), WorkerError> {
        // A driver may leave a queue disabled; then there is nothing to serve.
        let Some(queue) = activation.queues.into_iter().next() else {
            return Ok(());
        };
        if let Some(fd) = self.flights.completion_fd() {
            sources.add(fd, COMPLETIONS)?;
        }
        self.active = Some(Active {
            ram: activation.mem,
            features: activation.features,
            queue: ServedQueue::new(queue, activation.features, activation.interrupt),
        });
        Ok(())
    }

    fn queue_ready(&mut self, _queue_index: u16) -> Result<(), WorkerError> {
        self.run()
    }

    fn source_ready(&mut self, _token: u32, _: &mut EventSources) -> Result<(), WorkerError> {
        self.run()
    }

    fn reset(&mut self) {
        self.flights.drain(&mut self.landed);
        self.landed.clear();
        self.active = None;
    }

    fn pause(&mut self) {
        self.flights.drain(&mut self.landed);
        let Some(mut active) = self.active.take() else {
            self.landed.clear();
            return;
        };
        let ram = active.ram.memory();
        let answered = self
            .answer_landed(&mut active.queue, &ram)
            .and_then(|()| active.queue.signal(&ram));
        if let Err(error) = answered {
            // Will show again, and be handled, at the next run.
            log::warn!("{}: while pausing: {error}", self.name);
        }
        self.active = Some(active);
    }
}

impl DiskState {
    /// Whether a completed write may still be in a volatile cache: not if the
    /// driver cannot flush, or asked for write-through (virtio 1.2 §5.2.5.2).
    fn is_write_back(&self, features: u64) -> bool {
        if has(features, VIRTIO_BLK_F_CONFIG_WCE) {
            return self.writeback();
        }
        has(features, VIRTIO_BLK_F_FLUSH)
    }
}
