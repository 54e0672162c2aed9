//! Tests hot-plug and unplug of devices, with the bare-metal guest.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use api::Client;
use integration_tests::bare_metal::{SCENARIO_DEADLINE, expect_all_passed, kvm_opens, start};
use integration_tests::descriptors::open_tap;
use integration_tests::literal_client::Answer;
use integration_tests::vmm::Vmm;
use integration_tests::wait::wait_for;
use serde_json::{Value, json};

fn wait_ready(vmm: &mut Vmm, what: &str) -> Result<()> {
    let line = format!("READY {what}");
    wait_for(&line, SCENARIO_DEADLINE, || {
        ensure!(!vmm.has_ended()?, "the VMM ended");
        Ok(vmm.text("serial").contains(&line).then_some(()))
    })
    .with_context(|| format!("serial: {}\nerrors: {}", vmm.text("serial"), vmm.stderr()))
}

fn put(vmm: &Vmm, endpoint: &str, body: &Value) -> Result<Answer> {
    vmm.request("PUT", endpoint, Some(&body.to_string()))
}

fn expect(answer: &Answer, status: u16) -> Result<()> {
    ensure!(answer.status == status, "{answer:?}");
    Ok(())
}

fn resize_balloon(vmm: &Vmm, bytes: u64) -> Result<()> {
    expect(
        &put(vmm, "vm.resize", &json!({"desired_balloon": bytes}))?,
        204,
    )
}

#[test]
fn disk_and_balloon_come_and_the_balloon_goes_when_it_is_empty() -> Result<()> {
    let scenario = "hotplug";
    disk_and_balloon_come(0, scenario, &[], "0000:00:03.0")
}

#[test]
fn disk_and_balloon_come_on_another_segment_and_the_balloon_goes() -> Result<()> {
    let scenario = "hotplug-on-segment-1";
    let platform = ["--platform", "num_pci_segments=2"];
    let rng = ["--rng", "src=/dev/urandom,pci_segment=1"];
    let arguments = [platform, rng].concat();
    disk_and_balloon_come(1, scenario, &arguments, "0001:00:02.0")
}

fn disk_and_balloon_come(
    segment: u16,
    scenario: &str,
    more: &[&str],
    balloon_bdf: &str,
) -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let image = tempfile::NamedTempFile::new()?;
    image.as_file().set_len(1 << 20)?;
    let arguments = [&["--event-monitor", "path=@/events"], more].concat();
    let mut vmm = start(scenario, &arguments)?;

    wait_ready(&mut vmm, "disk")?;
    let disk =
        json!({"path": image.path(), "image_type": "Raw", "id": "d", "pci_segment": segment});
    let added = put(&vmm, "vm.add-disk", &disk)?;
    expect(&added, 200)?;
    ensure!(added.json()?["id"] == "d", "{added:?}");
    let info = vmm.get("vm.info")?;
    for id in ["__rng", "d"] {
        let bdf = info["device_tree"][id]["pci_bdf"].as_str();
        let expected = format!("{segment:04x}:00:");
        ensure!(
            bdf.is_some_and(|bdf| bdf.starts_with(&expected)),
            "{info:#}"
        );
        let bar = &info["device_tree"][format!("_virtio-pci-{id}")]["resources"][0]["PciBar"];
        ensure!(
            bar["base"].as_u64() >= Some(1 << 32) && bar["type_"] == "Mmio64",
            "{info:#}"
        );
    }

    wait_ready(&mut vmm, "balloon")?;
    // Threads need a moment to get their names.
    wait_for("the disk's thread", Duration::from_secs(60), || {
        let (_, threads) = vmm.possessions()?;
        Ok(threads.contains("d_q0").then_some(()))
    })?;
    refused_additions_leave_nothing(&vmm, &image.path().display().to_string())?;
    let balloon = json!({"size": 0, "free_page_reporting": true, "pci_segment": segment});
    let added = put(&vmm, "vm.add-balloon", &balloon)?;
    expect(&added, 200)?;
    ensure!(added.json()?["id"] == "__balloon", "{added:?}");
    ensure!(added.json()?["bdf"] == balloon_bdf, "{added:?}");
    expect(&put(&vmm, "vm.add-balloon", &balloon)?, 400)?;

    wait_ready(&mut vmm, "inflated")?;
    let remove = || put(&vmm, "vm.remove-device", &json!({"id": "__balloon"}));
    let refused = remove()?;
    expect(&refused, 400)?;
    let cause = refused.json()?[2].to_string();
    ensure!(cause.contains(" holds 65536 bytes"), "{cause}");
    let stats = vmm.get("vm.reclaim-stats")?;
    ensure!(stats["inflate"]["discarded_bytes"] == 65536, "{stats:#}");
    ensure!(stats["ballooned_bytes"] == 65536, "{stats:#}");
    // Signals the guest to continue; it deflates completely.
    resize_balloon(&vmm, 4096)?;
    wait_for("an empty balloon", SCENARIO_DEADLINE, || {
        let stats = vmm.get("vm.reclaim-stats")?;
        Ok((stats["ballooned_bytes"] == 0).then_some(()))
    })?;
    // The balloon's target is still one page.
    expect(&remove()?, 400)?;
    resize_balloon(&vmm, 0)?;
    expect(&remove()?, 204)?;

    expect_all_passed(&mut vmm)?;
    vmm.expect_clean_exit(SCENARIO_DEADLINE)?;
    let events = vmm.text("events");
    ensure!(events.matches("\"added\"").count() == 2, "{events}");
    ensure!(
        events.matches("\"device-removed\"").count() == 1,
        "{events}"
    );
    Ok(())
}

