//! The requirements that every device must meet.

use std::sync::{Arc, Mutex};

use super::conformance_checks::{OFFERED_MAX, RAM_BYTES, assert_alive, used_indices};
use super::driver::MockPciDriver;
use super::queue::{Desc, INDIRECT, NEXT, Segment, WRITE};
use super::ram::TestRam;
use crate::device::VirtioDevice;
use crate::pci::PciFunction;

/// Rounds of random descriptors per queue.
const RANDOM_ROUNDS: usize = 40;
const SEED: u64 = 0x005e_ed0f_600d;

/// The test of one aspect, with a separate device.
type Chapter = fn(&mut MockPciDriver);

/// Runs a device with well-behaved and hostile drivers. `make` is called for each chapter, with the RAM that the device
/// will get at activation. `name` is the name of the samples of its saved state.
///
/// # Panics
/// The device does not conform.
pub fn conformance(name: &str, make: impl Fn(&TestRam) -> Arc<Mutex<dyn VirtioDevice>>) {
    let chapters: [(&str, Chapter); 7] = [
        ("identity", identity_is_virtio),
        ("features", features_are_negotiated_strictly),
        ("configuration", configuration_reads_at_any_width),
        ("activation", starts_resets_and_starts_again),
        ("garbage", survives_garbage_chains),
        ("reset during work", reset_during_work_lets_go),
        ("VM reset and pause", vm_reset_and_pause_work),
    ];
    for (name, chapter) in chapters {
        println!("conformance: {name}");
        let ram = TestRam::new(RAM_BYTES);
        let mut driver = MockPciDriver::new(make(&ram), &ram);
        chapter(&mut driver);
    }
    println!("conformance: turns");
    super::turns::stops_for_commands(&make);
    super::conformance_state::run(name, &make);
    super::conformance_iommu::run(&make);
}

fn identity_is_virtio(driver: &mut MockPciDriver) {
    let device_type = driver
        .function
        .device()
        .lock()
        .expect("device lock is sound")
        .device_type();
    let id = driver.pci_read_u32(0);
    assert_eq!(id & 0xffff, 0x1af4);
    assert_eq!(id >> 16, 0x1040 + device_type);
    // Fails if two counters have the same name.
    assert_eq!(driver.function.counters()["activations"], 0);
    assert_ne!(driver.num_queues(), 0);
}

fn features_are_negotiated_strictly(driver: &mut MockPciDriver) {
    driver.reset();
    let offered = driver.offered();
    let version_1 = 1 << 32;
    assert_ne!(offered & version_1, 0, "VERSION_1 is on offer");
    driver.reset();
    assert!(!driver.try_features(offered & !version_1));
    let not_offered = 1 << (!offered).trailing_zeros();
    driver.reset();
    assert!(!driver.try_features(version_1 | not_offered));
    driver.reset();
    assert!(driver.try_features(version_1));
    driver.reset();
    assert!(driver.try_features(offered));
}

fn configuration_reads_at_any_width(driver: &mut MockPciDriver) {
    driver.start(u64::MAX);
    let mut bytes = [0; 64];
    for (offset, byte) in (0u64..).zip(&mut bytes) {
        driver.device_config(offset, std::slice::from_mut(byte));
    }
    for width in 1..=16 {
        for offset in 0..bytes.len() - width {
            let mut data = vec![0; width];
            driver.device_config(offset as u64, &mut data);
            assert_eq!(data, bytes[offset..offset + width], "{width} at {offset}");
        }
    }
    for offset in [63, 255, 4095, 4096] {
        let mut data = [0; 8];
        driver.device_config(offset, &mut data);
        driver.write_device_config(offset, &[0xa5; 8]);
    }
    {
        // The transport rejects such offsets, so the device is called directly.
        let device = driver.function.device();
        let mut device = device.lock().expect("device lock is sound");
        let mut data = [0xff; 8];
        device.write_config(u64::MAX - 3, &data);
        device.read_config(u64::MAX - 3, &mut data);
        assert_eq!(data, [0; 8]);
    }
    for offset in 0..70 {
        for width in 0..9 {
            driver.write_device_config(offset, &vec![0xff; width]);
        }
    }
    assert_alive(driver);
}

fn starts_resets_and_starts_again(driver: &mut MockPciDriver) {
    for wanted in [u64::MAX, 0, u64::MAX] {
        let accepted = driver.start(wanted);
        assert_eq!(accepted & !(wanted | 1 << 32), 0);
        for index in 0..driver.num_queues() {
            driver.kick(index);
        }
    }
    assert_alive(driver);
}

