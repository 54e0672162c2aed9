//! Tests control of a guest's reporting: the guest without an operating system follows a policy, does not support one,
//! or lies about it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::bare_metal::{SCENARIO_DEADLINE, kvm_opens, start};
use integration_tests::vmm::Vmm;
use integration_tests::wait::wait_for;
use serde_json::Value;

const POLICY: &[&str] = &[
    "--balloon",
    "size=0,free_page_reporting=on,reporting_policy=on",
];
const PLAIN: &[&str] = &["--balloon", "size=0,free_page_reporting=on"];
const PAUSE: &str = r#"{"action": "pause"}"#;
const RESUME: &str = r#"{"action": "resume"}"#;
const REPORT_NOW: &str = r#"{"action": "report-now"}"#;

/// Starts it and waits until its driver has started this many times.
fn started(scenario: &str, arguments: &[&str]) -> Result<Vmm> {
    let arguments = [arguments, &["--event-monitor", "path=@/events"]].concat();
    let mut vmm = start(scenario, &arguments)?;
    vmm.wait_api()?;
    wait_for("the guest's driver", SCENARIO_DEADLINE, || {
        ensure!(!vmm.has_ended()?, "{}", vmm.stderr());
        Ok(vmm.text("serial").contains("READY").then_some(()))
    })
    .with_context(|| vmm.text("serial"))?;
    Ok(vmm)
}

fn steer(vmm: &Vmm, body: &str) -> Result<Value> {
    let answer = vmm.request("PUT", "vm.balloon-reporting", Some(body))?;
    ensure!(answer.status == 200, "{answer:?}");
    Ok(serde_json::from_str(
        answer.body.as_deref().unwrap_or_default(),
    )?)
}

fn figure(stats: &Value, path: &str) -> u64 {
    stats.pointer(path).and_then(Value::as_u64).unwrap_or(0)
}

/// Waits until `condition` holds of the statistics and returns them.
fn stats_when(vmm: &Vmm, what: &str, condition: impl Fn(&Value) -> bool) -> Result<Value> {
    wait_for(what, SCENARIO_DEADLINE, || {
        let stats = vmm.get("vm.reclaim-stats")?;
        Ok(condition(&stats).then_some(stats))
    })
    .with_context(|| format!("{:#}", vmm.get("vm.reclaim-stats").unwrap_or_default()))
}

/// Waits for another report, whether it is discarded or not.
fn next_report(vmm: &Vmm) -> Result<Value> {
    let before = figure(&vmm.get("vm.reclaim-stats")?, "/report/requested_bytes");
    stats_when(vmm, "another report", |stats| {
        figure(stats, "/report/requested_bytes") > before
    })
}

