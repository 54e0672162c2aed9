//! Tests kernels of both formats, with few and many vCPUs, and with little and much memory.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use integration_tests::linux::{BOOT_DEADLINE, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::paths;
use integration_tests::shared;
use integration_tests::tests;
use integration_tests::vmm::{PROCESS_DEADLINE, Vmm};
use integration_tests::wait::wait_for;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        pvh_kernel_with_one_vcpu_boots,
        bzimage_with_four_vcpus_boots,
        pvh_kernel_with_sixteen_vcpus_boots,
        memory_around_the_pci_hole_is_all_there,
        topology_is_what_was_asked_for,
        affinity_pins_the_vcpu_thread,
        guest_that_sees_hyperv_still_uses_kvm,
        guest_without_initramfs_starts_over_and_over,
    ]
}

/// Tests that share a guest.
pub(crate) fn sharing() -> Vec<Test> {
    tests![clock_is_kvmclock, real_time_clock_tells_the_hosts_time]
}

/// Boots, compares the number of processors and ends cleanly.
fn boots_with(kernel: &str, cpus: &str, count: u32) -> Result<Outcome> {
    let mut guest = Machine {
        kernel,
        cpus,
        ..Machine::default()
    }
    .serve()?;
    let text = guest.shell("echo processors $(nproc)")?;
    ensure!(
        text.contains(&format!("processors {count}\n"))
            || text.contains(&format!("processors {count}\r")),
        "{text}"
    );
    guest.end_cleanly()?;
    ensure!(
        !guest.vmm.socket().exists(),
        "the API socket was left behind"
    );
    Ok(Outcome::Passed)
}

fn pvh_kernel_with_one_vcpu_boots() -> Result<Outcome> {
    boots_with("vmlinux", "boot=1", 1)
}

fn bzimage_with_four_vcpus_boots() -> Result<Outcome> {
    boots_with("bzImage", "boot=4", 4)
}

fn pvh_kernel_with_sixteen_vcpus_boots() -> Result<Outcome> {
    boots_with("vmlinux", "boot=16", 16)
}

fn memory_around_the_pci_hole_is_all_there() -> Result<Outcome> {
    let mut guest = Machine {
        memory: "size=6G",
        ..Machine::default()
    }
    .serve()?;
    let total = guest.memory_bytes("total")?;
    // The kernel reserves some memory; the part above the hole is half of the total.
    ensure!(total > 5800 << 20, "the guest sees {} MiB", total >> 20);
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

fn topology_is_what_was_asked_for() -> Result<Outcome> {
    let mut guest = Machine {
        cpus: "boot=4,topology=2:2:1:1",
        ..Machine::default()
    }
    .serve()?;
    let text = guest.shell(
        "cd /sys/devices/system/cpu; echo T $(cat cpu0/topology/thread_siblings_list) \
         C $(cat cpu0/topology/core_siblings_list) P $(cat cpu3/topology/physical_package_id)",
    )?;
    ensure!(text.contains("T 0-1 C 0-3 P 0"), "{text}");
    Ok(Outcome::Passed)
}

/// Linux looks for every hypervisor it knows, and prefers KVM. A vCPU that comes later is like the others.
fn guest_that_sees_hyperv_still_uses_kvm() -> Result<Outcome> {
    let machine = Machine {
        cpus: "boot=1,max=2,kvm_hyperv=on",
        ..Machine::default()
    };
    let mut guest = match machine.serve() {
        Err(error) if format!("{error:#}").contains("no support for kvm_hyperv") => {
            return Ok(Outcome::Skipped("the host's KVM has no Hyper-V".to_owned()));
        }
        served => served?,
    };
    let text = guest.shell("dmesg | grep 'Hypervisor detected'")?;
    ensure!(text.contains("Hypervisor detected: KVM"), "{text}");
    guest
        .vmm
        .put("vm.resize", Some(r#"{"desired_vcpus": 2}"#))?;
    guest.shell_until("echo 1 > /sys/devices/system/cpu/cpu1/online")?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

fn affinity_pins_the_vcpu_thread() -> Result<Outcome> {
    // On one processor, this only shows that a guest with pinning boots; a test with a bare-metal guest checks the
    // pinning on machines with two.
    let last = std::thread::available_parallelism()?.get() - 1;
    let guest = Machine {
        cpus: &format!("boot=2,affinity=[0@[{last}],1@[0]]"),
        ..Machine::default()
    }
    .serve()?;
    let mut pinned = Vec::new();
    for task in fs::read_dir(format!("/proc/{}/task", guest.vmm.pid()))? {
        let task = task?.path();
        let name = fs::read_to_string(task.join("comm"))?;
        if name.starts_with("vcpu") {
            let status = fs::read_to_string(task.join("status"))?;
            let allowed = status
                .lines()
                .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))
                .unwrap_or_default();
            pinned.push(format!("{}@{}", name.trim(), allowed.trim()));
        }
    }
    pinned.sort();
    ensure!(
        pinned == [format!("vcpu0@{last}"), "vcpu1@0".to_owned()],
        "{pinned:?}"
    );
    Ok(Outcome::Passed)
}

fn clock_is_kvmclock() -> Result<Outcome> {
    let text = Machine::default().share(|guest| {
        guest.shell(
            "cat /sys/devices/system/clocksource/clocksource0/available_clocksource; grep -c x2apic /proc/cpuinfo",
        )
    })?;
    ensure!(text.contains("kvm-clock"), "{text}");
    Ok(Outcome::Passed)
}

fn real_time_clock_tells_the_hosts_time() -> Result<Outcome> {
    let text = Machine::default()
        .share(|guest| guest.shell("echo since $(cat /sys/class/rtc/rtc0/since_epoch) epoch"))?;
    let guests: u64 = text
        .split_ascii_whitespace()
        .skip_while(|word| *word != "since")
        .nth(1)
        .and_then(|word| word.parse().ok())
        .with_context(|| text.clone())?;
    let hosts = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    ensure!(hosts.abs_diff(guests) < 60, "host {hosts}, guest {guests}");
    Ok(Outcome::Passed)
}

/// The kernel finds no root, panics, and resets the machine immediately.
fn guest_without_initramfs_starts_over_and_over() -> Result<Outcome> {
    let kernel = paths::guest("vmlinux")?;
    let kernel = kernel.to_str().context("path is not UTF-8")?;
    let extra = std::env::var("GUEST_CMDLINE_EXTRA").unwrap_or_default();
    shared::end_idle();
    let mut vmm = Vmm::start(&[
        "--kernel",
        kernel,
        "--cmdline",
        &format!("console=ttyS0 quiet panic=-1 {extra}"),
        "--memory",
        "size=512M",
        "--serial",
        "file=@/serial",
        "--console",
        "off",
    ])?;
    wait_for("second panic", BOOT_DEADLINE, || {
        let panics = vmm.text("serial").matches("Kernel panic").count();
        Ok((panics >= 2).then_some(()))
    })
    .with_context(|| vmm.last_words())?;
    vmm.put("vmm.shutdown", None)?;
    vmm.expect_clean_exit(PROCESS_DEADLINE)?;
    Ok(Outcome::Passed)
}
