//! The configuration of a VM: body of `PUT /vm.create`, part of `GET /vm.info`, and result of parsing the command line.
//!
//! One file per section. These types check syntax only (a number, a known word). The VMM validates the values when it
//! builds the VM, because `vm.create` stores a configuration without validating it. Sections that Cloud Hypervisor has
//! and this VMM lacks are stored unparsed, so that using one is rejected by name and not silently ignored.

mod balloon;
mod console;
mod cpus;
mod device;
mod disk;
mod fs;
mod generic_vhost_user;
mod landlock;
mod mac;
mod memory;
mod migration;
mod net;
mod numa;
mod path_or_fd;
mod payload;
mod pci_segment;
mod platform;
mod pmem;
mod process;
mod rate_limit;
mod restore;
mod rng;
mod rtc;
mod vsock;

pub use balloon::BalloonConfig;
pub use console::{
    ConsoleConfig, ConsoleOutputMode, DEFAULT_DEBUG_CONSOLE_PORT, DebugConsoleConfig, SerialConfig,
};
pub use cpus::{
    CoreScheduling, CpuAffinity, CpuFeatures, CpuTopology, CpusConfig, DEFAULT_MAX_PHYS_BITS,
    DEFAULT_VCPUS,
};
pub use device::DeviceConfig;
pub use disk::{
    DEFAULT_DISK_NUM_QUEUES, DEFAULT_DISK_QUEUE_SIZE, DiskConfig, ImageType, LockGranularity,
    VirtQueueAffinity,
};
pub use fs::{DEFAULT_FS_NUM_QUEUES, DEFAULT_FS_QUEUE_SIZE, FsConfig};
pub use generic_vhost_user::{GenericVhostUserConfig, VirtioDeviceType};
pub use landlock::LandlockConfig;
pub use mac::{MacAddr, MacAddrError};
pub use memory::{
    DEFAULT_MEMORY_BYTES, HotplugMethod, MemoryConfig, MemoryUnavailableAction, MemoryZoneConfig,
};
pub use migration::{
    MigrationMemoryMode, MigrationTimeoutStrategy, VmReceiveMigrationData, VmSendMigrationData,
};
pub use net::{DEFAULT_NET_NUM_QUEUES, DEFAULT_NET_QUEUE_SIZE, INVALID_FD, NetConfig, VhostMode};
pub use numa::{NumaConfig, NumaDistance};
pub use path_or_fd::PathOrFd;
pub use payload::PayloadConfig;
pub use pci_segment::{DEFAULT_APERTURE_WEIGHT, PciSegmentConfig};
pub use platform::{DEFAULT_IOMMU_ADDRESS_WIDTH_BITS, DEFAULT_NUM_PCI_SEGMENTS, PlatformConfig};
pub use pmem::PmemConfig;
pub use process::{JailConfig, ResourceLimitsConfig};
pub(crate) use rate_limit::RATE_LIMIT_KEYS;
pub use rate_limit::{RateLimitGroupConfig, RateLimiterConfig, TokenBucket};
pub use restore::{MemoryRestoreMode, RestoreConfig, RestoredNetConfig, ZoneUpdate};
pub use rng::{DEFAULT_RNG_SOURCE, RngConfig};
pub use rtc::RtcConfig;
pub use vsock::VsockConfig;

use api_macros::section;
use serde_json::{Value, json};

/// The configuration of a VM. Unsupported sections are parsed and kept, and rejected by name at boot.
#[section]
#[derive(Clone, Debug, PartialEq)]
#[schemars(extend("example" = json!({
    "cpus": {"boot_vcpus": 2, "max_vcpus": 2},
    "memory": {"size": 1 << 30},
    "payload": {"kernel": "/boot/vmlinux", "cmdline": "console=hvc0 root=/dev/vda"},
    "disks": [{"path": "/var/lib/vm/disk.img"}],
    "balloon": {"size": 0, "free_page_reporting": true},
})))]
pub struct VmConfig {
    /// vCPUs.
    pub cpus: CpusConfig,
    /// Guest RAM.
    pub memory: MemoryConfig,
    /// Kernel or firmware to boot. `vm.boot` requires it; `vm.create` does not.
    pub payload: Option<PayloadConfig>,
    /// Disks, in the order of their PCI slots.
    pub disks: Option<Vec<DiskConfig>>,
    /// Network interfaces, in the order of their PCI slots.
    pub net: Option<Vec<NetConfig>>,
    /// The random number device, which every VM has.
    pub rng: RngConfig,
    /// The memory balloon; when absent, the VM has none.
    pub balloon: Option<BalloonConfig>,
    /// Shared folders (virtio-fs), in the order of their PCI slots.
    pub fs: Option<Vec<FsConfig>>,
    /// Devices of any type that vhost-user back ends serve, in the order of their PCI slots.
    pub generic_vhost_user: Option<Vec<GenericVhostUserConfig>>,
    /// Persistent memory, in the order of its PCI slots.
    pub pmem: Option<Vec<PmemConfig>>,
    /// The vsock device; when absent, the VM has none.
    pub vsock: Option<VsockConfig>,
    /// The serial port.
    pub serial: SerialConfig,
    /// The virtio console.
    pub console: ConsoleConfig,
    /// The debug console.
    pub debug_console: DebugConsoleConfig,
    /// Guest NUMA nodes.
    pub numa: Option<Vec<NumaConfig>>,
    /// Platform settings.
    pub platform: Option<PlatformConfig>,
    /// A virtual IOMMU, even if no device is behind it. A device with `iommu` adds one in any case.
    pub iommu: bool,
    /// A watchdog device, which resets a guest that has pinged it and then stops pinging.
    pub watchdog: bool,
    /// A device (pvpanic) through which the guest reports a panic; each report is an event.
    pub pvpanic: bool,
    /// Restrict the VMM to files that this configuration names.
    pub landlock_enable: bool,
    /// Further files that the VMM may use, for devices that are added later. Needs `landlock_enable`.
    pub landlock_rules: Option<Vec<LandlockConfig>>,
    /// Assigned PCI devices (VFIO), in the order of their PCI slots.
    pub devices: Option<Vec<DeviceConfig>>,
    /// Assigned devices of another process (vfio-user). Unsupported.
    pub user_devices: Option<Value>,
    /// vDPA devices. Unsupported.
    pub vdpa: Option<Value>,
    /// Shares of PCI segments in the windows of addresses for devices; those that are absent have the weight 1.
    pub pci_segments: Option<Vec<PciSegmentConfig>>,
    /// The TPM. Unsupported.
    pub tpm: Option<Value>,
    /// The clock device; when absent, the VM has none.
    pub rtc: Option<RtcConfig>,
    /// Rate limits that several disks share.
    pub rate_limit_groups: Option<Vec<RateLimitGroupConfig>>,
}

impl VmConfig {
    /// The sections in use that this VMM knows by name but does not support; validation rejects them. `null`, `false`
    /// and an empty list do not count as use.
    pub fn unsupported_sections(&self) -> Vec<&'static str> {
        let sections = [
            ("user_devices", &self.user_devices),
            ("vdpa", &self.vdpa),
            ("tpm", &self.tpm),
        ];
        let sections = sections.into_iter().filter(|(_, value)| match value {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Array(items)) => !items.is_empty(),
            Some(_) => true,
        });
        let sections = sections.map(|(name, _)| name);
        sections.collect()
    }
}

#[cfg(test)]
mod tests;
