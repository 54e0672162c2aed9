//! Stress tests: guests use their memory heavily while the host takes it in every possible way.
//!
//! In the guest two threads allocate, check, free and refill memory (`churn-start`), with every byte known. At the same
//! time, the guest's kernel reports freed memory. On the host, random steps from a seed change the balloon's target,
//! start and stop runs of hinting, and pause and resume the machine. At the end, the guest must have found no wrong
//! byte, and its kernel must have logged no error.
//!
//! `STRESS_SECONDS=1800` makes every test here run longer, and `STRESS_SEED=N` repeats one:
//!
//! ```text
//! cargo xtask testbed run --timeout 4000 -- env STRESS_SECONDS=1800 target/debug/vm-tests stress_
//! ```

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use integration_tests::MIB;
use integration_tests::linux::{Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::paths::guest_kernel_inflates_by_blocks;
use integration_tests::random::{Random, fresh_seed};
use integration_tests::tests;
use integration_tests::wait::wait_for;
use serde_json::Value;

use integration_tests::huge_pages::ReservedHugePages;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        stress_private_memory_keeps_every_byte,
        stress_small_pages_keep_every_byte,
        stress_shared_memory_keeps_every_byte,
        stress_huge_pages_keep_every_byte,
        stress_init_on_free_keeps_every_byte,
        stress_page_poison_keeps_every_byte,
    ]
}

const RAM_BYTES: u64 = 256 * MIB;
/// Maximum memory of the churning threads.
const CHURN_BYTES: u64 = 72 * MIB;
/// Maximum balloon: together with the churn and the kernel this leaves little memory, and deflation on OOM provides the
/// rest.
const BALLOON_BYTES_MAX: u64 = 100 * MIB;
/// Minimum number of steps of a short run.
const STEPS_MIN: u64 = 16;
/// Minimum memory that each path must have returned.
const DISCARDED_MIN: u64 = 16 * MIB;
/// Time limit until these conditions are met: a guest reports only memory that has been free for seconds.
const SHORT_DEADLINE: Duration = Duration::from_secs(300);
/// Time for the guest to make some steps, or to reach a target, under full load.
const PROGRESS_DEADLINE: Duration = Duration::from_secs(120);

/// A machine's configuration, and its effect on the paths by which memory returns.
struct Variant {
    memory: &'static str,
    command_line: &'static str,
    /// Reports and hints are discarded; otherwise the guest relies on its free pages' contents.
    free_pages_go: bool,
    /// The driver fills pages as large as those behind the guest's memory; otherwise inflation returns none.
    balloon_pages_go: bool,
}

const PLAIN: Variant = Variant {
    memory: "size=256M",
    command_line: "",
    free_pages_go: true,
    balloon_pages_go: true,
};

fn stress_private_memory_keeps_every_byte() -> Result<Outcome> {
    stress(&PLAIN)
}

fn stress_small_pages_keep_every_byte() -> Result<Outcome> {
    stress(&Variant {
        memory: "size=256M,thp=off",
        ..PLAIN
    })
}

fn stress_shared_memory_keeps_every_byte() -> Result<Outcome> {
    stress(&Variant {
        memory: "size=256M,shared=on",
        ..PLAIN
    })
}

fn stress_huge_pages_keep_every_byte() -> Result<Outcome> {
    let Some(_reserved) = ReservedHugePages::new(RAM_BYTES / (2 * MIB))? else {
        return Ok(Outcome::Skipped(
            "the host has no huge pages to give".into(),
        ));
    };
    stress(&Variant {
        memory: "size=256M,hugepages=on",
        // Mainline's driver names half a huge page with a kick.
        balloon_pages_go: guest_kernel_inflates_by_blocks(),
        ..PLAIN
    })
}

/// The guest's kernel assumes that free pages are zeroed, and does not clear them again.
fn stress_init_on_free_keeps_every_byte() -> Result<Outcome> {
    stress(&Variant {
        command_line: "init_on_free=1",
        ..PLAIN
    })
}

/// The guest's kernel checks its poison in every page that it allocates.
fn stress_page_poison_keeps_every_byte() -> Result<Outcome> {
    stress(&Variant {
        command_line: "page_poison=1",
        free_pages_go: false,
        ..PLAIN
    })
}

