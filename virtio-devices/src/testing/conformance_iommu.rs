//! The requirements that every device behind an IOMMU must meet.

use std::sync::{Arc, Mutex};

use vm_memory::Permissions;

use super::conformance_checks::{RAM_BYTES, assert_alive, settle, used_indices};
use super::driver::MockPciDriver;
use super::queue::Segment;
use super::ram::TestRam;
use crate::device::VirtioDevice;
use crate::dma::{DmaEndpoint, Refusal, Shared, Tables};
use crate::pci::PciFunction;

/// The endpoint and its domain.
const ENDPOINT: u32 = 0x18;

/// Takes memory away from the device.
type Removal = fn(&mut Tables) -> Result<(), Refusal>;

/// Runs a device whose driver takes memory away while buffers of every queue are with the device.
pub(super) fn run(make: impl Fn(&TestRam) -> Arc<Mutex<dyn VirtioDevice>>) {
    let removals: [(&str, Removal); 3] = [
        ("unmap", |tables| tables.unmap(ENDPOINT, 0..=u64::MAX)),
        ("detach", |tables| tables.detach(ENDPOINT, ENDPOINT)),
        ("move", |tables| tables.attach(2, ENDPOINT, false)),
    ];
    for (name, removal) in removals {
        println!("conformance: behind an IOMMU: {name}");
        let shared = Arc::new(Shared::new(u64::MAX).expect("descriptors"));
        shared.set_bypass(false);
        let endpoint = Arc::new(DmaEndpoint::new(Arc::clone(&shared), None));
        endpoint.place(ENDPOINT);
        shared.change(map_all);
        let ram = TestRam::new(RAM_BYTES);
        let mut driver = MockPciDriver::behind(Some(endpoint), make(&ram), &ram);
        removal_ends_all_access(&mut driver, &shared, removal);
        shared.change(|tables| {
            tables.clear();
            map_all(tables);
        });
        assert_alive(&mut driver);
    }
}

fn map_all(tables: &mut Tables) {
    let both = Permissions::ReadWrite;
    let mapped = tables
        .attach(ENDPOINT, ENDPOINT, false)
        .and_then(|()| tables.map(ENDPOINT, 0..=RAM_BYTES as u64 - 1, 0, both));
    mapped.expect("a sound mapping");
}

fn removal_ends_all_access(driver: &mut MockPciDriver, shared: &Arc<Shared>, removal: Removal) {
    driver.start(u64::MAX);
    for index in 0..driver.num_queues() {
        let queue = driver.queue(index);
        for _ in 0..queue.size() / 2 {
            queue.push(&[Segment::Writable(4096)]);
        }
        driver.kick(index);
    }
    // Idle, with what it keeps of the buffers; or in the middle of its work.
    settle(driver);
    for index in 0..driver.num_queues() {
        let queue = driver.queue(index);
        for _ in 0..queue.size() / 4 {
            queue.push(&[Segment::Readable(&[0; 16]), Segment::Writable(4096)]);
        }
        driver.kick(index);
    }
    std::thread::scope(|scope| {
        let answer = scope.spawn(|| shared.change_and_wait(removal));
        super::wait_until("the answer to the IOMMU's driver", || answer.is_finished());
        answer.join().expect("no panic").expect("a sound request");
    });
    let seen: Vec<u16> = used_indices(driver);
    for index in 0..driver.num_queues() {
        driver.kick(index);
    }
    driver.function.pause();
    assert_eq!(used_indices(driver), seen, "access after the answer");
    driver.function.resume();
}
