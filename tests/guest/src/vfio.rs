//! The calls of VFIO that [`crate::dma`] needs (linux/vfio.h).
#![allow(unsafe_code)]
// UNSAFETY: std has no ioctl.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _};

/// `_IO(';', 100)`, the first request.
const BASE: libc::Ioctl = 0x3b64;
const SET_IOMMU: libc::Ioctl = BASE + 2;
const GROUP_SET_CONTAINER: libc::Ioctl = BASE + 4;
const GROUP_GET_DEVICE_FD: libc::Ioctl = BASE + 6;
const DEVICE_GET_REGION_INFO: libc::Ioctl = BASE + 8;
const MAP_DMA: libc::Ioctl = BASE + 13;
const UNMAP_DMA: libc::Ioctl = BASE + 14;

const TYPE1V2_IOMMU: libc::c_ulong = 3;
const READ_AND_WRITE: u32 = 0b11;
/// Configuration space, behind the BARs and the expansion ROM.
pub(crate) const CONFIG_REGION: u32 = 7;

#[repr(C)]
struct RegionInfo {
    bytes: u32,
    flags: u32,
    index: u32,
    capabilities: u32,
    size: u64,
    offset: u64,
}

#[repr(C)]
struct Map {
    bytes: u32,
    flags: u32,
    address: u64,
    input: u64,
    size: u64,
}

#[repr(C)]
struct Unmap {
    bytes: u32,
    flags: u32,
    input: u64,
    size: u64,
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    match result {
        0.. => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Puts a group into an empty container, and gives the container an IOMMU.
pub(crate) fn join(group: &File, container: &File) -> io::Result<()> {
    let number = container.as_raw_fd();
    // SAFETY: the first request reads an integer that lives until the call returns, and the second has no pointer.
    unsafe {
        check(libc::ioctl(
            group.as_raw_fd(),
            GROUP_SET_CONTAINER,
            &raw const number,
        ))?;
        check(libc::ioctl(number, SET_IOMMU, TYPE1V2_IOMMU)).map(drop)
    }
}

/// Opens the device of a group with this address on the bus.
pub(crate) fn device(group: &File, address: &str) -> io::Result<File> {
    let address = CString::new(address).map_err(io::Error::other)?;
    // SAFETY: a NUL-terminated string that lives until the call returns; the new descriptor has no other owner.
    unsafe {
        let request = GROUP_GET_DEVICE_FD;
        let fd = check(libc::ioctl(group.as_raw_fd(), request, address.as_ptr()))?;
        Ok(File::from_raw_fd(fd))
    }
}

/// The offset of a region in the device's file.
pub(crate) fn region_offset(device: &File, index: u32) -> io::Result<u64> {
    let mut info = RegionInfo {
        bytes: size_of::<RegionInfo>() as u32,
        flags: 0,
        index,
        capabilities: 0,
        size: 0,
        offset: 0,
    };
    // SAFETY: the kernel reads and writes only the structure, whose size it gets.
    check(unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_GET_REGION_INFO, &raw mut info) })?;
    Ok(info.offset)
}

/// Gives the devices of a container access to memory of this process, which stays theirs when it is unmapped here.
pub(crate) fn map(container: &File, address: u64, input: u64, size: u64) -> io::Result<()> {
    let map = Map {
        bytes: size_of::<Map>() as u32,
        flags: READ_AND_WRITE,
        address,
        input,
        size,
    };
    // SAFETY: the kernel reads the structure, whose size it gets. Memory that a test maps has no references while the
    // device writes.
    check(unsafe { libc::ioctl(container.as_raw_fd(), MAP_DMA, &raw const map) }).map(drop)
}

/// Takes that memory away.
pub(crate) fn unmap(container: &File, input: u64, size: u64) -> io::Result<()> {
    let mut unmap = Unmap {
        bytes: size_of::<Unmap>() as u32,
        flags: 0,
        input,
        size,
    };
    // SAFETY: the kernel reads and writes only the structure, whose size it gets.
    check(unsafe { libc::ioctl(container.as_raw_fd(), UNMAP_DMA, &raw mut unmap) })?;
    match unmap.size == size {
        true => Ok(()),
        false => Err(io::Error::other(format!("{} bytes", unmap.size))),
    }
}