fn stress(variant: &Variant) -> Result<Outcome> {
    let seed = match std::env::var("STRESS_SEED") {
        Ok(seed) => seed.parse().context("STRESS_SEED")?,
        Err(_) => fresh_seed(),
    };
    println!("     {variant}: STRESS_SEED={seed}");
    let mut stress = Stress::start(variant, seed)?;
    let run = stress.run();
    run.with_context(|| format!("{variant}, STRESS_SEED={seed}, {}", stress.done))?;
    println!("     {variant}: {}, {}", stress.done, stress.figures()?);
    Ok(Outcome::Passed)
}

impl std::fmt::Display for Variant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.memory, self.command_line)
    }
}

/// The host's actions on the guest.
#[derive(Debug, Default)]
struct Done {
    steps: u64,
    targets: u64,
    runs: u64,
    stops: u64,
    pauses: u64,
}

impl std::fmt::Display for Done {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            steps,
            targets,
            runs,
            stops,
            pauses,
        } = self;
        write!(
            f,
            "{steps} steps ({targets} targets, {runs} runs of hinting started, {stops} stopped, {pauses} pauses)"
        )
    }
}

struct Stress<'a> {
    guest: Guest,
    variant: &'a Variant,
    random: Random,
    done: Done,
    /// Steps and checked bytes as last reported by the guest.
    churned: (u64, u64),
}

impl<'a> Stress<'a> {
    fn start(variant: &'a Variant, seed: u64) -> Result<Self> {
        let mut guest = Machine {
            cpus: "boot=2",
            memory: variant.memory,
            command_line: variant.command_line,
            arguments: &[
                "--balloon",
                "size=0,deflate_on_oom=on,free_page_reporting=on,free_page_hinting=on,stats_poll_ms=200",
            ],
            ..Machine::default()
        }
        .serve()?;
        guest.command(&format!("churn-start {CHURN_BYTES} seed={seed} threads=2"))?;
        Ok(Self {
            guest,
            variant,
            random: Random(seed),
            done: Done::default(),
            churned: (0, 0),
        })
    }

    fn run(&mut self) -> Result<()> {
        let long_form = match std::env::var("STRESS_SECONDS") {
            Ok(seconds) => Some(Duration::from_secs(seconds.parse().context("seconds")?)),
            Err(_) => None,
        };
        let started = Instant::now();
        loop {
            self.step()?;
            let took = started.elapsed();
            match long_form {
                Some(long) if took > long => break,
                None if self.done.steps >= STEPS_MIN && self.is_everything_seen()? => break,
                None if took > SHORT_DEADLINE => bail!("too little came back: {}", self.figures()?),
                _ => {}
            }
        }
        self.settle()?;
        ensure!(self.is_everything_seen()?, "{}", self.figures()?);
        Ok(())
    }

    /// Performs one random action, then lets the guest work for a while.
    fn step(&mut self) -> Result<()> {
        self.done.steps += 1;
        match self.random.below(8) {
            0..=2 => {
                let bytes = self.random.below(BALLOON_BYTES_MAX / 4096 + 1) * 4096;
                self.target(bytes)?;
            }
            3 | 4 => self.done.runs += u64::from(self.hinting("start")?),
            5 => self.done.stops += u64::from(self.hinting("stop")?),
            6 => self.pause_and_resume()?,
            _ => {
                self.figure("/resident_bytes")?;
            }
        }
        let steps = self.churned.0 + 1 + self.random.below(6);
        self.wait_churned(steps)
    }

    fn pause_and_resume(&mut self) -> Result<()> {
        let answer = self.guest.vmm.request("PUT", "vm.pause", None)?;
        if !matches!(answer.status, 200 | 204) {
            // If the machine around the host does not run the vCPUs, they cannot stop in time.
            let info = self.guest.vmm.get("vm.info")?;
            ensure!(info["state"] == "Running", "{answer:?}, {}", info["state"]);
            return Ok(());
        }
        // Figures do not need a running guest.
        self.figure("/resident_bytes")?;
        self.guest.vmm.put("vm.resume", None)?;
        self.done.pauses += 1;
        Ok(())
    }

    fn target(&mut self, bytes: u64) -> Result<()> {
        let body = format!("{{\"desired_balloon\":{bytes}}}");
        self.guest.vmm.put("vm.resize", Some(&body))?;
        self.done.targets += 1;
        Ok(())
    }

