//! Tests the balloon with a real guest: inflation, deflation, out of memory, reporting.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::control_group::Group;
use integration_tests::linux::{Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::tests;
use integration_tests::wait::wait_for;
use serde_json::{Value, json};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        balloon_gives_way_before_the_guest_runs_out_of_memory,
        charge_falls_when_a_guest_returns_parts_of_huge_pages,
        reporting_private_memory_comes_back,
        reporting_shared_memory_comes_back,
        hinting_gives_free_memory_back_and_leaves_used_memory_alone,
        statistics_are_polled,
        alert_and_target_are_told_as_memory_goes_and_comes_back,
    ]
}

/// Tests that share a guest with a balloon, and one that ends it.
pub(crate) fn sharing() -> Vec<Test> {
    tests![
        statistics_carry_every_tag,
        balloon_target_survives_a_reboot,
        balloon_inflates_and_deflates,
    ]
}

/// A test that shares a guest with reporting.
pub(crate) fn sharing_reporting() -> Vec<Test> {
    tests![hinting_not_configured_is_refused]
}

/// A test that ends a shared guest with two vCPUs and reporting.
pub(crate) fn sharing_reporting_pair() -> Vec<Test> {
    tests![reporting_leaves_used_memory_alone]
}

/// A machine with a balloon only.
const WITH_BALLOON: Machine<'_> = Machine {
    arguments: &["--balloon", "size=0"],
    ..Machine::DEFAULT
};

/// A machine with a balloon that accepts reports.
pub(crate) const REPORTING: Machine<'_> = Machine {
    arguments: &["--balloon", "size=0,free_page_reporting=on"],
    ..Machine::DEFAULT
};

/// The same with two vCPUs.
pub(crate) const REPORTING_PAIR: Machine<'_> = Machine {
    cpus: "boot=2",
    ..REPORTING
};

/// Mainline reports two seconds after a free, then a sixteenth every two seconds.
pub(crate) const RECLAIM_DEADLINE: Duration = Duration::from_secs(120);

/// One figure of `vm.reclaim-stats`.
pub(crate) fn figure(guest: &Guest, pointer: &str) -> Result<u64> {
    let stats = guest.vmm.get("vm.reclaim-stats")?;
    stats
        .pointer(pointer)
        .and_then(Value::as_u64)
        .with_context(|| format!("no {pointer} in {stats:#}"))
}

pub(crate) fn resize(guest: &Guest, bytes: u64) -> Result<()> {
    let body = format!("{{\"desired_balloon\":{bytes}}}");
    guest.vmm.put("vm.resize", Some(&body)).map(drop)
}

/// Waits until `vm.info` shows this much memory.
pub(crate) fn wait_actual(guest: &Guest, bytes: u64) -> Result<()> {
    wait_for("memory_actual_size", RECLAIM_DEADLINE, || {
        let info = guest.vmm.get("vm.info")?;
        Ok((info["memory_actual_size"] == bytes).then_some(()))
    })
}

fn balloon_inflates_and_deflates() -> Result<Outcome> {
    let mut guest = WITH_BALLOON.take_over()?;
    // Touched and freed memory: without reporting, it stays resident on the host.
    guest.command("alloc 200M")?;
    guest.command("free")?;
    let before = figure(&guest, "/resident_bytes")?;
    ensure!(before > 200 * MIB, "resident {} MiB", before / MIB);
    let total = guest.memory_bytes("total")?;
    // Counted since the VMM started.
    let earlier = figure(&guest, "/inflate/discarded_bytes")?;

    resize(&guest, 384 * MIB)?;
    wait_actual(&guest, 128 * MIB)?;
    // The figure is a sample, and the balloon may have been inflated since the last one.
    wait_for("the balloon's memory on the host", RECLAIM_DEADLINE, || {
        let inflated = figure(&guest, "/resident_bytes")?;
        Ok((inflated + 130 * MIB < before).then_some(()))
    })
    .with_context(|| format!("{} MiB were resident", before / MIB))?;
    ensure!(figure(&guest, "/ballooned_bytes")? == 384 * MIB);
    ensure!(figure(&guest, "/inflate/discarded_bytes")? == earlier + 384 * MIB);
    ensure!(figure(&guest, "/inflate/failed_bytes")? == 0);
    ensure!(
        guest.memory_bytes("total")? + 380 * MIB < total,
        "the guest keeps its memory"
    );

    resize(&guest, 0)?;
    wait_actual(&guest, 512 * MIB)?;
    guest.command("alloc 200M seed=5")?;
    guest.command("verify")?;
    Ok(Outcome::Passed)
}

