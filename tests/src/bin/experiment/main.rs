//! Experiments that measure the value of reclaimed memory: how many guests a host holds, and how fast bursts of memory
//! can follow each other.
//!
//! Runs where KVM boots Linux, on a host with the memory of the experiment. `cargo xtask experiment` starts it in the
//! testbed with the experiment's name, its plan as JSON, and the folder for the results.

mod burst;
mod chart;
mod host;
mod outcome;
mod overcommit;
mod patience;
mod plan;
mod recorder;
mod turns;

use std::path::Path;

use anyhow::{Context, Result, bail};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, plan, folder] = arguments.as_slice() else {
        bail!("usage: experiment overcommit|burst PLAN-AS-JSON FOLDER");
    };
    let outcome = match name.as_str() {
        "overcommit" => overcommit::run(&serde_json::from_str(plan).context("the plan")?)?,
        "burst" => burst::run(&serde_json::from_str(plan).context("the plan")?)?,
        other => bail!("there is no experiment {other:?}"),
    };
    outcome.write(Path::new(folder))?;
    println!("{}", outcome.sentence);
    match outcome.fault {
        Some(fault) => bail!("{fault}"),
        None => Ok(()),
    }
}
