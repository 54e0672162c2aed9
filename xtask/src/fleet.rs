//! `cargo xtask fleet-page`, `fleet-bench` and `fleet-chaos`: test the fleet agent with other programs, its costs, and
//! its behaviour under faults.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};

use crate::apt::{self, Need};
use crate::{cargo, paths};

const NEEDS: &[Need] = &[
    Need {
        package: "chromium",
        why: "shows the agent's page",
    },
    Need {
        package: "python3-placement",
        why: "takes what the adapter tells",
    },
    Need {
        package: "prometheus",
        why: "scrapes the agent, checks rules and dashboards",
    },
];

/// Targets with tests that need additional programs. They are selected from the whole workspace, like the unit tests,
/// so that nothing is built twice.
const TESTS: &[[&str; 2]] = &[["--test", "seen"], ["--bin", "ch-fleet-adapter"]];

/// Tests the agent with a browser, Prometheus and placement. Pictures of the page are left in `target/tmp/page`.
pub(crate) fn page() -> Result<ExitCode> {
    apt::ensure(NEEDS)?;
    for [kind, target] in TESTS {
        let passed = cargo::command(["test", "--workspace", kind, target])
            // One browser or server at a time.
            .args([
                "--",
                "--ignored",
                "--test-threads=1",
                "--skip",
                PHOTOGRAPHER,
            ])
            .status()
            .context("starting the tests")?
            .success();
        if !passed {
            return Ok(ExitCode::FAILURE);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The test that takes a picture of a real fleet's page.
const PHOTOGRAPHER: &str = "page_of_a_real_fleet_shows_memory_going_from_guest_to_guest";
const PHOTOGRAPHER_IN: [&str; 4] = ["test", "--workspace", "--test", "seen"];

/// Installs the browser.
pub(crate) fn ensure_browser() -> Result<()> {
    apt::ensure(&NEEDS[..1])
}

/// Builds the test that drives the browser.
pub(crate) fn build_photographer() -> Result<()> {
    cargo::run(PHOTOGRAPHER_IN.into_iter().chain(["--no-run", "--quiet"]))
}

/// A command that waits for the page of a fleet on a port of this machine and takes its picture.
pub(crate) fn photographer(port: u16, picture: &Path) -> Result<Command> {
    let picture = std::path::absolute(picture).context("the picture's path")?;
    let mut command = cargo::command(PHOTOGRAPHER_IN);
    command
        .args(["--quiet", "--", "--ignored", "--exact"])
        .arg(format!("picture::{PHOTOGRAPHER}"))
        .env("FLEET_PAGE", format!("127.0.0.1:{port}"))
        .env("FLEET_PICTURE", picture);
    Ok(command)
}

#[derive(Debug, clap::Args)]
pub(crate) struct BenchOptions {
    /// Number of fake VMs
    #[arg(long, default_value_t = 500)]
    vms: usize,
    /// Seconds of measurement
    #[arg(long, default_value_t = 120)]
    seconds: u64,
}

/// Measures the cost of an agent and prints one JSON object.
pub(crate) fn bench(options: &BenchOptions) -> Result<ExitCode> {
    let built = cargo::command(["build", "--release", "--package", "ch-fleet"])
        .status()
        .context("building the agent")?;
    if !built.success() {
        bail!("building the agent failed ({built})");
    }
    let status = cargo::command(["run", "--quiet", "--package", "fleet"])
        .args(["--features", "test-utils", "--example", "agent_footprint"])
        .arg("--")
        .arg(paths::target().join("release/ch-fleet"))
        .args([options.vms.to_string(), options.seconds.to_string()])
        .status()
        .context("starting the measurement")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

#[derive(Debug, clap::Args)]
pub(crate) struct ChaosOptions {
    /// Minutes of failures before the state must settle
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Seed of the script
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Runs the test of the same name for longer.
pub(crate) fn chaos(options: &ChaosOptions) -> Result<ExitCode> {
    let passed = cargo::command(["test", "--package", "ch-fleet", "--test", "chaos"])
        .args(["--", "--exact", "--nocapture"])
        .arg("agent_that_is_killed_again_and_again_does_no_harm")
        .env("FLEET_CHAOS_MINUTES", options.minutes.to_string())
        .env("SEED", options.seed.to_string())
        .status()
        .context("starting the test")?
        .success();
    Ok(if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
