//! Validates a configuration before anything is created.
//!
//! `vm.create` stores every configuration that parses, as upstream does. Validation runs at boot and when the VMM
//! starts a VM from the command line.

mod cpus;
mod device_list;
mod devices;
mod error;
mod ids;
mod image_format;
mod iommu;
mod memory;
mod numa;
mod pci_devices;
mod rate_limits;
#[cfg(test)]
mod tests;
mod unsupported;

use api::VmConfig;
use api::config::{BalloonConfig, ConsoleOutputMode, DEFAULT_DEBUG_CONSOLE_PORT, PayloadConfig};

use machine::boot::check_platform;
use machine::legacy::is_fixed_port;

pub use device_list::{NewDevice, balloon_id, take_id, with_device, without_device};
pub use error::{CpusFault, DeviceFault, MemoryFault, NumaFault, ValidationError};
pub use ids::DeviceNumbers;
pub use image_format::image_format;
pub use iommu::iommu_address_width_bits;
pub use pci_devices::{has_iommu, iommu_segments, segment_weights, wished_slots};
pub use rate_limits::{RateLimiterError, rate_limits, validate_rate_limits, with_rate_limit};

/// Checks every section. The most important errors come first.
///
/// # Errors
/// The first problem found.
pub fn validate(config: &VmConfig) -> Result<(), ValidationError> {
    payload(config.payload.as_ref())?;
    unsupported::check(config)?;
    cpus::check(&config.cpus).map_err(ValidationError::Cpus)?;
    memory::check(&config.memory, config.cpus.max_phys_bits).map_err(ValidationError::Memory)?;
    numa::check(config).map_err(ValidationError::Numa)?;
    if let Some(platform) = &config.platform {
        check_platform(platform).map_err(ValidationError::Platform)?;
    }
    balloon(config)?;
    devices::check(config)?;
    validate_rate_limits(config)?;
    pci_devices::check(config)?;
    iommu::check(config)?;
    ids::check(config)?;
    consoles(config)?;
    landlock(config)
}

/// Checks a configuration to which a device was just added: that device, and whether it is compatible with the others.
/// The rest of the configuration has been or will be validated at boot.
///
/// # Errors
/// The first problem found.
pub fn validate_addition(config: &VmConfig, added: &NewDevice) -> Result<(), ValidationError> {
    unsupported::check(config)?;
    // The target of an existing balloon may exceed RAM, which a running machine accepts.
    if matches!(added, NewDevice::Balloon(_)) {
        balloon(config)?;
    }
    devices::check(config)?;
    validate_rate_limits(config)?;
    pci_devices::check(config)?;
    iommu::check(config)?;
    ids::check(config)
}

fn payload(payload: Option<&PayloadConfig>) -> Result<(), ValidationError> {
    let payload = payload.ok_or(ValidationError::PayloadMissing)?;
    match (&payload.firmware, &payload.kernel) {
        (None, None) if payload.initramfs.is_some() => Err(ValidationError::InitramfsWithoutKernel),
        (None, None) => Err(ValidationError::PayloadMissing),
        (Some(_), None) if payload.initramfs.is_none() && payload.cmdline.is_none() => Ok(()),
        (Some(_), _) => Err(ValidationError::FirmwareAndKernel),
        (None, Some(_)) => Ok(()),
    }
}

/// Minimum time between two samples of statistics, in milliseconds. Each sample wakes the guest.
const STATS_POLL_MS_MIN: u64 = 100;

/// Checks sizes of RAM and of the balloon from `vm.resize`: a VM that was resized must be able to boot again.
///
/// # Errors
/// The first problem found.
pub fn validate_sizes(config: &VmConfig) -> Result<(), ValidationError> {
    memory::check(&config.memory, config.cpus.max_phys_bits).map_err(ValidationError::Memory)?;
    validate_balloon(config)
}

/// Checks the balloon's new size from `vm.resize` against the rest of the configuration, because a resized VM must be
/// able to boot again.
///
/// # Errors
/// The balloon would leave the guest no RAM.
pub fn validate_balloon(config: &VmConfig) -> Result<(), ValidationError> {
    let (Some(balloon), Some(ram_bytes)) = (&config.balloon, config.memory.total_bytes()) else {
        return Ok(());
    };
    if balloon.size >= ram_bytes {
        return Err(ValidationError::BalloonLargerThanRam {
            balloon_bytes: balloon.size,
            ram_bytes,
        });
    }
    Ok(())
}

fn balloon(config: &VmConfig) -> Result<(), ValidationError> {
    let poll_ms = config.balloon.as_ref().map_or(0, |it| it.stats_poll_ms);
    if (1..STATS_POLL_MS_MIN).contains(&poll_ms) {
        return Err(ValidationError::StatsPollTooOften {
            poll_ms,
            least_ms: STATS_POLL_MS_MIN,
        });
    }
    let lone = |it: &BalloonConfig| it.reporting_policy && !it.free_page_reporting;
    if config.balloon.as_ref().is_some_and(lone) {
        return Err(ValidationError::PolicyWithoutReporting);
    }
    let lone = |it: &BalloonConfig| it.device_init && !it.free_page_reporting;
    if config.balloon.as_ref().is_some_and(lone) {
        return Err(ValidationError::DeviceInitWithoutReporting);
    }
    validate_balloon(config)
}

fn consoles(config: &VmConfig) -> Result<(), ValidationError> {
    use ConsoleOutputMode::{File, Off, Socket};
    let debug = &config.debug_console;
    let ends = [
        (
            "serial",
            config.serial.mode,
            &config.serial.file,
            config.serial.file_bytes_max,
            &config.serial.socket,
        ),
        (
            "console",
            config.console.mode,
            &config.console.file,
            config.console.file_bytes_max,
            &config.console.socket,
        ),
        (
            "debug_console",
            debug.mode,
            &debug.file,
            debug.file_bytes_max,
            &None,
        ),
    ];
    for (device, mode, file, bytes_max, socket) in ends {
        if mode != File && bytes_max.is_some() {
            return Err(ValidationError::Device {
                device: device.to_owned(),
                fault: DeviceFault::ConsoleLimitWithoutFile,
            });
        }
        let path_missing = match mode {
            File => file.is_none(),
            Socket => socket.is_none(),
            _ => false,
        };
        if path_missing {
            return Err(ValidationError::Device {
                device: device.to_owned(),
                fault: DeviceFault::ConsolePathMissing,
            });
        }
    }
    let port = debug.iobase.unwrap_or(DEFAULT_DEBUG_CONSOLE_PORT);
    if debug.mode != Off && is_fixed_port(port) {
        return Err(ValidationError::Device {
            device: "debug_console".to_owned(),
            fault: DeviceFault::PortInUse { port },
        });
    }
    Ok(())
}

fn landlock(config: &VmConfig) -> Result<(), ValidationError> {
    let rules = config.landlock_rules.as_deref().unwrap_or_default();
    if !config.landlock_enable && !rules.is_empty() {
        return Err(ValidationError::LandlockRulesWithoutLandlock);
    }
    let is_known = |access: &str| !access.is_empty() && access.chars().all(|it| "rw".contains(it));
    match rules.iter().find(|rule| !is_known(&rule.access)) {
        Some(rule) => Err(ValidationError::LandlockAccess {
            path: rule.path.clone(),
            access: rule.access.clone(),
        }),
        None => Ok(()),
    }
}
