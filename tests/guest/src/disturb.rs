//! The disturbances of `guest-mem stress`, one kind each.
//!
//! A kernel may have good reason to reject a disturbance. For example, it does not take a block of memory in use
//! offline, and makes no immediate report while reporting is paused. Rejections are counted. A wrong byte in a file, or
//! a setting that is not accepted, is an error.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::random::Random;
use crate::{disk, sys};

/// One kind of disturbance to repeat.
#[derive(Debug)]
pub(crate) struct Disturbance {
    pub(crate) name: &'static str,
    pub(crate) pause_ms_max: usize,
    pub(crate) act: fn(&mut Random, &mut State) -> Result<Done, String>,
}

/// The result of one disturbance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Done {
    Yes,
    Refused,
    /// Not supported by this kernel or machine.
    Absent,
}

/// State of a disturbance between repetitions.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Files that exist: name, bytes, seed.
    files: Vec<(String, u64, u64)>,
    /// Pages held in the contiguous area.
    contiguous_pages: u64,
}

pub(crate) const DISTURBANCES: &[Disturbance] = &[
    disturbance("files", 20, files),
    disturbance("processes", 20, processes),
    disturbance("huge-pages", 500, huge_pages),
    disturbance("offline", 1000, offline),
    disturbance("tracker", 2000, tracker),
    disturbance("settings", 200, settings),
    disturbance("report-now", 500, report_now),
    disturbance("rebind", 3000, rebind),
    disturbance("compact", 1000, compact),
    disturbance("contiguous", 300, contiguous),
    disturbance("figures", 100, figures),
];

const fn disturbance(
    name: &'static str,
    pause_ms_max: usize,
    act: fn(&mut Random, &mut State) -> Result<Done, String>,
) -> Disturbance {
    Disturbance {
        name,
        pause_ms_max,
        act,
    }
}

const REPORTING: &str = "/sys/kernel/mm/page_reporting";
const HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
const MEMORY: &str = "/sys/devices/system/memory";
const BALLOONS: &str = "/sys/bus/virtio/drivers/virtio_balloon";
const COMPACT: &str = "/proc/sys/vm/compact_memory";
const CONTIGUOUS: &str = "/sys/kernel/debug/cma";
const EVENTS: &str = "/sys/kernel/tracing/events/page_reporting/enable";

/// Maximum size of a file, and maximum number of files at a time.
const FILE_BYTES_MAX: usize = 8 << 20;
const FILES_MAX: usize = 8;
/// Pages of the contiguous area taken by one act.
const CONTIGUOUS_PAGES_MAX: usize = 1024;
/// Maximum time until free memory is reported; a busy emulator is slow.
const REPORT_DEADLINE: Duration = Duration::from_secs(120);

/// Each setting with values worth trying, the default first. A `paused` of 1 is reset.
const SETTINGS: &[(&str, &[&str])] = &[
    ("order", &["0", "9", "10"]),
    ("pending_blocks", &["16", "1", "64"]),
    ("delay_ms", &["1000", "10", "100"]),
    ("age_ms", &["100", "0", "10"]),
    ("bytes_per_second", &["0", "67108864", "1073741824"]),
    ("backoff", &["1", "0"]),
    ("paused", &["0", "1"]),
];

/// Mounts the file systems that some disturbances need, if the kernel has them.
pub(crate) fn prepare() {
    for (kind, target) in [
        ("debugfs", "/sys/kernel/debug"),
        ("tracefs", "/sys/kernel/tracing"),
    ] {
        if let Err(error) = sys::mount(kind, target, kind, 0, "") {
            println!("stress: no {kind}: {error}");
        }
    }
}

/// Writes as a shell would.
fn write(path: impl AsRef<Path>, value: &str) -> Result<(), String> {
    let path = path.as_ref();
    fs::write(path, value).map_err(|error| format!("{value} to {}: {error}", path.display()))
}

fn read(path: impl AsRef<Path>) -> Result<String, String> {
    let path = path.as_ref();
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// For a write that the kernel may reject.
fn asked(path: impl AsRef<Path>, value: &str) -> Done {
    match write(path, value) {
        Ok(()) => Done::Yes,
        Err(_) => Done::Refused,
    }
}

fn one_of<'a, T: ?Sized>(random: &mut Random, list: &[&'a T]) -> &'a T {
    list[random.below(list.len())]
}

