//! Measures figures of the VMM with a real Linux guest. Prints one JSON object per figure.
//!
//! Runs where KVM boots Linux: `cargo xtask bench`; with `--icount`, the times are counted instructions and repeatable.
//! With `--vmm PATH`, the figures of the group `vmm` are measured for our VMM and that program alternately, and shown
//! side by side.

mod api;
mod block;
mod boot_free;
mod cases;
mod compare;
mod cost;
mod guest_overhead;
mod inflation;
mod kicks;
mod moves;
mod net;
mod options;
mod reclaim;
mod restore;
mod start;
mod subject;
mod timed_work;

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use options::{Asked, Options};
use subject::Subject;

/// A figure that a name on the command line selects.
struct Figure {
    name: &'static str,
    measure: Measure,
}

enum Measure {
    /// Of any VMM: this number of turns per VMM if selected by name, otherwise one.
    OfVmm(usize, fn(&Subject) -> Result<Value>),
    /// Of our VMM alone.
    OfOurs(fn(&Asked<'_>) -> Result<Value>),
}

/// Figures that take minutes.
const BY_NAME_ONLY: &[&str] = &[
    guest_overhead::NAME,
    boot_free::NAME,
    kicks::NAME,
    inflation::NAME,
    moves::NAME,
    restore::NAME,
    restore::WAKE,
    "block",
    "net",
];

const FIGURES: &[Figure] = &[
    of_vmm("overhead", 1, cost::overhead),
    of_vmm("start", start::TURNS, start::measure),
    of_ours(reclaim::NAME, reclaim::run),
    of_vmm("api", 1, api::measure),
    of_ours(boot_free::NAME, boot_free::run),
    of_vmm("block", block::TURNS, block::measure),
    of_vmm("net", net::TURNS, net::measure),
    of_ours(guest_overhead::NAME, guest_overhead::run),
    of_ours(kicks::NAME, kicks::run),
    of_ours(inflation::NAME, inflation::run),
    of_ours(moves::NAME, moves::run),
    of_ours(restore::NAME, restore::run),
    of_ours(restore::WAKE, restore::wake),
];

const fn of_vmm(
    name: &'static str,
    turns: usize,
    measure: fn(&Subject) -> Result<Value>,
) -> Figure {
    Figure {
        name,
        measure: Measure::OfVmm(turns, measure),
    }
}

const fn of_ours(name: &'static str, measure: fn(&Asked<'_>) -> Result<Value>) -> Figure {
    Figure {
        name,
        measure: Measure::OfOurs(measure),
    }
}

impl Figure {
    /// Whether the command line selects this figure: by its name, by its group, or by naming none.
    fn is_chosen(&self, names: &[String]) -> bool {
        let of_vmm = matches!(self.measure, Measure::OfVmm(..));
        names
            .iter()
            .any(|name| name == self.name || (name == options::GROUP && of_vmm))
            || (names.is_empty() && !BY_NAME_ONLY.contains(&self.name))
    }

    fn run(&self, options: &Options, subjects: &[Subject]) -> Result<Value> {
        match &self.measure {
            Measure::OfOurs(measure) => measure(&Asked {
                by_name: (!options.names.is_empty()).then_some(&options.rest),
            }),
            Measure::OfVmm(turns, measure) => {
                Asked {
                    by_name: Some(&options.rest),
                }
                .refuse_options()?;
                let mut taken = vec![Vec::new(); subjects.len()];
                let turns = if options.names.is_empty() { 1 } else { *turns };
                for _ in 0..turns {
                    for (subject, values) in subjects.iter().zip(&mut taken) {
                        let value = measure(subject);
                        values.push(value.with_context(|| subject.name.to_owned())?);
                    }
                }
                Ok(compare::side_by_side(&taken))
            }
        }
    }
}

fn main() -> Result<()> {
    let known: Vec<&str> = FIGURES.iter().map(|figure| figure.name).collect();
    let options = Options::parse(std::env::args().skip(1), &known)?;
    let subjects = subject::all(options.vmm.as_deref(), &options.left_out)?;
    let mut failed = Vec::new();
    let first = options.from.as_deref();
    let figures = FIGURES
        .iter()
        .skip_while(|figure| first.is_some_and(|name| name != figure.name));
    for figure in figures {
        if !figure.is_chosen(&options.names) {
            continue;
        }
        let value = match figure.run(&options, &subjects) {
            Ok(value) => value,
            // The following figures are still measured.
            Err(error) => {
                eprintln!("{} failed: {error:#}", figure.name);
                failed.push(figure.name);
                continue;
            }
        };
        if subjects.len() > 1 {
            eprint!("{}", compare::table(figure.name, &value));
        }
        println!("{}", json!({ figure.name: value }));
        if let Some(folder) = &options.out {
            let path = folder.join(format!("bench-{}.json", figure.name));
            let text = serde_json::to_string_pretty(&value)?;
            fs::write(&path, text + "\n").with_context(|| path.display().to_string())?;
        }
    }
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}
