//! Tests with back ends that serve, disconnect and reconnect.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{GuestAddress, GuestAddressSpace};

use super::back_end::{About, BackEnd};
use super::{QUEUES, RAM_BYTES, REQUESTS, Rig, device, region};
use crate::pci::PciFunction;
use crate::reclaim::{DiscardEngine, Expected, GuestRange};
use crate::testing::{Chain, Segment};

const WORDS: &[u8] = b"read me back";

fn ask(rig: &mut Rig, queue: u16) -> Chain {
    let segments = [Segment::Readable(WORDS), Segment::Writable(64)];
    let chain = rig.driver.queue(queue).push(&segments);
    rig.driver.kick(queue);
    chain
}

fn expect_answer(rig: &mut Rig, queue: u16, chain: &Chain) {
    let used = rig.driver.queue(queue).wait_used();
    assert_eq!(used.head, u32::from(chain.head));
    assert_eq!(used.len, WORDS.len() as u32);
    let answer = rig.driver.queue(queue).read_buffer(chain.buffers[1]);
    assert_eq!(&answer[..WORDS.len()], WORDS);
}

#[test]
fn back_end_serves_every_queue_and_interrupts() {
    let mut rig = Rig::new();
    let _back_end = BackEnd::start(&rig.socket(), QUEUES);
    rig.wait_until_served();
    for queue in 0..QUEUES as u16 {
        let before = rig.driver.vectors.triggered(queue + 1);
        let chain = ask(&mut rig, queue);
        expect_answer(&mut rig, queue, &chain);
        rig.driver.vectors.wait_triggered(queue + 1, before + 1);
    }
    let mut config = [0; 40];
    rig.driver.device_config(0, &mut config);
    assert_eq!(&config[..7], b"folder\0");
    assert_eq!(config[36..], 1u32.to_le_bytes());
    assert_eq!(rig.count("protocol_errors"), 0);
}

#[test]
fn request_made_before_there_is_a_back_end_is_served_by_it() {
    let mut rig = Rig::new();
    let chain = ask(&mut rig, REQUESTS);
    let _back_end = BackEnd::start(&rig.socket(), QUEUES);
    expect_answer(&mut rig, REQUESTS, &chain);
}

#[test]
fn request_that_a_killed_back_end_held_is_served_by_its_successor() {
    let mut rig = Rig::new();
    for round in 1..=3 {
        let back_end = BackEnd::start(&rig.socket(), QUEUES);
        rig.wait_for("connections", round);
        rig.wait_until_served();
        let chain = ask(&mut rig, REQUESTS);
        expect_answer(&mut rig, REQUESTS, &chain);
        back_end.idle.store(true, Ordering::SeqCst);
        let held = ask(&mut rig, REQUESTS);
        back_end.kill();
        rig.wait_for("connections_lost", 2 * round - 1);
        assert_eq!(rig.driver.queue(REQUESTS).pop_used(), None);
        let back_end = BackEnd::start(&rig.socket(), QUEUES);
        expect_answer(&mut rig, REQUESTS, &held);
        back_end.kill();
        rig.wait_for("connections_lost", 2 * round);
    }
    assert!(!rig.driver.needs_reset());
}

#[test]
fn driver_that_starts_again_uses_the_same_connection() {
    let mut rig = Rig::new();
    let _back_end = BackEnd::start(&rig.socket(), QUEUES);
    for _ in 0..3 {
        rig.wait_until_served();
        let chain = ask(&mut rig, REQUESTS);
        expect_answer(&mut rig, REQUESTS, &chain);
        rig.driver.reset();
        assert_eq!(rig.count("serving"), 0);
        rig.driver.start(u64::MAX);
    }
    rig.wait_until_served();
    assert_eq!(rig.count("connections"), 1);
    assert_eq!(rig.count("rings_taken_away"), 0);
}

