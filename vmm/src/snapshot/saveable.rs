//! The VMs that can be saved.

use api::VmConfig;
use api::config::HotplugMethod;

use super::SnapshotError;

/// Rejects a VM with state outside the snapshot. At a restore, this also rejects a configuration that was edited so
/// that restoring RAM would overwrite a file of the host.
///
/// # Errors
/// The device or zone whose state is elsewhere.
pub fn require_content_is_ours(config: &VmConfig) -> Result<(), SnapshotError> {
    let mut zones = config.memory.zones.iter().flatten();
    if let Some(zone) = zones.find(|zone| zone.file.is_some()) {
        let zone = zone.id.clone();
        return Err(SnapshotError::ZoneInFile { zone });
    }
    if let Some(fs) = config.fs.iter().flatten().next() {
        let tag = fs.tag.clone();
        return Err(SnapshotError::SharedFolder { tag });
    }
    if let Some(device) = config.generic_vhost_user.iter().flatten().next() {
        let id = device.id.clone().unwrap_or_default();
        return Err(SnapshotError::OtherProcess { id });
    }
    Ok(())
}

/// Rejects a VM with a device whose writes to guest memory are not recorded.
///
/// # Errors
/// The device.
pub fn require_recorded(config: &VmConfig) -> Result<(), SnapshotError> {
    require_content_is_ours(config)?;
    let not_recorded = |id: &Option<String>, reason| {
        let id = id.clone().unwrap_or_default();
        Err(SnapshotError::NotLive { id, reason })
    };
    if let Some(device) = config.devices.iter().flatten().next() {
        let reason = "it is assigned, and its writes to memory are not recorded";
        return not_recorded(&device.id, reason);
    }
    match served_elsewhere(config) {
        Some((_, id)) => not_recorded(id, SERVED_ELSEWHERE),
        None => Ok(()),
    }
}

/// Why a device of [`served_elsewhere`] is rejected.
pub const SERVED_ELSEWHERE: &str =
    "another process serves it, whose writes to memory are not recorded";

/// The kind and the identifier of a disk or network device of another process.
pub fn served_elsewhere(config: &VmConfig) -> Option<(&'static str, &Option<String>)> {
    let disks = config.disks.iter().flatten();
    let disks = disks.filter(|it| it.vhost_socket.is_some());
    let nets = config.net.iter().flatten();
    let nets = nets.filter(|it| it.vhost_socket.is_some());
    let mut all = disks
        .map(|it| ("Disk", &it.id))
        .chain(nets.map(|it| ("Network device", &it.id)));
    all.next()
}

/// Rejects a VM whose images change after the snapshot: the restored guest would find other data than it knows.
///
/// # Errors
/// The device.
pub fn require_steady_disks(config: &VmConfig) -> Result<(), SnapshotError> {
    let disks = config.disks.iter().flatten();
    let disks = disks.filter(|it| !it.readonly).map(|it| &it.id);
    let pmems = config.pmem.iter().flatten();
    let pmems = pmems.filter(|it| !it.discard_writes).map(|it| &it.id);
    match disks.chain(pmems).next() {
        Some(id) => Err(SnapshotError::NotLive {
            id: id.clone().unwrap_or_default(),
            reason: "its image changes when the VM continues; set keep_paused, copy the image, then resume the VM",
        }),
        None => Ok(()),
    }
}

/// Rejects a VM whose writes cannot be recorded while it runs.
///
/// # Errors
/// A device or memory prevents it.
pub fn require_recordable(config: &VmConfig) -> Result<(), SnapshotError> {
    require_recorded(config)?;
    match config.memory.room_bytes(HotplugMethod::VirtioMem) {
        0 => Ok(()),
        _ => Err(SnapshotError::VirtioMem),
    }
}
