//! Drives a whole PCI function through its registers, in Linux's order (virtio 1.2 §3.1.1, §4.1.5).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use state::Saved;
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};

use super::queue::DriverQueue;
use super::ram::TestRam;
use super::vectors::MockVectors;
use super::wait_until;
use crate::device::VirtioDevice;
use crate::dma::DmaEndpoint;
use crate::pci::PciFunction;
use crate::transport::{TransportError, VirtioPciFunction, VirtioPciParams, vectors_needed};

const BAR0: u16 = 0x10;
/// The address of BAR0.
const BAR_ADDRESS: u64 = 0x10_0000_0000;
const COMMAND: u16 = 0x04;
const COMMAND_MEMORY_AND_MASTER: u16 = 0b110;
const CAPABILITY_POINTER: u16 = 0x34;
/// Maximum number of capabilities that fit; a longer list is a loop.
const CAPABILITIES_MAX: usize = 48;
const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_ENTRY_BYTES: u64 = 16;

/// Register offsets in the common configuration.
pub mod common {
    #![allow(missing_docs)]
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0c;
    pub const CONFIG_MSIX_VECTOR: u64 = 0x10;
    pub const NUM_QUEUES: u64 = 0x12;
    pub const DEVICE_STATUS: u64 = 0x14;
    pub const CONFIG_GENERATION: u64 = 0x15;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
}

/// Offsets in BAR0, found by walking the capabilities.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// Common configuration.
    pub common: u64,
    /// ISR status.
    pub isr: u64,
    /// Device configuration.
    pub device: u64,
    /// Doorbells.
    pub notify: u64,
    /// Distance between doorbells.
    pub notify_multiplier: u64,
    /// PCI_CFG capability, an offset in configuration space.
    pub window: u16,
    /// MSI-X capability, an offset in configuration space.
    pub msix: u16,
    /// MSI-X table.
    pub msix_table: u64,
    /// MSI-X pending bits.
    pub msix_pending: u64,
}

/// A driver bound to one function.
#[derive(Debug)]
pub struct MockPciDriver {
    /// The function, for operations beyond a driver's (pause, resume, VM reset).
    pub function: Arc<VirtioPciFunction>,
    /// Its interrupts. Vector 0 is the configuration's, queue n has vector n + 1.
    pub vectors: Arc<MockVectors>,
    /// Guest RAM.
    pub ram: TestRam,
    /// The offsets of the registers.
    pub windows: Windows,
    queues: BTreeMap<u16, DriverQueue>,
    /// Rings from before the last reset, by index and size. They are reused, because RAM is finite.
    spare: BTreeMap<(u16, u16), DriverQueue>,
}

/// A driver in a guest whose device is temporarily absent.
#[derive(Debug)]
pub struct MovingDriver {
    /// Guest RAM.
    pub ram: TestRam,
    windows: Windows,
    queues: BTreeMap<u16, DriverQueue>,
    spare: BTreeMap<(u16, u16), DriverQueue>,
}

impl MovingDriver {
    /// Continues with `device` behind a function restored from `saved`, which is paused.
    ///
    /// # Errors
    /// The state is rejected.
    pub fn restore(
        self,
        device: Arc<Mutex<dyn VirtioDevice>>,
        saved: &Saved,
    ) -> Result<MockPciDriver, TransportError> {
        self.restore_behind(None, device, saved)
    }

    /// The same, with a device behind a virtual IOMMU.
    ///
    /// # Errors
    /// The state is rejected.
    pub fn restore_behind(
        self,
        dma: Option<Arc<DmaEndpoint>>,
        device: Arc<Mutex<dyn VirtioDevice>>,
        saved: &Saved,
    ) -> Result<MockPciDriver, TransportError> {
        let (params, vectors) = params(dma, device, &self.ram);
        let function = VirtioPciFunction::from_state(params, saved)?;
        Ok(MockPciDriver {
            function,
            vectors,
            ram: self.ram,
            windows: self.windows,
            queues: self.queues,
            spare: self.spare,
        })
    }
}

