//! `cargo xtask fleet-store`: the fleet manager against a real etcd.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};

use crate::apt::{self, Need};
use crate::{paths, shows};

const NEEDS: [Need; 3] = [
    Need {
        package: "etcd-server",
        why: "the store that hosts share",
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
        cargo(&[
            "test",
            "--quiet",
            "--workspace",
            "--lib",
            "--bins",
            "--tests",
            "etcd_does_what_a_store_must",
            "--",
            "--ignored",
        ])?;
    }
    let program = build(&options.profile)?;
    let tests = shows::build("fleet-tests")?;
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

fn build(profile: &str) -> Result<PathBuf> {
    // A release is built whole, as everywhere else.
    let packages: &[&str] = match profile {
        "release" => &["cloud-hypervisor", "ch-remote", "ch-fleet"],
        _ => &["ch-fleet"],
    };
    let mut args = vec!["build", "--quiet", "--profile", profile];
    for package in packages {
        args.extend(["--package", package]);
    }
    cargo(&args)?;
    let folder = if profile == "dev" { "debug" } else { profile };
    Ok(paths::target().join(folder).join("ch-fleet"))
}

fn cargo(args: &[&str]) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(args)
        .current_dir(paths::workspace())
        .status()
        .context("starting cargo")?;
    if !status.success() {
        bail!("cargo {} failed ({status})", args.join(" "));
    }
    Ok(())
}
