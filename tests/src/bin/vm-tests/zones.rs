//! Tests guest RAM with several backings, and how much of each returns to the host.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::linux::{COMMAND_DEADLINE, Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::tests;
use integration_tests::wait::wait_for;
use serde_json::Value;
use virtio_devices::reclaim::guarded_ram::{
    HUGE_PAGE_PAGES, Kind, PAGE, RamArea, discard_and_check,
};
use virtio_devices::reclaim::{DiscardEngine, Expected, GuestRange};

use integration_tests::huge_pages::ReservedHugePages;

use crate::snapshot;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        zones_of_two_kinds_and_nodes_give_memory_back,
        zone_of_a_node_grows_is_saved_and_shrinks,
        private_file_gives_back_what_the_guest_wrote,
        huge_pages_come_back_to_the_pool,
        huge_pages_that_are_gone_pause_the_guest_until_they_are_back,
        full_file_system_ends_only_its_guest,
        gigantic_pages_are_not_reported,
        discard_engine_frees_whole_huge_pages_and_nothing_else,
    ]
}

const RECLAIM_DEADLINE: Duration = Duration::from_secs(120);

fn stats(guest: &Guest) -> Result<Value> {
    guest.vmm.get("vm.reclaim-stats")
}

/// Resident bytes of all RAM and of each zone.
fn resident(guest: &Guest) -> Result<(u64, Vec<u64>)> {
    let stats = stats(guest)?;
    let of = |value: &Value| value["resident_bytes"].as_u64().context("resident_bytes");
    let zones = stats["zones"].as_array().context("zones")?;
    Ok((of(&stats)?, zones.iter().map(of).collect::<Result<_>>()?))
}

/// Waits until the zones' resident bytes satisfy `enough`.
fn wait_resident(
    guest: &Guest,
    what: &str,
    enough: impl Fn(&[u64]) -> bool,
) -> Result<(u64, Vec<u64>)> {
    wait_for(what, RECLAIM_DEADLINE, || {
        let (all, zones) = resident(guest)?;
        Ok(enough(&zones).then_some((all, zones)))
    })
    .with_context(|| format!("{:#}", stats(guest).unwrap_or_default()))
}

/// A file system in memory with a limit, unmounted on drop.
struct TinyFileSystem(tempfile::TempDir);

impl TinyFileSystem {
    fn mount(bytes: u64) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let options = format!("size={bytes}");
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(folder.path());
        ensure!(mount.status()?.success(), "{mount:?}");
        Ok(Self(folder))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for TinyFileSystem {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(self.path()).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            println!("     {} stays mounted", self.path().display());
        }
    }
}

/// A file in memory with the size of a zone.
fn zone_file(name: &str, bytes: u64) -> Result<(tempfile::TempDir, String)> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join(name);
    File::create_new(&path)?.set_len(bytes)?;
    let path = path.into_os_string().into_string();
    Ok((folder, path.ok().context("the path is UTF-8")?))
}

