//! Applies a restore request to the saved configuration.

use api::RestoreConfig;
use api::VmConfig;
use api::config::{MemoryConfig, NetConfig, ZoneUpdate};

use super::SnapshotError;

/// Applies `request` to the saved `config`. `fds` contains the numbers of the descriptors received with the request, in
/// the order of `net_fds`. It is empty if the request names descriptors of this process.
///
/// # Errors
/// An interface lacks descriptors or is named twice, or there is no such zone or it is named twice.
pub fn adapt(
    config: &mut VmConfig,
    request: &RestoreConfig,
    fds: &[i32],
) -> Result<(), SnapshotError> {
    set_prefault(&mut config.memory, request.prefault);
    move_zones(
        &mut config.memory,
        request.zone_updates.as_deref().unwrap_or_default(),
    )?;
    let mut named = request.net_fds.clone().unwrap_or_default();
    let ids = named.iter().map(|net| &net.id);
    if let Some((_, twice)) = ids
        .enumerate()
        .find(|(at, id)| named[..*at].iter().any(|earlier| earlier.id == **id))
    {
        let id = twice.clone();
        return Err(SnapshotError::NetTwice { id });
    }
    if named.iter().all(|net| net.fds.is_empty()) {
        let counts = named.iter().map(|net| net.num_fds);
        let announced = counts.fold(0_usize, usize::saturating_add);
        if announced != fds.len() {
            let got = fds.len();
            return Err(SnapshotError::FdCount { announced, got });
        }
        let mut left = fds;
        for net in &mut named {
            let (own, rest) = left.split_at(net.num_fds);
            net.fds = own.to_vec();
            left = rest;
        }
    }
    let nets = config.net.iter_mut().flatten();
    for NetConfig { id, fds, .. } in nets {
        let Some(fds) = fds else {
            continue;
        };
        let given = named.iter().find(|net| Some(&net.id) == id.as_ref());
        let given = given.map_or(&[][..], |net| &net.fds);
        if given.len() != fds.len() {
            return Err(SnapshotError::NetFds {
                id: id.clone().unwrap_or_default(),
                needed: fds.len(),
                got: given.len(),
            });
        }
        *fds = given.to_vec();
    }
    Ok(())
}

fn move_zones(memory: &mut MemoryConfig, updates: &[ZoneUpdate]) -> Result<(), SnapshotError> {
    for (at, update) in updates.iter().enumerate() {
        let id = || update.id.clone();
        if updates[..at].iter().any(|earlier| earlier.id == update.id) {
            return Err(SnapshotError::ZoneTwice { id: id() });
        }
        let mut zones = memory.zones.iter_mut().flatten();
        let zone = zones.find(|zone| zone.id == update.id);
        let zone = zone.ok_or_else(|| SnapshotError::NoZone { id: id() })?;
        zone.host_numa_node = Some(update.host_numa_node);
    }
    Ok(())
}

pub(super) fn set_prefault(memory: &mut MemoryConfig, prefault: bool) {
    memory.prefault = prefault;
    for zone in memory.zones.iter_mut().flatten() {
        zone.prefault = prefault;
    }
}
