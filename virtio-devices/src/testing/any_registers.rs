//! Makes arbitrary accesses to the registers of a device whose workers run, and restores arbitrary states, for the fuzz
//! targets `registers` and `saved_state`.

use state::Saved;
use state::testing::change;

use super::any_device;
use super::driver::{MockPciDriver, restore};
use super::fuzz_input::Input;
use super::queue::Segment;
use super::ram::TestRam;
use crate::pci::PciFunction;
use crate::transport::TransportError;
use crate::unpoisoned::Unpoisoned as _;

/// Maximum number of steps per input; further bytes are ignored.
const STEPS_MAX: usize = 64;
const RAM_BYTES: usize = 4 << 20;
/// Maximum number of changes to a state.
const CHANGES_MAX: usize = 8;

/// Runs the steps that the bytes describe, the first of which chooses the device; returns whether the device has needed
/// a reset.
///
/// # Panics
/// The device does not work after a reset.
pub fn run(bytes: &[u8]) -> bool {
    let mut input = Input(bytes);
    let ram = TestRam::new(RAM_BYTES);
    let made = any_device::make(input.byte(), &ram);
    let mut driver = MockPciDriver::new(made.device.clone(), &ram);
    driver.start(u64::MAX);
    let mut gave_up = false;
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        step(&mut driver, &mut input);
        gave_up |= driver.needs_reset();
    }
    driver.function.resume();
    // A driver that starts over finds a working device.
    driver.function.reset();
    driver.set_up_pci();
    driver.start(u64::MAX);
    driver.function.pause();
    driver.function.resume();
    assert!(driver.function.workers_live(), "a worker has panicked");
    assert!(!driver.needs_reset(), "device gave up on a fresh start");
    gave_up
}

fn step(driver: &mut MockPciDriver, input: &mut Input<'_>) {
    let windows = driver.windows;
    let bytes = 1 << (input.byte() % 4);
    let near = u64::from(input.byte());
    let mut data = input.number(8).to_le_bytes();
    let data = &mut data[..bytes];
    let bar_bytes = driver.function.bars()[0].size_bytes;
    let offset = match input.byte() % 16 {
        0..=4 => windows.common + near % 0x40,
        5 => windows.notify + near,
        6 => windows.device + near,
        7 => windows.msix_table + near,
        8 => input.number(8) % bar_bytes,
        9 | 10 => {
            // Aligned, as the bus guarantees.
            let at = (input.word() % 4096) & !3;
            let bytes = bytes.min(4);
            driver.function.config_write(at, &data[..bytes]);
            driver.function.config_read(at, &mut data[..bytes]);
            return;
        }
        11 => return driver.function.pause(),
        12 => return driver.function.resume(),
        13 => return driver.function.reset(),
        14 => {
            let state = driver.function.state().expect("its workers live");
            let _saved = Saved::of(&state);
            return look(driver);
        }
        _ => {
            let count = driver.num_queues();
            if near & 1 != 0 {
                // An index that may be impossible.
                let index = (near >> 1) as u16 % count;
                let idx = u16::from_le_bytes([data[0], input.byte()]);
                driver.queue(index).set_avail_idx(idx);
            }
            for index in 0..count {
                driver.kick(index);
            }
            return;
        }
    };
    let offset = offset.min(bar_bytes - bytes as u64);
    driver.write(offset, data);
    driver.read(offset, data);
}

/// Reads what the host can.
fn look(driver: &MockPciDriver) {
    let function = &driver.function;
    let _counters = function.counters();
    assert!(!function.id().is_empty());
    assert!(function.device().lock().unpoisoned().device_type() > 0);
    let bar_bytes = function.bars()[0].size_bytes;
    function.with_doorbells(&mut |doorbell| assert!(doorbell.offset < bar_bytes));
}

/// Restores a device from its own state after changes to it; returns whether the device accepted a changed state.
///
/// # Panics
/// A worker of the restored device panics.
#[must_use]
pub fn run_state(bytes: &[u8]) -> bool {
    let mut input = Input(bytes);
    let choice = input.byte();
    let ram = TestRam::new(RAM_BYTES);
    let made = any_device::make(choice, &ram);
    let mut driver = MockPciDriver::new(made.device.clone(), &ram);
    driver.start(u64::MAX);
    for index in 0..driver.num_queues() {
        let queue = driver.queue(index);
        queue.push(&[Segment::Readable(&[0; 16]), Segment::Writable(512)]);
    }
    let (saved, moving) = driver.save();
    let mut changed = serde_json::to_value(&saved).expect("states are JSON");
    for _ in 0..CHANGES_MAX {
        if input.is_empty() {
            break;
        }
        change(&mut changed, || input.byte());
    }
    let Ok(read) = serde_json::from_value::<Saved>(changed) else {
        return false;
    };
    let other = any_device::make(choice, &moving.ram);
    match restore(other.device.clone(), &moving.ram, &read) {
        Ok((function, _)) => {
            function.resume();
            function.pause();
            assert!(function.workers_live(), "a worker has panicked");
            read != saved
        }
        Err(TransportError::State(_)) => false,
        Err(other) => panic!("{other}"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn random_accesses_break_no_device(
            device in 0..any_device::NAMES.len() as u8,
            bytes in proptest::collection::vec(any::<u8>(), 0..900),
        ) {
            let _gave_up = run(&[&[device], bytes.as_slice()].concat());
        }

        #[test]
        fn changed_states_break_no_device(
            device in 0..any_device::NAMES.len() as u8,
            bytes in proptest::collection::vec(any::<u8>(), 0..24),
        ) {
            let _accepted = run_state(&[&[device], bytes.as_slice()].concat());
        }
    }
}
