//! Configuration of guest RAM.

use std::path::PathBuf;

use api_macros::{Words, section};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::options::{OptionError, parse_bytes};

/// Default size of RAM: 512 MiB.
pub const DEFAULT_MEMORY_BYTES: u64 = 512 << 20;

/// Guest RAM: size, backing and growth.
#[section(
    option = "memory",
    about = "Memory parameters",
    parse = "parse_without_zones"
)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryConfig {
    /// RAM at boot, bytes; 0 if zones describe it.
    #[key("<guest_memory_size>", read = parse_bytes, required, default = DEFAULT_MEMORY_BYTES)]
    pub size: u64,
    /// Let the host merge identical pages (KSM).
    #[key]
    pub mergeable: bool,
    /// How RAM is added to a running guest.
    #[key]
    pub hotplug_method: HotplugMethod,
    /// Maximum number of bytes that can be added to a running guest. With virtio-mem, a multiple of 128 MiB. Zones have
    /// their own.
    #[key("<hotpluggable_memory_size>", read = parse_bytes)]
    pub hotplug_size: Option<u64>,
    /// Target for the part of `hotplug_size` that the guest has, bytes. It follows `vm.resize`. Only with virtio-mem.
    #[key("<hotplugged_memory_size>", read = parse_bytes)]
    pub hotplugged_size: Option<u64>,
    /// Back RAM with a shared mapping, so that another process can map it too.
    #[key]
    pub shared: bool,
    /// Back RAM with huge pages from the host's pool.
    #[key]
    pub hugepages: bool,
    /// Size of the huge pages, bytes; the host's default when absent.
    #[key("<hugepage_size>", read = parse_bytes)]
    pub hugepage_size: Option<u64>,
    /// Allocate all of RAM before the guest starts.
    #[key]
    pub prefault: bool,
    /// Let the host account for all of RAM at the start.
    #[key]
    pub reserve: bool,
    /// Request transparent huge pages.
    #[key(default = true)]
    pub thp: bool,
    /// Reaction if the host cannot provide a page of RAM while the VM runs. The VM ends, or is paused if it can be
    /// resumed later.
    #[key]
    pub on_unavailable: MemoryUnavailableAction,
    /// Zones of RAM with different backing; `size` must be 0.
    pub zones: Option<Vec<MemoryZoneConfig>>,
}

impl MemoryConfig {
    /// RAM in bytes, including all zones and hot-plugged memory; `None` if the sum exceeds 64 bits.
    pub fn total_bytes(&self) -> Option<u64> {
        let own = self.size.checked_add(self.hotplugged_size.unwrap_or(0))?;
        self.zones.iter().flatten().try_fold(own, |sum, zone| {
            sum.checked_add(zone.size)?
                .checked_add(zone.hotplugged_size.unwrap_or(0))
        })
    }

    /// The size of what `method` can add to RAM, bytes. Zones grow only by virtio-mem.
    pub fn room_bytes(&self, method: HotplugMethod) -> u64 {
        let own = self.hotplug_size.filter(|_| self.size > 0).unwrap_or(0);
        let zones = self.zones.iter().flatten();
        let in_zones = zones.filter_map(|zone| zone.hotplug_size);
        match method {
            _ if self.hotplug_method != method => 0,
            HotplugMethod::Acpi => own,
            HotplugMethod::VirtioMem => in_zones.fold(own, u64::saturating_add),
        }
    }

    /// Reads the values of `--memory` and of every `--memory-zone`.
    ///
    /// # Errors
    /// An unknown key, a malformed value, or a zone without a name.
    pub fn parse<S: AsRef<str>>(text: &str, zones: &[S]) -> Result<Self, OptionError> {
        let mut memory = Self::parse_without_zones(text)?;
        if !zones.is_empty() {
            let zones = zones.iter().map(|it| MemoryZoneConfig::parse(it.as_ref()));
            memory.zones = Some(zones.collect::<Result<_, _>>()?);
        }
        Ok(memory)
    }
}

/// One part of guest RAM.
#[section(option = "memory-zone", about = "Memory zone parameters")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryZoneConfig {
    /// Name of the zone, unique among the names of zones and devices.
    #[key("<zone_identifier>", required)]
    pub id: String,
    /// RAM at boot, bytes.
    #[key("<guest_memory_region_size>", read = parse_bytes, required, default = DEFAULT_MEMORY_BYTES)]
    pub size: u64,
    /// File of at least this size, or directory for a new unnamed file. With `shared=on` the guest's writes go to the
    /// file; otherwise the file is only read.
    #[key("<backing_file>")]
    pub file: Option<PathBuf>,
    /// Back the zone with a shared mapping.
    #[key]
    pub shared: bool,
    /// Back the zone with huge pages from the host's pool.
    #[key]
    pub hugepages: bool,
    /// Size of the huge pages, bytes; the host's default when absent.
    #[key("<hugepage_size>", read = parse_bytes)]
    pub hugepage_size: Option<u64>,
    /// Host NUMA node that provides the zone.
    #[key("<node_id>")]
    pub host_numa_node: Option<u32>,
    /// Maximum number of bytes that can be added to the zone of a running guest. A multiple of 128 MiB. Only with
    /// virtio-mem.
    #[key("<hotpluggable_memory_size>", read = parse_bytes)]
    pub hotplug_size: Option<u64>,
    /// Target for the part of `hotplug_size` that the guest has, bytes. It follows `vm.resize-zone`.
    #[key("<hotplugged_memory_size>", read = parse_bytes)]
    pub hotplugged_size: Option<u64>,
    /// Allocate the zone before the guest starts.
    #[key]
    pub prefault: bool,
    /// Let the host account for the zone at the start.
    #[key]
    pub reserve: bool,
    /// Let the host merge identical pages (KSM).
    #[key]
    pub mergeable: bool,
}

/// The reaction if the host cannot provide RAM of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema, Words)]
pub enum MemoryUnavailableAction {
    /// The VM ends, as on any other failure.
    #[default]
    #[word("shutdown")]
    Shutdown,
    /// The VM is paused. `vm.resume` tries again. If a device has missed the page, the VM ends.
    #[word("pause")]
    Pause,
}

/// How RAM is added to a running guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema, Words)]
pub enum HotplugMethod {
    /// Memory devices (DIMMs) that ACPI announces.
    #[default]
    #[word("acpi")]
    Acpi,
    /// The virtio-mem device.
    #[word("virtio-mem")]
    VirtioMem,
}
