//! The configuration half and the queue half of the virtual IOMMU.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use state::{Saved, StateError};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::GuestAddressSpace;

use super::pinned::{HostIommu, PinnedMappings};
use super::request::{
    F_BYPASS_CONFIG, F_MAP_UNMAP, FAULT_BYTES, PROBE_BYTES, REQUEST_BYTES_MAX, RESULT_BYTES_MAX,
    Request,
};
use super::state::IommuState;
use crate::device::{
    Activation, Counters, GuestRam, HandlerState, QueueHandler, VirtioDevice, WorkerError, boxed,
    read_config_space,
};
use crate::dma::{DmaEndpoint, GRANULE, Shared, StopsNow, Tables};
use crate::queue::{ChainBuffers, ChainError, Next, Popped, ServedQueue};
use crate::worker::{EventSources, Turn};

/// Virtio device id.
const DEVICE_TYPE: u32 = 23;
const QUEUE_SIZES: [u16; 2] = [256, 256];
const REQUEST_QUEUE: u16 = 0;
const EVENT_QUEUE: u16 = 1;
/// Token of the faults, the only source.
const TOKEN_FAULTS: u32 = 0;

const F_INPUT_RANGE: u64 = 1 << 0;
const F_PROBE: u64 = 1 << 4;

/// Sizes of pages that a driver should map if it can: 4 KiB, 2 MiB and 1 GiB, as the processor has them.
const PAGE_SIZE_MASK: u64 = GRANULE | 2 << 20 | 1 << 30;
const CONFIG_BYTES: usize = 40;
/// The only writable byte.
const BYPASS_OFFSET: u64 = 36;

/// Smallest number of bits of an input address: less does not even cover 32-bit devices.
pub const ADDRESS_WIDTH_BITS_MIN: u8 = 32;
/// Largest number of bits of an input address.
pub const ADDRESS_WIDTH_BITS_MAX: u8 = 64;

/// The parameters of a virtual IOMMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IommuParams<'a> {
    /// The device's id in the API.
    pub id: &'a str,
    /// Bits of an input address, from [`ADDRESS_WIDTH_BITS_MIN`] to [`ADDRESS_WIDTH_BITS_MAX`].
    pub address_width_bits: u8,
}

/// Connects devices to the IOMMU.
#[derive(Debug, Clone)]
pub struct IommuHandle(Arc<Shared>);

impl IommuHandle {
    /// The endpoint of a new device.
    pub fn endpoint(&self) -> Arc<DmaEndpoint> {
        Arc::new(DmaEndpoint::new(Arc::clone(&self.0), None))
    }

    /// The endpoint of a device of the host, which gets access to exactly the parts of `ram` that the guest maps for it.
    /// Until the guest has attached it to a domain, it has no access.
    pub fn endpoint_of_host(&self, iommu: Arc<dyn HostIommu>, ram: GuestRam) -> Arc<DmaEndpoint> {
        let mappings = PinnedMappings::new(iommu, ram);
        let shared = Arc::clone(&self.0);
        Arc::new(DmaEndpoint::new(shared, Some(Arc::new(mappings))))
    }
}

/// The configuration half.
#[derive(Debug)]
pub struct Iommu {
    handler: Option<Handler>,
    shared: Arc<Shared>,
    input_last: u64,
    accepted: u64,
}

impl Iommu {
    /// No endpoint is attached, and bypass is on: firmware and a boot loader, which know no IOMMU, can read from a disk
    /// behind it.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(params: IommuParams<'_>) -> io::Result<(Self, IommuHandle)> {
        let width = params
            .address_width_bits
            .clamp(ADDRESS_WIDTH_BITS_MIN, ADDRESS_WIDTH_BITS_MAX);
        let input_last = u64::MAX >> (ADDRESS_WIDTH_BITS_MAX - width);
        let shared = Arc::new(Shared::new(input_last)?);
        let handler = Handler {
            name: params.id.to_owned(),
            shared: Arc::clone(&shared),
            ram: None,
            features: 0,
            requests: None,
            events: None,
        };
        let device = Self {
            handler: Some(handler),
            shared: Arc::clone(&shared),
            input_last,
            accepted: 0,
        };
        Ok((device, IommuHandle(shared)))
    }

    #[cfg(test)]
    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn config_space(&self) -> [u8; CONFIG_BYTES] {
        let mut space = [0; CONFIG_BYTES];
        space[0..8].copy_from_slice(&PAGE_SIZE_MASK.to_le_bytes());
        // The input range starts at 0. Domains have any 32-bit number.
        space[16..24].copy_from_slice(&self.input_last.to_le_bytes());
        space[28..32].copy_from_slice(&u32::MAX.to_le_bytes());
        space[32..36].copy_from_slice(&(PROBE_BYTES as u32).to_le_bytes());
        space[36] = u8::from(self.shared.bypass());
        space
    }
}

impl VirtioDevice for Iommu {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let narrow = match self.input_last {
            u64::MAX => 0,
            _ => F_INPUT_RANGE,
        };
        1 << VIRTIO_F_VERSION_1 | F_MAP_UNMAP | F_PROBE | F_BYPASS_CONFIG | narrow
    }

    fn ack_features(&mut self, features: u64) {
        self.accepted = features;
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config_space(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (BYPASS_OFFSET, [bypass @ (0 | 1)]) if self.accepted & F_BYPASS_CONFIG != 0 => {
                self.shared.set_bypass(*bypass == 1);
            }
            _ => self.shared.stats.bad_requests.count(),
        }
    }

    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
        boxed(self.handler.take())
    }

    /// Does not change bypass (§5.13.4): otherwise devices would have access between two drivers that switch it off.
    fn reset(&mut self) {
        self.accepted = 0;
    }

    fn state(&self) -> Saved {
        let bypass = self.shared.bypass();
        Saved::of(&self.shared.read(|tables| IommuState::of(tables, bypass)))
    }

    fn restore(&mut self, state: &Saved) -> Result<(), StateError> {
        let state: IommuState = state.read()?;
        self.shared.set_bypass(state.bypass);
        self.shared.change(|tables| state.fill(tables))
    }

    fn counters(&self) -> Counters {
        let mut counters = self.shared.stats.read();
        counters.insert("mappings", self.shared.mappings());
        counters.insert("host_mapped_bytes", self.shared.host_mapped_bytes());
        counters
    }
}

