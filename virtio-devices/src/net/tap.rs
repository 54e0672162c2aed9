//! Opens and configures taps.
//!
//! A tap created here exists as long as its descriptors: an error during set-up, or the end of the VM, removes it. A
//! tap that existed before stays.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, c_int};

use super::frame_io::HEADER_BYTES;
use super::tap_sys::{self, ConfigSocket, NAME_BYTES_MAX};

const TUN_DEVICE: &str = "/dev/net/tun";
/// Name pattern of taps without a configured name.
const DEFAULT_NAME: &str = "vmtap%d";

/// Reasons why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Invalid name: interface names have at most 15 bytes and contain no slash, colon or blank.
    #[error("tap name {name:?} is not an interface name of 1 to {NAME_BYTES_MAX} bytes")]
    Name {
        /// The name.
        name: String,
    },
    /// The tun driver is missing.
    #[error("{TUN_DEVICE} does not exist: is the tun driver loaded?")]
    NoTunDevice(#[source] io::Error),
    /// The tun driver cannot be opened.
    #[error("cannot open {TUN_DEVICE}")]
    Open(#[source] io::Error),
    /// Permission denied: creating a tap needs CAP_NET_ADMIN; using one requires being its owner.
    #[error(
        "no permission to use tap {name}: creating one needs CAP_NET_ADMIN, and using one requires being its owner"
    )]
    Permission {
        /// The tap.
        name: String,
        #[source]
        source: io::Error,
    },
    /// Another process uses the tap.
    #[error("tap {name} is in use")]
    Busy {
        /// The tap.
        name: String,
        #[source]
        source: io::Error,
    },
    /// The interface exists but is not a tap, or has only one queue.
    #[error("{name} is not a tap that supports {queues} queues")]
    Unsuitable {
        /// The interface.
        name: String,
        /// Number of queue pairs requested.
        queues: u16,
        #[source]
        source: io::Error,
    },
    /// Attaching failed for another reason.
    #[error("cannot attach to tap {name}")]
    Attach {
        /// The tap.
        name: String,
        #[source]
        source: io::Error,
    },
    /// The given descriptor is not a tap.
    #[error("file descriptor {fd} is not a tap")]
    NotATap {
        /// Its number.
        fd: RawFd,
        #[source]
        source: io::Error,
    },
    /// The given descriptor belongs to a tap of the wrong kind.
    #[error("file descriptor {fd} is not a tap with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    WrongKind {
        /// Its number.
        fd: RawFd,
    },
    /// A setting was rejected.
    #[error("cannot set {what} of tap {name}")]
    Configure {
        /// The setting.
        what: &'static str,
        /// The tap.
        name: String,
        #[source]
        source: io::Error,
    },
}

/// The configured settings of a tap; absent ones stay unchanged.
#[derive(Debug, Clone, Copy, Default)]
pub struct TapConfig {
    /// Address and mask.
    pub ip: Option<(Ipv4Addr, Ipv4Addr)>,
    /// Hardware address of the host's side.
    pub host_mac: Option<[u8; 6]>,
    /// MTU.
    pub mtu: Option<u16>,
}

