//! The PCI function: registers for the driver, and the device with its workers.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard};

use ::state::{Saved, StateError};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::common_config::{CommonConfig, Effects, S_NEEDS_RESET, on_this_transport};
use super::counters::TransportCounters;
use super::interrupt::PciInterrupt;
use super::layout::{
    BAR_BYTES, BAR_INDEX, CAP_BAR, CAP_LENGTH, CAP_OFFSET, CAP_PCI_CFG_DATA, Header,
    NOTIFY_MULTIPLIER, NOTIFY_OFFSET, QUEUES_MAX, Region,
};
use super::state::VirtioPciState;
use super::{LifecycleListener, TransportError, VirtioPciParams, vectors_needed};
use crate::Unpoisoned;
use crate::device::{Counters, DeviceIdentity, Doorbell, GuestRam, QueueHandler, VirtioDevice};
use crate::dma::DmaEndpoint;
use crate::pci::{Bar, DoorbellRegister, MsixLines, MsixTable, PciFunction};
use crate::queue::DmaMemory;
use crate::worker::{Pausing, Worker, WorkerHandle};

/// A virtio device as a PCI function.
pub struct VirtioPciFunction {
    pub(super) id: String,
    pub(super) device: Arc<Mutex<dyn VirtioDevice>>,
    pub(super) mem: GuestRam,
    pub(super) dma: Option<Arc<DmaEndpoint>>,
    pub(super) interrupt: Arc<PciInterrupt>,
    lines: Arc<MsixLines>,
    pub(super) doorbells: Vec<Arc<Doorbell>>,
    /// For each queue, whether the VMM signals its doorbell and holds the vCPU that wrote to it.
    holds_notifier: Vec<bool>,
    pub(super) workers: Vec<WorkerHandle>,
    pub(super) counters: Arc<TransportCounters>,
    pub(super) listener: Option<Arc<dyn LifecycleListener>>,
    /// The offset of the PCI_CFG capability; it never changes.
    window_at: u16,
    state: Mutex<Registers>,
    /// Set if the function was built from a saved state and not resumed since.
    pub(super) owes_signals: AtomicBool,
}

/// State that vCPU threads change, one at a time.
#[derive(Debug)]
pub(super) struct Registers {
    pub(super) header: Header,
    pub(super) msix: MsixTable,
    pub(super) common: CommonConfig,
    /// Queues were handed to the workers since the last reset.
    pub(super) active: bool,
    /// The workers were ordered to release them, because the driver cleared Bus Master.
    pub(super) stopped: bool,
}

crate::debug_fields!(VirtioPciFunction { id, state });

impl VirtioPciFunction {
    /// Attaches a device to the transport and starts its worker threads.
    ///
    /// # Errors
    /// The device's queues are invalid, or the host has no descriptor or thread left. Nothing is left behind.
    pub fn new(params: VirtioPciParams) -> Result<Arc<Self>, TransportError> {
        Self::build(params, None)
    }

    /// Attaches a device to the transport in the state `saved`, paused. `params.device` must have the same
    /// configuration as the saved device, and guest RAM must have the same content.
    ///
    /// # Errors
    /// As [`VirtioPciFunction::new`], or [`TransportError::State`]: the state cannot be read or cannot belong to this
    /// device. Nothing is left behind.
    pub fn from_state(params: VirtioPciParams, saved: &Saved) -> Result<Arc<Self>, TransportError> {
        let state = saved.read::<VirtioPciState>()?;
        let function = Self::build(params, Some(&state))?;
        function.workers.iter().for_each(WorkerHandle::pause);
        function.continue_from(&state)?;
        Ok(function)
    }