/// The queue half.
#[derive(Debug)]
struct Handler {
    name: String,
    shared: Arc<Shared>,
    ram: Option<GuestRam>,
    features: u64,
    requests: Option<ServedQueue>,
    events: Option<ServedQueue>,
}

impl Handler {
    fn serve_requests(&mut self, turn: &mut Turn) -> Result<(), WorkerError> {
        let (Some(ram), Some(queue)) = (&self.ram, &mut self.requests) else {
            return Ok(());
        };
        let ram = ram.memory();
        queue.disable_doorbell(&ram)?;
        loop {
            match queue.next(&ram, turn)? {
                Next::Chain(Popped { head, buffers }) => {
                    let before = self.shared.host_mapped_bytes();
                    let mut stops_now = || {
                        turn.charge_call(1, 0);
                        turn.is_called()
                    };
                    let Some(written) =
                        answer(&self.shared, buffers, self.features, &mut stops_now)
                    else {
                        queue.put_back(1)?;
                        break;
                    };
                    let changed = self.shared.host_mapped_bytes().abs_diff(before);
                    if changed > 0 {
                        turn.charge_call(1, changed);
                    }
                    queue.push_used(&ram, head, written)?;
                }
                Next::Empty if queue.enable_doorbell(&ram)? => queue.disable_doorbell(&ram)?,
                Next::Empty | Next::TurnOver => break,
            }
        }
        queue.signal(&ram)
    }

    /// Reports faults as long as the driver has buffers for them.
    fn report_faults(&mut self, turn: &mut Turn) -> Result<(), WorkerError> {
        let (Some(ram), Some(queue)) = (&self.ram, &mut self.events) else {
            return Ok(());
        };
        let ram = ram.memory();
        let stats = &self.shared.stats;
        while self.shared.has_fault() {
            let Next::Chain((head, buffer)) =
                queue.next_writable(&ram, FAULT_BYTES, turn, || stats.bad_requests.count())?
            else {
                break;
            };
            // Only this thread takes faults.
            let written = self.shared.next_fault().map(|fault| fault.bytes());
            let written = written.map_or(0, |bytes| buffer.copy_in(&bytes));
            queue.push_used(&ram, head, written as u32)?;
        }
        queue.signal(&ram)
    }
}

/// Executes a request and returns the number of bytes for the driver. A request that cannot be read gets none. If the
/// request takes memory away from a device, this returns after the device's last access to it. `None`: a command arrived
/// during the request.
fn answer(
    shared: &Shared,
    request: Result<ChainBuffers, ChainError>,
    features: u64,
    stops_now: StopsNow<'_>,
) -> Option<u32> {
    let read = request.ok().and_then(|buffers| {
        let mut bytes = [0; REQUEST_BYTES_MAX];
        let length = buffers.readable.bytes();
        let bytes = bytes.get_mut(..length)?;
        buffers.readable.copy_out(bytes);
        let request = Request::read(bytes, buffers.writable.bytes(), features)?;
        Some((request, buffers))
    });
    let Some((request, buffers)) = read else {
        shared.stats.requests.count();
        shared.stats.bad_requests.count();
        return Some(0);
    };
    let mut result = [0; RESULT_BYTES_MAX];
    let (bytes, succeeded) = request.execute(shared, features, &mut result, stops_now)?;
    shared.stats.requests.count();
    if !succeeded {
        shared.stats.refused_requests.count();
    }
    Some(buffers.writable.copy_in(&result[..bytes]) as u32)
}

impl QueueHandler for Handler {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn activate(
        &mut self,
        activation: Activation,
        sources: &mut EventSources,
    ) -> Result<(), WorkerError> {
        sources.add(self.shared.faulted.as_raw_fd(), TOKEN_FAULTS)?;
        self.features = activation.features;
        let (ram, queues) = activation.serve();
        self.ram = Some(ram);
        for queue in queues {
            match queue.index() {
                REQUEST_QUEUE => self.requests = Some(queue),
                _ => self.events = Some(queue),
            }
        }
        Ok(())
    }

    fn queue_ready(&mut self, queue_index: u16, turn: &mut Turn) -> Result<(), WorkerError> {
        match queue_index {
            EVENT_QUEUE => self.report_faults(turn),
            _ => self.serve_requests(turn),
        }
    }

    fn source_ready(
        &mut self,
        _token: u32,
        _sources: &mut EventSources,
        turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        // Before the faults are taken: a later one makes it readable again.
        self.shared.faulted.read().ok();
        self.report_faults(turn)
    }

    fn reset(&mut self) {
        self.ram = None;
        self.requests = None;
        self.events = None;
        self.shared.forget_faults();
        self.shared.change_and_wait(Tables::clear);
    }

    fn state(&self) -> HandlerState {
        let queues = self.requests.iter().chain(&self.events);
        HandlerState::of_queues(queues.map(ServedQueue::position))
    }
}
