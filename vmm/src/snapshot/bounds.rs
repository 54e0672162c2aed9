//! Maximum sizes of a snapshot's files, derived from its configuration before they are read.

use api::VmConfig;
use api::config::HotplugMethod;
use virtio_devices::dma::MAPPINGS_MAX;

use crate::config::has_iommu;

/// The same limit as for a request body.
pub(super) const CONFIG_BYTES_MAX: u64 = 4 << 20;

/// State of all devices; the largest is a vsock device with the maximum number of connections.
const DEVICES_BYTES: u64 = 4 << 20;
/// Registers, CPUID leaves, and the state of a nested guest.
const VCPU_BYTES: u64 = 128 << 10;
/// `KVM_MAX_VCPUS` of Linux at most.
const VCPUS_MAX: u64 = 4096;
/// Bytes of RAM per byte of state: covers one bit, in base 64, for each 2 MiB block that can be plugged in.
const RAM_PER_BLOCK_BYTE: u64 = 4 << 20;
/// The most mappings of a virtual IOMMU, of 25 bytes each, in base 64; and its endpoints.
const IOMMU_BYTES: u64 = MAPPINGS_MAX as u64 * 34 + (64 << 10);
/// Content is listed in chunks of this size.
const CHUNK_BYTES: u64 = 2 << 20;
/// Maximum length of a chunk's entry.
const CHUNK_TEXT_BYTES: u64 = 1024;
/// Maximum length of a table without chunks.
const TABLE_BYTES: u64 = 256;

/// Bounds of `state.json`. They limit the reader's memory to a small fraction of the configured RAM.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// The line of the machine.
    pub(super) machine: u64,
    /// The line of one memory file.
    pub(super) table: u64,
    /// The whole file.
    pub(super) file: u64,
}

/// Maximum length of the state of a machine, without its memory.
pub fn state_bytes_max(config: &VmConfig) -> u64 {
    Bounds::of(config).machine
}

impl Bounds {
    pub(super) fn of(config: &VmConfig) -> Self {
        let memory = &config.memory;
        // Each can have a region in which it grows.
        let zones = 2 * memory.zones.iter().flatten().count().max(1) as u64;
        // Invalid sizes are rejected later, with an error that names them.
        let ram = memory.total_bytes().unwrap_or(0);
        let room = [HotplugMethod::Acpi, HotplugMethod::VirtioMem].map(|it| memory.room_bytes(it));
        let ram = room.into_iter().fold(ram, u64::saturating_add);
        // The guest may not have released vCPUs whose removal was requested.
        let vcpus = config.cpus.max_vcpus.max(config.cpus.boot_vcpus);
        let vcpus = u64::from(vcpus).min(VCPUS_MAX);
        let iommu = match has_iommu(config) {
            true => IOMMU_BYTES,
            false => 0,
        };
        let machine = DEVICES_BYTES + iommu + vcpus * VCPU_BYTES + ram / RAM_PER_BLOCK_BYTE;
        // Each zone can end with a partial chunk, both before and after the hole in the address map.
        let chunks = ram / CHUNK_BYTES + 2 * zones;
        let table = TABLE_BYTES + chunks * CHUNK_TEXT_BYTES;
        Self {
            machine,
            table,
            file: machine + table + zones * TABLE_BYTES,
        }
    }
}

#[cfg(test)]
mod tests {
    use machine::memory::{ChunkState, ZoneContentState};

    use super::*;

    #[test]
    fn table_of_a_zone_that_is_full_of_data_is_within_its_bound() {
        let mut config = VmConfig::default();
        config.memory.size = 1 << 30;
        let chunk = ChunkState {
            offset: u64::MAX,
            pages: state::Bytes(vec![255; 64]),
            zeros: state::Bytes(vec![255; 64]),
            sums: state::Bytes(vec![255; 512]),
            crc32: Some(u32::MAX),
        };
        let table = ZoneContentState {
            bytes: u64::MAX,
            chunks: vec![chunk; 512],
        };
        let text = serde_json::to_string(&table).expect("plain data is always JSON");
        let bounds = Bounds::of(&config);
        assert!((text.len() as u64) < bounds.table, "{}", text.len());
        assert!(bounds.machine + bounds.table < bounds.file);
        assert!(bounds.file < 8 << 20, "a small machine has a small bound");
    }
}
