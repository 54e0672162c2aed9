//! Inflates a balloon in a guest with mainline's driver and in one with the driver that inflates by blocks.
//!
//! `cargo xtask bench --kernel inflation inflation`. The host has backed all of the guest's free memory with huge pages.
//! In one case, that memory is free in large blocks. In the other case, it is free in blocks of 64 KiB.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::linux::{Guest, Machine};
use integration_tests::wait::wait_for;
use serde_json::{Map, Value, json};

use crate::compare::rounded;
use crate::cost::Cost;
use crate::options::Asked;

/// Its name on the command line.
pub(crate) const NAME: &str = "inflation";

/// Kernels of the guests.
const DRIVERS: [(&str, &str); 2] = [
    ("mainline", "debian/vmlinux"),
    ("blocks", "inflation/vmlinux"),
];
const ROUNDS: usize = 2;
const GUEST_BYTES: u64 = 512 * MIB;
/// Memory that a program in the guest touches before each inflation.
const TOUCHED_BYTES: u64 = 384 * MIB;
/// Interval between two looks at the balloon's size: each one delays the guest on a host with one processor.
const INTERVAL: Duration = Duration::from_millis(50);
/// Time for the guest to touch its memory in small pages, on a busy emulated host.
const DEADLINE: Duration = Duration::from_secs(900);
/// Orders of the guest's free blocks from 2 MiB on.
const LARGE_ORDERS: [u32; 2] = [9, 10];
const PAGE_BYTES: u64 = 4096;

/// State of the guest's memory when the host requests some of it.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    /// Whether the guest's program uses huge pages.
    huge: &'static str,
    /// The part of its memory that the program frees: all, or every other block of this size.
    freed: &'static str,
    /// The balloon's size.
    inflated_bytes: u64,
}

const CASES: [Case; 2] = [
    Case {
        name: "large blocks are free",
        huge: "always",
        freed: "all",
        inflated_bytes: 320 * MIB,
    },
    Case {
        name: "only 64 KiB blocks are free",
        huge: "never",
        freed: "64K",
        inflated_bytes: 160 * MIB,
    },
];

/// The host's memory at one moment.
struct Host {
    free_bytes: u64,
    resident_bytes: u64,
    huge_bytes: u64,
}

/// All rounds of all cases with both drivers.
pub(crate) fn run(asked: &Asked<'_>) -> Result<Value> {
    asked.refuse_options()?;
    let mut rows = Map::new();
    for case in CASES {
        for (driver, kernel) in DRIVERS {
            let mut guest = Machine {
                kernel,
                memory: "size=512M,thp=on",
                arguments: &["--balloon", "size=0"],
                ..Machine::default()
            }
            .serve()?;
            let line = format!("alloc {TOUCHED_BYTES} huge={}", case.huge);
            eprintln!("{}, {driver}: touching memory", case.name);
            let id = number(&guest.command_within(&line, DEADLINE)?, 2)?;
            let mut rounds = Vec::new();
            for _ in 0..ROUNDS {
                let round = round(&mut guest, case, id)?;
                eprintln!("{}, {driver}: {round}", case.name);
                rounds.push(round);
            }
            // Memory in use must not have been returned.
            guest.command_within(&format!("verify {id}"), DEADLINE)?;
            rows.insert(format!("{}, {driver}", case.name), middle(&rounds));
        }
    }
    Ok(json!({ "rounds": ROUNDS, "median": rows }))
}

/// Frees memory in the guest, inflates, deflates, and touches the memory again.
fn round(guest: &mut Guest, case: Case, id: u64) -> Result<Value> {
    let pid = guest.vmm.pid();
    guest.command(&format!("pick {id} {}", case.freed))?;
    let dropped = guest.command_within(&format!("drop {id}"), DEADLINE)?;
    let freed_bytes = number(&dropped, 2)?;

    eprintln!("inflating");
    let large_before = large_bytes(guest)?;
    let (before, counted) = (Host::now(pid)?, counters(guest)?);
    let cost = Cost::so_far(pid)?;
    let inflate_ms = resize(guest, case.inflated_bytes)?;
    let cost = Cost::so_far(pid)?.since(&cost);
    let (after, counts) = (Host::now(pid)?, counters(guest)?);
    let large_after = large_bytes(guest)?;

    eprintln!("inflated in {inflate_ms:.0} ms, deflating");
    let deflate_ms = resize(guest, 0)?;
    eprintln!("touching again");
    let large_deflated = large_bytes(guest)?;
    let faults = faults(pid)?;
    let refilled = guest.command_within(&format!("refill {id}"), DEADLINE)?;
    let gib = case.inflated_bytes as f64 / (1u64 << 30) as f64;
    let per_gib = |count: usize| rounded((counts[count] - counted[count]) as f64 / gib);
    Ok(json!({
        "guest_freed_mib": freed_bytes / MIB,
        "inflated_mib": case.inflated_bytes / MIB,
        "inflate_ms": rounded(inflate_ms),
        "gib_per_s": rounded(gib * 1000.0 / inflate_ms),
        "host_free_mib": (after.free_bytes as f64 - before.free_bytes as f64) / MIB as f64,
        "resident_fell_mib": (before.resident_bytes as f64 - after.resident_bytes as f64) / MIB as f64,
        "huge_before_mib": before.huge_bytes / MIB,
        "huge_after_mib": after.huge_bytes / MIB,
        "batches_per_gib": per_gib(0),
        "discarded_ranges_per_gib": per_gib(1),
        "syscalls_per_gib": per_gib(2),
        "each_mib": cost.each(case.inflated_bytes / MIB),
        "guest_large_free_mib": { "before": large_before / MIB, "inflated": large_after / MIB, "deflated": large_deflated / MIB },
        "deflate_ms": rounded(deflate_ms),
        "touch_again_ms": rounded(number(&refilled, 4)? as f64 / 1000.0),
        "touch_again_faults": self::faults(pid)? - faults,
    }))
}

