//! Tests every request of the API in every state of a machine, with two clients. One parses responses like upstream's
//! `ch-remote`; the other is generated from upstream's API description.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cloud_hypervisor_client::apis::DefaultApi;
use cloud_hypervisor_client::models;
use integration_tests::bare_metal::{self, kvm_opens};
use integration_tests::vmm::{PROCESS_DEADLINE, Vmm};
use integration_tests::wait::wait_for;
use serde_json::{Value, json};

/// A guest that never ends and never responds.
fn config(kernel: &Path) -> String {
    json!({
        "payload": { "kernel": kernel, "cmdline": "scenario=spin" },
        "memory": { "size": 256u64 << 20 },
        "cpus": { "boot_vcpus": 2, "max_vcpus": 2 },
        "balloon": { "size": 0, "free_page_reporting": true },
        "serial": { "mode": "Null" },
        "console": { "mode": "Off" },
        "a_field_of_the_future": true,
    })
    .to_string()
}

/// One request and its expected status.
type Step<'a> = (&'a str, &'a str, Option<&'a str>, u16);

fn walk(vmm: &Vmm, state: &str, steps: &[Step<'_>]) -> Result<()> {
    for (method, endpoint, body, status) in steps {
        let answer = vmm.request(method, endpoint, *body)?;
        ensure!(
            answer.status == *status,
            "{state}: {method} {endpoint}: {status} expected, got {answer:?}"
        );
        if *status >= 400 {
            let chain = answer.json()?;
            ensure!(
                chain
                    .as_array()
                    .is_some_and(|chain| !chain.is_empty() && chain.iter().all(Value::is_string)),
                "{state}: {method} {endpoint}: no error chain in {answer:?}"
            );
        }
    }
    Ok(())
}

/// There is no such disk.
const CORE: &str = r#"{"destination_url": "file:///nonexistent/core"}"#;
const ZONE_8K: &str = "{\"id\":\"mem0\",\"desired_ram\":8192}";
const DISK_8K: &str = "{\"id\":\"_disk0\",\"desired_size\":8192}";
/// As above.
const LIMIT: &str = "{\"id\":\"_disk0\"}";
const BALLOON_64M: &str = "{\"desired_balloon\":67108864}";

const WITHOUT_CONFIG: &[Step<'_>] = &[
    ("GET", "vmm.ping", None, 200),
    ("GET", "vm.info", None, 404),
    ("PUT", "vm.boot", None, 404),
    ("PUT", "vm.reboot", None, 404),
    ("PUT", "vm.resize", Some(BALLOON_64M), 404),
    ("PUT", "vm.pause", None, 500),
    ("PUT", "vm.resume", None, 500),
    ("PUT", "vm.shutdown", None, 500),
    ("PUT", "vm.power-button", None, 500),
    ("PUT", "vm.nmi", None, 500),
    ("PUT", "vm.coredump", Some(CORE), 500),
    ("PUT", "vm.resize-zone", Some(ZONE_8K), 404),
    ("PUT", "vm.resize-disk", Some(DISK_8K), 404),
    ("PUT", "vm.update-rate-limiter", Some(LIMIT), 404),
    ("GET", "vm.counters", None, 500),
    ("GET", "vm.balloon-stats", None, 500),
    ("GET", "vm.reclaim-stats", None, 500),
    ("GET", "vm.reclaim-thresholds", None, 404),
    ("PUT", "vm.reclaim-thresholds", Some("{}"), 404),
    ("PUT", "vm.delete", None, 204),
    ("GET", "vm.nonsense", None, 404),
    ("PUT", "vmm.ping", None, 400),
    ("GET", "vm.boot", None, 400),
    ("PUT", "vm.create", None, 400),
    ("PUT", "vm.create", Some("{"), 400),
    ("PUT", "vm.boot", Some("{}"), 400),
    // The configuration is validated at boot, not here.
    ("PUT", "vm.create", Some("{}"), 204),
    ("PUT", "vm.boot", None, 400),
    ("PUT", "vm.delete", None, 204),
    ("GET", "vm.info", None, 404),
];

const CREATED: &[Step<'_>] = &[
    ("GET", "vm.info", None, 200),
    ("PUT", "vm.create", Some("{\"payload\":{}}"), 500),
    ("PUT", "vm.reboot", None, 404),
    ("PUT", "vm.pause", None, 500),
    ("PUT", "vm.shutdown", None, 500),
    ("PUT", "vm.nmi", None, 500),
    ("PUT", "vm.coredump", Some(CORE), 500),
    ("PUT", "vm.resize-disk", Some(DISK_8K), 500),
    ("PUT", "vm.update-rate-limiter", Some(LIMIT), 404),
    ("GET", "vm.counters", None, 500),
    ("GET", "vm.reclaim-thresholds", None, 200),
    ("PUT", "vm.reclaim-thresholds", Some("{}"), 200),
    ("PUT", "vm.reclaim-thresholds", None, 400),
    (
        "PUT",
        "vm.reclaim-thresholds",
        Some("{\"remove_alerts\":[\"unknown\"]}"),
        400,
    ),
    ("PUT", "vm.resize", Some(BALLOON_64M), 204),
];

const RUNNING: &[Step<'_>] = &[
    ("GET", "vm.info", None, 200),
    ("PUT", "vm.create", Some("{\"payload\":{}}"), 500),
    ("PUT", "vm.boot", None, 500),
    ("GET", "vm.counters", None, 200),
    ("GET", "vm.reclaim-stats", None, 200),
    ("PUT", "vm.resize", Some(BALLOON_64M), 204),
    (
        "PUT",
        "vm.resize",
        Some("{\"desired_balloon\":\"much\"}"),
        400,
    ),
    ("PUT", "vm.resume", None, 500),
    ("PUT", "vm.power-button", None, 204),
    ("PUT", "vm.resize-disk", Some(DISK_8K), 404),
    ("PUT", "vm.update-rate-limiter", Some(LIMIT), 404),
    ("PUT", "vm.resize-zone", Some(ZONE_8K), 404),
    ("PUT", "vm.resize-zone", Some("{\"id\":\"mem0\"}"), 400),
    ("PUT", "vm.resize-disk", Some("{\"id\":\"_disk0\"}"), 400),
    ("PUT", "vm.update-rate-limiter", Some("{}"), 400),
    ("PUT", "vm.pause", None, 204),
    ("PUT", "vm.pause", None, 500),
    ("GET", "vm.info", None, 200),
    ("GET", "vm.reclaim-stats", None, 200),
    ("PUT", "vm.resume", None, 204),
    ("PUT", "vm.reboot", None, 204),
    ("PUT", "vm.shutdown", None, 204),
];

#[test]
fn every_request_in_every_state_answers_as_upstream_does() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let kernel = bare_metal::image()?;
    let mut vmm = Vmm::start(&[])?;
    walk(&vmm, "no config", WITHOUT_CONFIG)?;
    vmm.put("vm.create", Some(&config(&kernel)))?;
    walk(&vmm, "created", CREATED)?;
    let info = vmm.get("vm.info")?;
    ensure!(info["state"] == "Created", "{info:#}");
    ensure!(info["config"]["balloon"]["size"] == 64 << 20, "{info:#}");
    vmm.put("vm.boot", None)?;
    let info = vmm.get("vm.info")?;
    ensure!(info["state"] == "Running", "{info:#}");
    ensure!(
        info["device_tree"]["__balloon"]["pci_bdf"].is_string(),
        "{info:#}"
    );
    walk(&vmm, "running", RUNNING)?;
    let info = vmm.get("vm.info")?;
    ensure!(info["state"] == "Created", "after shutdown: {info:#}");
    walk(
        &vmm,
        "shut down",
        &[
            ("PUT", "vm.delete", None, 204),
            ("GET", "vm.info", None, 404),
        ],
    )?;
    let answer = vmm.put("vmm.shutdown", None)?;
    ensure!(answer.status == 200 && answer.body.is_none(), "{answer:?}");
    vmm.expect_clean_exit(PROCESS_DEADLINE)?;
    ensure!(!vmm.socket().exists(), "the API socket was left behind");
    Ok(())
}

