//! Default names of devices.

/// Names that begin like this belong to the VMM's own devices.
pub(crate) const RESERVED_PREFIX: &str = "__";
/// The balloon.
pub(crate) const BALLOON_ID: &str = "__balloon";
/// The random number device.
pub(crate) const RNG_ID: &str = "__rng";
/// The clock device.
pub(crate) const RTC_ID: &str = "__rtc";
/// The watchdog.
pub(crate) const WATCHDOG_ID: &str = "__watchdog";
/// The virtual IOMMU.
pub(crate) const IOMMU_ID: &str = "__iommu";
/// The serial port.
pub(crate) const SERIAL_ID: &str = "__serial";
/// The debug console.
pub(crate) const DEBUG_CONSOLE_ID: &str = "__debug_console";
/// The console.
pub(crate) const CONSOLE_ID: &str = "__console";
