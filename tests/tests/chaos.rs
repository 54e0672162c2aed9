//! Tests clients that change a machine at random. The guest has no operating system, and follows each change
//! immediately.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::bare_metal::{SCENARIO_DEADLINE, expect_all_passed, kvm_opens, start};
use integration_tests::chaos::{
    Belongings, KEPT_DISK, Limits, Progress, Upheavals, host_has_taps, length_and_seed,
    run_clients, settle,
};
use integration_tests::guest_at_work::END_BYTES;
use integration_tests::vmm::Vmm;
use integration_tests::wait::wait_for;
use serde_json::json;

const LENGTH: Duration = Duration::from_secs(10);
/// Further time in which each change must have been accepted once.
const LENGTH_MAX: Duration = Duration::from_secs(120);
/// Rounds of the guest between two looks at it.
const ROUNDS_MIN: u64 = 16;

/// The rounds of all boots: one line for 16.
fn rounds(vmm: &mut Vmm) -> Result<u64> {
    ensure!(!vmm.has_ended()?, "the VMM ended: {}", vmm.stderr());
    let text = vmm.text("serial");
    ensure!(!text.contains("FAIL "), "the guest says:\n{text}");
    Ok(16 * text.matches("ROUND ").count() as u64)
}

fn wait_rounds(vmm: &mut Vmm, wanted: u64, progress: &Progress) -> Result<()> {
    wait_for("rounds of the guest", SCENARIO_DEADLINE, || {
        let so_far = rounds(vmm)?;
        progress.set(so_far);
        Ok((so_far >= wanted).then_some(()))
    })
}

#[test]
fn guest_loses_nothing_and_the_vmm_keeps_nothing_while_clients_change_the_machine() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let limits = Limits {
        vcpus: (1, 4),
        ram_mib: (256, 384),
        balloon_bytes: 256 * 4096,
        has_taps: host_has_taps(),
    };
    let (length, seed) = length_and_seed(LENGTH)?;
    let image = tempfile::NamedTempFile::new()?;
    image.as_file().set_len(1 << 20)?;
    let disk = format!(
        "path={},image_type=raw,id={KEPT_DISK}",
        image.path().display()
    );
    let mut vmm = start(
        "chaos",
        &[
            "--cpus",
            "boot=1,max=4",
            "--memory",
            "size=256M,hotplug_method=virtio-mem,hotplug_size=128M",
            "--disk",
            &disk,
            "--balloon",
            "size=0,free_page_reporting=on",
        ],
    )?;
    vmm.wait_api()?;
    let progress = Progress::default();
    wait_rounds(&mut vmm, ROUNDS_MIN, &progress)?;
    let before = Belongings::of(&vmm)?;
    let started = Instant::now();
    let mut upheavals = Upheavals::new(seed);
    let place = (vmm.socket(), vmm.folder().to_owned());
    let done = run_clients(place, &limits, seed, &progress, || {
        let so_far = rounds(&mut vmm)?;
        wait_rounds(&mut vmm, so_far + ROUNDS_MIN, &progress)?;
        upheavals.next(&vmm)?;
        let is_long = upheavals.are_of_each_kind() && started.elapsed() >= length;
        Ok(is_long && (progress.has_all(&limits) || started.elapsed() >= LENGTH_MAX + length))
    });
    let done = done.with_context(|| format!("CHAOS_SEED={seed}"))?;
    println!("     {} rounds, {upheavals}, {done}", rounds(&mut vmm)?);
    done.expect_all(&limits)?;
    settle(&vmm, &limits)?;
    // Nothing may come later.
    let so_far = rounds(&mut vmm)?;
    wait_rounds(&mut vmm, so_far + ROUNDS_MIN, &progress)?;
    before.expect_no_more(&vmm)?;
    let end = json!({"desired_balloon": END_BYTES}).to_string();
    vmm.put("vm.resize", Some(&end))?;
    expect_all_passed(&mut vmm)?;
    vmm.expect_clean_exit(SCENARIO_DEADLINE)
}