/// The real thread measures every figure here, under its seccomp filter.
#[test]
fn alerts_on_a_running_machine_cross_once_and_outlive_a_reboot() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let kernel = bare_metal::image()?;
    let mut vmm = Vmm::start(&["--event-monitor", "path=@/events"])?;
    vmm.put("vm.create", Some(&config(&kernel)))?;
    vmm.put("vm.boot", None)?;
    let alert = |name: &str, figure: &str, direction: &str, enter: u64| json!({"name": name, "figure": figure, "direction": direction, "enter": enter});
    let change = json!({"alerts": [
        alert("resident", "resident_bytes", "above", 0),
        alert("counter", "__balloon/actual_bytes", "below", 1),
        alert("path", "report/failed_bytes", "below", 1),
        alert("silent", "resident_bytes", "above", 1 << 40),
    ]});
    vmm.put("vm.reclaim-thresholds", Some(&change.to_string()))?;
    let entered = |vmm: &Vmm| {
        let events = vmm.text("events");
        events.matches("\"reclaim-threshold-entered\"").count()
    };
    wait_for("three crossings", PROCESS_DEADLINE, || {
        ensure!(!vmm.has_ended()?, "the VMM ended: {}", vmm.stderr());
        Ok((entered(&vmm) >= 3).then_some(()))
    })?;
    vmm.put("vm.pause", None)?;
    vmm.put("vm.reboot", None)?;
    wait_for("a look at the next machine", PROCESS_DEADLINE, || {
        let answer = vmm.get("vm.reclaim-thresholds")?;
        let alerts = answer["alerts"].as_array().context("no alerts")?.clone();
        for alert in &alerts {
            let silent = alert["name"] == "silent";
            ensure!(alert["active"] == !silent, "{alert:#}");
            ensure!(alert["times_entered"] == u64::from(!silent), "{alert:#}");
        }
        let seen = alerts.iter().all(|alert| alert["value"].is_u64());
        Ok(seen.then_some(()))
    })?;
    ensure!(entered(&vmm) == 3, "{}", vmm.text("events"));
    vmm.put("vmm.shutdown", None)?;
    vmm.expect_clean_exit(PROCESS_DEADLINE)
}

