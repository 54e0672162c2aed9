//! Guest RAM.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::serde_rules::enabled;
use crate::options::{OptionError, OptionFault, Options};

/// RAM of a VM that does not say otherwise: 512 MiB.
pub const DEFAULT_MEMORY_BYTES: u64 = 512 << 20;

/// Guest RAM: its size, what it is made of, and how it may grow.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct MemoryConfig {
    /// RAM at boot, bytes. 0 when zones describe it.
    pub size: u64,
    /// Let the host merge equal pages (KSM).
    #[serde(default)]
    pub mergeable: bool,
    /// How RAM is added to a running guest.
    #[serde(default)]
    pub hotplug_method: HotplugMethod,
    /// Most bytes that can be added to a running guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    /// Bytes already added.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplugged_size: Option<u64>,
    /// Back RAM with a shared mapping, so that another process can map it too.
    #[serde(default)]
    pub shared: bool,
    /// Back RAM with huge pages from the host's pool.
    #[serde(default)]
    pub hugepages: bool,
    /// Size of those huge pages, bytes; the host's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// Allocate all of RAM before the guest starts.
    #[serde(default)]
    pub prefault: bool,
    /// Have the host account for all of RAM up front.
    #[serde(default)]
    pub reserve: bool,
    /// Ask for transparent huge pages.
    #[serde(default = "enabled")]
    pub thp: bool,
    /// RAM in parts of different kinds; `size` must be 0 then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zones: Option<Vec<MemoryZoneConfig>>,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: DEFAULT_MEMORY_BYTES,
            mergeable: false,
            hotplug_method: HotplugMethod::default(),
            hotplug_size: None,
            hotplugged_size: None,
            shared: false,
            hugepages: false,
            hugepage_size: None,
            prefault: false,
            reserve: false,
            thp: true,
            zones: None,
        }
    }
}

impl MemoryConfig {
    /// RAM in bytes, over all zones and with what was added; `None` when the sum does not fit 64 bits.
    pub fn total_bytes(&self) -> Option<u64> {
        let own = self.size.checked_add(self.hotplugged_size.unwrap_or(0))?;
        self.zones.iter().flatten().try_fold(own, |sum, zone| {
            sum.checked_add(zone.size)?
                .checked_add(zone.hotplugged_size.unwrap_or(0))
        })
    }
}

/// One part of guest RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct MemoryZoneConfig {
    /// Name of the zone.
    pub id: String,
    /// RAM at boot, bytes.
    pub size: u64,
    /// File or directory the zone is backed by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Back the zone with a shared mapping.
    #[serde(default)]
    pub shared: bool,
    /// Back the zone with huge pages from the host's pool.
    #[serde(default)]
    pub hugepages: bool,
    /// Size of those huge pages, bytes; the host's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// Host NUMA node the zone is taken from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_numa_node: Option<u32>,
    /// Most bytes that can be added to a running guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    /// Bytes already added.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplugged_size: Option<u64>,
    /// Allocate the zone before the guest starts.
    #[serde(default)]
    pub prefault: bool,
    /// Have the host account for the zone up front.
    #[serde(default)]
    pub reserve: bool,
    /// Let the host merge equal pages (KSM).
    #[serde(default)]
    pub mergeable: bool,
}

/// How RAM is added to a running guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum HotplugMethod {
    /// ACPI memory devices.
    #[default]
    Acpi,
    /// virtio-mem.
    VirtioMem,
}

impl MemoryConfig {
    /// Syntax of `--memory`.
    pub const SYNTAX: &str = "Memory parameters \"size=<guest_memory_size>,mergeable=on|off,shared=on|off,\
        hugepages=on|off,hugepage_size=<hugepage_size>,hotplug_method=acpi|virtio-mem,\
        hotplug_size=<hotpluggable_memory_size>,hotplugged_size=<hotplugged_memory_size>,prefault=on|off,\
        reserve=on|off,thp=on|off\"";

    /// Reads the value of `--memory` with those of every `--memory-zone`.
    ///
    /// # Errors
    /// An unknown key, a malformed value, or a zone without a name.
    pub fn parse<S: AsRef<str>>(text: &str, zones: &[S]) -> Result<Self, OptionError> {
        let options = Options::parse(
            "memory",
            text,
            &[
                "size",
                "mergeable",
                "shared",
                "hugepages",
                "hugepage_size",
                "hotplug_method",
                "hotplug_size",
                "hotplugged_size",
                "prefault",
                "reserve",
                "thp",
            ],
            &[],
        )?;
        let zones: Vec<_> = zones
            .iter()
            .map(|zone| MemoryZoneConfig::parse(zone.as_ref()))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            size: options.bytes("size")?.unwrap_or(DEFAULT_MEMORY_BYTES),
            mergeable: options.toggle("mergeable")?.unwrap_or(false),
            hotplug_method: options
                .word(
                    "hotplug_method",
                    &[
                        ("acpi", HotplugMethod::Acpi),
                        ("virtio-mem", HotplugMethod::VirtioMem),
                    ],
                )?
                .unwrap_or_default(),
            hotplug_size: options.bytes("hotplug_size")?,
            hotplugged_size: options.bytes("hotplugged_size")?,
            shared: options.toggle("shared")?.unwrap_or(false),
            hugepages: options.toggle("hugepages")?.unwrap_or(false),
            hugepage_size: options.bytes("hugepage_size")?,
            prefault: options.toggle("prefault")?.unwrap_or(false),
            reserve: options.toggle("reserve")?.unwrap_or(false),
            thp: options.toggle("thp")?.unwrap_or(true),
            zones: (!zones.is_empty()).then_some(zones),
        })
    }
}

impl MemoryZoneConfig {
    /// Syntax of `--memory-zone`.
    pub const SYNTAX: &str = "User defined memory zone parameters \"id=<zone_identifier>,size=<guest_memory_region_size>,\
        file=<backing_file>,shared=on|off,hugepages=on|off,hugepage_size=<hugepage_size>,\
        host_numa_node=<node_id>,hotplug_size=<hotpluggable_memory_size>,\
        hotplugged_size=<hotplugged_memory_size>,prefault=on|off,reserve=on|off,mergeable=on|off\"";

    /// Reads the value of one `--memory-zone`.
    ///
    /// # Errors
    /// An unknown key, a malformed value, or no `id`.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let options = Options::parse(
            "memory-zone",
            text,
            &[
                "id",
                "size",
                "file",
                "shared",
                "hugepages",
                "hugepage_size",
                "host_numa_node",
                "hotplug_size",
                "hotplugged_size",
                "prefault",
                "reserve",
                "mergeable",
            ],
            &[],
        )?;
        Ok(Self {
            id: options
                .string("id")
                .ok_or_else(|| options.refuse(OptionFault::MissingKey { key: "id" }))?,
            size: options.bytes("size")?.unwrap_or(DEFAULT_MEMORY_BYTES),
            file: options.text("file").map(PathBuf::from),
            shared: options.toggle("shared")?.unwrap_or(false),
            hugepages: options.toggle("hugepages")?.unwrap_or(false),
            hugepage_size: options.bytes("hugepage_size")?,
            host_numa_node: options.parsed("host_numa_node")?,
            hotplug_size: options.bytes("hotplug_size")?,
            hotplugged_size: options.bytes("hotplugged_size")?,
            prefault: options.toggle("prefault")?.unwrap_or(false),
            reserve: options.toggle("reserve")?.unwrap_or(false),
            mergeable: options.toggle("mergeable")?.unwrap_or(false),
        })
    }
}
