//! `cargo xtask fleet-store`: tests the fleet manager with a real etcd.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};

use crate::apt::{self, Need};
use crate::{cargo, test_programs, testbed};

const NEEDS: [Need; 4] = [
    Need {
        package: "etcd-server",
        why: "the store that hosts share",
    },
    Need {
        package: "openssl",
        why: "certificates for a store with TLS",
    },
    Need {
        package: "iproute2",
        why: "ip: links that can be cut",
    },
    Need {
        package: "util-linux",
        why: "unshare, nsenter and setpriv: a network namespace for each process",
    },
];

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Build profile of ch-fleet
    #[arg(long, default_value = "release")]
    profile: String,
    /// Only tests whose name contains one of these
    filters: Vec<String>,
}

/// Runs the tests and returns the status the program ends with.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    apt::ensure(&NEEDS)?;
    if options.filters.is_empty() {
        // The selection of packages is that of the unit tests, so that nothing is built twice.
        cargo::run([
            "test",
            "--quiet",
            "--workspace",
            "--lib",
            "--bins",
            "--tests",
            "store::tests::etcd_",
            "--",
            "--ignored",
        ])?;
    }
    let program = build(&options.profile)?;
    let tests = test_programs::build("fleet-tests")?;
    let status = Command::new(tests)
        .args(&options.filters)
        .env("CH_FLEET", program)
        .status()
        .context("starting fleet-tests")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// All programs for a release, as everywhere else: the same selection is built once.
fn build(profile: &str) -> Result<PathBuf> {
    match profile {
        "release" => testbed::build_programs(profile)?,
        _ => cargo::run([
            "build",
            "--quiet",
            "--profile",
            profile,
            "--package",
            "ch-fleet",
        ])?,
    }
    Ok(cargo::folder(profile).join("ch-fleet"))
}
