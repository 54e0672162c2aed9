//! A PCI function with a BAR in each window and a doorbell, and with the configuration space of real devices.

use std::sync::{Mutex, MutexGuard};

use state::StateError;
use virtio_devices::Unpoisoned;
use virtio_devices::pci::{
    Bar, ConfigSpace, DoorbellRegister, Identity, PciConfigState, PciFunction,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const IDENTITY: Identity = Identity {
    vendor: 0x1af4,
    device: 0x1045,
    revision: 1,
    class: 0xff,
    subclass: 0,
    subsystem_vendor: 0x1af4,
    subsystem: 1,
};
const NARROW: u8 = 0;
pub(super) const NARROW_BYTES: u32 = 0x1000;
const WIDE: u8 = 2;
pub(super) const WIDE_BYTES: u64 = 0x8000;
const DOORBELL_OFFSET: u64 = 0x6000;

pub(super) struct PlainFunction {
    id: String,
    config: Mutex<ConfigSpace>,
    event: EventFd,
}

virtio_devices::debug_fields!(PlainFunction { id });

impl PlainFunction {
    pub(super) fn new(id: &str) -> Self {
        let mut config = ConfigSpace::new(IDENTITY);
        config.add_memory_bar_32(NARROW, NARROW_BYTES);
        config.add_memory_bar_64(WIDE, WIDE_BYTES);
        Self {
            id: id.to_owned(),
            config: Mutex::new(config),
            event: EventFd::new(EFD_NONBLOCK).expect("descriptors"),
        }
    }

    pub(super) fn state(&self) -> PciConfigState {
        self.config().state()
    }

    pub(super) fn restore(&self, state: &PciConfigState) -> Result<(), StateError> {
        self.config().restore(state)
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unpoisoned()
    }
}

fn bars(config: &ConfigSpace) -> Vec<Bar> {
    let bar = |index, size_bytes, is_64bit| Bar {
        index,
        size_bytes,
        is_64bit,
        address: config.bar_address(index),
        decoded: config.memory_decoded(),
    };
    vec![
        bar(NARROW, u64::from(NARROW_BYTES), false),
        bar(WIDE, WIDE_BYTES, true),
    ]
}

impl PciFunction for PlainFunction {
    fn id(&self) -> &str {
        &self.id
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> bool {
        assert!(matches!(data.len(), 1 | 2 | 4) && usize::from(offset).is_multiple_of(data.len()));
        let mut config = self.config();
        let before = bars(&config);
        config.write(offset, data);
        bars(&config) != before
    }

    fn bars(&self) -> Vec<Bar> {
        bars(&self.config())
    }

    fn set_bar_address(&self, index: u8, address: u64) {
        self.config().set_bar_address(index, address);
    }

    fn bar_read(&self, index: u8, offset: u64, data: &mut [u8]) {
        self.check(index, offset, data.len());
        data.fill(index);
    }

    fn bar_write(&self, index: u8, offset: u64, data: &[u8]) {
        self.check(index, offset, data.len());
    }

    fn with_doorbells(&self, visit: &mut dyn FnMut(DoorbellRegister<'_>)) {
        visit(DoorbellRegister {
            bar_index: WIDE,
            offset: DOORBELL_OFFSET,
            event: &self.event,
        });
    }

    fn resume(&self) {}

    fn reset(&self) {}
}

impl PlainFunction {
    fn check(&self, index: u8, offset: u64, bytes: usize) {
        let own = self.bars();
        let bar = own.iter().find(|bar| bar.index == index);
        let bar = bar.expect("only its own BARs are mapped");
        assert!(offset + bytes as u64 <= bar.size_bytes);
    }
}