fn balloon_gives_way_before_the_guest_runs_out_of_memory() -> Result<Outcome> {
    let mut guest = Machine {
        arguments: &["--balloon", "size=300M,deflate_on_oom=on"],
        ..Machine::default()
    }
    .serve()?;
    wait_actual(&guest, 212 * MIB)?;
    // More memory than is left outside the balloon.
    guest.command("alloc 300M seed=9")?;
    guest.command("verify")?;
    let ballooned = figure(&guest, "/ballooned_bytes")?;
    ensure!(
        ballooned < 300 * MIB,
        "{} MiB still ballooned",
        ballooned / MIB
    );
    Ok(Outcome::Passed)
}

/// Memory of a guest, as the host shows it.
struct Held {
    /// From the page tables.
    resident: u64,
    /// Charged to the VMM's control group.
    charged: u64,
}

impl Held {
    fn by(guest: &Guest) -> Result<Self> {
        let stats = guest.vmm.get("vm.reclaim-stats")?;
        ensure!(stats["charged_method"] == "cgroup", "{stats:#}");
        let bytes = |name: &str| stats[name].as_u64().with_context(|| stats.to_string());
        Ok(Self {
            resident: bytes("resident_bytes")?,
            charged: bytes("charged_bytes")?,
        })
    }
}