fn survives_garbage_chains(driver: &mut MockPciDriver) {
    let queues = driver.num_queues();
    for (name, garbage) in garbage_chains() {
        driver.start(u64::MAX);
        for index in 0..queues {
            if driver.queue(index).size() < 4 {
                continue;
            }
            driver.queue(index).push_raw(&garbage);
            // A valid chain after the invalid one.
            driver.queue(index).push(&[Segment::Writable(8)]);
            driver.kick(index);
        }
        println!("  {name}");
        assert_alive(driver);
    }
    let mut random = Random(SEED);
    for round in 0..RANDOM_ROUNDS {
        driver.start(if round % 2 == 0 { u64::MAX } else { 0 });
        for index in 0..queues {
            push_random(driver, index, &mut random);
            driver.kick(index);
        }
        assert_alive(driver);
    }
    for wrong_idx in [1, 300, 40_000, u16::MAX] {
        driver.start(u64::MAX);
        for index in 0..queues {
            driver.queue(index).set_avail_idx(wrong_idx);
            driver.kick(index);
        }
        assert_alive(driver);
    }
}

fn reset_during_work_lets_go(driver: &mut MockPciDriver) {
    for _ in 0..8 {
        driver.start(u64::MAX);
        for index in 0..driver.num_queues() {
            let queue = driver.queue(index);
            for _ in 0..queue.size() / 2 {
                queue.push(&[Segment::Readable(&[0; 16]), Segment::Writable(512)]);
            }
            driver.kick(index);
        }
        driver.set_status(0);
        super::wait_until("the reset", || driver.status() == 0);
        let seen: Vec<u16> = used_indices(driver);
        // Released memory is no longer accessed, with or without kicks.
        for index in 0..driver.num_queues() {
            driver.kick(index);
        }
        driver.function.pause();
        assert_eq!(used_indices(driver), seen);
        driver.function.resume();
    }
    assert_alive(driver);
}

fn vm_reset_and_pause_work(driver: &mut MockPciDriver) {
    driver.start(u64::MAX);
    driver.function.pause();
    driver.function.resume();
    driver.function.pause();
    driver.function.reset();
    driver.function.resume();
    assert_eq!(driver.status(), 0);
    assert!(!driver.function.bars()[0].decoded);
    driver.set_up_pci();
    assert_alive(driver);
}

fn garbage_chains() -> Vec<(&'static str, Vec<Desc>)> {
    let desc = |addr, len, flags, next| Desc {
        addr,
        len,
        flags,
        next,
    };
    let inside = RAM_BYTES as u64 / 2;
    let outside = RAM_BYTES as u64 + 0x1000;
    vec![
        (
            "a loop of two",
            vec![desc(inside, 16, NEXT, 1), desc(inside, 16, NEXT, 0)],
        ),
        ("a writable loop", vec![desc(inside, 16, NEXT | WRITE, 0)]),
        (
            "next outside of the table",
            vec![desc(inside, 16, NEXT, 0xfff0)],
        ),
        ("address outside of RAM", vec![desc(outside, 16, 0, 0)]),
        ("writable outside of RAM", vec![desc(outside, 16, WRITE, 0)]),
        ("address that wraps", vec![desc(u64::MAX - 4, 64, WRITE, 0)]),
        (
            "over the end of RAM",
            vec![desc(RAM_BYTES as u64 - 8, 4096, WRITE, 0)],
        ),
        ("longest length", vec![desc(inside, u32::MAX, 0, 0)]),
        (
            "longest writable length",
            vec![desc(inside, u32::MAX, WRITE, 0)],
        ),
        ("empty", vec![desc(inside, 0, 0, 0)]),
        ("empty and writable", vec![desc(inside, 0, WRITE, 0)]),
        ("odd length", vec![desc(inside + 1, 7, 0, 0)]),
        (
            "readable after writable",
            vec![desc(inside, 16, NEXT | WRITE, 1), desc(inside, 16, 0, 0)],
        ),
        (
            "indirect outside of RAM",
            vec![desc(outside, 32, INDIRECT, 0)],
        ),
        (
            "indirect of odd length",
            vec![desc(inside, 17, INDIRECT, 0)],
        ),
        ("indirect and empty", vec![desc(inside, 0, INDIRECT, 0)]),
        (
            "indirect into zeroes",
            vec![desc(inside, 4096, INDIRECT, 0)],
        ),
        (
            "indirect with next",
            vec![desc(inside, 64, INDIRECT | NEXT, 0)],
        ),
        ("all flags", vec![desc(inside, 64, u16::MAX, 0)]),
    ]
}

fn push_random(driver: &mut MockPciDriver, index: u16, random: &mut Random) {
    let queue = driver.queue(index);
    let size = queue.size();
    for slot in 0..size {
        queue.write_desc(slot, random.desc());
    }
    for _ in 0..size.min(OFFERED_MAX) {
        queue.offer((random.next() % (u64::from(size) * 2)) as u16);
    }
}

/// xorshift64*: the same garbage in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }

    fn desc(&mut self) -> Desc {
        let inside = self.next() % (RAM_BYTES as u64 * 2);
        Desc {
            addr: if self.next().is_multiple_of(8) {
                self.next() << 8
            } else {
                inside
            },
            len: match self.next() % 4 {
                0 => self.next() as u32,
                1 => 4096,
                2 => 16,
                _ => self.next() as u32 % 8192,
            },
            flags: self.next() as u16 % 8,
            next: self.next() as u16 % 64,
        }
    }
}
