//! The configuration of a VM: body of `PUT /vm.create`, part of `GET /vm.info`, and what the command line builds.
//!
//! One file per section. These types check form only (is it a number, is it a known word); whether the values make
//! sense together is decided where the VM is built, because `vm.create` stores a configuration without judging it.
//! Sections that Cloud Hypervisor has and this VMM does not are kept as they came, so that asking for one is refused by
//! name and not silently ignored.

mod balloon;
mod console;
mod cpus;
mod disk;
mod mac;
mod memory;
mod net;
mod numa;
mod path_or_fd;
mod payload;
mod platform;
mod rate_limit;
mod rng;
mod serde_rules;

pub use balloon::BalloonConfig;
pub use console::{
    ConsoleConfig, ConsoleOutputMode, DEFAULT_DEBUG_CONSOLE_PORT, DebugConsoleConfig, SerialConfig,
};
pub use cpus::{
    CoreScheduling, CpuAffinity, CpuFeatures, CpuTopology, CpusConfig, DEFAULT_MAX_PHYS_BITS,
    DEFAULT_VCPUS,
};
pub use disk::{
    DEFAULT_DISK_NUM_QUEUES, DEFAULT_DISK_QUEUE_SIZE, DiskConfig, ImageType, LockGranularity,
    VirtQueueAffinity,
};
pub use mac::{MacAddr, MacAddrError};
pub use memory::{DEFAULT_MEMORY_BYTES, HotplugMethod, MemoryConfig, MemoryZoneConfig};
pub use net::{DEFAULT_NET_NUM_QUEUES, DEFAULT_NET_QUEUE_SIZE, INVALID_FD, NetConfig, VhostMode};
pub use numa::{NumaConfig, NumaDistance};
pub use path_or_fd::PathOrFd;
pub use payload::PayloadConfig;
pub use platform::{DEFAULT_IOMMU_ADDRESS_WIDTH_BITS, DEFAULT_NUM_PCI_SEGMENTS, PlatformConfig};
pub use rate_limit::{RateLimiterConfig, TokenBucket};
pub use rng::{DEFAULT_RNG_SOURCE, RngConfig};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The configuration of a VM.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct VmConfig {
    /// vCPUs.
    #[serde(default)]
    pub cpus: CpusConfig,
    /// Guest RAM.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// What is booted. Needed to boot, not to create.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload: Option<PayloadConfig>,
    /// Disks, in the order of their PCI slots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskConfig>>,
    /// Network interfaces, in the order of their PCI slots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<Vec<NetConfig>>,
    /// The random number device; always there.
    #[serde(default)]
    pub rng: RngConfig,
    /// The memory balloon; there is none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// The serial port.
    #[serde(default)]
    pub serial: SerialConfig,
    /// The virtio console.
    #[serde(default)]
    pub console: ConsoleConfig,
    /// The debug console.
    #[serde(default)]
    pub debug_console: DebugConsoleConfig,
    /// Guest NUMA nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa: Option<Vec<NumaConfig>>,
    /// Platform settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<PlatformConfig>,
    /// A virtual IOMMU.
    #[serde(default)]
    pub iommu: bool,
    /// A watchdog device.
    #[serde(default)]
    pub watchdog: bool,
    /// A device through which the guest tells of a panic.
    #[serde(default)]
    pub pvpanic: bool,
    /// Restrict the VMM's own file access.
    #[serde(default)]
    pub landlock_enable: bool,
    /// Sections of upstream's that have no type here.
    #[serde(flatten)]
    pub unsupported: UnsupportedSections,
}

macro_rules! unsupported_sections {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Sections of upstream's configuration that have no type here, kept as they came.
        #[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
        pub struct UnsupportedSections {
            $(
                $(#[$doc])*
                #[serde(default, skip_serializing_if = "Option::is_none")]
                pub $name: Option<Value>,
            )*
        }

        impl UnsupportedSections {
            /// Names of the sections that ask for something. `null`, `false` and an empty list ask for nothing.
            pub fn requested(&self) -> Vec<&'static str> {
                [$((stringify!($name), &self.$name)),*]
                    .into_iter()
                    .filter(|(_, value)| match value {
                        None | Some(Value::Null | Value::Bool(false)) => false,
                        Some(Value::Array(items)) => !items.is_empty(),
                        Some(_) => true,
                    })
                    .map(|(name, _)| name)
                    .collect()
            }
        }
    };
}

unsupported_sections! {
    /// Shared directories (virtio-fs).
    fs,
    /// Persistent memory.
    pmem,
    /// Assigned PCI devices (VFIO).
    devices,
    /// Assigned devices of another process (vfio-user).
    user_devices,
    /// vDPA devices.
    vdpa,
    /// The vsock device.
    vsock,
    /// Apertures of PCI segments.
    pci_segments,
    /// The TPM.
    tpm,
    /// The paravirtual real time clock.
    rtc,
    /// Rate limits shared by several disks.
    rate_limit_groups,
    /// vhost-user devices of any type.
    generic_vhost_user,
    /// File access rules of the VMM.
    landlock_rules,
}

impl VmConfig {
    /// Every part of the configuration that this VMM knows by name and cannot do, for validation to refuse.
    pub fn unsupported_sections(&self) -> Vec<&'static str> {
        let mut names = self.unsupported.requested();
        let switches = [
            ("iommu", self.iommu),
            ("watchdog", self.watchdog),
            ("pvpanic", self.pvpanic),
        ];
        names.extend(
            switches
                .into_iter()
                .filter(|(_, wanted)| *wanted)
                .map(|(name, _)| name),
        );
        names
    }
}

#[cfg(test)]
mod parse_tests;
#[cfg(test)]
mod tests;