#[test]
fn paused_device_serves_nothing_and_continues() {
    let mut rig = Rig::new();
    let _back_end = BackEnd::start(&rig.socket(), QUEUES);
    rig.wait_until_served();
    for _ in 0..20 {
        rig.driver.function.pause();
        assert_eq!(rig.count("serving"), 0);
        let chain = ask(&mut rig, REQUESTS);
        assert_eq!(rig.driver.queue(REQUESTS).pop_used(), None);
        rig.driver.function.resume();
        expect_answer(&mut rig, REQUESTS, &chain);
    }
    assert_eq!(rig.count("connections"), 1);
}

#[test]
fn saved_device_continues_with_another_back_end() {
    let mut rig = Rig::new();
    let back_end = BackEnd::start(&rig.socket(), QUEUES);
    rig.wait_until_served();
    let chain = ask(&mut rig, REQUESTS);
    expect_answer(&mut rig, REQUESTS, &chain);
    back_end.idle.store(true, Ordering::SeqCst);
    let held = ask(&mut rig, REQUESTS);
    let socket = rig.folder.path().join("other");
    let Rig { folder, driver } = rig;
    let (saved, moving) = driver.save();
    let driver = moving.restore(device(&socket), &saved).unwrap();
    let mut rig = Rig { folder, driver };
    let _back_end = BackEnd::start(&socket, QUEUES);
    rig.driver.function.resume();
    expect_answer(&mut rig, REQUESTS, &held);
}

/// Memory devices are added while the queues stand still.
#[test]
fn memory_added_to_the_guest_is_the_back_ends_when_its_queues_start_again() {
    for takes_single_regions in [true, false] {
        let mut rig = Rig::new();
        let about = About {
            takes_single_regions,
            ..About::default()
        };
        let _back_end = BackEnd::start_as(&rig.socket(), QUEUES, about);
        rig.wait_until_served();
        for number in 1..=3 {
            let start = GuestAddress(number * RAM_BYTES as u64 * 2);
            rig.driver.function.pause();
            let ram = rig.driver.ram.mem();
            let grown = ram.memory().insert_region(region(start));
            ram.lock().unwrap().replace(grown.unwrap());
            rig.driver.function.resume();
            rig.driver.ram.write(start, WORDS);
            let segments = [
                Segment::ReadableAt(start, WORDS.len() as u32),
                Segment::Writable(64),
            ];
            let chain = rig.driver.queue(REQUESTS).push(&segments);
            rig.driver.kick(REQUESTS);
            expect_answer(&mut rig, REQUESTS, &chain);
        }
        assert_eq!(rig.count("connections"), 1);
        assert_eq!(rig.count("protocol_errors"), 0);
    }
}

/// A balloon discards pages while the back end has them mapped.
#[test]
fn discarded_memory_is_gone_for_the_back_end() {
    const PAGE_BYTES: u64 = 4096;
    let mut rig = Rig::new();
    let _back_end = BackEnd::start(&rig.socket(), QUEUES);
    rig.wait_until_served();
    let page = rig.driver.ram.alloc(PAGE_BYTES, PAGE_BYTES);
    rig.driver.ram.write(page, &[0xa5; 64]);
    for expected in [0xa5, 0] {
        let segments = [Segment::ReadableAt(page, 64), Segment::Writable(64)];
        let chain = rig.driver.queue(REQUESTS).push(&segments);
        rig.driver.kick(REQUESTS);
        assert_eq!(rig.driver.queue(REQUESTS).wait_used().len, 64);
        let seen = rig.driver.queue(REQUESTS).read_buffer(chain.buffers[1]);
        assert_eq!(seen, vec![expected; 64]);
        let range = GuestRange {
            start: page.0,
            bytes: PAGE_BYTES,
        };
        let mem = rig.driver.ram.mem();
        let mut engine = DiscardEngine::new(Arc::default());
        let outcome = engine.discard(&mem, &mut [range], Expected::Anything);
        assert_eq!(outcome.discarded.bytes, PAGE_BYTES);
    }
}