/// Builds a function from a state, with recording vectors.
///
/// # Errors
/// The state is rejected.
pub(super) fn restore(
    device: Arc<Mutex<dyn VirtioDevice>>,
    ram: &TestRam,
    saved: &Saved,
) -> Result<(Arc<VirtioPciFunction>, Arc<MockVectors>), TransportError> {
    let (params, vectors) = params(None, device, ram);
    Ok((VirtioPciFunction::from_state(params, saved)?, vectors))
}

fn params(
    dma: Option<Arc<DmaEndpoint>>,
    device: Arc<Mutex<dyn VirtioDevice>>,
    ram: &TestRam,
) -> (VirtioPciParams, Arc<MockVectors>) {
    let count = vectors_needed(&*device.lock().expect("device lock is sound"));
    let vectors = Arc::new(MockVectors::new(count));
    let params = VirtioPciParams {
        id: "_mock".into(),
        device,
        mem: ram.mem(),
        dma,
        vectors: vectors.clone(),
        thread_start: Arc::new(|_: &str| {}),
        listener: None,
    };
    (params, vectors)
}

impl MockPciDriver {
    /// Attaches `device` to a transport and probes it: BAR programmed, decoding on, MSI-X enabled with every vector
    /// unmasked.
    pub fn new(device: Arc<Mutex<dyn VirtioDevice>>, ram: &TestRam) -> Self {
        Self::behind(None, device, ram)
    }

    /// The same, with a device behind a virtual IOMMU.
    pub fn behind(
        dma: Option<Arc<DmaEndpoint>>,
        device: Arc<Mutex<dyn VirtioDevice>>,
        ram: &TestRam,
    ) -> Self {
        let (params, vectors) = params(dma, device, ram);
        let function = VirtioPciFunction::new(params).expect("the device fits the transport");
        Self::probe(function, vectors, ram)
    }

    /// Pauses and saves the function, and drops it with its device. The driver does not notice.
    pub fn save(self) -> (Saved, MovingDriver) {
        self.function.pause();
        let saved = Saved::of(&self.function.state().expect("the workers run"));
        let moving = MovingDriver {
            ram: self.ram,
            windows: self.windows,
            queues: self.queues,
            spare: self.spare,
        };
        (saved, moving)
    }

    /// Probes an existing function.
    pub fn probe(
        function: Arc<VirtioPciFunction>,
        vectors: Arc<MockVectors>,
        ram: &TestRam,
    ) -> Self {
        let mut driver = Self {
            function,
            vectors,
            ram: ram.clone(),
            windows: Windows::default(),
            queues: BTreeMap::new(),
            spare: BTreeMap::new(),
        };
        driver.set_up_pci();
        driver
    }

    /// Does the work of a PCI core: BAR, command register, MSI-X.
    pub fn set_up_pci(&mut self) {
        self.pci_write(BAR0, &(BAR_ADDRESS as u32).to_le_bytes());
        self.pci_write(BAR0 + 4, &((BAR_ADDRESS >> 32) as u32).to_le_bytes());
        self.pci_write(COMMAND, &COMMAND_MEMORY_AND_MASTER.to_le_bytes());
        let bar = self.function.bars()[0];
        assert_eq!((bar.address, bar.decoded), (BAR_ADDRESS, true));
        self.windows = self.walk_capabilities();

        let control = self.windows.msix + 2;
        let size = u64::from(self.pci_read_u16(control) & 0x7ff) + 1;
        for vector in 0..size {
            let entry = self.windows.msix_table + vector * MSIX_ENTRY_BYTES;
            self.write(entry, &0xfee0_0000u32.to_le_bytes());
            self.write(entry + 8, &(vector as u32).to_le_bytes());
            self.write(entry + 12, &0u32.to_le_bytes());
        }
        self.pci_write(control, &MSIX_ENABLE.to_le_bytes());
    }

