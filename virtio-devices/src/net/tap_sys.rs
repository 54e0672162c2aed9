//! The ioctls of tap devices and network interfaces (linux/if_tun.h, netdevice(7)).

#![allow(unsafe_code)]
// UNSAFETY: ioctls on descriptors we own, each with a pointer to a local of the
// type the request reads or writes.

use std::ffi::{c_char, c_int, c_short, c_uint, c_ulong};
use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Longest interface name.
pub(super) const NAME_BYTES_MAX: usize = libc::IFNAMSIZ - 1;

/// The parameters of TUNSETIFF and TUNGETIFF.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) name: String,
    /// `IFF_TAP` and so on.
    pub(super) flags: c_int,
}

/// A request for the interface `name`, at most [`NAME_BYTES_MAX`] bytes.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: `ifreq` is plain data, for which all zeroes are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name[..NAME_BYTES_MAX]
        .iter_mut()
        .zip(name.bytes())
    {
        *to = from as c_char;
    }
    request
}

fn name_of(request: &libc::ifreq) -> String {
    let bytes: Vec<u8> = request
        .ifr_name
        .iter()
        .map(|byte| *byte as u8)
        .take_while(|byte| *byte != 0)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// TUNSETIFF: attaches `file` to the tap `name`, creating it if necessary. The kernel replaces a `%d` in the name and
/// returns the result.
pub(super) fn attach(file: &File, name: &str, flags: c_int) -> io::Result<String> {
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = flags as c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) })?;
    Ok(name_of(&request))
}

/// TUNGETIFF: the interface to which `file` is attached.
pub(super) fn attached(file: &File) -> io::Result<Interface> {
    let mut request = request("");
    // SAFETY: TUNGETIFF writes one `ifreq`.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF, &mut request) })?;
    Ok(Interface {
        name: name_of(&request),
        // SAFETY: TUNGETIFF has filled in the flags.
        flags: c_int::from(unsafe { request.ifr_ifru.ifru_flags } as u16),
    })
}

/// TUNSETVNETHDRSZ: length of the header in front of each frame.
pub(super) fn set_header_bytes(file: &File, bytes: usize) -> io::Result<()> {
    let bytes = bytes as c_int;
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &bytes) })
}

/// TUNSETOFFLOAD: the offloads that the reader of the tap accepts, `TUN_F_*`.
pub(super) fn set_offload(file: &File, offloads: c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    check(unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::TUNSETOFFLOAD,
            c_ulong::from(offloads),
        )
    })
}

/// TUNSETQUEUE: whether the kernel sends frames to this queue of a multi-queue tap.
pub(super) fn set_queue_enabled(file: &File, enabled: bool) -> io::Result<()> {
    let mut request = request("");
    let flag = if enabled {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    request.ifr_ifru.ifru_flags = flag as c_short;
    // SAFETY: TUNSETQUEUE reads one `ifreq`.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETQUEUE, &request) })
}

/// Makes the descriptor non-blocking.
pub(super) fn set_nonblocking(file: &File) -> io::Result<()> {
    // SAFETY: F_GETFL takes no argument.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    // SAFETY: F_SETFL takes an int.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })
}

/// A socket for configuring interfaces.
pub(super) struct ConfigSocket(OwnedFd);

impl ConfigSocket {
    pub(super) fn open() -> io::Result<Self> {
        // SAFETY: takes numbers only.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        check(fd)?;
        // SAFETY: the kernel has just returned this descriptor.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn call(&self, what: c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: every SIOC[GS]IF* request used here reads or writes one `ifreq`.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), what as libc::Ioctl, request) })
    }

    pub(super) fn set_address(&self, name: &str, address: Ipv4Addr) -> io::Result<()> {
        let mut request = request(name);
        request.ifr_ifru.ifru_addr = inet(address);
        self.call(libc::SIOCSIFADDR as c_ulong, &mut request)
    }

    pub(super) fn set_netmask(&self, name: &str, mask: Ipv4Addr) -> io::Result<()> {
        let mut request = request(name);
        request.ifr_ifru.ifru_netmask = inet(mask);
        self.call(libc::SIOCSIFNETMASK as c_ulong, &mut request)
    }

    pub(super) fn set_hardware_address(&self, name: &str, mac: [u8; 6]) -> io::Result<()> {
        let mut request = request(name);
        let mut address = libc::sockaddr {
            sa_family: libc::ARPHRD_ETHER,
            sa_data: [0; 14],
        };
        for (to, from) in address.sa_data.iter_mut().zip(mac) {
            *to = from as c_char;
        }
        request.ifr_ifru.ifru_hwaddr = address;
        self.call(libc::SIOCSIFHWADDR as c_ulong, &mut request)
    }

    pub(super) fn set_mtu(&self, name: &str, mtu: u16) -> io::Result<()> {
        let mut request = request(name);
        request.ifr_ifru.ifru_mtu = c_int::from(mtu);
        self.call(libc::SIOCSIFMTU as c_ulong, &mut request)
    }

    /// Brings the interface up; this needs no permission if it is up already.
    pub(super) fn bring_up(&self, name: &str) -> io::Result<()> {
        let mut request = request(name);
        self.call(libc::SIOCGIFFLAGS as c_ulong, &mut request)?;
        // SAFETY: SIOCGIFFLAGS has filled in the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let up = libc::IFF_UP as c_short;
        if flags & up != 0 {
            return Ok(());
        }
        request.ifr_ifru.ifru_flags = flags | up;
        self.call(libc::SIOCSIFFLAGS as c_ulong, &mut request)
    }
}

/// `sockaddr_in` of an address, port 0: family, port, then four bytes of address.
fn inet(address: Ipv4Addr) -> libc::sockaddr {
    let mut sockaddr = libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data: [0; 14],
    };
    for (to, from) in sockaddr.sa_data[2..6].iter_mut().zip(address.octets()) {
        *to = from as c_char;
    }
    sockaddr
}
