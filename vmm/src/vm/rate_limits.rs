//! The rate limiters of a machine, by name, so that they can be changed while it runs.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::config::{DiskConfig, NetConfig, RateLimitGroupConfig};
use virtio_devices::net::NetLimiters;
use virtio_devices::rate_limit::{RateLimiter, RateLimits};

use crate::config::rate_limits;

/// The limiters of a machine.
#[derive(Debug, Default)]
pub(super) struct MachineLimiters {
    groups: BTreeMap<String, Arc<RateLimiter>>,
    devices: BTreeMap<String, DeviceLimiter>,
}

/// The limiter of a device.
#[derive(Debug)]
pub(super) enum DeviceLimiter {
    Disk(Arc<RateLimiter>),
    /// The disk uses the limiter of this group.
    DiskInGroup(String),
    Net(NetLimiters),
}

impl MachineLimiters {
    /// Creates the limiters of the groups. Disks are added later.
    pub(super) fn new(groups: &[RateLimitGroupConfig]) -> Self {
        let limiter = |group: &RateLimitGroupConfig| {
            let limits = rate_limits(group.rate_limiter_config.as_ref());
            (group.id.clone(), Arc::new(RateLimiter::new(limits)))
        };
        Self {
            groups: groups.iter().map(limiter).collect(),
            devices: BTreeMap::new(),
        }
    }

    /// The limiter for a new disk. It is stored once the disk has been created.
    pub(super) fn for_disk(&self, disk: &DiskConfig) -> (Arc<RateLimiter>, DeviceLimiter) {
        if let Some(group) = &disk.rate_limit_group
            && let Some(limiter) = self.groups.get(group)
        {
            let limiter = Arc::clone(limiter);
            return (limiter, DeviceLimiter::DiskInGroup(group.clone()));
        }
        let limits = rate_limits(disk.rate_limiter_config.as_ref());
        let limiter = Arc::new(RateLimiter::new(limits));
        (Arc::clone(&limiter), DeviceLimiter::Disk(limiter))
    }

    /// The same for a network interface.
    pub(super) fn for_net(net: &NetConfig) -> NetLimiters {
        NetLimiters::new(rate_limits(net.rate_limiter_config.as_ref()))
    }

    pub(super) fn keep(&mut self, id: String, limiter: DeviceLimiter) {
        self.devices.insert(id, limiter);
    }

    pub(super) fn remove(&mut self, id: &str) {
        self.devices.remove(id);
    }

    /// Changes the limit of the device or group of this name, and returns the devices that must be paused and resumed
    /// for it to take effect immediately; `None` if there is no such limit.
    pub(super) fn set(&self, id: &str, limits: RateLimits) -> Option<Vec<&str>> {
        match (self.devices.get_key_value(id), self.groups.get(id)) {
            (Some((id, DeviceLimiter::Disk(limiter))), _) => {
                limiter.set(limits);
                Some(vec![id])
            }
            (Some((id, DeviceLimiter::Net(limiters))), _) => {
                limiters.set(limits);
                Some(vec![id])
            }
            (_, Some(limiter)) => {
                limiter.set(limits);
                Some(self.disks_in(id).collect())
            }
            (Some((_, DeviceLimiter::DiskInGroup(_))) | None, None) => None,
        }
    }

    fn disks_in(&self, group: &str) -> impl Iterator<Item = &str> {
        let is_member = move |limiter: &DeviceLimiter| matches!(limiter, DeviceLimiter::DiskInGroup(of) if of == group);
        let members = self.devices.iter().filter(move |(_, it)| is_member(it));
        members.map(|(id, _)| id.as_str())
    }
}
