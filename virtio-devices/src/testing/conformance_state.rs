//! Saves a device and continues it elsewhere: idle, during work, from old states, and from invalid states.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use state::{Saved, State, testing};

use super::conformance_checks::{RAM_BYTES, assert_alive, settle, used_indices};
use super::driver::{MockPciDriver, restore};
use super::queue::Segment;
use super::ram::TestRam;
use crate::device::VirtioDevice;
use crate::pci::PciFunction;
use crate::transport::{TransportError, VirtioPciState};

/// Environment variable: write a sample of the current versions if there is none yet.
const WRITE_SAMPLES: &str = "WRITE_STATE_SAMPLES";
/// Number of times all queues are kicked; enough to complete work of this size.
const SETTLE_ROUNDS: usize = 8;

type Make<'a> = &'a dyn Fn(&TestRam) -> Arc<Mutex<dyn VirtioDevice>>;

/// All chapters.
pub(super) fn run(name: &str, make: Make<'_>) {
    for (what, load) in [("idle", Load::None), ("at work", Load::All)] {
        println!("conformance: saved {what}, twice");
        saved_twice_does_the_same_work(make, load);
    }
    println!("conformance: saved after a reset and before a driver");
    saved_without_driver_is_found_by_one(make);
    println!("conformance: samples of saved states");
    samples_are_readable(name, make);
    println!("conformance: damaged states");
    damaged_states_are_refused_or_work(make);
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Load {
    None,
    All,
}

fn started(make: Make<'_>) -> MockPciDriver {
    let ram = TestRam::new(RAM_BYTES);
    let mut driver = MockPciDriver::new(make(&ram), &ram);
    driver.start(u64::MAX);
    driver
}

/// Submits requests on every queue, half of them without a kick.
fn work(driver: &mut MockPciDriver, load: Load) {
    if load == Load::None {
        return;
    }
    for index in 0..driver.num_queues() {
        for rung in [true, false] {
            let queue = driver.queue(index);
            for _ in 0..queue.size() / 8 {
                queue.push(&[Segment::Readable(&[0; 16]), Segment::Writable(512)]);
            }
            if rung {
                driver.kick(index);
            }
        }
    }
}

/// The used indices of a device that does the work without being saved.
fn used_without_saving(make: Make<'_>, load: Load) -> Vec<u16> {
    let mut driver = started(make);
    work(&mut driver, load);
    for _ in 0..SETTLE_ROUNDS {
        settle(&driver);
    }
    used_indices(&mut driver)
}

fn saved_twice_does_the_same_work(make: Make<'_>, load: Load) {
    let expected = used_without_saving(make, load);
    let mut driver = started(make);
    work(&mut driver, load);
    for _ in 0..2 {
        driver = moved(driver, make);
        driver.function.resume();
        // The interrupt for work that was done before may have been lost.
        for index in 0..driver.num_queues() {
            driver.vectors.wait_triggered(index + 1, 1);
        }
    }
    let end = Instant::now() + super::DEADLINE;
    while used_indices(&mut driver) != expected && Instant::now() < end {
        std::thread::yield_now();
    }
    assert_eq!(used_indices(&mut driver), expected, "used entries a queue");
    assert!(!driver.needs_reset());
    assert_alive(&mut driver);
}

/// Saves, serialises, deserialises and restores; checks that the paused function is then identical in every field.
fn moved(driver: MockPciDriver, make: Make<'_>) -> MockPciDriver {
    let (saved, moving) = driver.save();
    let text = serde_json::to_string(&saved).expect("states are JSON");
    let read: Saved = serde_json::from_str(&text).expect("just written");
    let device = make(&moving.ram);
    let driver = moving.restore(device, &read).expect("state is sound");
    assert_eq!(
        Saved::of(&driver.function.state().expect("the workers run")),
        saved
    );
    driver
}

fn saved_without_driver_is_found_by_one(make: Make<'_>) {
    let mut driver = started(make);
    driver.reset();
    driver = moved(driver, make);
    driver.function.resume();
    assert_eq!(driver.status(), 0);
    assert_alive(&mut driver);
    // The driver requested a reset that could not be finished yet.
    driver.start(u64::MAX);
    driver.function.pause();
    driver.set_status(0);
    driver = moved(driver, make);
    driver.function.resume();
    assert_eq!(driver.status(), 0);
    assert_alive(&mut driver);
}

fn samples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/testing/samples")
}

/// Checks that every committed sample can be read, and that the newest equals the current output: a state of another
/// structure needs a new version, see `docs/state.md`.
fn samples_are_readable(name: &str, make: Make<'_>) {
    let today = Saved::of(
        &started(make)
            .save()
            .0
            .read::<VirtioPciState>()
            .expect("own state"),
    );
    let mut ordinal = 0;
    let mut newest = None;
    loop {
        let path = samples().join(format!("{name}-{}.json", ordinal + 1));
        let Ok(text) = fs::read_to_string(&path) else {
            break;
        };
        ordinal += 1;
        let sample: Saved = serde_json::from_str(&text).expect("samples are JSON");
        let ram = TestRam::new(RAM_BYTES);
        let (function, vectors) = restore(make(&ram), &ram, &sample)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        newest = Some(Saved::of(&function.state().expect("the workers run")));
        function.resume();
        let mut driver = MockPciDriver::probe(function, vectors, &ram);
        assert_alive(&mut driver);
        assert!(
            sample.read::<VirtioPciState>().is_ok(),
            "{}",
            VirtioPciState::PART.name
        );
        if newest.as_ref() == Some(&sample) && sample == today {
            return;
        }
    }
    if std::env::var_os(WRITE_SAMPLES).is_some() {
        let path = samples().join(format!("{name}-{}.json", ordinal + 1));
        let text = serde_json::to_string_pretty(&today).expect("states are JSON");
        fs::write(&path, text + "\n").expect("samples can be written");
        return;
    }
    panic!(
        "no sample of {name} has the shape that is written today: give what has changed another \
         version, then add a sample with {WRITE_SAMPLES}=1. Newest sample: {newest:?}, today: {today:?}"
    );
}

fn damaged_states_are_refused_or_work(make: Make<'_>) {
    let mut driver = started(make);
    work(&mut driver, Load::All);
    let (saved, moving) = driver.save();
    let mut refused = 0;
    let count = testing::damage(&saved, |damaged| {
        match restore(make(&moving.ram), &moving.ram, damaged) {
            Ok((function, _)) => {
                function.resume();
                function.pause();
                assert!(function.workers_live(), "a worker panicked on {damaged:?}");
            }
            Err(TransportError::State(_)) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    });
    println!("  {refused} of {count} refused");
    assert!(refused > count / 2, "{refused} of {count}");
}
