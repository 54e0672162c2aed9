//! What reporting costs the guest: the same work with reporting off, by mainline's tracker and,
//! in a patched kernel, by the bitmap tracker.
//!
//! `cargo xtask bench --icount --kernel patched guest-overhead`: there the guest's clock counts
//! instructions, and a percent is a percent. `off` is measured twice, to show what repeats.
//! The guest has one processor, as such a host has: what tasks cost each other by contention
//! between processors is not in these figures.

use std::collections::BTreeMap;
use std::env;

use anyhow::{Context, Result};
use integration_tests::linux::{Guest, Machine};
use serde_json::{Value, json};

use crate::options::Asked;

/// By what it is chosen on the command line.
pub(crate) const NAME: &str = "guest-overhead";

/// A name, arguments of `guest-mem workload`, and how many rounds are measured.
///
/// One task each: on the one processor that instructions are counted on, four take turns and say
/// no more.
const WORKLOADS: [(&str, &str, u32); 3] = [
    ("page_fault1", "page_fault1 --tasks 1", 3),
    ("page_fault2", "page_fault2 --tasks 1", 2),
    ("churn of 512 MiB", "churn --tasks 1 --bytes 512M", 2),
];

/// A name, the balloon, and more for the kernel's command line.
type Variant = (&'static str, &'static str, &'static str);

const REPORTING: &str = "size=0,free_page_reporting=on";
const OFF: Variant = ("off", "size=0", "");
const MAINLINE: Variant = ("mainline", REPORTING, "page_reporting.tracker=mainline");
const BITMAP: Variant = ("bitmap", REPORTING, "page_reporting.tracker=bitmap");

/// Nanoseconds of each workload under each variant, and the loss against `off` in percent.
pub(crate) fn run(asked: &Asked<'_>) -> Result<Value> {
    asked.refuse_options()?;
    let patched = env::var_os("GUEST_KERNEL").is_some_and(|choice| choice == "patched");
    let mut variants = vec![OFF, MAINLINE];
    if patched {
        variants.push(BITMAP);
    }
    variants.push(("off again", OFF.1, OFF.2));
    let mut times: BTreeMap<&str, BTreeMap<&str, u64>> = BTreeMap::new();
    for variant in variants {
        let mut guest = boot(variant)?;
        for (workload, arguments, rounds) in WORKLOADS {
            let ns = measure(&mut guest, arguments, rounds)
                .with_context(|| format!("{workload}, reporting {}", variant.0))?;
            // It takes many minutes, and whoever waits wants to see that it goes on.
            eprintln!("reporting {}: {workload}: {} ms", variant.0, ns / 1_000_000);
            times.entry(workload).or_default().insert(variant.0, ns);
        }
    }
    let rows = times.into_iter().map(|(workload, times)| {
        let off = times[OFF.0] as f64;
        let loss: BTreeMap<&str, f64> = times
            .iter()
            .filter(|(variant, _)| **variant != OFF.0)
            .map(|(variant, ns)| (*variant, (*ns as f64 / off - 1.0) * 100.0))
            .collect();
        let row = json!({ "ns": times, "loss_percent": loss });
        (workload.to_owned(), row)
    });
    Ok(Value::Object(rows.collect()))
}

fn boot((_, balloon, command_line): Variant) -> Result<Guest> {
    Machine {
        memory: "size=2G",
        arguments: &["--balloon", balloon],
        command_line,
        ..Machine::default()
    }
    .serve()
}

/// Runs a round to warm up and then those for the figure.
fn measure(guest: &mut Guest, arguments: &str, rounds: u32) -> Result<u64> {
    let mut course = |rounds| {
        guest.shell(&format!(
            "mkdir -p /tmp && guest-mem workload {arguments} --rounds {rounds}"
        ))
    };
    course(1)?;
    let text = course(rounds)?;
    let figure = text
        .lines()
        .find_map(|line| line.strip_prefix("ok workload "))
        .and_then(|rest| rest.split(' ').next());
    figure
        .with_context(|| format!("no time in {text:?}"))?
        .parse()
        .context("the time")
}
