//! `cargo xtask guest sanitize`: stress-tests the series in kernels with debugging options.
//!
//! Three small kernels run under emulation, each with two processors, two NUMA nodes and a balloon. `guest-mem stress`
//! churns memory and checks every byte, while trackers, settings, huge pages, memory blocks and the driver itself
//! change. Afterwards the kernel must not have reported a fault. Its output stays in
//! `target/guest/sanitize/KIND/console`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::complaints::{complaints, races};
use super::emulator::Machine;
use super::initramfs;
use super::kernel::Kernel;
use super::stress_ng;
use crate::paths;

/// Time for the start, the end and a busy machine.
const SPARE: Duration = Duration::from_secs(1200);
/// Lines of the console shown when the stress ends early.
const QUOTED_LINES: usize = 40;

/// The kinds of checking that a kernel can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, strum::IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
enum Kind {
    /// Lock order, sleeping in atomic context, pages used after free
    Lockdep,
    /// Use after free and out-of-bounds accesses
    Kasan,
    /// Data races
    Kcsan,
    /// The unchanged patched test kernel: fast, for long runs; not in the default selection
    Plain,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Kernels to stress [default: lockdep, kasan, kcsan]
    #[arg(value_enum)]
    kinds: Vec<Kind>,
    /// Seconds of stress for each kernel
    #[arg(long, default_value_t = 180)]
    seconds: u64,
    /// Seed of the stress
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Also run Debian's stress-ng
    #[arg(long)]
    stress_ng: bool,
    /// Only build the kernels
    #[arg(long)]
    build_only: bool,
    /// Show the kernel's complete output
    #[arg(long)]
    verbose: bool,
}

impl Kind {
    const LOOKING: [Self; 3] = [Self::Lockdep, Self::Kasan, Self::Kcsan];

    /// The name of its configuration and folder.
    fn name(self) -> &'static str {
        self.into()
    }

    fn kernel(self) -> Result<Kernel> {
        match self {
            Self::Plain => Kernel::patched(),
            looking => Kernel::sanitized(looking.name()),
        }
    }

    /// The required console output, without which a lack of reports means nothing.
    fn works(self) -> &'static str {
        match self {
            // Lockdep turns itself off when it has found something or has no more room.
            Self::Lockdep => " debug_locks:                             1",
            Self::Kasan => "KernelAddressSanitizer initialized",
            Self::Kcsan => "kcsan: enabled early",
            Self::Plain => "Linux version ",
        }
    }
}

/// Builds, boots and evaluates each kernel.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let kinds = match options.kinds.as_slice() {
        [] => &Kind::LOOKING,
        some => some,
    };
    let mut built = Vec::new();
    for &kind in kinds {
        let dir = paths::guest().join("sanitize").join(kind.name());
        kind.kernel()?.build(&dir)?;
        built.push((kind, dir));
    }
    if options.build_only {
        return Ok(ExitCode::SUCCESS);
    }
    let image = image(options)?;
    let mut failed = 0;
    for (kind, dir) in built {
        match stress(kind, &dir, &image, options) {
            Ok(told) => println!("ok    {}: {told}", kind.name()),
            Err(error) => {
                println!("FAIL  {}: {error:#}", kind.name());
                failed += 1;
            }
        }
    }
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The guests' initramfs, with stress-ng if requested.
fn image(options: &Options) -> Result<PathBuf> {
    let plain = paths::guest().join("initramfs.cpio.gz");
    initramfs::build(&plain)?;
    if !options.stress_ng {
        return Ok(plain);
    }
    let mut bytes = fs::read(&plain).with_context(|| format!("reading {}", plain.display()))?;
    // Archives follow one another on a multiple of four.
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(stress_ng::archive()?);
    let path = paths::guest().join("sanitize/initramfs-stress-ng.cpio.gz");
    fs::create_dir_all(paths::guest().join("sanitize")).context("creating a folder")?;
    fs::write(&path, bytes).with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}

/// The script of the guest's init.
fn script(options: &Options) -> String {
    let (seconds, seed) = (options.seconds, options.seed);
    let (beside, after, churn) = if options.stress_ng {
        (
            format!(
                "cd /tmp; /usr/bin/stress-ng --vm 1 --vm-bytes 128M --vm-method all --mmap 1 \
                 --mmap-bytes 48M --malloc 1 --malloc-bytes 1M --malloc-max 64 --fork 1 --verify \
                 --timeout {seconds} & NG=$!\n"
            ),
            "wait $NG && echo ok stress-ng || exit 1\n",
            "200M",
        )
    } else {
        (String::new(), "", "280M")
    };
    format!(
        "{beside}guest-mem stress --seconds {seconds} --seed {seed} --bytes {churn} || exit 1\n\
         {after}echo tainted $(cat /proc/sys/kernel/tainted)\n\
         grep debug_locks /proc/lockdep_stats\n\
         cat /sys/kernel/debug/kcsan\n\
         true"
    )
}

