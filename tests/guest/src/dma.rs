//! A device of the host that a program of the guest drives through VFIO: QEMU's educational device (`edu`), which copies
//! between memory and a page of its own. It accesses any address that it is told, so it can do what a hostile guest
//! would do.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::thread;
use std::time::{Duration, Instant};

use crate::blocks::PAGE_BYTES;
use crate::vfio;

/// Registers of 32 bits, and the page of the device as it names it itself.
const SOURCE: u64 = 0x80;
const TARGET: u64 = 0x88;
const COUNT: u64 = 0x90;
const COMMAND: u64 = 0x98;
const OWN_PAGE: u32 = 0x4_0000;
/// The command, which reads one while the device copies, and the direction.
const RUN: u32 = 1;
const TO_MEMORY: u32 = 2;

/// The command register of PCI: the device responds at its BARs, and may access memory.
const PCI_COMMAND: u64 = 4;
const PCI_MEMORY_AND_MASTER: u16 = 0b110;

/// The device takes a tenth of a second; emulated guests may be slow.
const COPY_DEADLINE: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// An open device, and the memory that it can access.
#[derive(Debug)]
pub(crate) struct Dma {
    // In this order: the kernel takes a container back last.
    device: File,
    registers_at: u64,
    _group: File,
    container: File,
}

fn with<T>(what: &str, result: std::io::Result<T>) -> Result<T, String> {
    result.map_err(|error| format!("{what}: {error}"))
}

impl Dma {
    /// Opens the device with this address on the bus, and takes it away from its driver.
    pub(crate) fn open(address: &str) -> Result<Self, String> {
        let folder = format!("/sys/bus/pci/devices/{address}");
        // A guest has no interrupt remapping, without which VFIO gives no device to a program.
        let unsafe_interrupts = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
        with(unsafe_interrupts, fs::write(unsafe_interrupts, "Y"))?;
        let driver = format!("{folder}/driver_override");
        with(&driver, fs::write(&driver, "vfio-pci"))?;
        with("probing", fs::write("/sys/bus/pci/drivers_probe", address))?;
        let link = format!("{folder}/iommu_group");
        let group = with(&link, fs::read_link(&link))?;
        let group = group.file_name().and_then(|name| name.to_str());
        let group = format!("/dev/vfio/{}", group.ok_or("a group without a name")?);
        let open = |path: &str| with(path, OpenOptions::new().read(true).write(true).open(path));
        let container = open("/dev/vfio/vfio")?;
        let group = open(&group)?;
        with("joining", vfio::join(&group, &container))?;
        let device = with("opening", vfio::device(&group, address))?;
        let config_at = with("config", vfio::region_offset(&device, vfio::CONFIG_REGION))?;
        let registers_at = with("registers", vfio::region_offset(&device, 0))?;
        let command = PCI_MEMORY_AND_MASTER.to_le_bytes();
        with(
            "command",
            device.write_all_at(&command, config_at + PCI_COMMAND),
        )?;
        Ok(Self {
            device,
            registers_at,
            _group: group,
            container,
        })
    }

    /// Gives the device access to the page at `address` of this process, at the address `input`.
    pub(crate) fn map(&self, address: usize, input: u64) -> Result<(), String> {
        let mapped = vfio::map(&self.container, address as u64, input, PAGE_BYTES);
        with("mapping", mapped)
    }

    /// Takes the page at the address `input` away from it again.
    pub(crate) fn unmap(&self, input: u64) -> Result<(), String> {
        let unmapped = vfio::unmap(&self.container, input, PAGE_BYTES);
        with("unmapping", unmapped)
    }

    /// Copies a page of memory to the device. It does not report whether it could.
    pub(crate) fn read(&self, input: u32) -> Result<(), String> {
        self.copy(input, OWN_PAGE, RUN)
    }

    /// Copies the device's page to memory. It does not report whether it could.
    pub(crate) fn write(&self, input: u32) -> Result<(), String> {
        self.copy(OWN_PAGE, input, RUN | TO_MEMORY)
    }

    fn copy(&self, source: u32, target: u32, command: u32) -> Result<(), String> {
        self.set(SOURCE, source)?;
        self.set(TARGET, target)?;
        self.set(COUNT, PAGE_BYTES as u32)?;
        self.set(COMMAND, command)?;
        let begin = Instant::now();
        while self.get(COMMAND)? & RUN != 0 {
            if begin.elapsed() > COPY_DEADLINE {
                return Err("the device does not end".into());
            }
            thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    fn set(&self, register: u64, value: u32) -> Result<(), String> {
        let place = self.registers_at + register;
        with(
            "register",
            self.device.write_all_at(&value.to_le_bytes(), place),
        )
    }

    fn get(&self, register: u64) -> Result<u32, String> {
        let mut value = [0; 4];
        let place = self.registers_at + register;
        with("register", self.device.read_exact_at(&mut value, place))?;
        Ok(u32::from_le_bytes(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_that_is_not_there_is_an_error() {
        Dma::open("ffff:ff:1f.7").unwrap_err();
    }
}