/// Creates files in memory, reads them back and removes them.
fn files(random: &mut Random, state: &mut State) -> Result<Done, String> {
    if state.files.len() < FILES_MAX && random.below(2) == 0 {
        let name = format!("/tmp/stress-{:016x}", random.next());
        // As likely small as large.
        let most = 1 << random.below(FILE_BYTES_MAX.ilog2() as usize + 1);
        let (bytes, seed) = (8 + random.below(most) as u64, random.next());
        disk::fill(&name, bytes, seed)?;
        state.files.push((name, bytes, seed));
    } else if !state.files.is_empty() {
        let at = random.below(state.files.len());
        let (name, bytes, seed) = state.files.swap_remove(at);
        disk::verify(&name, bytes, seed)?;
        fs::remove_file(&name).map_err(|error| format!("removing {name}: {error}"))?;
    }
    Ok(Done::Yes)
}

/// Starts processes, which allocate page tables, stacks and other memory.
fn processes(_: &mut Random, _: &mut State) -> Result<Done, String> {
    let status = Command::new("/bin/true")
        .stdin(Stdio::null())
        .status()
        .map_err(|error| format!("starting /bin/true: {error}"))?;
    if status.success() {
        Ok(Done::Yes)
    } else {
        Err(format!("/bin/true: {status}"))
    }
}

fn huge_pages(random: &mut Random, _: &mut State) -> Result<Done, String> {
    if !Path::new(HUGE_PAGES).exists() {
        return Ok(Done::Absent);
    }
    let mode = one_of(random, &["always", "madvise", "never"]);
    write(HUGE_PAGES, mode).map(|()| Done::Yes)
}

/// The blocks of memory that can be taken offline one by one.
fn memory_blocks() -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(MEMORY).map_err(|error| format!("{MEMORY}: {error}"))?;
    let mut blocks: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path().join("state"))
        .filter(|path| path.exists())
        .collect();
    blocks.sort();
    Ok(blocks)
}

/// Takes a block offline for a moment.
fn offline(random: &mut Random, _: &mut State) -> Result<Done, String> {
    if !Path::new(MEMORY).exists() {
        return Ok(Done::Absent);
    }
    let blocks = memory_blocks()?;
    // The upper half is likelier to be movable.
    let block = &blocks[blocks.len() / 2 + random.below(blocks.len().div_ceil(2))];
    let done = asked(block, "offline");
    if done == Done::Yes {
        thread::sleep(Duration::from_millis(random.below(300) as u64));
        write(block, "online_movable")?;
    }
    Ok(done)
}

/// Selects the bitmap tracker half of the time, so that it has work.
fn tracker(random: &mut Random, _: &mut State) -> Result<Done, String> {
    let path = Path::new(REPORTING).join("tracker");
    if !path.exists() {
        return Ok(Done::Absent);
    }
    let choice = one_of(random, &["bitmap", "mainline", "bitmap", "off"]);
    write(path, choice).map(|()| Done::Yes)
}

fn settings(random: &mut Random, _: &mut State) -> Result<Done, String> {
    if !Path::new(REPORTING).exists() {
        return Ok(Done::Absent);
    }
    let (name, values) = SETTINGS[random.below(SETTINGS.len())];
    let path = Path::new(REPORTING).join(name);
    write(&path, one_of(random, values))?;
    if name == "paused" {
        thread::sleep(Duration::from_millis(random.below(50) as u64));
        write(&path, "0")?;
    }
    Ok(Done::Yes)
}

fn report_now(random: &mut Random, _: &mut State) -> Result<Done, String> {
    let path = Path::new(REPORTING).join("report_now");
    if !path.exists() {
        return Ok(Done::Absent);
    }
    Ok(asked(path, one_of(random, &["1", "again"])))
}

/// Names of balloons, whether they have a driver or not.
fn balloons() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/bus/virtio/devices") else {
        return Vec::new();
    };
    entries
        .flatten()
        // virtio 1.2 §5: device 5 is the traditional balloon.
        .filter(|entry| read(entry.path().join("device")).is_ok_and(|id| id.trim() == "0x0005"))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Unbinds the driver from its device for a moment.
fn rebind(random: &mut Random, _: &mut State) -> Result<Done, String> {
    let Some(name) = balloons().pop() else {
        return Ok(Done::Absent);
    };
    write(Path::new(BALLOONS).join("unbind"), &name)?;
    thread::sleep(Duration::from_millis(random.below(200) as u64));
    write(Path::new(BALLOONS).join("bind"), &name).map(|()| Done::Yes)
}

fn compact(_: &mut Random, _: &mut State) -> Result<Done, String> {
    if !Path::new(COMPACT).exists() {
        return Ok(Done::Absent);
    }
    write(COMPACT, "1").map(|()| Done::Yes)
}