fn stress(kind: Kind, dir: &Path, initramfs: &Path, options: &Options) -> Result<String> {
    let verbose = options.verbose;
    let command_line = format!(
        "console=ttyS0 panic=-1 no_timer_check page_reporting.tracker=bitmap cma=64M \
         movablecore=384M memhp_default_state=online_movable guest.run={}",
        STANDARD.encode(script(options))
    );
    let ended = Machine {
        kernel: &dir.join("vmlinux"),
        initramfs: Some(initramfs),
        command_line: &command_line,
        cpus: 2,
        arguments: &[
            // One processor per node, in separate packages as on real machines.
            "-smp",
            "2,sockets=2",
            "-m",
            "1G",
            "-object",
            "memory-backend-ram,id=m0,size=512M",
            "-object",
            "memory-backend-ram,id=m1,size=512M",
            "-numa",
            "node,nodeid=0,cpus=0,memdev=m0",
            "-numa",
            "node,nodeid=1,cpus=1,memdev=m1",
            "-device",
            "virtio-balloon-pci,free-page-reporting=on",
        ],
        deadline: Duration::from_secs(options.seconds) * 2 + SPARE,
    }
    .run(move |line| {
        if verbose || line.starts_with("stress: ") {
            println!("{line}");
        }
    })?;
    let log = dir.join("console");
    fs::write(&log, &ended.console).with_context(|| format!("writing {}", log.display()))?;
    judge(kind, &ended.console)
}

/// Reads the output of the kernel and its stress.
fn judge(kind: Kind, console: &str) -> Result<String> {
    let races = races(console);
    for race in &races {
        let whose = if race.is_ours { "ours" } else { "mainline's" };
        println!("{whose}: {}", race.title);
        for line in race.lines.iter().filter(|_| race.is_ours) {
            println!("  {line}");
        }
    }
    let theirs: Vec<&str> = races
        .iter()
        .filter(|race| !race.is_ours)
        .map(|race| race.title)
        .collect();
    let complaints: Vec<&str> = complaints(console)
        .into_iter()
        .filter(|line| !theirs.contains(line))
        .collect();
    if !complaints.is_empty() {
        bail!(
            "the kernel logged warnings or errors:\n  {}",
            complaints.join("\n  ")
        );
    }
    let said = console.lines().find(|line| line.starts_with("ok stress"));
    let Some(said) = said else {
        let lines: Vec<&str> = console.lines().collect();
        let tail = &lines[lines.len().saturating_sub(QUOTED_LINES)..];
        bail!(
            "the stress did not end cleanly:\n  | {}",
            tail.join("\n  | ")
        );
    };
    ensure!(
        console.lines().any(|line| line.contains(kind.works())),
        "{:?} is missing: the kernel has not checked anything",
        kind.works()
    );
    ensure!(
        console.contains("ok stress-ng") || !console.contains("stress-ng: "),
        "stress-ng failed"
    );
    // A kernel with a race reported is not tainted, one with a warning is.
    ensure!(
        console.lines().any(|line| line == "tainted 0"),
        "the kernel is tainted"
    );
    let idle = console.lines().find(|line| {
        line.starts_with("stress: ")
            && (line.contains(" done=0 ") || (line.ends_with(" absent") && kind != Kind::Plain))
    });
    ensure!(idle.is_none(), "the stress did nothing: {idle:?}");
    Ok(format!("{said}; {} races of mainline's", theirs.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "[    0.0] kcsan: enabled early\n\
        stress: offline done=4 refused=2\n\
        ok stress seconds=180 seed=1\n\
        tainted 0\n";

    fn race(function: &str) -> String {
        format!("BUG: KCSAN: data-race in a / b\n {function}+0x1/0x2\n==============\n")
    }

    #[test]
    fn kernel_that_looked_and_found_nothing_passes() {
        judge(Kind::Kcsan, GOOD).unwrap();
        let told = judge(Kind::Kcsan, &(race("folio_wander") + GOOD)).unwrap();
        assert!(told.ends_with("1 races of mainline's"), "{told}");
    }

    #[test]
    fn kernel_that_complains_or_did_not_look_fails() {
        for console in [
            race("prb_pass") + GOOD,
            race("folio_wander") + "BUG: KASAN: wild-memory-access in it\n" + GOOD,
            GOOD.replace("kcsan: enabled", ""),
            GOOD.replace("tainted 0", "tainted 512"),
            GOOD.replace("ok stress", "guest-mem: thread 1"),
            format!("stress-ng: fail:  [7] vm: it\n{GOOD}"),
            GOOD.replace("done=4", "done=0"),
            GOOD.replace("done=4 refused=2", "absent"),
        ] {
            judge(Kind::Kcsan, &console).unwrap_err();
        }
    }
}
