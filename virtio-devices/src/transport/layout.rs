//! The layout of BAR0 and configuration space (virtio 1.2 §4.1.4).

use crate::pci::{ConfigSpace, Identity, MSIX_CAPABILITY_ID, MsixTable};

/// The only BAR.
pub const BAR_INDEX: u8 = 0;
/// Its size.
pub const BAR_BYTES: u64 = 512 << 10;

const COMMON_OFFSET: u64 = 0;
/// `struct virtio_pci_common_cfg` up to and including `queue_device`.
pub(super) const COMMON_BYTES: u64 = 56;
const ISR_OFFSET: u64 = 0x2000;
const ISR_BYTES: u64 = 1;
const DEVICE_OFFSET: u64 = 0x4000;
const DEVICE_BYTES: u64 = 0x1000;
/// Doorbell of queue n is at `NOTIFY_OFFSET + n * NOTIFY_MULTIPLIER`.
pub const NOTIFY_OFFSET: u64 = 0x6000;
/// Distance between two doorbells.
pub const NOTIFY_MULTIPLIER: u32 = 4;
const NOTIFY_BYTES: u64 = 0x1000;
const MSIX_TABLE_OFFSET: u64 = 0x8000;
const MSIX_TABLE_BYTES: u64 = 0x40000;
const MSIX_PBA_OFFSET: u64 = 0x48000;
const MSIX_PBA_BYTES: u64 = 0x800;

/// Maximum number of queues: the number of doorbells in the notify window.
pub(super) const QUEUES_MAX: usize = (NOTIFY_BYTES / NOTIFY_MULTIPLIER as u64) as usize;

const _: () = {
    assert!(MSIX_TABLE_OFFSET + MSIX_TABLE_BYTES <= MSIX_PBA_OFFSET);
    assert!(MSIX_PBA_OFFSET + MSIX_PBA_BYTES <= BAR_BYTES);
    // One vector per queue and one for the configuration.
    assert!(QUEUES_MAX < crate::pci::MSIX_VECTORS_MAX as usize);
    assert!((QUEUES_MAX + 1) * crate::pci::MSIX_ENTRY_BYTES <= MSIX_TABLE_BYTES as usize);
};

/// The areas of BAR0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Region {
    Common,
    Isr,
    Device,
    Notify,
    MsixTable,
    MsixPending,
}

impl Region {
    /// The area that contains an offset, and the offset in that area.
    pub(super) fn of(offset: u64) -> Option<(Self, u64)> {
        const REGIONS: [(Region, u64, u64); 6] = [
            (Region::Common, COMMON_OFFSET, COMMON_BYTES),
            (Region::Isr, ISR_OFFSET, ISR_BYTES),
            (Region::Device, DEVICE_OFFSET, DEVICE_BYTES),
            (Region::Notify, NOTIFY_OFFSET, NOTIFY_BYTES),
            (Region::MsixTable, MSIX_TABLE_OFFSET, MSIX_TABLE_BYTES),
            (Region::MsixPending, MSIX_PBA_OFFSET, MSIX_PBA_BYTES),
        ];
        REGIONS
            .iter()
            .find(|(_, start, bytes)| (*start..start + bytes).contains(&offset))
            .map(|(region, start, _)| (*region, offset - start))
    }
}

const VENDOR_VIRTIO: u16 = 0x1af4;
/// First device id of modern devices.
const DEVICE_ID_BASE: u16 = 0x1040;
const REVISION_MODERN: u8 = 1;

const CAPABILITY_VENDOR: u8 = 0x09;
// `cfg_type` of the vendor capabilities (virtio 1.2 §4.1.4).
const VIRTIO_PCI_CAP_COMMON_CFG: u8 = 1;
const VIRTIO_PCI_CAP_NOTIFY_CFG: u8 = 2;
const VIRTIO_PCI_CAP_ISR_CFG: u8 = 3;
const VIRTIO_PCI_CAP_DEVICE_CFG: u8 = 4;
const VIRTIO_PCI_CAP_PCI_CFG: u8 = 5;

