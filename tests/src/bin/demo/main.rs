//! Demonstrates the main function: a Linux guest touches memory and frees it, the memory returns to the host, and the
//! REST API shows it.
//!
//! Runs where KVM boots Linux: `cargo xtask demo` starts it in the testbed with
//! the folder for its results as the only argument; `demo --fleet PORT [keep | until FILE]` is the fleet's.

mod chart;
mod fleet;
mod recording;
mod screen;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use fleet::Then;
use integration_tests::MIB;
use integration_tests::linux::{Guest, Machine};
use integration_tests::paths;
use integration_tests::vmm::Vmm;
use recording::{Phase, Recording, Sample};
use screen::Screen;

/// Memory of the guest, and memory that it touches and frees.
const GUEST_BYTES: u64 = 1024 * MIB;
const TOUCH_BYTES: u64 = 700 * MIB;
/// Interval between two samples of the API.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(200);
/// How long the guest is sampled while nothing changes, before the touch and before the free.
const CALM: Duration = Duration::from_secs(1);
/// Mainline's reporting works every two seconds: if nothing changes for longer than that, it has finished.
const SETTLED: Duration = Duration::from_secs(4);
/// If at most this much more is resident than before the touch, nearly everything has returned, and the wait ends.
const REST_BYTES: u64 = TOUCH_BYTES / 20;
/// Time after which the demonstration ends, settled or not.
const SETTLE_DEADLINE: Duration = Duration::from_secs(90);
/// Smaller changes of residency are the guest's own activity.
const NOISE_BYTES: u64 = 2 * MIB;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["--fleet", port] => fleet::run(port, Then::End),
        ["--fleet", port, "keep"] => fleet::run(port, Then::Keep),
        ["--fleet", port, "until", file] => fleet::run(port, Then::Until(file.as_ref())),
        [folder] => one_guest(folder.as_ref()),
        _ => bail!("usage: demo FOLDER, or demo --fleet PORT [keep | until FILE]"),
    }
}

fn one_guest(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;

    // Set by the testbed's --kernel.
    let patched = paths::guest_kernel_is_patched();
    let kind = if patched {
        "a Linux kernel with our patches"
    } else if paths::guest_kernel_is_debian() {
        "Debian's Linux kernel for cloud guests"
    } else {
        "an unmodified Linux kernel"
    };
    println!("Booting {kind} with 1 GiB and a balloon that accepts reports …");
    let mut guest = Machine {
        memory: "size=1G",
        cpus: "boot=2",
        arguments: &["--balloon", "size=0,free_page_reporting=on"],
        ..Machine::default()
    }
    .serve()?;

    let mut monitor = Monitor {
        recording: Recording::new(GUEST_BYTES),
        screen: Screen::new(),
    };
    let before = monitor.watch(&guest, Phase::Idle, CALM)?;
    monitor
        .screen
        .headline(&format!("The guest touches {} MiB:", TOUCH_BYTES / MIB));
    monitor.touch(&mut guest)?;
    monitor.watch(&guest, Phase::Touched, CALM)?;
    monitor.screen.headline("The guest frees them:");
    guest.command("free")?;
    monitor.recording.freed();
    monitor.settle(&guest, before)?;
    monitor.screen.end();

    let recording = monitor.recording;
    let result = recording.result()?;
    fs::write(folder.join("demo.json"), recording.to_json(&result)?)?;
    fs::write(folder.join("demo.svg"), chart::svg(&recording, &result))?;
    guest.end()?;
    println!("{}", result.sentence());
    Ok(())
}

/// The samples, and their display.
struct Monitor {
    recording: Recording,
    screen: Screen,
}

impl Monitor {
    /// Samples the API once and shows the sample.
    fn sample(&mut self, vmm: &Vmm, phase: Phase) -> Result<Sample> {
        let stats = vmm.get("vm.reclaim-stats")?;
        let sample = self.recording.add(phase, &stats, vmm.resident_bytes()?)?;
        self.screen.sample(&sample, GUEST_BYTES);
        Ok(sample)
    }

    /// Samples for this time; returns the residency at its end.
    fn watch(&mut self, guest: &Guest, phase: Phase, time: Duration) -> Result<u64> {
        let start = Instant::now();
        loop {
            let sample = self.sample(&guest.vmm, phase)?;
            if start.elapsed() >= time {
                return Ok(sample.resident_bytes);
            }
            std::thread::park_timeout(SAMPLE_INTERVAL);
        }
    }

    /// Samples the API while the guest touches memory.
    fn touch(&mut self, guest: &mut Guest) -> Result<()> {
        let Guest { vmm, serial } = guest;
        std::thread::scope(|scope| {
            let touching = scope.spawn(|| -> Result<String> {
                serial.send(&format!("alloc {TOUCH_BYTES}"))?;
                serial.expect("ok alloc", Duration::from_secs(120))
            });
            while !touching.is_finished() {
                self.sample(vmm, Phase::Touching)?;
                std::thread::park_timeout(SAMPLE_INTERVAL);
            }
            match touching.join() {
                Ok(answer) => answer.map(drop),
                Err(_) => bail!("the thread that talks to the guest panicked"),
            }
        })
    }

    /// Samples until residency has not fallen for a while, or is nearly as low as `before` the touch.
    fn settle(&mut self, guest: &Guest, before: u64) -> Result<()> {
        let start = Instant::now();
        let (mut lowest, mut lowest_at) = (u64::MAX, Instant::now());
        while start.elapsed() < SETTLE_DEADLINE {
            let sample = self.sample(&guest.vmm, Phase::Freed)?;
            if sample.resident_bytes + NOISE_BYTES < lowest {
                (lowest, lowest_at) = (sample.resident_bytes, Instant::now());
            } else if sample.discarded_bytes > 0 {
                let nearly_all = lowest <= before + REST_BYTES;
                let enough = if nearly_all { CALM } else { SETTLED };
                if lowest_at.elapsed() > enough {
                    return Ok(());
                }
            }
            std::thread::park_timeout(SAMPLE_INTERVAL);
        }
        Ok(())
    }
}