    /// Whether it was accepted: a run may be in progress, or none.
    fn hinting(&mut self, action: &str) -> Result<bool> {
        let body = format!("{{\"action\":\"{action}\"}}");
        let vmm = &self.guest.vmm;
        let answer = vmm.request("PUT", "vm.balloon-hinting", Some(&body))?;
        Ok(matches!(answer.status, 200 | 204))
    }

    /// Waits until the guest has made this many steps in total, without a wrong byte.
    fn wait_churned(&mut self, steps: u64) -> Result<()> {
        let started = Instant::now();
        while self.churned.0 < steps {
            self.ask_churn("churn-status")?;
            ensure!(
                started.elapsed() < PROGRESS_DEADLINE,
                "the guest makes no progress at {:?} steps and bytes",
                self.churned
            );
        }
        Ok(())
    }

    /// Reads the guest's figures.
    ///
    /// # Panics
    /// The guest has found a wrong byte. A failed test may be retried, but a panic is not.
    fn ask_churn(&mut self, command: &str) -> Result<()> {
        let told = self.guest.command(command).map_err(|error| {
            let text = format!("{error:#}");
            assert!(!text.contains(" reads "), "{text}");
            match self.guest.serial.text().matches("guest: init").count() {
                1 => error,
                boots => error.context(format!("the guest has booted {boots} times")),
            }
        })?;
        self.churned = (
            told_figure(&told, "steps")?,
            told_figure(&told, "verified")?,
        );
        Ok(())
    }

    /// Whether every path that may take memory has taken some, and the others have taken none.
    fn is_everything_seen(&self) -> Result<bool> {
        let stats = self.guest.vmm.get("vm.reclaim-stats")?;
        let mut seen = self.churned.1 > CHURN_BYTES;
        for (path, goes) in [
            ("report", self.variant.free_pages_go),
            ("hint", self.variant.free_pages_go),
            ("inflate", self.variant.balloon_pages_go),
        ] {
            let bytes = |name: &str| stats[path][name].as_u64().context("a figure");
            ensure!(bytes("failed_bytes")? == 0, "{path}: {stats:#}");
            let discarded = bytes("discarded_bytes")?;
            ensure!(goes || discarded == 0, "{path}: {stats:#}");
            seen &= if goes {
                discarded >= DISCARDED_MIN
            } else {
                bytes("requested_bytes")? >= DISCARDED_MIN
            };
        }
        Ok(seen)
    }

    /// Ends everything, with a final check of every byte and of the kernel's log.
    fn settle(&mut self) -> Result<()> {
        self.hinting("stop")?;
        self.target(0)?;
        wait_for("all memory back in the guest", PROGRESS_DEADLINE, || {
            let info = self.guest.vmm.get("vm.info")?;
            Ok((info["memory_actual_size"] == RAM_BYTES).then_some(()))
        })?;
        self.wait_churned(self.churned.0 + 16)?;
        self.ask_churn("churn-stop")?;
        let log = self.guest.shell("dmesg")?;
        for complaint in COMPLAINTS {
            let line = log.lines().find(|line| line.contains(complaint));
            ensure!(line.is_none(), "the guest's kernel says {line:?}");
        }
        Ok(())
    }

    fn figure(&self, pointer: &str) -> Result<u64> {
        let stats = self.guest.vmm.get("vm.reclaim-stats")?;
        let figure = stats.pointer(pointer).and_then(Value::as_u64);
        figure.with_context(|| format!("no {pointer} in {stats:#}"))
    }

    fn figures(&self) -> Result<String> {
        let discarded = |path: &str| self.figure(&format!("/{path}/discarded_bytes"));
        Ok(format!(
            "{} steps and {} MiB checked in the guest, MiB discarded: {} reported, {} inflated, {} hinted",
            self.churned.0,
            self.churned.1 / MIB,
            discarded("report")? / MIB,
            discarded("inflate")? / MIB,
            discarded("hint")? / MIB,
        ))
    }
}

/// Kernel messages about corrupted memory or other serious errors.
const COMPLAINTS: [&str; 6] = [
    "corruption",
    "bit error",
    "BUG",
    "Oops",
    "Bad page",
    "WARNING",
];

/// One number of the guest's `churn-status`.
fn told_figure(told: &str, name: &str) -> Result<u64> {
    let word = told.split(' ').find_map(|word| {
        let value = word.strip_prefix(name)?.strip_prefix('=')?;
        value.trim().parse().ok()
    });
    word.with_context(|| format!("no {name} in {told:?}"))
}
