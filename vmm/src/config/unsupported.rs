//! Rejects, by name, settings that upstream has and this VMM does not support, so that no setting is silently ignored.

use api::VmConfig;
use api::config::{
    ConsoleOutputMode, CpusConfig, DiskConfig, HotplugMethod, ImageType, MemoryConfig, NumaConfig,
    PlatformConfig,
};

use super::error::ValidationError;

pub(super) fn check(config: &VmConfig) -> Result<(), ValidationError> {
    let mut wanted: Vec<String> = config
        .unsupported_sections()
        .into_iter()
        .map(str::to_owned)
        .collect();
    wanted.extend(asked(
        "debug_console.mode Socket",
        config.debug_console.mode == ConsoleOutputMode::Socket,
    ));
    wanted.extend(cpus(&config.cpus));
    wanted.extend(memory(&config.memory));
    wanted.extend(config.numa.iter().flatten().filter_map(numa));
    wanted.extend(config.disks.iter().flatten().filter_map(disk));
    wanted.extend(config.platform.iter().flat_map(platform));
    wanted.extend(assigned(config));
    wanted.extend(iommu(config));
    if wanted.is_empty() {
        return Ok(());
    }
    Err(ValidationError::Unsupported {
        what: wanted.join(", "),
    })
}

fn asked(name: &str, wanted: bool) -> Option<String> {
    wanted.then(|| name.to_owned())
}

fn cpus(cpus: &CpusConfig) -> Vec<String> {
    [
        asked("cpus.kvm_hyperv", cpus.kvm_hyperv),
        asked("cpus.features.amx", cpus.features.amx),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn memory(memory: &MemoryConfig) -> Vec<String> {
    let wanted = |sizes: [Option<u64>; 2]| sizes.into_iter().flatten().any(|bytes| bytes > 0);
    let mut zones = memory.zones.iter().flatten();
    let hotplug = wanted([memory.hotplug_size, memory.hotplugged_size]);
    let with_virtio_mem = memory.hotplug_method == HotplugMethod::VirtioMem;
    [
        asked(
            "memory.zones.hotplug_size",
            zones.any(|zone| wanted([zone.hotplug_size, zone.hotplugged_size])),
        ),
        asked(
            "memory.hotplug_size of memory in zones",
            hotplug && with_virtio_mem && memory.size == 0,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn numa(node: &NumaConfig) -> Option<String> {
    asked("numa.device_id", node.device_id.is_some())
}

fn disk(disk: &DiskConfig) -> Option<String> {
    let unreadable = matches!(disk.image_type, Some(ImageType::FlatVmdk | ImageType::Vhdx));
    asked("disks.image_type vmdk or vhdx", unreadable)
}

fn platform(platform: &PlatformConfig) -> Vec<String> {
    [
        asked("platform.iommufd", platform.iommufd),
        asked("platform.tdx", platform.tdx),
        asked("platform.sev_snp", platform.sev_snp),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn assigned(config: &VmConfig) -> Option<String> {
    let mut devices = config.devices.iter().flatten();
    asked(
        "devices.x_nv_gpudirect_clique",
        devices.any(|device| device.x_nv_gpudirect_clique.is_some()),
    )
}

/// Devices that cannot be behind the virtual IOMMU: the balloon's driver passes guest addresses, and back ends translate
/// nothing.
fn iommu(config: &VmConfig) -> Vec<String> {
    let mut disks = config.disks.iter().flatten();
    let mut nets = config.net.iter().flatten();
    [
        asked(
            "balloon.iommu",
            config.balloon.as_ref().is_some_and(|balloon| balloon.iommu),
        ),
        asked(
            "disks.iommu with vhost_user",
            disks.any(|disk| disk.iommu && disk.vhost_user),
        ),
        asked(
            "net.iommu with vhost_user",
            nets.any(|net| net.iommu && net.vhost_user),
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}
