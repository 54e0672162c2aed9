//! Experiments that measure the value of reclaimed memory: how many guests a host holds, and how fast bursts of memory
//! can follow each other.
//!
//! Runs where KVM boots Linux, on a host whose memory is the experiment's: `cargo xtask
//! experiment` starts it in the testbed with the experiment's name, its plan as JSON and the
//! folder for the results.

mod burst;
mod chart;
mod host;
mod overcommit;
mod patience;
mod plan;
mod recorder;
mod turns;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

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

/// The outcome of an experiment.
struct Outcome {
    /// File name without extension.
    name: String,
    /// The figures.
    figures: Value,
    /// The curves.
    svg: String,
    /// The closing line.
    sentence: String,
    /// The reason, if it failed.
    fault: Option<String>,
}

impl Outcome {
    fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let json = serde_json::to_string_pretty(&self.figures)?;
        for (extension, text) in [("json", &json), ("svg", &self.svg)] {
            let path = folder.join(format!("{}.{extension}", self.name));
            fs::write(&path, text).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }
}
