//! Turns a payload configuration into runnable guest memory.

use std::ffi::CString;
use std::io::Seek;
use std::ops::Range;

use api::config::{PayloadConfig, PlatformConfig};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

use super::image::{Format, Image};
use super::loaded::{BootData, LoadedImage};
use super::{BOOT_GDT, BootError, BootProtocol, EntryPoint, bzimage, elf, pvh, smbios, zero_page};
use crate::memory::GuestMemory;
use crate::memory::layout::{
    BOOT_GDT_START, BOOT_IDT_START, CMDLINE_MAX_BYTES, CMDLINE_START, EBDA_POINTER, EBDA_START,
    HIGH_RAM_START, PAGE_BYTES, SMBIOS_MAX_BYTES, SMBIOS_START,
};

/// A payload in guest RAM, before the machine is described to it.
#[derive(Debug)]
pub struct Payload {
    image: LoadedImage,
    initramfs: Option<Range<u64>>,
    cmdline: CString,
}

/// A payload whose files are open and have a bootable format.
#[derive(Debug)]
pub struct PayloadFiles {
    image: Image,
    format: Format,
    initramfs: Option<Image>,
    cmdline: CString,
}

impl PayloadFiles {
    /// Opens kernel or firmware and initramfs.
    ///
    /// # Errors
    /// Files that are missing or of unknown format; a command line that is too long.
    pub fn open(config: &PayloadConfig) -> Result<Self, BootError> {
        let path = match (&config.kernel, &config.firmware) {
            (Some(_), Some(_)) => return Err(BootError::KernelAndFirmware),
            (None, None) => return Err(BootError::MissingPayload),
            (Some(path), None) | (None, Some(path)) => path,
        };
        let cmdline = check_cmdline(config.cmdline.as_deref().unwrap_or_default())?;
        let mut image = Image::open(path)?;
        Ok(Self {
            format: image.format()?,
            image,
            initramfs: config.initramfs.as_deref().map(Image::open).transpose()?,
            cmdline,
        })
    }

    /// Reads them into guest RAM. The time depends on the size of the files. Needs only `memory`.
    ///
    /// # Errors
    /// Files that are truncated, broken or too large.
    pub fn load(mut self, memory: &GuestMemory) -> Result<Payload, BootError> {
        let ram = memory.ram().memory();
        let usable = HIGH_RAM_START..memory.map().low_ram_end();
        let image = match self.format {
            Format::Elf => elf::load(&mut self.image, &ram, &usable)?,
            Format::BzImage => bzimage::load(&mut self.image, &ram, &usable)?,
        };
        let end_max = usable.end.min(image.initramfs_end_max);
        let room = image.end..end_max;
        let initramfs = self.initramfs.as_mut();
        Ok(Payload {
            initramfs: initramfs
                .map(|initramfs| load_initramfs(initramfs, &ram, &room))
                .transpose()?,
            image,
            cmdline: self.cmdline,
        })
    }
}

impl Payload {
    /// Writes descriptor table, command line, memory map, SMBIOS and start info. The caller writes the ACPI tables;
    /// `rsdp_address` is the address of their root pointer.
    ///
    /// # Errors
    /// SMBIOS cannot represent a string, or RAM is smaller than the layout requires.
    pub fn write_boot_data(
        &self,
        memory: &GuestMemory,
        platform: Option<&PlatformConfig>,
        rsdp_address: GuestAddress,
    ) -> Result<EntryPoint, BootError> {
        let ram = memory.ram().memory();
        write_low_memory(&ram, &self.cmdline)?;
        write_smbios(&ram, platform)?;
        let data = BootData {
            e820: memory.e820(),
            cmdline_address: CMDLINE_START,
            rsdp_address: rsdp_address.0,
            initramfs: self.initramfs.clone(),
        };
        match (self.image.entry.protocol, &self.image.setup_header) {
            (BootProtocol::Linux32, Some(header)) => zero_page::write(&ram, header, &data)?,
            _ => pvh::write(&ram, &data)?,
        }
        Ok(self.image.entry)
    }
}

fn check_cmdline(cmdline: &str) -> Result<CString, BootError> {
    let bytes = cmdline.len() as u64 + 1;
    if bytes > CMDLINE_MAX_BYTES {
        return Err(BootError::CmdlineTooLong {
            bytes,
            max_bytes: CMDLINE_MAX_BYTES,
        });
    }
    CString::new(cmdline).map_err(|_| BootError::CmdlineZeroByte)
}

/// Loads the initramfs, page-aligned, at the top of `room`.
fn load_initramfs(
    image: &mut Image,
    ram: &GuestMemoryMmap<()>,
    room: &Range<u64>,
) -> Result<Range<u64>, BootError> {
    let bytes = image.bytes;
    let start = room
        .end
        .checked_sub(bytes)
        .map(|start| start & !(PAGE_BYTES - 1))
        .filter(|start| *start >= room.start)
        .ok_or_else(|| BootError::InitramfsTooLarge {
            path: image.path.clone(),
            bytes,
            room_bytes: room.end.saturating_sub(room.start),
        })?;
    image
        .file
        .rewind()
        .map_err(|source| image.read_error(source))?;
    // The size fits `usize`, because it is smaller than low RAM.
    ram.read_exact_volatile_from(GuestAddress(start), &mut image.file, bytes as usize)
        .map_err(write_error("the initramfs"))?;
    Ok(start..start + bytes)
}

fn write_low_memory(ram: &GuestMemoryMmap<()>, cmdline: &CString) -> Result<(), BootError> {
    let mut address = BOOT_GDT_START;
    for descriptor in BOOT_GDT {
        ram.write_obj(descriptor, GuestAddress(address))
            .map_err(write_error("the boot descriptor table"))?;
        address += size_of::<u64>() as u64;
    }
    ram.write_obj(0u64, GuestAddress(BOOT_IDT_START))
        .map_err(write_error("the boot interrupt table"))?;
    // A real mode segment: the address in paragraphs of 16 bytes.
    ram.write_obj((EBDA_START >> 4) as u16, GuestAddress(EBDA_POINTER))
        .map_err(write_error("the EBDA pointer"))?;
    ram.write_slice(cmdline.as_bytes_with_nul(), GuestAddress(CMDLINE_START))
        .map_err(write_error("the command line"))
}

fn write_smbios(
    ram: &GuestMemoryMmap<()>,
    platform: Option<&PlatformConfig>,
) -> Result<(), BootError> {
    let tables =
        smbios::tables(platform, SMBIOS_START, SMBIOS_MAX_BYTES).map_err(BootError::Smbios)?;
    ram.write_slice(&tables, GuestAddress(SMBIOS_START))
        .map_err(write_error("SMBIOS"))
}

fn write_error(what: &'static str) -> impl Fn(vm_memory::GuestMemoryError) -> BootError {
    move |source| BootError::Write { what, source }
}