/// The kernel keeps a huge page as long as a part of it is in use, unless the VMM has it split. Residency does not show
/// that.
fn charge_falls_when_a_guest_returns_parts_of_huge_pages() -> Result<Outcome> {
    const USED: u64 = 320 * MIB;
    /// Free memory in larger blocks that a balloon of any driver leaves.
    const LARGE_LEFT: u64 = 24 * MIB;
    /// Less than the guest frees in single pages.
    const RETURNED: u64 = 128 * MIB;
    const RETURNED_AT_LEAST: u64 = 96 * MIB;
    /// The VMM's own memory.
    const OWN_MAX: u64 = 48 * MIB;
    if !Group::is_possible() {
        let why = "control groups of this host do not account for memory";
        return Ok(Outcome::Skipped(why.to_owned()));
    }
    let group = Group::new(1024 * MIB)?;
    let mut entered = Ok(());
    let vmm = WITH_BALLOON.start_with(|command| entered = group.enter(command))?;
    entered?;
    let mut guest = Guest::on_socket(vmm, "serial.sock")?;
    guest.wait_init()?;
    guest.wait_serving()?;
    guest.command(&format!("alloc {USED} seed=11"))?;
    let huge = huge_page_bytes(&guest)?;
    if huge < USED / 2 {
        let why = format!("the host gave the guest {} MiB of huge pages", huge / MIB);
        return Ok(Outcome::Skipped(why));
    }
    guest.command("pick 0 4K")?;
    // Proactive compaction would move used pages between the free ones, and so make large blocks.
    guest.shell("echo 0 > /proc/sys/vm/compaction_proactiveness")?;
    // A driver that inflates by blocks prefers 2 MiB to single pages. First take nearly all free memory, which is in
    // large blocks.
    let large = guest.memory_bytes("free")?.saturating_sub(LARGE_LEFT) / MIB * MIB;
    resize(&guest, large)?;
    wait_actual(&guest, 512 * MIB - large)?;
    let partial_before = figure(&guest, "/inflate/discarded_partial_bytes")?;
    let before = Held::by(&guest)?;
    guest.command("drop 0")?;
    // The rest comes from the freed single pages, before Linux divides larger free blocks.
    resize(&guest, large + RETURNED)?;
    wait_actual(&guest, 512 * MIB - large - RETURNED)?;
    let after = Held::by(&guest)?;
    let partial = figure(&guest, "/inflate/discarded_partial_bytes")? - partial_before;
    let resident = before.resident.saturating_sub(after.resident);
    let charged = before.charged.saturating_sub(after.charged);
    println!(
        "     {} MiB of parts of huge pages: {} MiB less resident, {} MiB less charged",
        partial / MIB,
        resident / MIB,
        charged / MIB
    );
    ensure!(partial >= RETURNED_AT_LEAST, "{partial} bytes in parts");
    ensure!(resident >= RETURNED_AT_LEAST, "{resident} bytes less");
    ensure!(charged >= RETURNED_AT_LEAST, "{charged} bytes less charged");
    ensure!(after.charged <= after.resident + OWN_MAX);
    resize(&guest, 0)?;
    wait_actual(&guest, 512 * MIB)?;
    guest.command("refill 0")?;
    guest.command("verify")?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

/// Memory that the VMM's process has in transparent huge pages.
fn huge_page_bytes(guest: &Guest) -> Result<u64> {
    let path = format!("/proc/{}/smaps_rollup", guest.vmm.pid());
    let text = std::fs::read_to_string(path)?;
    let mut lines = text.lines();
    let line = lines.find_map(|line| line.strip_prefix("AnonHugePages:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.context("no AnonHugePages")?.parse::<u64>()? << 10)
}

fn alert_and_target_are_told_as_memory_goes_and_comes_back() -> Result<Outcome> {
    let mut guest = Machine {
        arguments: &["--balloon", "size=0", "--event-monitor", "path=@/events"],
        ..Machine::default()
    }
    .serve()?;
    let alert = json!({
        "name": "big", "figure": "resident_bytes", "direction": "above",
        "enter": 350 * MIB, "leave": 300 * MIB,
    });
    let change = json!({"alerts": [alert]}).to_string();
    guest.vmm.put("vm.reclaim-thresholds", Some(&change))?;
    let wait_told = |guest: &Guest, event: &str| {
        wait_for(event, RECLAIM_DEADLINE, || {
            Ok(guest.vmm.text("events").contains(event).then_some(()))
        })
    };
    guest.command("alloc 350M")?;
    wait_told(&guest, "reclaim-threshold-entered")?;
    guest.command("free")?;
    resize(&guest, 300 * MIB)?;
    wait_told(&guest, "balloon-target-reached")?;
    wait_told(&guest, "reclaim-threshold-left")?;
    let thresholds = guest.vmm.get("vm.reclaim-thresholds")?;
    let alert = &thresholds["alerts"][0];
    ensure!(
        alert["active"] == false && alert["times_entered"] == 1,
        "{alert:#}"
    );
    ensure!(!guest.vmm.text("events").contains("balloon-stuck"));
    Ok(Outcome::Passed)
}

/// Touches much of a guest's memory, frees it, and waits until it returns to the host.
fn comes_back(memory: &str, configured: u64, used: u64) -> Result<Outcome> {
    let mut guest = Machine {
        memory,
        arguments: &["--balloon", "size=0,free_page_reporting=on"],
        ..Machine::default()
    }
    .serve()?;
    guest.command(&format!("alloc {used}"))?;
    let touched = figure(&guest, "/resident_bytes")?;
    ensure!(touched > used, "resident {} MiB", touched / MIB);
    guest.command("free")?;
    let resident = wait_for("the guest's memory on the host", RECLAIM_DEADLINE, || {
        let resident = figure(&guest, "/resident_bytes")?;
        Ok((resident < 150 * MIB).then_some(resident))
    })
    .with_context(|| {
        format!(
            "{:#}",
            guest.vmm.get("vm.reclaim-stats").unwrap_or_default()
        )
    })?;
    let stats = guest.vmm.get("vm.reclaim-stats")?;
    ensure!(stats["reporting"]["active"] == true, "{stats:#}");
    ensure!(stats["report"]["failed_bytes"] == 0, "{stats:#}");
    ensure!(
        stats["reclaimed_bytes"].as_u64() >= Some(configured - 150 * MIB),
        "{stats:#}"
    );
    println!(
        "     {memory}: {} → {} MiB resident, latency {}",
        touched / MIB,
        resident / MIB,
        stats["report"]["latency_us"]
    );
    // The memory can be used again.
    guest.command(&format!("alloc {} seed=11", used / 2))?;
    guest.command("verify")?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

fn reporting_private_memory_comes_back() -> Result<Outcome> {
    comes_back("size=1G", 1 << 30, 700 * MIB)
}

fn reporting_shared_memory_comes_back() -> Result<Outcome> {
    comes_back("size=512M,shared=on", 512 * MIB, 300 * MIB)
}

/// Memory held through many rounds of freeing and reporting keeps its contents.
fn reporting_leaves_used_memory_alone() -> Result<Outcome> {
    let mut guest = REPORTING_PAIR.take_over()?;
    guest.command("alloc 64M seed=77")?;
    for round in 1..=3 {
        guest.command(&format!("alloc 128M seed={round}"))?;
        guest.command(&format!("verify {round}"))?;
        let before = figure(&guest, "/report/discarded_bytes")?;
        guest.command(&format!("free {round}"))?;
        wait_for("another report", RECLAIM_DEADLINE, || {
            let now = figure(&guest, "/report/discarded_bytes")?;
            Ok((now > before + 64 * MIB).then_some(()))
        })?;
        guest.command("verify 0")?;
    }
    Ok(Outcome::Passed)
}

fn hinting(guest: &Guest, action: &str) -> Result<()> {
    let body = format!("{{\"action\":\"{action}\"}}");
    guest.vmm.put("vm.balloon-hinting", Some(&body)).map(drop)
}

/// Requests a run and waits until the guest has hinted all its free memory.
fn hint_once(guest: &Guest) -> Result<()> {
    let before = figure(guest, "/hinting/runs_completed")?;
    hinting(guest, "start")?;
    wait_for("the end of the run", RECLAIM_DEADLINE, || {
        let now = figure(guest, "/hinting/runs_completed")?;
        Ok((now > before).then_some(()))
    })
}

fn hinting_gives_free_memory_back_and_leaves_used_memory_alone() -> Result<Outcome> {
    let mut guest = Machine {
        cpus: "boot=2",
        memory: "size=1G",
        // With reporting on, the queue numbers are those of a guest with all features. Mainline waits for seconds
        // before it reports, so memory that returns immediately was hinted.
        arguments: &[
            "--balloon",
            "size=0,free_page_hinting=on,free_page_reporting=on",
        ],
        ..Machine::default()
    }
    .serve()?;
    guest.command("alloc 200M seed=3")?;
    guest.command("alloc 500M")?;
    let touched = figure(&guest, "/resident_bytes")?;
    guest.command("free 1")?;
    hint_once(&guest)?;
    let stats = guest.vmm.get("vm.reclaim-stats")?;
    // The measurement may be one second old.
    let resident = wait_for("the hinted memory on the host", RECLAIM_DEADLINE, || {
        let resident = figure(&guest, "/resident_bytes")?;
        Ok((resident + 400 * MIB < touched).then_some(resident))
    })
    .with_context(|| format!("{stats:#}"))?;
    ensure!(
        figure(&guest, "/hint/discarded_bytes")? > 400 * MIB,
        "{stats:#}"
    );
    ensure!(figure(&guest, "/hint/failed_bytes")? == 0, "{stats:#}");
    ensure!(
        stats["hint"]["skipped_bytes"] == serde_json::json!({}),
        "{stats:#}"
    );
    println!(
        "     {} → {} MiB resident, latency {}",
        touched / MIB,
        resident / MIB,
        stats["hint"]["latency_us"]
    );
    // The guest has its memory again; while it fills it, the next runs take the rest.
    for id in 2..8 {
        hinting(&guest, "start")?;
        guest.command(&format!("alloc 500M seed={id}"))?;
        guest.command("verify")?;
        guest.command(&format!("free {id}"))?;
        hinting(&guest, "stop")?;
        guest.command("verify 0")?;
    }
    Ok(Outcome::Passed)
}

fn hinting_not_configured_is_refused() -> Result<Outcome> {
    REPORTING.share(|guest| {
        let refused = hinting(guest, "start");
        ensure!(refused.is_err(), "it was taken");
        ensure!(figure(guest, "/hinting/runs_requested")? == 0);
        Ok(Outcome::Passed)
    })
}

fn statistics_carry_every_tag() -> Result<Outcome> {
    WITH_BALLOON.share(|guest| {
        let answer = guest.vmm.get("vm.balloon-stats")?;
        let stats = answer["stats"].as_object().context("stats")?;
        ensure!(
            stats.len() == 16,
            "{} of 16 statistics: {answer:#}",
            stats.len()
        );
        let total = guest.memory_bytes("total")?;
        ensure!(
            answer["stats"]["total_memory"] == total,
            "{answer:#}, guest {total}"
        );
        Ok(Outcome::Passed)
    })
}

/// Statistics arrive without a request.
fn statistics_are_polled() -> Result<Outcome> {
    let mut guest = Machine {
        arguments: &["--balloon", "size=0,stats_poll_ms=200"],
        ..Machine::default()
    }
    .serve()?;
    guest.command("alloc 200M")?;
    let total = guest.memory_bytes("total")?;
    wait_for(
        "a sample that shows the memory in use",
        RECLAIM_DEADLINE,
        || {
            let stats = guest.vmm.get("vm.reclaim-stats")?;
            let free = stats
                .pointer("/guest/stats/free_memory")
                .and_then(Value::as_u64);
            Ok(free.filter(|free| free + 200 * MIB <= total))
        },
    )?;
    Ok(Outcome::Passed)
}

fn balloon_target_survives_a_reboot() -> Result<Outcome> {
    WITH_BALLOON.share(|guest| {
        resize(guest, 128 * MIB)?;
        wait_actual(guest, 384 * MIB)?;
        guest.vmm.put("vm.reboot", None)?;
        guest.wait_init()?;
        wait_actual(guest, 384 * MIB)?;
        resize(guest, 0)?;
        wait_actual(guest, 512 * MIB)?;
        Ok(Outcome::Passed)
    })
}