/// Takes pages from the contiguous memory area, or returns some.
fn contiguous(random: &mut Random, state: &mut State) -> Result<Done, String> {
    let Some(area) = fs::read_dir(CONTIGUOUS)
        .ok()
        .and_then(|mut areas| areas.next()?.ok())
    else {
        return Ok(Done::Absent);
    };
    let pages = 1 + random.below(CONTIGUOUS_PAGES_MAX) as u64;
    if state.contiguous_pages > 0 && random.below(2) == 0 {
        let pages = pages.min(state.contiguous_pages);
        write(area.path().join("free"), &pages.to_string())?;
        state.contiguous_pages -= pages;
        return Ok(Done::Yes);
    }
    let done = asked(area.path().join("alloc"), &pages.to_string());
    if done == Done::Yes {
        state.contiguous_pages += pages;
    }
    Ok(done)
}

/// Reads all statistics, and turns trace events on and off.
fn figures(random: &mut Random, _: &mut State) -> Result<Done, String> {
    for path in ["/proc/vmstat", "/proc/buddyinfo", "/proc/zoneinfo"] {
        read(path)?;
    }
    if !Path::new(REPORTING).exists() {
        return Ok(Done::Yes);
    }
    let stats = Path::new(REPORTING).join("stats");
    for entry in fs::read_dir(&stats).map_err(|error| error.to_string())? {
        read(entry.map_err(|error| error.to_string())?.path())?;
    }
    let zones = Path::new("/sys/kernel/debug/page_reporting_zones");
    if zones.exists() {
        read(zones)?;
    }
    if Path::new(EVENTS).exists() {
        write(EVENTS, one_of(random, &["0", "1"]))?;
    }
    Ok(Done::Yes)
}

/// Restores everything that was changed.
pub(crate) fn restore() -> Result<(), String> {
    for block in memory_blocks().unwrap_or_default() {
        if read(&block)?.trim() == "offline" {
            write(&block, "online_movable")?;
        }
    }
    if !Path::new(REPORTING).exists() {
        return Ok(());
    }
    write(Path::new(REPORTING).join("tracker"), "bitmap")?;
    for (name, values) in SETTINGS {
        write(Path::new(REPORTING).join(name), values[0])?;
    }
    if Path::new(EVENTS).exists() {
        write(EVENTS, "0")?;
    }
    Ok(())
}

fn bytes(name: &str) -> Result<u64, String> {
    let path = Path::new(REPORTING).join("stats").join(name);
    let text = read(&path)?;
    text.trim()
        .parse()
        .map_err(|_| format!("{}: {text}", path.display()))
}

fn free_bytes() -> Result<u64, String> {
    let text = read("/proc/meminfo")?;
    text.lines()
        .find_map(|line| line.strip_prefix("MemFree:"))
        .and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok())
        .map(|kib| kib << 10)
        .ok_or_else(|| "no MemFree".into())
}

/// After the stress, at least half of the free memory must be reported. The rest may be in small blocks, or reserved by
/// the low watermark.
pub(crate) fn everything_free_is_reported() -> Result<(), String> {
    if !Path::new(REPORTING).exists() || balloons().is_empty() {
        return Ok(());
    }
    let path = Path::new(REPORTING).join("report_now");
    let begin = Instant::now();
    loop {
        let done = asked(&path, "again");
        let (reported, free) = (bytes("reported_bytes")?, free_bytes()?);
        let figures = format!("{} of {} MiB free are reported", reported >> 20, free >> 20);
        if done == Done::Yes && reported > free / 2 {
            println!("stress: {figures}");
            return Ok(());
        }
        if begin.elapsed() > REPORT_DEADLINE {
            return Err(format!("{figures}, the last request was {done:?}"));
        }
        thread::sleep(Duration::from_secs(1));
    }
}

/// Makes the kernel print blocked tasks and their reasons on its console.
pub(crate) fn tell_blocked_tasks() {
    // Only helps to diagnose failures; a kernel without the keys is not an error.
    write("/proc/sysrq-trigger", "w").ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_are_checked_and_a_changed_one_is_told() {
        let (mut random, mut state) = (Random::new(3, 0), State::default());
        for _ in 0..20 {
            files(&mut random, &mut state).unwrap();
        }
        while state.files.is_empty() {
            files(&mut random, &mut state).unwrap();
        }
        for (name, _, _) in &state.files {
            let mut contents = fs::read(name).unwrap();
            contents[0] ^= 1;
            fs::write(name, contents).unwrap();
        }
        let error = (0..100).find_map(|_| files(&mut random, &mut state).err());
        for (name, _, _) in &state.files {
            fs::remove_file(name).unwrap();
        }
        assert!(error.unwrap().contains("wrong contents at byte 0"));
    }

    #[test]
    fn disturbances_have_names_of_their_own() {
        let mut names: Vec<&str> = DISTURBANCES.iter().map(|what| what.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), DISTURBANCES.len());
    }
}
