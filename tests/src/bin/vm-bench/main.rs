//! The VMM's own figures with a real Linux guest: memory beside the guest's,
//! start to the guest's init, return of freed memory, latency of the API.
//!
//! Runs where KVM boots Linux: `cargo xtask testbed run -- …/vm-bench`; with
//! `--icount` the times are counted instructions and repeat.
//! Prints one JSON object a figure.

mod guest_overhead;
mod reclaim;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use integration_tests::linux::Machine;
use integration_tests::literal_client::request;
use integration_tests::mappings::{Mapping, beside_guest_ram};
use integration_tests::paths;
use integration_tests::vmm::Vmm;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// Starts measured, to show that they agree.
const STARTS: usize = 3;
/// Requests for the latency distribution.
const REQUESTS: usize = 500;
const GUEST_BYTES: u64 = 512 * MIB;

/// Name and measurement.
type Bench = (&'static str, fn() -> Result<Value>);

fn main() -> Result<()> {
    let chosen: Vec<String> = std::env::args().skip(1).collect();
    let all: [Bench; 5] = [
        ("overhead", overhead),
        ("start", start),
        (reclaim::NAME, reclaim::run),
        ("api", api),
        (guest_overhead::NAME, guest_overhead::run),
    ];
    for (name, bench) in all {
        // Minutes, so only when it is asked for.
        let everyday = name != guest_overhead::NAME;
        if (chosen.is_empty() && everyday) || chosen.iter().any(|choice| choice == name) {
            let figures = bench().with_context(|| name.to_owned())?;
            println!("{}", json!({ name: figures }));
        }
    }
    Ok(())
}

/// Balloon, disk and net, as the idle machine of the comparison has them.
fn full_machine(disk: &str) -> Vec<String> {
    [
        "--balloon",
        "size=0,free_page_reporting=on",
        "--disk",
        disk,
        "--net",
        "tap=vmbench0",
    ]
    .map(String::from)
    .to_vec()
}

fn disk_image() -> Result<(tempfile::TempDir, String)> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk.raw");
    File::create(&path)?.set_len(64 * MIB)?;
    let option = format!("path={},image_type=raw", path.display());
    Ok((folder, option))
}

/// Resident memory of the VMM outside of guest RAM, with the guest idle.
fn overhead() -> Result<Value> {
    let (_folder, disk) = disk_image()?;
    let arguments = full_machine(&disk);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let guest = Machine {
        arguments: &arguments,
        ..Machine::default()
    }
    .serve()?;
    let maps = beside_guest_ram(guest.vmm.pid(), GUEST_BYTES)?;
    let sum = |field: fn(&Mapping) -> u64| -> u64 { maps.iter().map(field).sum() };
    let mut largest: Vec<&Mapping> = maps.iter().collect();
    largest.sort_by_key(|map| std::cmp::Reverse(map.anonymous));
    let largest: Vec<Value> = largest
        .iter()
        .take(6)
        .map(|map| json!({ "name": map.name, "anonymous_bytes": map.anonymous }))
        .collect();
    Ok(json!({
        "resident_bytes": sum(|map| map.resident),
        "anonymous_bytes": sum(|map| map.anonymous),
        "largest_anonymous": largest,
    }))
}

/// Kills the VMM when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Already ended is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// From the start of the process to the guest's init, several times.
fn start() -> Result<Value> {
    let (folder, disk) = disk_image()?;
    let socket = folder.path().join("api.sock");
    let machine = Machine {
        script: "true",
        end: "stay",
        ..Machine::default()
    };
    let mut times_ms = Vec::new();
    for _ in 0..STARTS {
        let begin = Instant::now();
        let mut child = Running(
            Command::new(paths::program("cloud-hypervisor")?)
                .arg("--api-socket")
                .arg(&socket)
                .arg("--kernel")
                .arg(paths::guest("vmlinux")?)
                .arg("--initramfs")
                .arg(paths::guest("initramfs.cpio.gz")?)
                .args(["--cmdline", &machine.full_command_line()])
                .args([
                    "--memory",
                    "size=512M",
                    "--serial",
                    "tty",
                    "--console",
                    "off",
                ])
                .args([
                    "--balloon",
                    "size=0,free_page_reporting=on",
                    "--disk",
                    &disk,
                ])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()?,
        );
        let output = child.0.stdout.take().context("no pipe")?;
        let seen = BufReader::new(output)
            .lines()
            .map_while(Result::ok)
            .find(|line| line.contains("guest: init"));
        times_ms.push(begin.elapsed().as_secs_f64() * 1000.0);
        ensure!(seen.is_some(), "the guest did not reach its init");
        drop(child);
        // Killed, it could not remove its socket; the next one takes it over.
    }
    times_ms.sort_by(f64::total_cmp);
    Ok(json!({ "to_init_ms_median": times_ms[STARTS / 2], "to_init_ms": times_ms }))
}

/// `vm.info` while somebody waits for a guest that never answers.
fn api() -> Result<Value> {
    let guest = Machine {
        arguments: &["--balloon", "size=0,free_page_reporting=on"],
        ..Machine::default()
    }
    .serve()?;
    guest.vmm.put("vm.pause", None)?;
    let paused = latency(&guest.vmm)?;
    Ok(json!({ "vm_info_us": paused }))
}

fn latency(vmm: &Vmm) -> Result<Value> {
    let socket = vmm.socket();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let begin = Instant::now();
            // Its answer is an error: the guest is paused. Only the wait counts.
            let answer = request(&socket, "GET", "vm.balloon-stats", None);
            (answer.is_ok(), begin.elapsed())
        });
        let mut times_us: Vec<u64> = Vec::with_capacity(REQUESTS);
        for _ in 0..REQUESTS {
            let begin = Instant::now();
            let answer = request(&socket, "GET", "vm.info", None)?;
            ensure!(answer.status == 200, "{answer:?}");
            times_us.push(begin.elapsed().as_micros() as u64);
        }
        let Ok((answered, waited)) = waiting.join() else {
            bail!("the waiting thread panicked");
        };
        ensure!(answered, "vm.balloon-stats got no answer at all");
        times_us.sort_unstable();
        Ok(json!({
            "p50": times_us[REQUESTS / 2],
            "p99": times_us[REQUESTS * 99 / 100],
            "max": times_us[REQUESTS - 1],
            "balloon_stats_answered_after_ms": waited.as_millis() as u64,
        }))
    })
}
