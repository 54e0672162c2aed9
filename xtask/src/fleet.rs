//! `cargo xtask fleet-page`: tests of the fleet agent that need programs of others.

use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};

use crate::apt::{self, Need};
use crate::paths;

const NEEDS: &[Need] = &[
    Need {
        package: "chromium",
        why: "shows the agent's page",
    },
    Need {
        package: "prometheus",
        why: "scrapes the agent, checks rules and dashboards",
    },
];

/// Shows the agent's page and metrics to a browser and a Prometheus. Pictures of the page are left in `target/tmp/page`.
pub(crate) fn page() -> Result<ExitCode> {
    apt::ensure(NEEDS)?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["test", "--package", "ch-fleet", "--test", "seen"])
        // One browser or one Prometheus at a time.
        .args(["--", "--ignored", "--test-threads=1"])
        .current_dir(paths::workspace())
        .status()
        .context("starting the tests")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