/// One queue of a tap.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Opens `queues` queues of the tap `name`, creates the tap if it does not exist, and configures it.
    ///
    /// # Errors
    /// See [`TapError`]; a tap that was created by this call is removed.
    pub fn open(name: Option<&str>, queues: u16, config: TapConfig) -> Result<Vec<Self>, TapError> {
        let pattern = checked_name(name)?;
        let first = Self::attach(pattern, queues)?;
        let mut taps = vec![first];
        for _ in 1..queues {
            let next = Self::attach(&taps[0].name, queues)?;
            taps.push(next);
        }
        taps[0].configure(config)?;
        Ok(taps)
    }

    /// Takes over queues that another process has opened, sized and brought up.
    ///
    /// # Errors
    /// A descriptor is not a tap, or is one of the wrong kind.
    pub fn from_fds(fds: Vec<OwnedFd>) -> Result<Vec<Self>, TapError> {
        fds.into_iter().map(Self::from_fd).collect()
    }

    fn from_fd(fd: OwnedFd) -> Result<Self, TapError> {
        let file = File::from(fd);
        let fd = file.as_raw_fd();
        let interface =
            tap_sys::attached(&file).map_err(|source| TapError::NotATap { fd, source })?;
        let wanted = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        if interface.flags & wanted != wanted {
            return Err(TapError::WrongKind { fd });
        }
        let tap = Self {
            file,
            name: interface.name,
        };
        tap.prepare()?;
        Ok(tap)
    }

    /// A queue that is not a tap, for tests without permission to create one.
    #[cfg(any(test, feature = "test-utils"))]
    pub(super) fn untested(fd: OwnedFd) -> Self {
        Self {
            file: File::from(fd),
            name: "test".into(),
        }
    }

    #[cfg(test)]
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    fn attach(name: &str, queues: u16) -> Result<Self, TapError> {
        let single = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        let multi = single | IFF_MULTI_QUEUE;
        let attached = if queues > 1 {
            attach_once(name, multi)?
        } else {
            match attach_once(name, single)? {
                // An existing tap with several queues requires this flag even if only one is used.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    attach_once(name, multi)?
                }
                attached => attached,
            }
        };
        let (file, name) = attached.map_err(|source| attach_error(name, queues, source))?;
        let tap = Self { file, name };
        tap.prepare()?;
        Ok(tap)
    }

    /// The settings that every queue needs, regardless of who opened it.
    fn prepare(&self) -> Result<(), TapError> {
        tap_sys::set_header_bytes(&self.file, HEADER_BYTES)
            .map_err(|source| self.refused("header size", source))?;
        tap_sys::set_nonblocking(&self.file)
            .map_err(|source| self.refused("non-blocking mode", source))?;
        // The previous user of the tap may have enabled offloads that our guest does not accept.
        self.set_offload(0)
            .map_err(|source| self.refused("offloads", source))
    }

    fn configure(&self, config: TapConfig) -> Result<(), TapError> {
        let name = &self.name;
        let socket =
            ConfigSocket::open().map_err(|source| self.refused("anything (no socket)", source))?;
        if let Some(mac) = config.host_mac {
            socket
                .set_hardware_address(name, mac)
                .map_err(|source| self.refused("hardware address", source))?;
        }
        if let Some((address, mask)) = config.ip {
            socket
                .set_address(name, address)
                .map_err(|source| self.refused("address", source))?;
            socket
                .set_netmask(name, mask)
                .map_err(|source| self.refused("netmask", source))?;
        }
        if let Some(mtu) = config.mtu {
            socket
                .set_mtu(name, mtu)
                .map_err(|source| self.refused("MTU", source))?;
        }
        socket
            .bring_up(name)
            .map_err(|source| self.refused("state to up", source))
    }

    fn refused(&self, what: &'static str, source: io::Error) -> TapError {
        TapError::Configure {
            what,
            name: self.name.clone(),
            source,
        }
    }

    /// Interface name, as reported by the kernel.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sends one frame, header first.
    ///
    /// # Errors
    /// The tap is full, down or unusable.
    pub(super) fn send(&self, frame: &[u8]) -> io::Result<()> {
        (&self.file).write(frame).map(drop)
    }

    /// Sets the guest's offloads, `TUN_F_*`; the same for all queues of a tap.
    ///
    /// # Errors
    /// The kernel does not support one of them.
    pub(super) fn set_offload(&self, offloads: u32) -> io::Result<()> {
        tap_sys::set_offload(&self.file, offloads)
    }

    /// Sets whether the kernel sends frames to this queue.
    ///
    /// # Errors
    /// Not a queue of a multi-queue tap, or already in that state.
    pub(super) fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        tap_sys::set_queue_enabled(&self.file, enabled)
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn checked_name(name: Option<&str>) -> Result<&str, TapError> {
    let Some(name) = name else {
        return Ok(DEFAULT_NAME);
    };
    let plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%');
    if name.is_empty()
        || name.len() > NAME_BYTES_MAX
        || matches!(name, "." | "..")
        || !name.bytes().all(plain)
    {
        return Err(TapError::Name { name: name.into() });
    }
    Ok(name)
}

/// Opens the tun driver and attaches to a tap; the inner result is that of attaching.
fn attach_once(name: &str, flags: c_int) -> Result<io::Result<(File, String)>, TapError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(TUN_DEVICE)
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => TapError::NoTunDevice(source),
            _ => TapError::Open(source),
        })?;
    Ok(tap_sys::attach(&file, name, flags).map(|name| (file, name)))
}

fn attach_error(name: &str, queues: u16, source: io::Error) -> TapError {
    let name = name.to_owned();
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => TapError::Permission { name, source },
        Some(libc::EBUSY) => TapError::Busy { name, source },
        Some(libc::EINVAL) => TapError::Unsuitable {
            name,
            queues,
            source,
        },
        _ => TapError::Attach { name, source },
    }
}
