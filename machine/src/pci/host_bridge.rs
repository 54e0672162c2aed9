//! The function at `0000:00:00.0`: identity only, no programmable registers.

use virtio_devices::pci::{Bar, DoorbellRegister, PciFunction};

/// Vendor and device id by which guests recognise Cloud Hypervisor's bridge.
const VENDOR_ID: u16 = 0x8086;
const DEVICE_ID: u16 = 0x0d57;
/// Class 06 (bridge), subclass 00 (host).
const CLASS_CODE: [u8; 2] = [0x00, 0x06];

// Offsets in the type 0 header (PCI 3.0 §6.1).
const VENDOR_OFFSET: usize = 0x00;
const DEVICE_OFFSET: usize = 0x02;
const SUBCLASS_OFFSET: usize = 0x0a;
const HEADER_BYTES: usize = 0x40;

/// The host bridge.
#[derive(Debug)]
pub struct HostBridge {
    header: [u8; HEADER_BYTES],
}

impl Default for HostBridge {
    fn default() -> Self {
        let mut header = [0; HEADER_BYTES];
        header[VENDOR_OFFSET..][..2].copy_from_slice(&VENDOR_ID.to_le_bytes());
        header[DEVICE_OFFSET..][..2].copy_from_slice(&DEVICE_ID.to_le_bytes());
        header[SUBCLASS_OFFSET..][..2].copy_from_slice(&CLASS_CODE);
        Self { header }
    }
}

impl PciFunction for HostBridge {
    fn id(&self) -> &str {
        "__pci_host_bridge"
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self
                .header
                .get(usize::from(offset) + i)
                .copied()
                .unwrap_or(0);
        }
    }

    fn config_write(&self, _offset: u16, _data: &[u8]) -> bool {
        false
    }

    fn bars(&self) -> Vec<Bar> {
        Vec::new()
    }

    fn set_bar_address(&self, _index: u8, _address: u64) {}

    fn bar_read(&self, _index: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _index: u8, _offset: u64, _data: &[u8]) {}

    fn with_doorbells(&self, _visit: &mut dyn FnMut(DoorbellRegister<'_>)) {}

    fn resume(&self) {}

    fn reset(&self) {}
}
