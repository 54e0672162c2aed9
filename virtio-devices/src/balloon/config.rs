//! The balloon's configuration space (virtio 1.2 §5.5.4).
//!
//! | Offset | Field | Written by |
//! | --- | --- | --- |
//! | 0 | `num_pages` | device: pages it requests |
//! | 4 | `actual` | driver: pages it has given up |
//! | 8 | `free_page_hint_cmd_id` | device: id of the hinting run it requests |
//! | 12 | `poison_val` | driver, with PAGE_POISON |
//!
//! All fields are 32 bits, little endian. Reads may have any size; a write is valid only if it covers exactly one
//! field. The following fields, the reporting policy, are in [`super::reporting_policy`].

use std::sync::atomic::{AtomicU32, Ordering};

use device_facts::policy_space::{POLICY_END, POLICY_OFFSET};

use super::spec::VIRTIO_BALLOON_PFN_SHIFT;

const ACTUAL_OFFSET: u64 = 4;
const POISON_VAL_OFFSET: u64 = 12;
const FIELDS: usize = 4;
const FIELD_BYTES: usize = 4;
const SPACE_BYTES: usize = FIELDS * FIELD_BYTES;
/// The standard fields and the reporting policy.
const WHOLE_BYTES: usize = POLICY_END as usize;
const _: () = assert!(POLICY_OFFSET as usize == SPACE_BYTES);

/// The fields, written by vCPU and API threads and read by all threads. They are independent of each other, so no
/// ordering is needed.
#[derive(Debug, Default)]
pub(super) struct ConfigSpace {
    num_pages: AtomicU32,
    hint_cmd_id: AtomicU32,
    actual: AtomicU32,
    poison_val: AtomicU32,
}

/// The effect of a write to the configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ConfigWrite {
    /// `actual` has a new value, in bytes.
    Actual(u64),
    /// `poison_val` has a new value.
    PoisonVal,
    /// Not a field that a driver may write, or not all of one.
    Ignored,
}

impl ConfigSpace {
    pub(super) fn num_pages(&self) -> u32 {
        self.num_pages.load(Ordering::Relaxed)
    }

    pub(super) fn actual(&self) -> u32 {
        self.actual.load(Ordering::Relaxed)
    }

    /// The number of bytes that the host requests.
    pub(super) fn target_bytes(&self) -> u64 {
        bytes_of_pages(self.num_pages())
    }

    /// Requests whole pages. A value beyond 32 bits is truncated, as in the API that this device is compatible with.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "num_pages is 32 bits on the wire"
    )]
    pub(super) fn set_target_bytes(&self, bytes: u64) {
        let pages = (bytes >> VIRTIO_BALLOON_PFN_SHIFT) as u32;
        self.num_pages.store(pages, Ordering::Relaxed);
    }

    /// The number of bytes that the driver reports as given up.
    pub(super) fn actual_bytes(&self) -> u64 {
        bytes_of_pages(self.actual())
    }

    pub(super) fn hint_cmd_id(&self) -> u32 {
        self.hint_cmd_id.load(Ordering::Relaxed)
    }

    pub(super) fn set_hint_cmd_id(&self, id: u32) {
        self.hint_cmd_id.store(id, Ordering::Relaxed);
    }

    pub(super) fn poison_val(&self) -> u32 {
        self.poison_val.load(Ordering::Relaxed)
    }

    /// Restores all fields.
    pub(super) fn restore(&self, num_pages: u32, actual: u32, hint_cmd_id: u32, poison_val: u32) {
        self.num_pages.store(num_pages, Ordering::Relaxed);
        self.actual.store(actual, Ordering::Relaxed);
        self.hint_cmd_id.store(hint_cmd_id, Ordering::Relaxed);
        self.poison_val.store(poison_val, Ordering::Relaxed);
    }

    /// Clears the values of a driver that is gone; the host's requests stay.
    pub(super) fn forget_driver(&self) {
        self.actual.store(0, Ordering::Relaxed);
        self.poison_val.store(0, Ordering::Relaxed);
    }

    /// `policy`: the bytes from [`POLICY_OFFSET`] on, if any.
    pub(super) fn read(&self, policy: Option<&[u8]>, offset: u64, data: &mut [u8]) {
        let fields = [
            self.num_pages(),
            self.actual(),
            self.hint_cmd_id(),
            self.poison_val(),
        ];
        let mut space = [0_u8; WHOLE_BYTES];
        let (standard, behind) = space.split_at_mut(SPACE_BYTES);
        for (bytes, field) in standard.chunks_exact_mut(FIELD_BYTES).zip(fields) {
            bytes.copy_from_slice(&field.to_le_bytes());
        }
        if let Some(policy) = policy {
            behind.copy_from_slice(policy);
        }
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let present = space.get(from..).unwrap_or_default();
        let len = present.len().min(data.len());
        data[..len].copy_from_slice(&present[..len]);
        data[len..].fill(0);
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) -> ConfigWrite {
        let Ok(bytes) = <[u8; FIELD_BYTES]>::try_from(data) else {
            return ConfigWrite::Ignored;
        };
        let value = u32::from_le_bytes(bytes);
        match offset {
            ACTUAL_OFFSET => {
                self.actual.store(value, Ordering::Relaxed);
                ConfigWrite::Actual(bytes_of_pages(value))
            }
            POISON_VAL_OFFSET => {
                self.poison_val.store(value, Ordering::Relaxed);
                ConfigWrite::PoisonVal
            }
            _ => ConfigWrite::Ignored,
        }
    }
}

fn bytes_of_pages(pages: u32) -> u64 {
    u64::from(pages) << VIRTIO_BALLOON_PFN_SHIFT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_read_past_its_end_gives_zeros() {
        let config = ConfigSpace::default();
        config.set_target_bytes(0x0403_0201 << 12);
        for offset in [0_u64, 1, 3, 15, 16, 17, u64::MAX] {
            let mut data = [0xff; 32];
            config.read(None, offset, &mut data);
            assert_eq!(data[0], if offset < 4 { offset as u8 + 1 } else { 0 });
            assert!(data[4..].iter().all(|byte| *byte == 0), "offset {offset}");
        }
    }

    #[test]
    fn space_write_other_than_one_whole_field_is_ignored() {
        let config = ConfigSpace::default();
        for (offset, len) in [
            (0, 4),
            (4, 3),
            (4, 8),
            (5, 4),
            (8, 4),
            (16, 4),
            (u64::MAX, 4),
            (4, 0),
        ] {
            assert_eq!(config.write(offset, &vec![0xff; len]), ConfigWrite::Ignored);
        }
        assert_eq!(
            (config.num_pages(), config.actual(), config.poison_val()),
            (0, 0, 0)
        );
        assert_eq!(
            config.write(4, &7_u32.to_le_bytes()),
            ConfigWrite::Actual(7 << 12)
        );
    }
}
