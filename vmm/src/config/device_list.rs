//! Adds devices to a configuration and removes them.

use api::VmConfig;
use api::config::{
    BalloonConfig, DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, PmemConfig, VsockConfig,
};

use crate::device_ids::BALLOON_ID;

/// A device for a machine, running or not.
#[derive(Debug, Clone)]
pub enum NewDevice {
    /// A disk.
    Disk(DiskConfig),
    /// A network interface.
    Net(NetConfig),
    /// A shared folder.
    Fs(FsConfig),
    /// A device of any type that a vhost-user back end serves.
    GenericVhostUser(GenericVhostUserConfig),
    /// Persistent memory.
    Pmem(PmemConfig),
    /// The vsock device.
    Vsock(VsockConfig),
    /// The balloon.
    Balloon(BalloonConfig),
}

impl NewDevice {
    /// Its name, if it has one.
    pub fn id(&self) -> Option<&str> {
        match self {
            Self::Disk(disk) => disk.id.as_deref(),
            Self::Net(net) => net.id.as_deref(),
            Self::Fs(fs) => fs.id.as_deref(),
            Self::GenericVhostUser(device) => device.id.as_deref(),
            Self::Pmem(pmem) => pmem.id.as_deref(),
            Self::Vsock(vsock) => vsock.id.as_deref(),
            Self::Balloon(balloon) => Some(balloon_id(balloon)),
        }
    }
}

/// Returns the configuration with one more device, after the others of its kind.
pub fn with_device(config: &VmConfig, device: NewDevice) -> VmConfig {
    let mut config = config.clone();
    match device {
        NewDevice::Disk(disk) => config.disks.get_or_insert_default().push(disk),
        NewDevice::Net(net) => config.net.get_or_insert_default().push(net),
        NewDevice::Fs(fs) => config.fs.get_or_insert_default().push(fs),
        NewDevice::GenericVhostUser(device) => {
            config
                .generic_vhost_user
                .get_or_insert_default()
                .push(device);
        }
        NewDevice::Pmem(pmem) => config.pmem.get_or_insert_default().push(pmem),
        NewDevice::Vsock(vsock) => config.vsock = Some(vsock),
        NewDevice::Balloon(balloon) => config.balloon = Some(balloon),
    }
    config
}

/// Returns the configuration without the removable device of this name; `None` if there is none.
pub fn without_device(config: &VmConfig, id: &str) -> Option<VmConfig> {
    let named = |known: &Option<String>| known.as_deref() == Some(id);
    let mut without = config.clone();
    if let Some(disks) = &mut without.disks {
        disks.retain(|disk| !named(&disk.id));
    }
    if let Some(net) = &mut without.net {
        net.retain(|net| !named(&net.id));
    }
    if let Some(fs) = &mut without.fs {
        fs.retain(|fs| !named(&fs.id));
    }
    if let Some(devices) = &mut without.generic_vhost_user {
        devices.retain(|device| !named(&device.id));
    }
    if let Some(pmem) = &mut without.pmem {
        pmem.retain(|pmem| !named(&pmem.id));
    }
    without.vsock.take_if(|vsock| named(&vsock.id));
    without.balloon.take_if(|balloon| balloon_id(balloon) == id);
    (without != *config).then_some(without)
}

/// The balloon's name, or the default name.
pub fn balloon_id(balloon: &BalloonConfig) -> &str {
    balloon.id.as_deref().unwrap_or(BALLOON_ID)
}

/// Stores the name of the device that was added last in the configuration.
pub fn take_id(config: &VmConfig, device: &mut NewDevice) {
    match device {
        NewDevice::Disk(disk) => {
            let last = config.disks.iter().flatten().next_back();
            disk.id = last.and_then(|last| last.id.clone());
        }
        NewDevice::Net(net) => {
            let last = config.net.iter().flatten().next_back();
            net.id = last.and_then(|last| last.id.clone());
        }
        NewDevice::Fs(fs) => {
            let last = config.fs.iter().flatten().next_back();
            fs.id = last.and_then(|last| last.id.clone());
        }
        NewDevice::GenericVhostUser(device) => {
            let last = config.generic_vhost_user.iter().flatten().next_back();
            device.id = last.and_then(|last| last.id.clone());
        }
        NewDevice::Pmem(pmem) => {
            let last = config.pmem.iter().flatten().next_back();
            pmem.id = last.and_then(|last| last.id.clone());
        }
        NewDevice::Vsock(vsock) => {
            vsock.id = config.vsock.as_ref().and_then(|named| named.id.clone());
        }
        // The balloon's name does not depend on the configuration.
        NewDevice::Balloon(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use api::config::{DiskConfig, NetConfig};

    use super::super::assign_ids;
    use super::*;

    fn disk(id: Option<&str>) -> NewDevice {
        NewDevice::Disk(DiskConfig {
            id: id.map(str::to_owned),
            ..DiskConfig::default()
        })
    }

    #[test]
    fn device_added_and_removed_leaves_nothing() {
        let empty = VmConfig {
            disks: Some(Vec::new()),
            net: Some(Vec::new()),
            fs: Some(Vec::new()),
            pmem: Some(Vec::new()),
            ..VmConfig::default()
        };
        let net = NewDevice::Net(NetConfig {
            id: Some("b".to_owned()),
            ..NetConfig::default()
        });
        let vsock = NewDevice::Vsock(VsockConfig {
            id: Some("v".to_owned()),
            ..VsockConfig::default()
        });
        let fs = NewDevice::Fs(FsConfig {
            id: Some("f".to_owned()),
            ..FsConfig::default()
        });
        let pmem = NewDevice::Pmem(PmemConfig {
            id: Some("p".to_owned()),
            ..PmemConfig::default()
        });
        let balloon = NewDevice::Balloon(BalloonConfig::default());
        for (device, id) in [
            (disk(Some("a")), "a"),
            (net, "b"),
            (fs, "f"),
            (vsock, "v"),
            (pmem, "p"),
            (balloon, "__balloon"),
        ] {
            let with = with_device(&empty, device);
            assert!(without_device(&with, "c").is_none());
            assert_eq!(without_device(&with, id).unwrap(), empty);
        }
    }

    #[test]
    fn device_without_a_name_takes_the_one_it_got() {
        let config = with_device(&VmConfig::default(), disk(Some("_disk0")));
        let mut device = disk(None);
        let mut config = with_device(&config, device.clone());
        assign_ids(&mut config);
        take_id(&config, &mut device);
        assert_eq!(device.id(), Some("_disk1"));
        let mut vsock = NewDevice::Vsock(VsockConfig::default());
        let config = with_device(&VmConfig::default(), disk(None));
        let mut config = with_device(&config, vsock.clone());
        assign_ids(&mut config);
        take_id(&config, &mut vsock);
        assert_eq!(vsock.id(), Some("_vsock1"));
        let mut fs = NewDevice::Fs(FsConfig::default());
        let mut config = with_device(&config, fs.clone());
        assign_ids(&mut config);
        take_id(&config, &mut fs);
        assert_eq!(fs.id(), Some("_fs2"), "after _disk0 and _vsock1");
        let mut pmem = NewDevice::Pmem(PmemConfig::default());
        let mut config = with_device(&config, pmem.clone());
        assign_ids(&mut config);
        take_id(&config, &mut pmem);
        assert_eq!(pmem.id(), Some("_pmem3"));
    }
}
