//! The VMs that can be migrated.

use api::VmConfig;

use super::MigrationError;
use crate::snapshot;

/// Rejects a VM with a device that cannot move. Both sides check it: the source for a quick answer, the target because it
/// does not trust the source.
///
/// # Errors
/// The device.
pub fn movable(config: &VmConfig) -> Result<(), MigrationError> {
    let content = snapshot::require_content_is_ours(config);
    content.map_err(|error| MigrationError::Owner(Box::new(error)))?;
    let device = |kind: &str, id: &Option<String>, reason| {
        let device = format!("{kind} {}", id.as_deref().unwrap_or_default());
        Err(MigrationError::Device { device, reason })
    };
    if let Some((kind, id)) = snapshot::served_elsewhere(config) {
        return device(kind, id, snapshot::SERVED_ELSEWHERE);
    }
    let mut nets = config.net.iter().flatten();
    match nets.find(|net| net.fds.is_some()) {
        Some(net) => device(
            "Network device",
            &net.id,
            "it was created from file descriptors",
        ),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use api::config::{DiskConfig, FsConfig, NetConfig};

    use super::*;

    #[test]
    fn devices_with_state_or_writes_elsewhere_are_named() {
        let disk = DiskConfig {
            id: Some("d".to_owned()),
            vhost_socket: Some("/s".into()),
            ..DiskConfig::default()
        };
        let net = NetConfig {
            id: Some("n".to_owned()),
            fds: Some(vec![3]),
            ..NetConfig::default()
        };
        let fs = FsConfig {
            tag: "t".to_owned(),
            ..FsConfig::default()
        };
        let plain = VmConfig::default();
        movable(&plain).expect("nothing prevents it");
        for (config, text) in [
            (
                VmConfig {
                    disks: Some(vec![disk]),
                    ..plain.clone()
                },
                "Disk d cannot be migrated",
            ),
            (
                VmConfig {
                    net: Some(vec![net]),
                    ..plain.clone()
                },
                "Network device n cannot be migrated",
            ),
            (
                VmConfig {
                    fs: Some(vec![fs]),
                    ..plain
                },
                "Shared folder t",
            ),
        ] {
            let error = movable(&config).expect_err("it cannot move").to_string();
            assert!(error.contains(text), "{error}");
        }
    }
}
