//! Adds devices to a configuration, names them, and removes them.

use api::VmConfig;
use api::config::{
    BalloonConfig, DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig,
    PmemConfig, VsockConfig,
};

use crate::device_ids::BALLOON_ID;

/// Declares the devices that can be added and removed: a row has the section, whether it is a list or holds one device,
/// and the prefix of generated names.
macro_rules! devices {
    (@iter list $section:expr) => { $section.iter().flatten() };
    (@iter one $section:expr) => { $section.iter() };
    (@iter_mut list $section:expr) => { $section.iter_mut().flatten() };
    (@iter_mut one $section:expr) => { $section.iter_mut() };
    (@add list $section:expr, $device:expr) => { $section.get_or_insert_default().push($device) };
    (@add one $section:expr, $device:expr) => { $section = Some($device) };
    (@remove list $section:expr, $named:expr) => {
        if let Some(devices) = &mut $section {
            devices.retain(|device| !$named(&device.id));
        }
    };
    (@remove one $section:expr, $named:expr) => { $section.take_if(|device| $named(&device.id)) };
    ($(#[doc = $doc:literal] $kind:ident($config:ty): $form:ident $section:ident, $prefix:literal;)+) => {
        /// A device for a machine, running or not.
        #[derive(Debug, Clone)]
        pub enum NewDevice {
            $(#[doc = $doc] $kind($config),)+
            /// The balloon. Its name does not depend on the configuration.
            Balloon(BalloonConfig),
        }

        impl NewDevice {
            /// Its name, if it has one.
            pub fn id(&self) -> Option<&str> {
                match self {
                    $(Self::$kind(device) => device.id.as_deref(),)+
                    Self::Balloon(balloon) => Some(balloon_id(balloon)),
                }
            }
        }

        /// Returns the configuration with one more device, after the others of its kind.
        pub fn with_device(config: &VmConfig, device: NewDevice) -> VmConfig {
            let mut config = config.clone();
            match device {
                $(NewDevice::$kind(device) => devices!(@add $form config.$section, device),)+
                NewDevice::Balloon(balloon) => config.balloon = Some(balloon),
            }
            config
        }

        /// Returns the configuration without the removable device of this name; `None` if there is none.
        pub fn without_device(config: &VmConfig, id: &str) -> Option<VmConfig> {
            let named = |known: &Option<String>| known.as_deref() == Some(id);
            let mut without = config.clone();
            $(devices!(@remove $form without.$section, named);)+
            without.balloon.take_if(|balloon| balloon_id(balloon) == id);
            (without != *config).then_some(without)
        }

        /// Stores the name of the device that was added last in the configuration.
        pub fn take_id(config: &VmConfig, device: &mut NewDevice) {
            match device {
                $(NewDevice::$kind(device) => {
                    let last = devices!(@iter $form config.$section).next_back();
                    device.id = last.and_then(|last| last.id.clone());
                })+
                NewDevice::Balloon(_) => {}
            }
        }

        /// Prefixes of generated names; a number follows.
        pub(super) const GENERATED_PREFIXES: &[&str] = &[$($prefix),+];

        /// Gives a name to each device without one; `next` makes it from the prefix.
        pub(super) fn name_devices(config: &mut VmConfig, mut next: impl FnMut(&str) -> String) {
            $(for device in devices!(@iter_mut $form config.$section) {
                device.id.get_or_insert_with(|| next($prefix));
            })+
        }
    };
}

devices! {
    /// A disk.
    Disk(DiskConfig): list disks, "_disk";
    /// A network interface.
    Net(NetConfig): list net, "_net";
    /// A shared folder.
    Fs(FsConfig): list fs, "_fs";
    /// A device of any type that a vhost-user back end serves.
    GenericVhostUser(GenericVhostUserConfig): list generic_vhost_user, "_generic_vhost_user";
    /// A device of the host.
    Assigned(DeviceConfig): list devices, "_vfio";
    /// Persistent memory.
    Pmem(PmemConfig): list pmem, "_pmem";
    /// The vsock device.
    Vsock(VsockConfig): one vsock, "_vsock";
}

/// The balloon's name, or the default name.
pub fn balloon_id(balloon: &BalloonConfig) -> &str {
    balloon.id.as_deref().unwrap_or(BALLOON_ID)
}

#[cfg(test)]
mod tests {
    use api::config::{DiskConfig, NetConfig};

    use super::super::DeviceNumbers;
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
            generic_vhost_user: Some(Vec::new()),
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
        let generic = NewDevice::GenericVhostUser(GenericVhostUserConfig {
            id: Some("g".to_owned()),
            ..GenericVhostUserConfig::default()
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
            (generic, "g"),
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
        DeviceNumbers::default().assign(&mut config);
        take_id(&config, &mut device);
        assert_eq!(device.id(), Some("_disk1"));
        let mut vsock = NewDevice::Vsock(VsockConfig::default());
        let config = with_device(&VmConfig::default(), disk(None));
        let mut config = with_device(&config, vsock.clone());
        DeviceNumbers::default().assign(&mut config);
        take_id(&config, &mut vsock);
        assert_eq!(vsock.id(), Some("_vsock1"));
        let mut fs = NewDevice::Fs(FsConfig::default());
        let mut config = with_device(&config, fs.clone());
        DeviceNumbers::default().assign(&mut config);
        take_id(&config, &mut fs);
        assert_eq!(fs.id(), Some("_fs2"), "after _disk0 and _vsock1");
        let mut pmem = NewDevice::Pmem(PmemConfig::default());
        let mut config = with_device(&config, pmem.clone());
        DeviceNumbers::default().assign(&mut config);
        take_id(&config, &mut pmem);
        assert_eq!(pmem.id(), Some("_pmem3"));
    }
}