    /// Resets, negotiates all offered features in `wanted` (VERSION_1 is added), sets up all queues at their maximum
    /// size, and sets DRIVER_OK. Returns the accepted features.
    ///
    /// # Panics
    /// The device rejects them.
    pub fn start(&mut self, wanted: u64) -> u64 {
        self.reset();
        let accepted = self.negotiate(wanted);
        for index in 0..self.num_queues() {
            self.set_up_queue(index, None);
        }
        self.driver_ok();
        assert!(!self.needs_reset(), "device refused to start");
        accepted
    }

    /// Resets as Linux does: writes 0 and polls until it reads 0.
    pub fn reset(&mut self) {
        self.set_status(0);
        wait_until("the reset", || self.status() == 0);
        for (index, queue) in std::mem::take(&mut self.queues) {
            self.spare.insert((index, queue.size()), queue);
        }
    }

    /// Performs steps 2 to 6 of the initialisation. Returns the accepted features.
    ///
    /// # Panics
    /// FEATURES_OK does not stay set.
    pub fn negotiate(&mut self, wanted: u64) -> u64 {
        let accepted = self.offered() & (wanted | 1 << 32);
        assert!(self.try_features(accepted), "features refused");
        accepted
    }

    /// Accepts exactly `features`; returns whether FEATURES_OK stayed set.
    pub fn try_features(&mut self, features: u64) -> bool {
        self.add_status(VIRTIO_CONFIG_S_ACKNOWLEDGE);
        self.add_status(VIRTIO_CONFIG_S_DRIVER);
        for select in 0..2u32 {
            self.common_write(common::DRIVER_FEATURE_SELECT, &select.to_le_bytes());
            let half = (features >> (32 * select)) as u32;
            self.common_write(common::DRIVER_FEATURE, &half.to_le_bytes());
        }
        self.add_status(VIRTIO_CONFIG_S_FEATURES_OK);
        self.status() & VIRTIO_CONFIG_S_FEATURES_OK as u8 != 0
    }

    /// Lays out and enables a queue, at its maximum size if `size` is `None`.
    pub fn set_up_queue(&mut self, index: u16, size: Option<u16>) {
        self.select_queue(index);
        let size = size.unwrap_or_else(|| self.common_u16(common::QUEUE_SIZE));
        let queue = match self.spare.remove(&(index, size)) {
            Some(mut queue) => {
                queue.clear();
                queue
            }
            None => DriverQueue::new(&self.ram, size),
        };
        self.program_queue(
            index,
            size,
            [
                queue.desc_table().0,
                queue.avail_ring().0,
                queue.used_ring().0,
            ],
        );
        self.queues.insert(index, queue);
    }

    /// Programs and enables a queue with any addresses (descriptors, available, used).
    pub fn program_queue(&self, index: u16, size: u16, rings: [u64; 3]) {
        self.select_queue(index);
        self.common_write(common::QUEUE_SIZE, &size.to_le_bytes());
        let registers = [
            common::QUEUE_DESC,
            common::QUEUE_DRIVER,
            common::QUEUE_DEVICE,
        ];
        for (register, address) in registers.into_iter().zip(rings) {
            self.common_write(register, &(address as u32).to_le_bytes());
            self.common_write(register + 4, &((address >> 32) as u32).to_le_bytes());
        }
        self.common_write(common::QUEUE_MSIX_VECTOR, &(index + 1).to_le_bytes());
        self.common_write(common::QUEUE_ENABLE, &1u16.to_le_bytes());
    }

    /// Performs steps 7 and 8 without the queues.
    pub fn driver_ok(&self) {
        self.common_write(common::CONFIG_MSIX_VECTOR, &0u16.to_le_bytes());
        self.add_status(VIRTIO_CONFIG_S_DRIVER_OK);
    }

    /// The driver's side of an enabled queue.
    pub fn queue(&mut self, index: u16) -> &mut DriverQueue {
        self.queues.get_mut(&index).expect("the queue is set up")
    }

    /// Signals a queue's doorbell by an access to the BAR, as without ioeventfds.
    pub fn kick(&self, index: u16) {
        let offset = self.windows.notify + u64::from(index) * self.windows.notify_multiplier;
        self.write(offset, &index.to_le_bytes());
    }