/// Two zones, one of them a file, as two NUMA nodes.
fn zones_of_two_kinds_and_nodes_give_memory_back() -> Result<Outcome> {
    let (_folder, path) = zone_file("ram", 256 * MIB)?;
    let file_bytes = || -> Result<u64> { Ok(std::fs::metadata(&path)?.blocks() * 512) };
    let file_zone = format!("id=file,size=256M,shared=on,file={path}");
    let mut guest = Machine {
        cpus: "boot=2",
        memory: "size=0",
        arguments: &[
            "--memory-zone",
            "id=plain,size=256M",
            &file_zone,
            "--numa",
            "guest_numa_id=0,cpus=[1],memory_zones=[plain],distances=[1@15]",
            "guest_numa_id=1,cpus=[0],memory_zones=[file]",
            "--balloon",
            "size=0,free_page_reporting=on",
        ],
        ..Machine::default()
    }
    .serve()?;
    let told =
        guest.shell("cd /sys/devices/system/node; cat online node*/cpulist node*/distance")?;
    let lines: Vec<_> = told.lines().map(str::trim).collect();
    for expected in [&["0-1", "1", "0"][..], &["10 15", "15 10"]] {
        ensure!(
            lines.windows(expected.len()).any(|lines| lines == expected),
            "the guest sees {lines:?}"
        );
    }

    guest.command("alloc 400M")?;
    let (all, touched) = resident(&guest)?;
    ensure!(
        touched.len() == 2 && touched.iter().all(|bytes| *bytes > 150 * MIB),
        "{touched:?}"
    );
    ensure!(
        touched.iter().sum::<u64>() == all,
        "{touched:?} are not {all}"
    );
    ensure!(
        file_bytes()? > 150 * MIB,
        "the file holds {}",
        file_bytes()?
    );
    guest.command("free")?;
    let (_, left) = wait_resident(&guest, "memory of both zones", |zones| {
        zones.iter().all(|bytes| *bytes <= 100 * MIB)
    })?;
    ensure!(
        file_bytes()? <= 100 * MIB,
        "the file holds {}",
        file_bytes()?
    );
    let stats = stats(&guest)?;
    ensure!(
        stats["backing"] == "mixed" && stats["report"]["failed_bytes"] == 0,
        "{stats:#}"
    );
    ensure!(
        std::fs::metadata(&path)?.len() == 256 * MIB,
        "the file is as long as it was"
    );
    println!("     resident {touched:?} → {left:?}");
    guest.command("alloc 300M seed=3")?;
    guest.command("verify")?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

/// Two nodes, of which the second grows. It is saved and continued with plugged blocks, and then shrinks.
fn zone_of_a_node_grows_is_saved_and_shrinks() -> Result<Outcome> {
    const PLUGGED: usize = 2;
    let mut guest = Machine {
        cpus: "boot=2",
        memory: "size=0,hotplug_method=virtio-mem",
        arguments: &[
            "--memory-zone",
            "id=a,size=160M",
            "id=b,size=96M,hotplug_size=256M",
            "--numa",
            "guest_numa_id=0,cpus=[0],memory_zones=[a]",
            "guest_numa_id=1,cpus=[1],memory_zones=[b]",
            "--balloon",
            "size=0,free_page_reporting=on",
        ],
        command_line: "memhp_default_state=online_movable",
        ..Machine::default()
    }
    .serve()?;
    let before = [node_kib(&mut guest, 0)?, node_kib(&mut guest, 1)?];
    let resize = |guest: &Guest, id: &str, mib: u64| -> Result<u16> {
        let body = format!("{{\"id\":\"{id}\",\"desired_ram\":{}}}", mib * MIB);
        Ok(guest
            .vmm
            .request("PUT", "vm.resize-zone", Some(&body))?
            .status)
    };
    for (id, mib, status) in [
        ("c", 96, 404),
        ("a", 192, 400),
        ("b", 512, 400),
        ("b", 224, 204),
    ] {
        let found = resize(&guest, id, mib)?;
        ensure!(found == status, "{id} {mib}: {found}");
    }
    wait_configured(&guest, PLUGGED, 128 * MIB)?;
    let info = guest.vmm.get("vm.info")?;
    ensure!(info["memory_actual_size"] == 384 * MIB, "{info:#}");
    wait_for("the memory of node 1", RECLAIM_DEADLINE, || {
        let grown = node_kib(&mut guest, 1)?;
        Ok((grown >= before[1] + 120 * 1024).then_some(()))
    })?;
    let first = node_kib(&mut guest, 0)?;
    ensure!(
        first.abs_diff(before[0]) < 1024,
        "node 0 has {first} KiB, before {}",
        before[0]
    );
    guest.command("alloc 200M seed=21")?;
    guest.command("verify")?;
    let (_, touched) = resident(&guest)?;
    ensure!(
        touched.len() == 3 && touched[PLUGGED] > 60 * MIB,
        "{touched:?}"
    );

    guest.vmm.put("vm.pause", None)?;
    let folder = guest.vmm.folder().join("saved");
    let url = snapshot::save(&guest, &folder)?;
    snapshot::end_vmm(&mut guest)?;
    let mut guest = snapshot::restore(&guest, &url)?;
    let info = guest.vmm.get("vm.info")?;
    ensure!(info["memory_actual_size"] == 384 * MIB, "{info:#}");
    guest.vmm.put("vm.resume", None)?;
    guest.command("verify")?;
    guest.command("free")?;
    guest.command("alloc 100M seed=22")?;
    let found = resize(&guest, "b", 96)?;
    ensure!(found == 204, "{found}");
    wait_configured(&guest, PLUGGED, 0)?;
    wait_resident(&guest, "memory that was unplugged", |zones| {
        zones[PLUGGED] == 0
    })?;
    guest.command("verify")?;
    let shrunk = node_kib(&mut guest, 1)?;
    ensure!(
        shrunk.abs_diff(before[1]) < 1024,
        "node 1 has {shrunk} KiB, before {}",
        before[1]
    );
    let counters = guest.vmm.get("vm.counters")?;
    let figure = |name: &str| counters["b"][name].as_u64();
    ensure!(
        figure("plugged_bytes") == Some(0)
            && figure("requests_wrong") == Some(0)
            && figure("unplugged_accesses") == Some(0),
        "{counters:#}"
    );
    ensure!(counters["a"].is_null(), "{counters:#}");
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

/// Memory of a node in the guest, KiB.
fn node_kib(guest: &mut Guest, node: u32) -> Result<u64> {
    let file = format!("/sys/devices/system/node/node{node}/meminfo");
    let text = guest.shell(&format!("grep MemTotal {file}"))?;
    let kib = text.lines().find_map(|line| {
        let rest = line.trim().strip_suffix("kB")?;
        rest.split_whitespace().last()?.parse().ok()
    });
    kib.with_context(|| format!("{file} has {text}"))
}

/// Waits until a zone has this size.
fn wait_configured(guest: &Guest, zone: usize, bytes: u64) -> Result<()> {
    wait_for("the size of the zone", RECLAIM_DEADLINE, || {
        let stats = stats(guest)?;
        Ok((stats["zones"][zone]["configured_bytes"] == bytes).then_some(()))
    })
    .with_context(|| format!("{:#}", stats(guest).unwrap_or_default()))
}

/// The file is a template: the guest's pages are discarded, and the file is unchanged.
fn private_file_gives_back_what_the_guest_wrote() -> Result<Outcome> {
    static TEMPLATE: [u8; MIB as usize] = [0x5a; MIB as usize];
    let (_folder, path) = zone_file("template", 64 * MIB)?;
    let file = File::options().read(true).write(true).open(&path)?;
    for at in 0..64 {
        file.write_all_at(&TEMPLATE, at * MIB)?;
    }
    let zone = format!("id=template,size=64M,file={path}");
    let mut guest = Machine {
        memory: "size=0",
        arguments: &[
            "--memory-zone",
            "id=plain,size=256M",
            &zone,
            "--balloon",
            "size=0,free_page_reporting=on",
        ],
        ..Machine::default()
    }
    .serve()?;
    guest.command("alloc 240M seed=9")?;
    guest.command("verify")?;
    let (_, touched) = resident(&guest)?;
    guest.command("free")?;
    let (_, left) = wait_resident(&guest, "copies of the template", |zones| {
        zones[1] + 20 * MIB < touched[1]
    })?;
    println!("     resident {touched:?} → {left:?}");
    guest.command("alloc 240M seed=10")?;
    guest.command("verify")?;
    guest.end_cleanly()?;
    let mut found = vec![0; MIB as usize];
    for at in 0..64 {
        file.read_exact_at(&mut found, at * MIB)?;
        ensure!(found == TEMPLATE, "the template has changed at {at} MiB");
    }
    Ok(Outcome::Passed)
}

fn huge_pages_come_back_to_the_pool() -> Result<Outcome> {
    const PAGES: u64 = 160;
    let Some(pool) = ReservedHugePages::of(2 * MIB, PAGES)? else {
        return Ok(no_huge_pages());
    };
    let before = pool.free()?;
    let mut guest = Machine {
        memory: "size=320M,hugepages=on",
        arguments: &["--balloon", "size=0,free_page_reporting=on"],
        ..Machine::default()
    }
    .serve()?;
    guest.command("alloc 200M seed=4")?;
    guest.command("verify")?;
    let used = before - pool.free()?;
    ensure!(used >= 100, "the guest is on {used} huge pages");
    guest.command("free")?;
    let (_, left) = wait_resident(&guest, "huge pages", |zones| zones[0] <= 160 * MIB)?;
    let stats = stats(&guest)?;
    ensure!(stats["zones"][0]["page_bytes"] == 2 * MIB, "{stats:#}");
    ensure!(stats["backing"] == "hugetlb-shared", "{stats:#}");
    ensure!(
        left[0].is_multiple_of(2 * MIB),
        "{left:?} is not whole huge pages"
    );
    let still_used = before - pool.free()?;
    ensure!(
        still_used <= 80,
        "of {used} huge pages {still_used} are left"
    );
    println!("     {used} → {still_used} huge pages");
    guest.command("alloc 150M seed=5")?;
    guest.command("verify")?;
    guest.end_cleanly()?;
    ensure!(pool.free()? == before, "huge pages are lost");
    Ok(Outcome::Passed)
}

/// The guest returns pages, which somebody else takes; then it touches its memory again.
fn huge_pages_that_are_gone_pause_the_guest_until_they_are_back() -> Result<Outcome> {
    const PAGES: u64 = 160;
    let Some(pool) = ReservedHugePages::of(2 * MIB, PAGES)? else {
        return Ok(no_huge_pages());
    };
    let mut guest = Machine {
        memory: "size=320M,hugepages=on,on_unavailable=pause",
        arguments: &[
            "--balloon",
            "size=0,free_page_reporting=on",
            "--event-monitor",
            "path=@/events",
        ],
        ..Machine::default()
    }
    .serve()?;
    guest.command("alloc 200M seed=4")?;
    guest.command("free")?;
    wait_resident(&guest, "huge pages", |zones| zones[0] <= 160 * MIB)?;
    let taken = pool.take_free()?;
    guest.serial.send("alloc 200M seed=5")?;
    let is_paused =
        |guest: &Guest| -> Result<bool> { Ok(guest.vmm.get("vm.info")?["state"] == "Paused") };
    wait_for("the pause", RECLAIM_DEADLINE, || {
        Ok(is_paused(&guest)?.then_some(()))
    })?;
    let (log, events) = (guest.vmm.stderr(), guest.vmm.text("events"));
    ensure!(log.contains("memory zone mem0 (hugetlb-shared)"), "{log}");
    ensure!(events.contains("memory-unavailable"), "{events}");
    // Nothing has changed: it is paused again.
    guest.vmm.put("vm.resume", None)?;
    wait_for("the second pause", RECLAIM_DEADLINE, || {
        Ok(is_paused(&guest)?.then_some(()))
    })?;
    drop(taken);
    guest.vmm.put("vm.resume", None)?;
    guest.serial.expect_answer("alloc", COMMAND_DEADLINE)?;
    guest.command("verify")?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

/// The memory file is larger than the file system. Another guest does not notice.
fn full_file_system_ends_only_its_guest() -> Result<Outcome> {
    let place = TinyFileSystem::mount(160 * MIB)?;
    let path = place.path().join("ram");
    File::create_new(&path)?.set_len(512 * MIB)?;
    let zone = format!("id=ram,size=512M,shared=on,file={}", path.display());
    let mut other = Machine::default().serve()?;
    let mut guest = Machine {
        memory: "size=0",
        arguments: &["--memory-zone", &zone, "--event-monitor", "path=@/events"],
        ..Machine::default()
    }
    .serve()?;
    guest.serial.send("alloc 300M seed=5")?;
    let status = guest.vmm.wait_exit(RECLAIM_DEADLINE)?;
    let (log, events) = (guest.vmm.stderr(), guest.vmm.text("events"));
    ensure!(status.code() == Some(1), "{status}: {log}");
    ensure!(log.contains("memory zone ram (file-shared)"), "{log}");
    ensure!(events.contains("memory-unavailable"), "{events}");
    other.command("alloc 20M seed=1")?;
    other.command("verify")?;
    other.end_cleanly()?;
    Ok(Outcome::Passed)
}

fn no_huge_pages() -> Outcome {
    Outcome::Skipped("the host has no such huge pages to give".to_owned())
}

/// No block of a guest covers a page of 1 GiB, so nothing is reported, and inflated memory is counted.
fn gigantic_pages_are_not_reported() -> Result<Outcome> {
    let Some(_pool) = ReservedHugePages::of(1024 * MIB, 1)? else {
        return Ok(no_huge_pages());
    };
    let mut guest = Machine {
        memory: "size=1G,hugepages=on,hugepage_size=1G",
        arguments: &["--balloon", "size=0,free_page_reporting=on"],
        ..Machine::default()
    }
    .serve()?;
    guest
        .vmm
        .put("vm.resize", Some("{\"desired_balloon\":67108864}"))?;
    wait_for("the balloon", RECLAIM_DEADLINE, || {
        Ok((stats(&guest)?["ballooned_bytes"] == 64 * MIB).then_some(()))
    })?;
    let stats = stats(&guest)?;
    ensure!(stats["reporting"]["active"] == false, "{stats:#}");
    let reason = &stats["zones"][0]["reporting"]["reason"];
    ensure!(
        reason
            .as_str()
            .is_some_and(|why| why.contains("1073741824")),
        "{stats:#}"
    );
    let inflate = &stats["inflate"];
    ensure!(
        inflate["discarded_bytes"] == 0 && inflate["discard_syscalls"] == 0,
        "{stats:#}"
    );
    ensure!(
        inflate["skipped_bytes"]["backing_page_larger"] == 64 * MIB,
        "{stats:#}"
    );
    ensure!(stats["resident_bytes"] == 1024 * MIB, "{stats:#}");
    guest.command("alloc 100M seed=6")?;
    guest.command("verify")?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

/// The property test of the discard engine, on a host with huge pages.
fn discard_engine_frees_whole_huge_pages_and_nothing_else() -> Result<Outcome> {
    const ROUNDS: u64 = 12;
    let Some(_pool) = ReservedHugePages::of(2 * MIB, 24)? else {
        return Ok(no_huge_pages());
    };
    let mut freed = 0;
    for seed in 1..=ROUNDS {
        let mut numbers = Numbers(seed);
        let areas = [
            area(numbers.below(600), 1 + numbers.below(40), Kind::Anonymous),
            // Aligned to huge pages, or not.
            area(
                640 + 512 * numbers.below(2) + numbers.below(2) * 100,
                1024,
                Kind::Huge,
            ),
            area(2400 + numbers.below(50), 1 + numbers.below(40), Kind::Memfd),
            area(2500 + numbers.below(50), 512, Kind::Huge),
        ];
        let claims: Vec<_> = (0..1 + numbers.below(12))
            .map(|_| GuestRange {
                start: numbers.below(3100) * PAGE as u64,
                bytes: numbers.below(1500) * PAGE as u64,
            })
            .collect();
        let engines = [
            DiscardEngine::new(Arc::default()),
            DiscardEngine::without_vectors(Arc::default()),
        ];
        for mut engine in engines {
            let outcome = discard_and_check(&mut engine, &areas, &claims, Expected::Zeros)
                .with_context(|| format!("seed {seed}"))?;
            freed += outcome.discarded.bytes;
        }
    }
    ensure!(
        freed > ROUNDS * 2 * MIB,
        "only {freed} bytes were ever freed"
    );
    Ok(Outcome::Passed)
}

fn area(guest_page: u64, pages: u64, kind: Kind) -> RamArea {
    let pages = usize::try_from(pages).expect("a few thousand");
    assert!(kind != Kind::Huge || pages.is_multiple_of(HUGE_PAGE_PAGES));
    RamArea {
        guest_page,
        pages,
        kind,
    }
}

/// Repeatable pseudo-random numbers (xorshift).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        // The first numbers of small seeds have few bits.
        (self.0 >> 16) % limit
    }
}