#[test]
fn generated_client_steers_a_whole_life() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let kernel = bare_metal::image()?;
    let kernel = kernel.to_str().context("path is not UTF-8")?.to_owned();
    let mut vmm = Vmm::start(&[])?;
    let client = cloud_hypervisor_client::socket_based_api_client(vmm.socket());
    let life = async {
        let ping = client.vmm_ping_get().await?;
        assert!(!ping.version.is_empty());
        let mut config = models::VmConfig::new(models::PayloadConfig {
            kernel: Some(kernel),
            cmdline: Some("scenario=spin".into()),
            ..models::PayloadConfig::new()
        });
        config.memory = Some(models::MemoryConfig::new(256 << 20));
        config.balloon = Some(models::BalloonConfig::new(0));
        client.create_vm(config).await?;
        client.boot_vm().await?;
        let info = client.vm_info_get().await?;
        assert_eq!(info.state, models::VmState::Running);
        assert_eq!(info.memory_actual_size, Some(256 << 20));
        assert!(client.vm_counters_get().await?.contains_key("__balloon"));
        client
            .vm_resize_put(models::VmResize {
                desired_balloon: Some(64 << 20),
                ..models::VmResize::new()
            })
            .await?;
        client.pause_vm().await?;
        client.resume_vm().await?;
        client.power_button_vm().await?;
        client.reboot_vm().await?;
        client.shutdown_vm().await?;
        client.delete_vm().await?;
        client.shutdown_vmm().await
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime
        .block_on(async { tokio::time::timeout(Duration::from_secs(300), life).await })
        .context("the client hangs")?
        .map_err(|error| anyhow::anyhow!("{error:?}; {}", vmm.stderr()))?;
    vmm.expect_clean_exit(PROCESS_DEADLINE)
}
