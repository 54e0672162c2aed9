//! A fake PCI function with one 64-bit BAR and one doorbell.

use std::sync::Mutex;

use virtio_devices::pci::{Bar, DoorbellRegister, PciFunction};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(super) use super::fake_doorbells::FakeDoorbells;

pub(super) const BAR_BYTES: u64 = 0x8000;
pub(super) const DOORBELL_OFFSET: u64 = 0x6000;

#[derive(Debug)]
pub(super) struct Registers {
    pub(super) config: [u8; 256],
    /// Accesses as the function saw them: offset and length.
    pub(super) config_accesses: Vec<(u16, usize)>,
    pub(super) bar_writes: Vec<(u64, Vec<u8>)>,
}

#[derive(Debug)]
pub(super) struct FakeFunction {
    id: String,
    event: EventFd,
    pub(super) registers: Mutex<Registers>,
}

impl FakeFunction {
    pub(super) fn new(id: &str) -> Self {
        let mut config = [0; 256];
        config[..4].copy_from_slice(&[0xf4, 0x1a, 0x45, 0x10]);
        Self {
            id: id.to_owned(),
            event: EventFd::new(EFD_NONBLOCK).unwrap(),
            registers: Mutex::new(Registers {
                config,
                config_accesses: Vec::new(),
                bar_writes: Vec::new(),
            }),
        }
    }
}

impl PciFunction for FakeFunction {
    fn id(&self) -> &str {
        &self.id
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let mut registers = self.registers.lock().unwrap();
        registers.config_accesses.push((offset, data.len()));
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = *registers.config.get(usize::from(offset) + i).unwrap_or(&0);
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> bool {
        assert!(matches!(data.len(), 1 | 2 | 4));
        assert_eq!(usize::from(offset) % data.len(), 0);
        let mut registers = self.registers.lock().unwrap();
        registers.config_accesses.push((offset, data.len()));
        for (i, byte) in data.iter().enumerate() {
            if let Some(old) = registers.config.get_mut(usize::from(offset) + i) {
                *old = *byte;
            }
        }
        offset < 0x18
    }

    fn bars(&self) -> Vec<Bar> {
        let registers = self.registers.lock().unwrap();
        let address = u64::from_le_bytes(registers.config[0x10..0x18].try_into().unwrap());
        vec![Bar {
            index: 0,
            size_bytes: BAR_BYTES,
            is_64bit: true,
            address: address & !(BAR_BYTES - 1),
            decoded: registers.config[4] & 2 != 0,
        }]
    }

    fn set_bar_address(&self, index: u8, address: u64) {
        assert_eq!(index, 0);
        self.registers.lock().unwrap().config[0x10..0x18].copy_from_slice(&address.to_le_bytes());
    }

    fn bar_read(&self, _index: u8, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }

    fn bar_write(&self, _index: u8, offset: u64, data: &[u8]) {
        let mut registers = self.registers.lock().unwrap();
        registers.bar_writes.push((offset, data.to_vec()));
    }

    fn with_doorbells(&self, visit: &mut dyn FnMut(DoorbellRegister<'_>)) {
        visit(DoorbellRegister {
            bar_index: 0,
            offset: DOORBELL_OFFSET,
            event: &self.event,
        });
    }

    fn resume(&self) {}

    fn reset(&self) {}
}