    /// Feature bits on offer.
    pub fn offered(&self) -> u64 {
        (0..2u32).fold(0, |features, select| {
            self.common_write(common::DEVICE_FEATURE_SELECT, &select.to_le_bytes());
            let half = self.common_u32(common::DEVICE_FEATURE);
            features | u64::from(half) << (32 * select)
        })
    }

    /// Number of queues.
    pub fn num_queues(&self) -> u16 {
        self.common_u16(common::NUM_QUEUES)
    }

    /// The status register.
    pub fn status(&self) -> u8 {
        let mut status = [0];
        self.common_read(common::DEVICE_STATUS, &mut status);
        status[0]
    }

    /// Whether the device has failed.
    pub fn needs_reset(&self) -> bool {
        self.status() & VIRTIO_CONFIG_S_NEEDS_RESET as u8 != 0
    }

    /// Writes the status register.
    pub fn set_status(&self, status: u8) {
        self.common_write(common::DEVICE_STATUS, &[status]);
    }

    /// Reads device configuration.
    pub fn device_config(&self, offset: u64, data: &mut [u8]) {
        self.read(self.windows.device + offset, data);
    }

    /// Writes device configuration.
    pub fn write_device_config(&self, offset: u64, data: &[u8]) {
        self.write(self.windows.device + offset, data);
    }

    /// Reads the common configuration.
    pub fn common_read(&self, offset: u64, data: &mut [u8]) {
        self.read(self.windows.common + offset, data);
    }

    /// Writes the common configuration.
    pub fn common_write(&self, offset: u64, data: &[u8]) {
        self.write(self.windows.common + offset, data);
    }

    /// Reads a two byte register of the common configuration.
    pub fn common_u16(&self, offset: u64) -> u16 {
        let mut data = [0; 2];
        self.common_read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// Reads a four byte register of the common configuration.
    pub fn common_u32(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.common_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Selects a queue.
    pub fn select_queue(&self, index: u16) {
        self.common_write(common::QUEUE_SELECT, &index.to_le_bytes());
    }

    /// Reads BAR0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.function.bar_read(0, offset, data);
    }

    /// Writes BAR0.
    pub fn write(&self, offset: u64, data: &[u8]) {
        self.function.bar_write(0, offset, data);
    }

    /// Reads PCI configuration space.
    pub fn pci_read_u16(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.function.config_read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// Reads PCI configuration space.
    pub fn pci_read_u32(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.function.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes PCI configuration space.
    pub fn pci_write(&self, offset: u16, data: &[u8]) {
        self.function.config_write(offset, data);
    }

    fn add_status(&self, bits: u32) {
        self.set_status(self.status() | bits as u8);
    }

    fn walk_capabilities(&self) -> Windows {
        let mut windows = Windows::default();
        let mut at = self.pci_read_u16(CAPABILITY_POINTER) & 0xfc;
        let mut found = 0;
        while at != 0 {
            found += 1;
            assert!(found <= CAPABILITIES_MAX, "capability list is a loop");
            let head = self.pci_read_u32(at);
            let offset = u64::from(self.pci_read_u32(at + 8));
            match head.to_le_bytes() {
                [CAPABILITY_MSIX, ..] => {
                    windows.msix = at;
                    windows.msix_table = u64::from(self.pci_read_u32(at + 4) & !7);
                    windows.msix_pending = u64::from(self.pci_read_u32(at + 8) & !7);
                }
                [CAPABILITY_VENDOR, _, _, 1] => windows.common = offset,
                [CAPABILITY_VENDOR, _, _, 2] => {
                    windows.notify = offset;
                    windows.notify_multiplier = u64::from(self.pci_read_u32(at + 16));
                }
                [CAPABILITY_VENDOR, _, _, 3] => windows.isr = offset,
                [CAPABILITY_VENDOR, _, _, 4] => windows.device = offset,
                [CAPABILITY_VENDOR, _, _, 5] => windows.window = at,
                other => panic!("unknown capability {other:x?}"),
            }
            at = u16::from(head.to_le_bytes()[1]);
        }
        windows
    }
}