    fn build(
        params: VirtioPciParams,
        state: Option<&VirtioPciState>,
    ) -> Result<Arc<Self>, TransportError> {
        let VirtioPciParams {
            id,
            device,
            mem,
            dma,
            vectors,
            thread_start,
            listener,
        } = params;
        let mut locked = lock(&device);
        let queue_sizes = locked.queue_sizes().to_vec();
        check_queues(&queue_sizes)?;

        let msix = MsixTable::new(vectors_needed(&*locked), vectors);
        let lines = msix.lines();
        let interrupt = Arc::new(PciInterrupt::new(Arc::clone(&lines), queue_sizes.len()));
        let counters = Arc::new(TransportCounters::default());
        let offered = offered(&*locked, dma.is_some());
        let doorbells = queue_sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new))
            .collect::<Result<_, _>>()
            .map_err(TransportError::Doorbell)?;
        let holds_notifier = (0..queue_sizes.len())
            .map(|index| u16::try_from(index).is_ok_and(|index| locked.holds_notifier(index)))
            .collect();
        let mut registers = Registers {
            header: Header::new(locked.device_type(), &msix),
            msix,
            common: CommonConfig::new(
                Arc::clone(&interrupt),
                Arc::clone(&counters),
                offered,
                &queue_sizes,
            ),
            active: false,
            stopped: false,
        };
        let mut handlers = locked.take_handlers();
        if let Some(state) = state {
            state.check(&*locked, &registers.common, (handlers.len(), dma.is_some()))?;
            restore_device(&mut *locked, &mut handlers, state)?;
            registers.restore(state, &interrupt)?;
        }
        let workers = handlers
            .into_iter()
            .map(|handler| Worker::spawn(handler, Arc::clone(&thread_start)))
            .collect::<Result<_, _>>()
            .map_err(TransportError::Worker)?;
        locked.set_interrupt(interrupt.clone());
        drop(locked);
        Ok(Arc::new(Self {
            id,
            device,
            mem,
            dma,
            interrupt,
            lines,
            doorbells,
            holds_notifier,
            workers,
            counters,
            listener,
            window_at: registers.header.window,
            state: Mutex::new(registers),
            owes_signals: AtomicBool::new(false),
        }))
    }

    /// Guest memory as the device addresses it.
    pub(super) fn dma_memory<'m>(&self, ram: &'m GuestMemoryMmap<()>) -> DmaMemory<'m> {
        DmaMemory {
            ram,
            access: self.dma.as_ref().map(DmaEndpoint::access),
        }
    }

    /// The configuration half behind this function.
    pub fn device(&self) -> &Arc<Mutex<dyn VirtioDevice>> {
        &self.device
    }

    /// Whether every worker thread is still running.
    #[cfg(any(test, feature = "test-utils"))]
    pub(crate) fn workers_live(&self) -> bool {
        self.workers.iter().all(|worker| !worker.is_finished())
    }

    pub(super) fn lock_state(&self) -> MutexGuard<'_, Registers> {
        let mut state = lock(&self.state);
        self.finish_reset_if_done(&mut state);
        state
    }

    fn apply(&self, state: &mut Registers, effects: Effects) {
        if effects.reset {
            self.begin_reset(state);
            if state.active {
                self.workers.iter().for_each(WorkerHandle::request_reset);
            }
            self.finish_reset_if_done(state);
        }
        if effects.features_ok {
            lock(&self.device).ack_features(state.common.accepted());
        }
        if effects.driver_ok {
            self.activate(state);
        }
    }

    /// Ends the device's access to memory until the driver resets it. A driver that never switches Bus Master on is
    /// served all the same, because some firmware does not.
    fn stop(&self, state: &mut Registers) {
        // Not again before the next activation: the workers accept a bounded number of commands.
        if state.active && !std::mem::replace(&mut state.stopped, true) {
            // Without an interrupt, which is an access to memory.
            self.interrupt.add_status(S_NEEDS_RESET);
            self.workers.iter().for_each(WorkerHandle::request_reset);
        }
    }

    fn begin_reset(&self, state: &mut Registers) {
        self.counters.resets.count();
        state.common.begin_reset();
        let mut device = lock(&self.device);
        device.reset();
        if device.identity() == DeviceIdentity::Awaited {
            // Before its first reset the status is 0, for which a driver waits.
            self.interrupt.add_status(S_NEEDS_RESET);
        }
        drop(device);
        if state.active
            && let Some(listener) = &self.listener
        {
            listener.device_reset(&self.id);
        }
    }

    fn finish_reset_if_done(&self, state: &mut Registers) {
        if state.common.is_resetting() && self.workers.iter().all(WorkerHandle::reset_done) {
            state.active = false;
            let device = lock(&self.device);
            if device.identity() != DeviceIdentity::Awaited {
                let offered = offered(&*device, self.dma.is_some());
                state.common.finish_reset(offered);
            }
        }
    }

    fn notify(&self, offset: u64) {
        let index = usize::try_from(offset / u64::from(NOTIFY_MULTIPLIER)).unwrap_or(usize::MAX);
        if self.holds_notifier.get(index) == Some(&true) && self.kick_and_wait(index) {
            return;
        }
        match self.doorbells.get(index) {
            // Fails only if the counter is full, and then the doorbell is already signalled.
            Some(doorbell) => drop(doorbell.write(1)),
            None => self.counters.bad_notifications.count(),
        }
    }

    /// Makes the queue's worker process it before the vCPU continues. False if it did not.
    fn kick_and_wait(&self, index: usize) -> bool {
        let Ok(index) = u16::try_from(index) else {
            return false;
        };
        // The state's lock is not held during the wait, because other vCPUs need it.
        let features = self.lock_state().common.accepted();
        let handler = lock(&self.device).handler_of_queue(index, features);
        handler
            .and_then(|handler| self.workers.get(handler))
            .is_some_and(|worker| worker.kick_and_wait(index))
    }

    /// The target of the PCI_CFG window, if it is valid (§4.1.4.9): `length` bytes, naturally aligned, in BAR0.
    fn window(&self, access_offset: u16) -> Option<(u64, usize)> {
        let state = self.lock_state();
        let window = self.window_at;
        let byte = |at: u16| {
            let mut data = [0];
            state.header.space.read(window + at, &mut data);
            data[0]
        };
        let dword = |at: u16| {
            let mut data = [0; 4];
            state.header.space.read(window + at, &mut data);
            u32::from_le_bytes(data)
        };
        let (bar, offset, length) = (byte(CAP_BAR), dword(CAP_OFFSET), dword(CAP_LENGTH));
        let valid = access_offset == window + CAP_PCI_CFG_DATA
            && bar == BAR_INDEX
            && matches!(length, 1 | 2 | 4)
            && offset.is_multiple_of(length)
            && u64::from(offset) < BAR_BYTES;
        if !valid {
            self.counters.bad_window_accesses.count();
        }
        valid.then_some((u64::from(offset), length as usize))
    }

    fn touches_window(&self, offset: u16, length: usize) -> bool {
        let start = usize::from(self.window_at + CAP_PCI_CFG_DATA);
        let offset = usize::from(offset);
        offset < start + 4 && start < offset + length
    }
}