/// Sets the balloon's target and waits until the guest has reached it; returns the time in milliseconds.
fn resize(guest: &Guest, bytes: u64) -> Result<f64> {
    let begin = Instant::now();
    let body = json!({ "desired_balloon": bytes }).to_string();
    guest.vmm.put("vm.resize", Some(&body))?;
    loop {
        let info = guest.vmm.get("vm.info")?;
        let took = begin.elapsed();
        if info["memory_actual_size"] == GUEST_BYTES - bytes {
            return Ok(took.as_secs_f64() * 1000.0);
        }
        ensure!(
            took < DEADLINE,
            "the balloon does not reach {bytes}: {info}"
        );
        thread::sleep(INTERVAL);
    }
}

impl Host {
    /// Waits until the kernel has settled: it splits and frees huge pages in the background.
    fn now(pid: u32) -> Result<Self> {
        let mut last = u64::MAX;
        let free_bytes = wait_for("steady free memory of the host", DEADLINE, || {
            let text = fs::read_to_string("/proc/meminfo")?;
            let free = kib(&text, "MemFree:")?;
            let steady = free.abs_diff(last) < 64;
            last = free;
            thread::sleep(INTERVAL);
            Ok(steady.then_some(free << 10))
        })?;
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        Ok(Self {
            free_bytes,
            resident_bytes: kib(&rollup, "Rss:")? << 10,
            huge_bytes: kib(&rollup, "AnonHugePages:")? << 10,
        })
    }
}

/// Batches, discarded ranges and system calls of the device so far.
fn counters(guest: &Guest) -> Result<[u64; 3]> {
    let stats = guest.vmm.get("vm.reclaim-stats")?;
    let figure = |name: &str| stats["inflate"][name].as_u64().context("no figure");
    Ok([
        figure("batches")?,
        figure("discarded_ranges")?,
        figure("discard_syscalls")?,
    ])
}

/// Free memory of the guest in blocks of 2 MiB and larger.
fn large_bytes(guest: &mut Guest) -> Result<u64> {
    let text = guest.shell("cat /proc/buddyinfo")?;
    let zones = text.lines().filter(|line| line.contains(" zone "));
    let mut bytes = 0;
    for zone in zones {
        // Node 0, zone Normal, and a count per order.
        let mut counts = zone.split_ascii_whitespace().skip(4);
        let counts: Vec<u64> = counts.by_ref().map(str::parse).collect::<Result<_, _>>()?;
        for order in LARGE_ORDERS {
            let count = counts.get(order as usize).copied().unwrap_or(0);
            bytes += count * (PAGE_BYTES << order);
        }
    }
    Ok(bytes)
}

/// Page faults of a process so far: those of its vCPUs are among them.
fn faults(pid: u32) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in parentheses may contain any characters; minor and major faults are fields 10 and 12.
    let (_, fields) = stat.rsplit_once(')').context("no name")?;
    let count = |field: usize| -> Result<u64> {
        let word = fields.split_ascii_whitespace().nth(field - 3);
        Ok(word.context("too few fields")?.parse()?)
    };
    Ok(count(10)? + count(12)?)
}

fn kib(text: &str, name: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let word = line.and_then(|rest| rest.split_ascii_whitespace().next());
    Ok(word.with_context(|| format!("no {name}"))?.parse()?)
}

/// A word of the guest's answer as a number.
fn number(answer: &str, word: usize) -> Result<u64> {
    let text = answer.split(' ').nth(word);
    let text = text.with_context(|| format!("too few words in {answer:?}"))?;
    text.parse().with_context(|| format!("{answer:?}"))
}

/// The median of each figure.
fn middle(rounds: &[Value]) -> Value {
    match &rounds[0] {
        Value::Object(first) => {
            let figure = |name: &String| {
                let values: Vec<Value> = rounds.iter().map(|round| round[name].clone()).collect();
                (name.clone(), middle(&values))
            };
            first.keys().map(figure).collect::<Map<_, _>>().into()
        }
        _ => {
            let mut values = rounds.to_vec();
            let key = |value: &Value| value.as_f64().unwrap_or(0.0);
            values.sort_by(|a, b| key(a).total_cmp(&key(b)));
            values[values.len() / 2].clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_rounds_is_taken_for_each_figure() {
        let round = |a: f64, b: u64| json!({ "a": a, "nested": { "b": b } });
        let rounds = [round(1.5, 7), round(9.0, 8), round(2.0, 0)];
        assert_eq!(middle(&rounds), round(2.0, 7));
    }

    #[test]
    fn field_of_proc_is_found_by_its_name() {
        let text = "MemTotal:  16 kB\nMemFree:   8 kB\n";
        assert_eq!(kib(text, "MemFree:").unwrap(), 8);
        assert!(kib(text, "Rss:").is_err());
    }
}
