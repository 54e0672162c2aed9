//! The checks that all chapters of the conformance suite share.

use super::driver::MockPciDriver;
use crate::pci::PciFunction;

/// RAM of the guest.
pub(super) const RAM_BYTES: usize = 64 << 20;
/// Chains offered to a queue between two checks of the device.
pub(super) const OFFERED_MAX: u16 = 32;

/// Returns when every queue has been processed. Commands take precedence over doorbells, so a reset right after a kick
/// would keep the garbage from the device. But after a resume each queue serves at least one chain, and the next pause
/// is acknowledged only after that.
pub(super) fn settle(driver: &MockPciDriver) {
    for _ in 0..=OFFERED_MAX {
        driver.function.pause();
        driver.function.resume();
    }
}

/// Checks that the device can be activated, which is impossible after its worker has panicked.
pub(super) fn assert_alive(driver: &mut MockPciDriver) {
    settle(driver);
    driver.start(u64::MAX);
    settle(driver);
    assert!(!driver.needs_reset(), "device gave up on a fresh start");
    driver.reset();
}

pub(super) fn used_indices(driver: &mut MockPciDriver) -> Vec<u16> {
    (0..driver.num_queues())
        .map(|index| driver.queue(index).used_idx())
        .collect()
}