// Fields of `struct virtio_pci_cap`, from the start of the capability.
pub(super) const CAP_BAR: u16 = 4;
pub(super) const CAP_OFFSET: u16 = 8;
pub(super) const CAP_LENGTH: u16 = 12;
/// `pci_cfg_data` of `struct virtio_pci_cfg_cap`.
pub(super) const CAP_PCI_CFG_DATA: u16 = 16;
/// `sizeof(struct virtio_pci_cap)`; the notify and the window capability have four more bytes.
const CAP_BYTES: u8 = 16;

/// Configuration space of a function, and the offsets at which a write has effects.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) space: ConfigSpace,
    /// The PCI_CFG capability, a window into BAR0.
    pub(super) window: u16,
    /// The MSI-X message control register.
    pub(super) msix_control: u16,
}

impl Header {
    pub(super) fn new(device_type: u32, msix: &MsixTable) -> Self {
        let mut space = ConfigSpace::new(identity(device_type));
        space.add_memory_bar_64(BAR_INDEX, BAR_BYTES);
        for (cfg_type, offset, bytes) in [
            (VIRTIO_PCI_CAP_COMMON_CFG, COMMON_OFFSET, COMMON_BYTES),
            (VIRTIO_PCI_CAP_ISR_CFG, ISR_OFFSET, ISR_BYTES),
            (VIRTIO_PCI_CAP_DEVICE_CFG, DEVICE_OFFSET, DEVICE_BYTES),
        ] {
            space.add_capability(CAPABILITY_VENDOR, &body(cfg_type, offset, bytes, None), &[]);
        }
        let notify = body(
            VIRTIO_PCI_CAP_NOTIFY_CFG,
            NOTIFY_OFFSET,
            NOTIFY_BYTES,
            Some(NOTIFY_MULTIPLIER),
        );
        space.add_capability(CAPABILITY_VENDOR, &notify, &[]);

        // The driver may write the window's bar, offset and length.
        let window_body = body(VIRTIO_PCI_CAP_PCI_CFG, 0, 0, Some(0));
        let mut window_writable = [0; 14];
        window_writable[usize::from(CAP_BAR) - 2] = 0xff;
        window_writable[usize::from(CAP_OFFSET) - 2..].fill(0xff);
        let window = space.add_capability(CAPABILITY_VENDOR, &window_body, &window_writable);

        let (msix_body, msix_writable) =
            msix.capability(BAR_INDEX, MSIX_TABLE_OFFSET as u32, MSIX_PBA_OFFSET as u32);
        let msix_at = space.add_capability(MSIX_CAPABILITY_ID, &msix_body, &msix_writable);
        Self {
            space,
            window: u16::from(window),
            msix_control: u16::from(msix_at) + 2,
        }
    }
}

/// Base class and subclass by device type, so that firmware and `lspci` recognise disks and network cards; all others
/// are unclassified devices.
fn identity(device_type: u32) -> Identity {
    let (class, subclass) = match device_type {
        1 => (0x02, 0x00),
        2 => (0x01, 0x80),
        _ => (0xff, 0xff),
    };
    let device = DEVICE_ID_BASE + u16::try_from(device_type & 0x3f).expect("six bits");
    Identity {
        vendor: VENDOR_VIRTIO,
        device,
        revision: REVISION_MODERN,
        class,
        subclass,
        subsystem_vendor: VENDOR_VIRTIO,
        subsystem: device,
    }
}

/// `struct virtio_pci_cap` after `cap_next`, with one more dword if there is a tail.
fn body(cfg_type: u8, offset: u64, bytes: u64, tail: Option<u32>) -> Vec<u8> {
    let length = |value: u64| u32::try_from(value).expect("BAR0 is 512 KiB").to_le_bytes();
    let cap_bytes = CAP_BYTES + if tail.is_some() { 4 } else { 0 };
    let mut body = vec![cap_bytes, cfg_type, BAR_INDEX, 0, 0, 0];
    body.extend(length(offset));
    body.extend(length(bytes));
    body.extend(tail.into_iter().flat_map(u32::to_le_bytes));
    body
}