/// A device that could not be added leaves nothing behind: no thread, no descriptor, no entry in the configuration.
fn refused_additions_leave_nothing(vmm: &Vmm, image: &str) -> Result<()> {
    let state = || -> Result<_> { Ok((vmm.possessions()?, vmm.get("vm.info")?)) };
    let before = state()?;
    for (status, body) in [
        (400, json!({"path": "/no/such/image"})),
        (400, json!({"path": "/"})),
        (409, json!({"path": image})),
        (409, json!({"path": image, "id": "d", "readonly": true})),
        (400, json!({"path": "/dev/null", "pci_device_id": 2})),
        (400, json!({"path": "/dev/null", "pci_segment": 2})),
        (400, json!({"path": "/dev/null", "pci_device_id": 32})),
        (400, json!({"path": "/dev/null", "num_queues": 99})),
        (400, json!({})),
    ] {
        let answer = put(vmm, "vm.add-disk", &body)?;
        expect(&answer, status).with_context(|| body.to_string())?;
    }
    expect(
        &put(vmm, "vm.add-net", &json!({"tap": "0123456789abcdef"}))?,
        400,
    )?;
    expect(&put(vmm, "vm.add-net", &json!({"fds": [7]}))?, 400)?;
    expect(
        &put(vmm, "vm.remove-device", &json!({"id": "nobody"}))?,
        404,
    )?;
    expect(&put(vmm, "vm.remove-device", &json!({"id": "__rng"}))?, 400)?;
    wait_for("what there was before", Duration::from_secs(60), || {
        Ok((state()? == before).then_some(()))
    })
    .with_context(|| format!("{before:?} became {:?}", state()))
}

