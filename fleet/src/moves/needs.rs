//! What a VM needs on each host, and the devices that keep it on one.

use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::cluster::Needs;

/// Maximum number of files, folders and interfaces; a VM has few.
const NEEDS_MAX: usize = 1024;

/// The relevant part of a VM's configuration.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Devices {
    #[serde(default)]
    disks: Option<Vec<Disk>>,
    #[serde(default)]
    net: Option<Vec<Net>>,
    #[serde(default)]
    pmem: Option<Vec<Backed>>,
    #[serde(default)]
    fs: Option<Vec<Value>>,
    #[serde(default)]
    devices: Option<Vec<Value>>,
    #[serde(default)]
    user_devices: Option<Vec<Value>>,
    #[serde(default)]
    vdpa: Option<Vec<Value>>,
    #[serde(default)]
    generic_vhost_user: Option<Vec<Value>>,
    #[serde(default)]
    vsock: Option<Socket>,
    #[serde(default)]
    serial: Option<Console>,
    #[serde(default)]
    console: Option<Console>,
    #[serde(default)]
    memory: Memory,
}

#[derive(Debug, Deserialize)]
struct Disk {
    #[serde(default)]
    path: Option<String>,
    #[serde(default)]
    vhost_user: bool,
    #[serde(default)]
    vhost_socket: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Net {
    #[serde(default)]
    tap: Option<String>,
    #[serde(default)]
    fds: Option<Vec<Value>>,
    #[serde(default)]
    vhost_user: bool,
}

#[derive(Debug, Deserialize)]
struct Backed {
    #[serde(default)]
    file: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Socket {
    #[serde(default)]
    socket: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Console {
    #[serde(default)]
    file: Option<String>,
    #[serde(default)]
    socket: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Memory {
    #[serde(default)]
    zones: Option<Vec<Backed>>,
}

fn any<T>(list: Option<&Vec<T>>) -> bool {
    list.is_some_and(|list| !list.is_empty())
}

impl Devices {
    /// The device that keeps the VM on its host.
    pub(crate) fn fixed_by(&self) -> Option<&'static str> {
        let disks = || self.disks.iter().flatten();
        let nets = || self.net.iter().flatten();
        let zones = || self.memory.zones.iter().flatten();
        let is_served = |disk: &Disk| disk.vhost_user || disk.vhost_socket.is_some();
        [
            (
                any(self.devices.as_ref()) || any(self.user_devices.as_ref()),
                "it has an assigned device",
            ),
            (any(self.vdpa.as_ref()), "it has a vDPA device"),
            (any(self.fs.as_ref()), "it has a shared folder"),
            (
                disks().any(is_served)
                    || nets().any(|net| net.vhost_user)
                    || any(self.generic_vhost_user.as_ref()),
                "it has a device of a vhost-user back end",
            ),
            (
                nets().any(|net| any(net.fds.as_ref())),
                "it has a network interface from descriptors",
            ),
            (
                zones().any(|zone| zone.file.is_some()),
                "it has memory in a file",
            ),
        ]
        .into_iter()
        .find_map(|(is, why)| is.then_some(why))
    }

    /// What the VM needs on a host.
    ///
    /// # Errors
    /// A path is relative, so it depends on the VMM's working directory; or there are too many.
    pub(super) fn needs(&self) -> Result<Needs, String> {
        let consoles = || [&self.serial, &self.console].into_iter().flatten();
        let created = consoles()
            .flat_map(|console| [&console.file, &console.socket])
            .chain([self.vsock.as_ref().map_or(&None, |vsock| &vsock.socket)]);
        let disks = self.disks.iter().flatten().map(|disk| &disk.path);
        let backed = self.pmem.iter().flatten().map(|backed| &backed.file);
        let needs = Needs {
            files: disks.chain(backed).flatten().cloned().collect(),
            folders: created
                .flatten()
                .map(|path| folder_of(path))
                .collect::<Result<_, _>>()?,
            taps: self
                .net
                .iter()
                .flatten()
                .filter_map(|net| net.tap.clone())
                .collect(),
        };
        if let Some(path) = needs.files.iter().find(|path| !path.starts_with('/')) {
            return Err(relative(path));
        }
        match needs.files.len() + needs.folders.len() + needs.taps.len() <= NEEDS_MAX {
            true => Ok(needs),
            false => Err(format!("it has more than {NEEDS_MAX} files and interfaces")),
        }
    }
}

fn relative(path: &str) -> String {
    format!("the path {path:?} is relative")
}

fn folder_of(path: &str) -> Result<String, String> {
    let parent = Path::new(path).parent().filter(|_| path.starts_with('/'));
    parent
        .map(|parent| parent.display().to_string())
        .ok_or_else(|| relative(path))
}

/// The first thing that this host lacks. `interfaces` is the kernel's folder of network interfaces.
pub(super) fn missing(needs: &Needs, interfaces: &Path) -> Option<String> {
    let file = needs.files.iter().find_map(|path| {
        let found = fs::metadata(path);
        let error = found.err()?;
        Some(format!("{path} cannot be used there: {error}"))
    });
    let folder = || {
        let mut folders = needs.folders.iter();
        let absent = folders.find(|path| !Path::new(path.as_str()).is_dir())?;
        Some(format!("the folder {absent} does not exist there"))
    };
    let tap = || {
        let is_there = |tap: &str| !tap.contains('/') && interfaces.join(tap).exists();
        let absent = needs.taps.iter().find(|tap| !is_there(tap))?;
        Some(format!(
            "the network interface {absent:?} does not exist there"
        ))
    };
    file.or_else(folder).or_else(tap)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    fn devices(config: Value) -> Devices {
        serde_json::from_value(config).unwrap()
    }

    #[test]
    fn devices_that_keep_a_vm_on_its_host_are_named() {
        for (config, why) in [
            (json!({"devices": [{"path": "/sys/x"}]}), "assigned"),
            (json!({"user_devices": [{}]}), "assigned"),
            (json!({"vdpa": [{}]}), "vDPA"),
            (json!({"fs": [{"tag": "t"}]}), "shared folder"),
            (json!({"disks": [{"vhost_user": true}]}), "vhost-user"),
            (json!({"disks": [{"vhost_socket": "/s"}]}), "vhost-user"),
            (json!({"net": [{"vhost_user": true}]}), "vhost-user"),
            (json!({"net": [{"fds": [3]}]}), "descriptors"),
            (
                json!({"memory": {"zones": [{"file": "/f"}]}}),
                "memory in a file",
            ),
        ] {
            let found = devices(config).fixed_by().unwrap();
            assert!(found.contains(why), "{found}");
        }
        let plain = json!({"disks": [{"path": "/d"}], "net": [{"tap": "t", "fds": null}],
            "devices": [], "fs": null, "memory": {"size": 1, "zones": [{"size": 1}]}});
        assert_eq!(devices(plain).fixed_by(), None);
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path();
        fs::write(here.join("disk"), "").unwrap();
        fs::create_dir(here.join("tap0")).unwrap();
        let path = |name: &str| here.join(name).display().to_string();
        let config = |disk: &str, serial: &str, tap: &str| {
            devices(json!({
                "disks": [{"path": path(disk)}],
                "serial": {"file": path(serial)},
                "net": [{"tap": tap}],
            }))
        };
        let lacks = |config: Devices| missing(&config.needs().unwrap(), here);
        assert_eq!(lacks(config("disk", "log", "tap0")), None);
        for (config, why) in [
            (config("other", "log", "tap0"), "other cannot be used"),
            (config("disk", "no/log", "tap0"), "no does not exist"),
            (config("disk", "log", "tap1"), "\"tap1\" does not exist"),
            (config("disk", "log", "../tap0"), "does not exist"),
        ] {
            let found = lacks(config).unwrap();
            assert!(found.contains(why), "{found}");
        }
        let relative = devices(json!({"disks": [{"path": "disk"}]})).needs();
        assert!(relative.unwrap_err().contains("relative"));
        let many = vec![json!({"tap": "t"}); NEEDS_MAX + 1];
        assert!(devices(json!({"net": many})).needs().is_err());
    }
}