impl PciFunction for VirtioPciFunction {
    fn id(&self) -> &str {
        &self.id
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        if self.touches_window(offset, data.len()) {
            data.fill(0);
            if let Some((at, length)) = self.window(offset) {
                let length = length.min(data.len());
                self.bar_read(BAR_INDEX, at, &mut data[..length]);
            }
            return;
        }
        self.lock_state().header.space.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> bool {
        if self.touches_window(offset, data.len()) {
            if let Some((at, length)) = self.window(offset) {
                self.bar_write(BAR_INDEX, at, &data[..length.min(data.len())]);
            }
            return false;
        }
        let mut state = self.lock_state();
        let (before, was_bus_master) = (bar(&state), state.header.space.is_bus_master());
        state.header.space.write(offset, data);
        if was_bus_master && !state.header.space.is_bus_master() {
            self.stop(&mut state);
        }
        let control = state.header.msix_control;
        let (start, end) = (usize::from(offset), usize::from(offset) + data.len());
        if start < usize::from(control) + 2 && usize::from(control) < end {
            let mut value = [0; 2];
            state.header.space.read(control, &mut value);
            state.msix.set_control(u16::from_le_bytes(value));
        }
        bar(&state) != before
    }

    fn bars(&self) -> Vec<Bar> {
        vec![bar(&self.lock_state())]
    }

    fn set_bar_address(&self, index: u8, address: u64) {
        if index == BAR_INDEX {
            self.lock_state()
                .header
                .space
                .set_bar_address(index, address);
        }
    }

    fn bar_read(&self, index: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if index != BAR_INDEX {
            return;
        }
        match Region::of(offset) {
            Some((Region::Common, at)) => {
                // A device first changes its configuration, then the generation, then interrupts: a driver that reads
                // in between is notified to read again.
                self.lock_state().common.read(at, data);
            }
            Some((Region::Isr, _)) => {
                if let Some(first) = data.first_mut() {
                    *first = self.interrupt.take_isr();
                }
            }
            Some((Region::Device, at)) => lock(&self.device).read_config(at, data),
            Some((Region::MsixTable, at)) => self.lock_state().msix.read_table(at, data),
            Some((Region::MsixPending, at)) => self.lock_state().msix.read_pending(at, data),
            Some((Region::Notify, _)) | None => {}
        }
    }

    fn bar_write(&self, index: u8, offset: u64, data: &[u8]) {
        if index != BAR_INDEX {
            return;
        }
        match Region::of(offset) {
            Some((Region::Common, at)) => {
                let mut state = self.lock_state();
                let effects = state.common.write(at, data);
                self.apply(&mut state, effects);
            }
            Some((Region::Device, at)) => lock(&self.device).write_config(at, data),
            Some((Region::Notify, at)) => self.notify(at),
            Some((Region::MsixTable, at)) => self.lock_state().msix.write_table(at, data),
            Some((Region::Isr | Region::MsixPending, _)) | None => {
                self.counters.bad_register_writes.count();
            }
        }
    }

    fn with_doorbells(&self, visit: &mut dyn FnMut(DoorbellRegister<'_>)) {
        let bells = self.doorbells.iter().zip(&self.holds_notifier);
        for (index, (doorbell, holds_notifier)) in (0u64..).zip(bells) {
            // KVM would signal the doorbell and let the vCPU continue.
            if *holds_notifier {
                continue;
            }
            visit(DoorbellRegister {
                bar_index: BAR_INDEX,
                offset: NOTIFY_OFFSET + index * u64::from(NOTIFY_MULTIPLIER),
                event: doorbell,
            });
        }
    }

    fn counters(&self) -> Counters {
        let mut counters = self.counters.read();
        let failures = self.workers.iter().map(WorkerHandle::failures).sum();
        counters.insert("worker_failures", failures);
        counters.insert("undelivered_interrupts", self.lines.undelivered());
        for (name, value) in lock(&self.device).counters() {
            let same = counters.insert(name, value);
            debug_assert!(same.is_none(), "two counters are called {name}");
        }
        counters
    }

    fn begin_pause(&self) -> Vec<Pausing> {
        // All workers pause at the same time: each waits for the requests in flight of its own queue.
        self.workers.iter().map(WorkerHandle::begin_pause).collect()
    }

    fn resume(&self) {
        self.workers.iter().for_each(WorkerHandle::resume);
        self.pay_signals();
    }

    fn begin_stop(&self) {
        self.workers.iter().for_each(WorkerHandle::begin_stop);
    }

    fn reset(&self) {
        let mut state = self.lock_state();
        self.begin_reset(&mut state);
        if state.active {
            self.workers.iter().for_each(WorkerHandle::reset_and_wait);
        }
        self.finish_reset_if_done(&mut state);
        state.msix.reset();
        let control = state.header.msix_control;
        state.header.space.write(control, &[0; 2]);
        state.header.space.reset_command();
        // A kick by the old guest does not apply to the new one.
        for doorbell in &self.doorbells {
            // EAGAIN: the doorbell was not signalled.
            doorbell.read().ok();
        }
    }
}

/// Feature bits that a driver may accept now.
fn offered(device: &dyn VirtioDevice, is_behind_iommu: bool) -> u64 {
    match device.identity() {
        DeviceIdentity::Known => on_this_transport(device.features(), is_behind_iommu),
        DeviceIdentity::Awaited | DeviceIdentity::Absent => 0,
    }
}

/// Restores the device's own state and the accepted features.
fn restore_device(
    device: &mut dyn VirtioDevice,
    handlers: &mut [Box<dyn QueueHandler>],
    state: &VirtioPciState,
) -> Result<(), StateError> {
    if state.features_are_accepted() {
        device.ack_features(state.accepted);
    }
    device.restore(&state.device)?;
    for (handler, own) in handlers.iter_mut().zip(&state.handlers) {
        handler.restore(own.as_ref())?;
    }
    Ok(())
}

fn bar(state: &Registers) -> Bar {
    Bar {
        index: BAR_INDEX,
        size_bytes: BAR_BYTES,
        is_64bit: true,
        address: state.header.space.bar_address(BAR_INDEX),
        decoded: state.header.space.memory_decoded(),
    }
}

fn check_queues(queue_sizes: &[u16]) -> Result<(), TransportError> {
    if queue_sizes.len() > QUEUES_MAX {
        return Err(TransportError::TooManyQueues {
            queues: queue_sizes.len(),
        });
    }
    for (index, &size) in queue_sizes.iter().enumerate() {
        if Queue::new(size).is_err() {
            return Err(TransportError::QueueSize { index, size });
        }
    }
    Ok(())
}

/// Locks. A panic while a thread held the lock has been reported, and the registers are still as valid as any that a
/// guest could write.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unpoisoned()
}

/// All workers stop at the same time: a disk's may wait for the kernel to end its requests.
impl Drop for VirtioPciFunction {
    fn drop(&mut self) {
        self.begin_stop();
    }
}
