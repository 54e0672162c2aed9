//! Boots a small kernel under emulation with a balloon, and checks that the kernel finds it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::complaints::complaints;
use super::emulator::Machine;

/// Timeout from power-on to power-off, on a busy machine.
const DEADLINE: Duration = Duration::from_secs(600);
/// Console lines shown on a failure.
const QUOTED_LINES: usize = 30;

const BALLOON: &str = "ls -d /sys/bus/virtio/drivers/virtio_balloon/virtio0";
const TRACKER: &str = "/sys/module/page_reporting/parameters/tracker";

/// Boots to the end of the guest's init; with `tracker`, checks that it is the one in use.
pub(super) fn with_balloon(vmlinux: &Path, initramfs: &Path, tracker: Option<&str>) -> Result<()> {
    let (word, script) = match tracker {
        Some(tracker) => (
            format!("page_reporting.tracker={tracker}"),
            format!("{BALLOON} && grep -qx {tracker} {TRACKER}"),
        ),
        None => (String::new(), BALLOON.to_string()),
    };
    let script = STANDARD.encode(script);
    // Without ACPI it cannot power off, and a reboot ends the emulator as well.
    let command_line =
        format!("console=ttyS0 panic=-1 no_timer_check {word} guest.run={script} guest.end=reboot");
    let ended = Machine {
        kernel: vmlinux,
        initramfs: Some(initramfs),
        command_line: &command_line,
        cpus: 2,
        arguments: &[
            "-m",
            "512M",
            "-device",
            "virtio-balloon-pci,free-page-reporting=on",
        ],
        deadline: DEADLINE,
    }
    .run(|_| ())?;
    judge(&ended.console, ended.status.is_some()).with_context(|| {
        format!(
            "booted with {:?}; its output:\n  | {}",
            word,
            tail(&ended.console)
        )
    })
}

fn judge(console: &str, in_time: bool) -> Result<()> {
    let bad = complaints(console);
    ensure!(
        bad.is_empty(),
        "the kernel logged warnings or errors:\n  {}",
        bad.join("\n  ")
    );
    ensure!(in_time, "the guest did not end in time");
    let said = console.lines().find(|line| line.starts_with("guest: exit"));
    let said = said.context("the guest's init did not end")?;
    ensure!(
        said == "guest: exit 0",
        "no balloon, or another tracker ({said})"
    );
    Ok(())
}

fn tail(console: &str) -> String {
    let lines: Vec<&str> = console.lines().collect();
    lines[lines.len().saturating_sub(QUOTED_LINES)..].join("\n  | ")
}

#[cfg(test)]
mod tests {
    use super::judge;

    #[test]
    fn boot_is_good_when_init_ended_well_and_the_kernel_kept_quiet() {
        judge("[ 1.0] Linux\nguest: exit 0\n", true).unwrap();
        judge("[ 1.0] Linux\nguest: exit 0\n", false).unwrap_err();
        judge("[ 1.0] Linux\nguest: exit 1\n", true).unwrap_err();
        judge("[ 1.0] Linux\n", true).unwrap_err();
        judge("[ 1.0] WARNING: CPU: 0\nguest: exit 0\n", true).unwrap_err();
    }
}