/// Sets a policy and waits until the guest follows all of it.
fn set_policy(vmm: &Vmm, delay_ms: u64) -> Result<()> {
    let change = format!(r#"{{"reporting_policy": {{"delay_ms_max": {delay_ms}}}}}"#);
    vmm.put("vm.reclaim-thresholds", Some(&change))?;
    in_effect(vmm)
}

fn in_effect(vmm: &Vmm) -> Result<()> {
    wait_for("the policy to be in effect", SCENARIO_DEADLINE, || {
        let policy = vmm.get("vm.reclaim-thresholds")?["reporting_policy"].clone();
        Ok((policy["in_effect"] == true).then_some(()))
    })
}

/// Waits for an event; the balloon is evaluated once per second.
fn event_told(vmm: &Vmm, event: &str) -> Result<()> {
    wait_for(event, Duration::from_secs(60), || {
        Ok(vmm.text("events").contains(event).then_some(()))
    })
}

fn ends(mut vmm: Vmm) -> Result<()> {
    vmm.put("vmm.shutdown", None)?;
    vmm.expect_clean_exit(SCENARIO_DEADLINE)
}

#[test]
fn guest_that_takes_a_policy_is_steered_and_kept_so_over_a_reboot() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let vmm = started("policy", POLICY)?;
    let told = vmm.get("vm.reclaim-thresholds")?["reporting_policy"].clone();
    ensure!(told["in_effect"] == false, "{told:#}");
    set_policy(&vmm, 70)?;
    let told = vmm.get("vm.reclaim-thresholds")?["reporting_policy"].clone();
    ensure!(told["settings"]["pause"]["in_effect"] == true, "{told:#}");
    ensure!(
        told["settings"]["report_again"]["reason"].is_string(),
        "{told:#}"
    );

    let stats = next_report(&vmm)?;
    for (name, value) in [
        ("pending_bytes", 2 << 20),
        ("reported_bytes", 4 << 20),
        ("batches", 7),
        ("isolation_failures", 3),
    ] {
        let told = figure(&stats, &format!("/guest/reporting/{name}"));
        ensure!(told == value, "{name}: {stats:#}");
    }

    let paused = steer(&vmm, PAUSE)?;
    ensure!(paused["paused_by"] == "guest", "{paused:#}");
    event_told(&vmm, "reporting-paused")?;
    let still = figure(&vmm.get("vm.reclaim-stats")?, "/report/requested_bytes");
    // It needs two iterations to follow this, and reports nothing.
    set_policy(&vmm, 80)?;
    set_policy(&vmm, 90)?;
    let stats = vmm.get("vm.reclaim-stats")?;
    ensure!(
        figure(&stats, "/report/requested_bytes") == still,
        "{stats:#}"
    );
    refused(&vmm)?;

    vmm.put("vm.reboot", None)?;
    let stats = stats_when(&vmm, "the pause of the next machine", |stats| {
        stats["reporting"]["paused_by"] == "guest"
    })?;
    in_effect(&vmm)?;
    ensure!(figure(&stats, "/report/requested_bytes") == 0, "{stats:#}");

    steer(&vmm, RESUME)?;
    let stats = next_report(&vmm)?;
    ensure!(stats["reporting"]["active"] == true, "{stats:#}");
    event_told(&vmm, "reporting-resumed")?;
    event_told(&vmm, "reporting-policy-acknowledged")?;
    let asked = steer(&vmm, REPORT_NOW)?;
    let id = figure(&asked, "/report_now/id");
    stats_when(&vmm, "a report of everything", |stats| {
        let wish = &stats["reporting"]["report_now"];
        wish["done_id"] == id && wish["pending"] == false
    })?;
    event_told(&vmm, "report-now-done")?;
    ends(vmm)
}

/// `report-now` is a client error here.
fn refused(vmm: &Vmm) -> Result<()> {
    let answer = vmm.request("PUT", "vm.balloon-reporting", Some(REPORT_NOW))?;
    ensure!(answer.status == 400, "{answer:?}");
    Ok(())
}

#[test]
fn guest_without_a_policy_is_paused_by_the_device() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let vmm = started("policy", PLAIN)?;
    refused(&vmm)?;
    next_report(&vmm)?;
    let paused = steer(&vmm, PAUSE)?;
    ensure!(paused["paused_by"] == "device", "{paused:#}");
    nothing_is_discarded(&vmm)?;
    steer(&vmm, RESUME)?;
    let before = figure(&vmm.get("vm.reclaim-stats")?, "/report/discarded_bytes");
    stats_when(&vmm, "a report that is discarded", |stats| {
        figure(stats, "/report/discarded_bytes") > before
    })?;
    ends(vmm)
}

/// Checks that nothing is discarded while reports keep arriving.
fn nothing_is_discarded(vmm: &Vmm) -> Result<()> {
    let before = figure(&vmm.get("vm.reclaim-stats")?, "/report/discarded_bytes");
    next_report(vmm)?;
    let stats = next_report(vmm)?;
    ensure!(
        figure(&stats, "/report/discarded_bytes") == before
            && figure(&stats, "/report/skipped_bytes/reporting_paused") > 0
            && stats["reporting"]["active"] == false,
        "{stats:#}"
    );
    Ok(())
}

#[test]
fn guest_that_lies_about_the_policy_is_contained_and_counted() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let vmm = started("policy-lies", POLICY)?;
    set_policy(&vmm, 70)?;
    next_report(&vmm)?;
    // It confirms, but continues to report.
    let paused = steer(&vmm, PAUSE)?;
    ensure!(paused["state"] == "paused", "{paused:#}");
    nothing_is_discarded(&vmm)?;
    let counters = vmm.get("vm.counters")?["__balloon"].clone();
    for name in ["config_writes_ignored", "policy_words_invalid"] {
        ensure!(figure(&counters, &format!("/{name}")) > 0, "{counters:#}");
    }
    let policy = vmm.get("vm.reclaim-thresholds")?["reporting_policy"].clone();
    ensure!(policy["delay_ms_max"] == 70, "{policy:#}");
    let lines = vmm.stderr().lines().count();
    ensure!(lines < 10, "{}", vmm.stderr());
    ends(vmm)
}
