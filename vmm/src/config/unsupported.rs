//! Rejects, by name, settings that upstream has and this VMM does not support, so that no setting is silently ignored.

use api::VmConfig;
use api::config::{ConsoleOutputMode, DiskConfig, ImageType, NumaConfig, PlatformConfig};

use super::error::ValidationError;

pub(super) fn check(config: &VmConfig) -> Result<(), ValidationError> {
    let mut wanted: Vec<String> = config
        .unsupported_sections()
        .into_iter()
        .map(str::to_owned)
        .collect();
    wanted.extend(asked(
        "a debug console on a socket",
        config.debug_console.mode == ConsoleOutputMode::Socket,
    ));
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

fn numa(node: &NumaConfig) -> Option<String> {
    asked("device_id of NUMA nodes", node.device_id.is_some())
}

fn disk(disk: &DiskConfig) -> Option<String> {
    asked("image_type vhdx", disk.image_type == Some(ImageType::Vhdx))
}

fn platform(platform: &PlatformConfig) -> Vec<String> {
    [
        asked("iommufd", platform.iommufd),
        asked("tdx", platform.tdx),
        asked("sev_snp", platform.sev_snp),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn assigned(config: &VmConfig) -> Option<String> {
    let mut devices = config.devices.iter().flatten();
    asked(
        "x_nv_gpudirect_clique",
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
            "iommu of the balloon",
            config.balloon.as_ref().is_some_and(|balloon| balloon.iommu),
        ),
        asked(
            "iommu of vhost-user disks",
            disks.any(|disk| disk.iommu && disk.vhost_user),
        ),
        asked(
            "iommu of vhost-user network interfaces",
            nets.any(|net| net.iommu && net.vhost_user),
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests;