#[test]
fn device_that_the_guest_does_not_let_go_is_gone_after_a_reboot() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let image = tempfile::NamedTempFile::new()?;
    image.as_file().set_len(1 << 20)?;
    let vmm = start("spin", &[])?;
    wait_for("running guest", SCENARIO_DEADLINE, || {
        let info = vmm.get("vm.info").ok();
        Ok(info.filter(|info| info["state"] == "Running"))
    })?;
    let disk = json!({"path": image.path(), "image_type": "Raw", "id": "d"});
    expect(&put(&vmm, "vm.add-disk", &disk)?, 200)?;
    let remove = || put(&vmm, "vm.remove-device", &json!({"id": "d"}));
    expect(&remove()?, 204)?;
    expect(&remove()?, 204)?;
    let info = vmm.get("vm.info")?;
    ensure!(info["device_tree"]["d"].is_object(), "{info:#}");
    ensure!(!info["config"].to_string().contains("\"d\""), "{info:#}");
    let refused = put(&vmm, "vm.add-disk", &disk)?;
    expect(&refused, 429)?;
    let cause = refused.json()?.to_string();
    ensure!(cause.contains("still being removed"), "{cause}");
    // The guest may still write to the image, so no other VM gets it, under any name.
    let other = start("spin", &[])?;
    wait_for("another running guest", SCENARIO_DEADLINE, || {
        let info = other.get("vm.info").ok();
        Ok(info.filter(|info| info["state"] == "Running"))
    })?;
    let again = json!({"path": image.path(), "image_type": "Raw", "id": "again"});
    for vmm in [&vmm, &other] {
        let refused = put(vmm, "vm.add-disk", &again)?;
        expect(&refused, 400)?;
        let cause = refused.json()?.to_string();
        ensure!(cause.contains("for writing: it is in use"), "{cause}");
    }
    vmm.put("vm.reboot", None)?;
    expect(&put(&other, "vm.add-disk", &again)?, 200)?;
    drop(other);
    expect(&remove()?, 404)?;
    // Its image is free again; a paused machine accepts it as well.
    vmm.put("vm.pause", None)?;
    expect(&put(&vmm, "vm.add-disk", &disk)?, 200)?;
    vmm.put("vm.resume", None)?;
    // Until no slot is left: the bridge, the entropy device and 30 disks.
    let image = image.path().display().to_string();
    expect(&remove()?, 204)?;
    vmm.put("vm.reboot", None)?;
    let shared = json!({"path": image, "image_type": "Raw", "readonly": true});
    for _ in 0..30 {
        expect(&put(&vmm, "vm.add-disk", &shared)?, 200)?;
    }
    expect(&put(&vmm, "vm.add-disk", &shared)?, 400)?;
    vmm.put("vm.reboot", None)?;
    let info = vmm.get("vm.info")?;
    let disks = info["config"]["disks"].as_array().map_or(0, Vec::len);
    ensure!(disks == 30, "{disks} disks");
    Ok(())
}

#[test]
fn tap_that_came_with_its_descriptor_is_kept_for_reboots_and_closed_with_the_device() -> Result<()>
{
    if !kvm_opens() {
        return Ok(());
    }
    let name = format!("hp{}", std::process::id());
    let tap = match open_tap(&name) {
        Ok(tap) => tap,
        Err(error) => {
            test_skip::skip(format!("{error:#}"));
            return Ok(());
        }
    };
    let vmm = start("spin", &[])?;
    wait_for("running guest", SCENARIO_DEADLINE, || {
        let info = vmm.get("vm.info").ok();
        Ok(info.filter(|info| info["state"] == "Running"))
    })?;
    let client = Client::new(vmm.socket());
    let add = json!({"id": "n", "fds": [0]}).to_string();
    let added = client.put_with_fds("vm.add-net", Some(&add), &[tap.as_raw_fd()])?;
    ensure!(added.is_some_and(|added| added.contains("\"n\"")));
    drop(tap);
    let interface = Path::new("/sys/class/net").join(&name);
    vmm.put("vm.reboot", None)?;
    let info = vmm.get("vm.info")?;
    ensure!(info["device_tree"]["n"].is_object(), "{info:#}");
    ensure!(interface.exists());
    // This guest releases nothing; the next machine does not have the device.
    expect(&put(&vmm, "vm.remove-device", &json!({"id": "n"}))?, 204)?;
    vmm.put("vm.reboot", None)?;
    wait_for("the tap to go", Duration::from_secs(60), || {
        Ok((!interface.exists()).then_some(()))
    })
}
