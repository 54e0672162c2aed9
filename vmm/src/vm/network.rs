//! Builds network devices on taps from the configuration.

use std::error::Error;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use api::config::{MacAddr, NetConfig, VhostMode};
use machine::threads::DeviceKind;
use virtio_devices::ListeningSocket;
use virtio_devices::net::{Backend, Net, NetLimiters, NetParams};
use virtio_devices::vhost_user::{Endpoint, NetProfile, Profile, VhostUser, VhostUserParams};

use super::VmError;
use super::devices::{Made, assigned, place};
use crate::inherited_fd;

/// The default network mask, the same as upstream's.
const DEFAULT_MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);

/// The host's side of an interface supports only IPv4 addresses.
#[derive(Debug, thiserror::Error)]
#[error("{address} is not an IPv4 address; only IPv4 is supported for the host side")]
struct NotIpv4 {
    address: IpAddr,
}

/// A tap's descriptor cannot be taken over.
#[derive(Debug, thiserror::Error)]
#[error("Cannot use file descriptor {fd} as a tap device")]
struct DescriptorError {
    fd: i32,
    #[source]
    source: io::Error,
}

/// Creates one interface and stores the tap's name in the configuration.
pub(super) fn net(config: &mut NetConfig, limiters: NetLimiters) -> Result<Made, VmError> {
    let id = assigned(&config.id).to_owned();
    let net = Net::new(NetParams {
        id: id.clone(),
        backend: backend(config).map_err(|source| VmError::device(&id, source))?,
        mac: config.mac.0,
        mtu: config.mtu,
        // The device adds its control queue itself.
        num_queues: u16::try_from(config.num_queues / 2 * 2).unwrap_or(u16::MAX),
        queue_size: config.queue_size,
        offload_tso: config.offload_tso,
        offload_ufo: config.offload_ufo,
        offload_csum: config.offload_csum,
        limiters,
    })
    .map_err(|source| VmError::device(&id, source))?;
    if config.fds.is_none() {
        config.tap = Some(net.tap_name().to_owned());
    }
    Ok(Made {
        is_behind_iommu: config.iommu,
        ..Made::new(&id, DeviceKind::Net, place!(config), net)
    })
}

/// The socket cannot be bound.
#[derive(Debug, thiserror::Error)]
#[error("Cannot listen on {}", path.display())]
struct SocketError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Creates an interface whose back end need not run yet.
pub(super) fn vhost_user_net(config: &NetConfig, socket: &Path) -> Result<Made, VmError> {
    let id = assigned(&config.id);
    let endpoint = match config.vhost_mode {
        VhostMode::Client => Endpoint::Connect(socket.to_owned()),
        VhostMode::Server => {
            let bound = ListeningSocket::bind(socket).map_err(|source| {
                let path = socket.to_owned();
                VmError::device(id, SocketError { path, source })
            })?;
            Endpoint::Listen(bound)
        }
    };
    // An odd number includes the control queue, which exists in any case.
    let pairs = config.num_queues / 2;
    let profile = Profile::net(&NetProfile {
        pairs: u16::try_from(pairs).map_err(|source| VmError::device(id, source))?,
        mac: config.mac.0,
        mtu: config.mtu,
        offload_tso: config.offload_tso,
        offload_ufo: config.offload_ufo,
        offload_csum: config.offload_csum,
    });
    let device = VhostUser::new(VhostUserParams {
        id: id.to_owned(),
        profile,
        endpoint,
        queue_sizes: vec![config.queue_size; 2 * pairs],
    })
    .map_err(|source| VmError::device(id, source))?;
    Ok(Made::new(id, DeviceKind::VhostUser, place!(config), device))
}

fn backend(config: &NetConfig) -> Result<Backend, Box<dyn Error + Send + Sync>> {
    if let Some(fds) = &config.fds {
        let own = fds.iter().map(|&fd| {
            inherited_fd::duplicate(fd).map_err(|source| DescriptorError { fd, source })
        });
        return Ok(Backend::Fds(own.collect::<Result<_, _>>()?));
    }
    let ip = config.ip.map(ipv4).transpose()?;
    let mask = config.mask.map(ipv4).transpose()?;
    Ok(Backend::Tap {
        name: config.tap.clone(),
        ip: ip.map(|ip| (ip, mask.unwrap_or(DEFAULT_MASK))),
        host_mac: config.host_mac.map(|MacAddr(bytes)| bytes),
    })
}

fn ipv4(address: IpAddr) -> Result<Ipv4Addr, NotIpv4> {
    match address {
        IpAddr::V4(address) => Ok(address),
        IpAddr::V6(_) => Err(NotIpv4 { address }),
    }
}
