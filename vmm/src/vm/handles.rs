//! Handles on a machine's devices, by name, for requests while it runs.

use std::collections::BTreeMap;
use std::io;

use api::config::{DiskConfig, NetConfig, PmemConfig, RateLimitGroupConfig};
use virtio_devices::block::DiskHandle;
use virtio_devices::pmem::PmemHandle;
use virtio_devices::rate_limit::RateLimits;

use super::devices::{self, Made};
use super::rate_limits::{DeviceLimiter, MachineLimiters};
use super::{VmError, network};

/// The handles of all devices.
#[derive(Debug)]
pub(super) struct Handles {
    disks: BTreeMap<String, DiskHandle>,
    pmems: BTreeMap<String, PmemHandle>,
    limiters: MachineLimiters,
}

impl Handles {
    /// Creates the handles of a machine with these rate limit groups. Its devices are added later.
    pub(super) fn new(groups: &[RateLimitGroupConfig]) -> Self {
        Self {
            disks: BTreeMap::new(),
            pmems: BTreeMap::new(),
            limiters: MachineLimiters::new(groups),
        }
    }

    /// Opens a disk and keeps its handles; one that a back end serves has none.
    pub(super) fn disk(&mut self, disk: &DiskConfig) -> Result<Made, VmError> {
        if let Some(socket) = &disk.vhost_socket {
            return devices::vhost_user_disk(disk, socket);
        }
        let (limiter, kept) = self.limiters.for_disk(disk);
        let (made, handle) = devices::disk(disk, limiter)?;
        self.limiters.keep(made.plug.id.clone(), kept);
        self.disks.insert(made.plug.id.clone(), handle);
        Ok(made)
    }

    /// The same for a network interface.
    pub(super) fn net(&mut self, net: &mut NetConfig) -> Result<Made, VmError> {
        if let Some(socket) = &net.vhost_socket {
            return network::vhost_user_net(net, socket);
        }
        let limiters = MachineLimiters::for_net(net);
        let made = network::net(net, limiters.clone())?;
        let kept = DeviceLimiter::Net(limiters);
        self.limiters.keep(made.plug.id.clone(), kept);
        Ok(made)
    }

    /// The same for persistent memory.
    pub(super) fn pmem(&mut self, pmem: &PmemConfig) -> Result<Made, VmError> {
        let (made, handle) = devices::pmem(pmem)?;
        self.pmems.insert(made.plug.id.clone(), handle);
        Ok(made)
    }

    /// Drops the handles of a device, if it has any.
    pub(super) fn remove(&mut self, id: &str) {
        self.disks.remove(id);
        self.pmems.remove(id);
        self.limiters.remove(id);
    }

    /// The disk of this name.
    pub(super) fn find_disk(&self, id: &str) -> Option<&DiskHandle> {
        self.disks.get(id)
    }

    /// As [`MachineLimiters::set`].
    pub(super) fn limit(&self, id: &str, limits: RateLimits) -> Option<Vec<&str>> {
        self.limiters.set(id, limits)
    }

    /// Releases the locks of all images, or takes them again. The devices are paused.
    ///
    /// # Errors
    /// Another process has a conflicting lock. No lock is held then.
    pub(super) fn hold(&self, hold: bool) -> Result<(), VmError> {
        let held = self.hold_each(hold);
        if let (true, Err(_)) = (hold, &held)
            && let Err(error) = self.hold_each(false)
        {
            log::error!("{}", api::error_line(&error));
        }
        held
    }

    fn hold_each(&self, hold: bool) -> Result<(), VmError> {
        for (id, disk) in &self.disks {
            disk.hold(hold).map_err(|error| not_held(id, error))?;
        }
        for (id, pmem) in &self.pmems {
            pmem.hold(hold).map_err(|error| not_held(id, error))?;
        }
        Ok(())
    }

    /// Writes the guest's data to stable storage. The devices are paused.
    ///
    /// # Errors
    /// A file cannot be synced.
    pub(super) fn sync(&self) -> Result<(), VmError> {
        sync_disks(&self.disks, DiskHandle::sync)?;
        sync_pmems(&self.pmems)
    }

    pub(super) fn written_files(&self) -> WrittenFiles {
        WrittenFiles {
            disks: self.disks.clone(),
            pmems: self.pmems.clone(),
        }
    }
}

/// The files that the guest writes to, for a thread that may wait for them.
#[derive(Debug, Default)]
pub struct WrittenFiles {
    disks: BTreeMap<String, DiskHandle>,
    pmems: BTreeMap<String, PmemHandle>,
}

impl WrittenFiles {
    /// Writes the data in the host's page cache to stable storage. The machine may run.
    ///
    /// # Errors
    /// A file cannot be synced.
    pub fn write_back(&self) -> Result<(), VmError> {
        sync_disks(&self.disks, DiskHandle::write_back)?;
        sync_pmems(&self.pmems)
    }
}

fn sync_disks(
    disks: &BTreeMap<String, DiskHandle>,
    sync: impl Fn(&DiskHandle) -> io::Result<()>,
) -> Result<(), VmError> {
    for (id, disk) in disks {
        let id = id.clone();
        sync(disk).map_err(|source| VmError::DiskSync { id, source })?;
    }
    Ok(())
}

fn sync_pmems(pmems: &BTreeMap<String, PmemHandle>) -> Result<(), VmError> {
    for (id, pmem) in pmems {
        let id = id.clone();
        pmem.sync()
            .map_err(|source| VmError::PmemSync { id, source })?;
    }
    Ok(())
}

/// Of all errors, only that of a lock goes away by waiting.
fn not_held(id: &str, source: io::Error) -> VmError {
    let id = id.to_owned();
    match source.kind() {
        io::ErrorKind::WouldBlock => VmError::ImageLock { id, source },
        _ => VmError::ImageHold { id, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_lock_of_another_process_is_worth_waiting_for() {
        for (error, is_lock) in [
            (io::Error::from_raw_os_error(libc::EAGAIN), true),
            (io::Error::from_raw_os_error(libc::EIO), false),
            (io::ErrorKind::InvalidData.into(), false),
        ] {
            let text = error.to_string();
            let made = not_held("_disk0", error);
            assert_eq!(matches!(made, VmError::ImageLock { .. }), is_lock, "{text}");
        }
    }
}
