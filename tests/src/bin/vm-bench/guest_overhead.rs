//! Measures the cost of reporting for the guest. The same work runs with reporting off, with mainline's tracker and, in
//! a patched kernel, with the bitmap tracker.
//!
//! With `cargo xtask bench --icount --kernel patched guest-overhead`, the guest's clock counts instructions, so that
//! small differences are significant. `off` is measured twice, to show the repeatability. The guest has one processor,
//! like the emulated host, so these figures do not include contention between processors.
//!
//! Options after `--` choose a part, for example `-- --workload churn --rounds 8 --reporting bitmap`, by prefixes of
//! workload names and by names of variants. If instructions are counted, parts with the same work can be measured
//! concurrently and compared. With `-- --tasks 4`, four concurrent tasks each do the work. If seconds are measured,
//! `-- --turns 5` measures everything five times, alternating between variants, and prints medians with minimum and
//! maximum.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use integration_tests::linux::{Guest, Machine};
use integration_tests::paths;
use serde_json::{Value, json};

use crate::compare::{rounded, side_by_side};
use crate::cost::Cost;
use crate::options::Asked;

/// Its name on the command line.
pub(crate) const NAME: &str = "guest-overhead";

/// A name, arguments of `guest-mem workload`, and the number of measured rounds.
const WORKLOADS: [(&str, &str, usize); 4] = [
    ("page_fault1", "page_fault1", 3),
    ("page_fault2", "page_fault2", 2),
    ("churn of 512 MiB", "churn --bytes 512M", 8),
    ("build", "build --bytes 8M", 4),
];

/// The name of the measurement of an idle guest.
const IDLE: &str = "idle";
/// Time to settle, and then time of the measurement.
const REST_SECONDS: u64 = 10;
const IDLE_SECONDS: u64 = 30;

/// A name, the balloon, and additional kernel parameters.
type Variant = (&'static str, &'static str, &'static str);

const REPORTING: &str = "size=0,free_page_reporting=on";
const OFF: Variant = ("off", "size=0", "");
const MAINLINE: Variant = ("mainline", REPORTING, "page_reporting.tracker=mainline");
const BITMAP: Variant = ("bitmap", REPORTING, "page_reporting.tracker=bitmap");
const OFF_AGAIN: Variant = ("off again", OFF.1, OFF.2);

/// The selection on the command line; empty selects everything.
#[derive(Debug, Default)]
struct Choice {
    workload: Option<String>,
    reporting: Vec<String>,
    tasks: Option<usize>,
    rounds: Option<usize>,
    turns: Option<usize>,
}

impl Choice {
    fn parse(words: &[String]) -> Result<Self> {
        let mut choice = Self::default();
        for pair in words.chunks(2) {
            let [option, value] = pair else {
                bail!("{} needs a value", pair[0]);
            };
            match option.as_str() {
                "--workload" => choice.workload = Some(value.clone()),
                "--reporting" => choice.reporting = value.split(',').map(String::from).collect(),
                "--tasks" => choice.tasks = Some(value.parse().context("--tasks")?),
                "--rounds" => choice.rounds = Some(value.parse().context("--rounds")?),
                "--turns" => choice.turns = Some(value.parse().context("--turns")?),
                _ => bail!("{NAME} has no option {option}"),
            }
        }
        Ok(choice)
    }

    fn has_workload(&self, name: &str) -> bool {
        let chosen = self.workload.as_deref();
        chosen.is_none_or(|chosen| name.starts_with(chosen))
    }

    fn has_variant(&self, name: &str) -> bool {
        self.reporting.is_empty() || self.reporting.iter().any(|chosen| chosen == name)
    }
}

/// Nanoseconds of each round by variant.
type Times = BTreeMap<&'static str, Vec<u64>>;

/// The times of one guest of each variant.
#[derive(Debug, Default)]
struct Turn {
    times: BTreeMap<&'static str, Times>,
    reports: BTreeMap<&'static str, BTreeMap<&'static str, Value>>,
    idle: BTreeMap<&'static str, Value>,
}

/// Measures nanoseconds of each workload under each variant, and the loss against `off` in percent.
pub(crate) fn run(asked: &Asked<'_>) -> Result<Value> {
    let choice = Choice::parse(asked.by_name.unwrap_or_default())?;
    let patched = paths::guest_kernel_is_patched();
    let mut variants = vec![OFF, MAINLINE];
    if patched {
        variants.push(BITMAP);
    }
    variants.push(OFF_AGAIN);
    variants.retain(|variant| choice.has_variant(variant.0));
    let turns: Vec<Turn> = (0..choice.turns.unwrap_or(1))
        .map(|_| Turn::take(&choice, &variants))
        .collect::<Result<_>>()?;
    if let [only] = turns.as_slice() {
        return Ok(only.rows());
    }
    let losses = WORKLOADS
        .iter()
        .filter(|workload| choice.has_workload(workload.0))
        .map(|workload| (workload.0.to_owned(), losses_of_turns(&turns, workload.0)))
        .collect();
    let turns: Vec<Value> = turns.iter().map(Turn::rows).collect();
    Ok(json!({ "loss_percent": Value::Object(losses), "turns": turns }))
}

impl Turn {
    fn take(choice: &Choice, variants: &[Variant]) -> Result<Self> {
        let mut turn = Self::default();
        for variant in variants {
            let mut guest = boot(*variant)?;
            for (workload, arguments, rounds) in WORKLOADS {
                if !choice.has_workload(workload) {
                    continue;
                }
                let rounds = choice.rounds.unwrap_or(rounds);
                let arguments = format!("{arguments} --tasks {}", choice.tasks.unwrap_or(1));
                let ns = measure(&mut guest, &arguments, rounds)
                    .with_context(|| format!("{workload}, reporting {}", variant.0))?;
                // This takes many minutes, so progress is shown.
                eprintln!("reporting {}: {workload}: {ns:?} ns", variant.0);
                let times = turn.times.entry(workload).or_default();
                times.insert(variant.0, ns);
                let stats = guest.vmm.get("vm.reclaim-stats").unwrap_or_default();
                let reports = turn.reports.entry(workload).or_default();
                reports.insert(variant.0, stats["report"].clone());
            }
            if choice.has_workload(IDLE) {
                turn.idle.insert(variant.0, at_rest(&mut guest)?);
            }
        }
        Ok(turn)
    }

    fn rows(&self) -> Value {
        let rows = self.times.iter().map(|(workload, times)| {
            let row = json!({
                "ns": times,
                "loss_percent": losses(times, |rounds| rounds),
                "loss_percent_first_half": losses(times, |rounds| &rounds[..rounds.len() / 2]),
                "loss_percent_second_half": losses(times, |rounds| &rounds[rounds.len() / 2..]),
                "reports_since_boot": self.reports[workload],
            });
            ((*workload).to_owned(), row)
        });
        let mut rows: serde_json::Map<String, Value> = rows.collect();
        if !self.idle.is_empty() {
            rows.insert(IDLE.into(), json!({ "each_second": self.idle }));
        }
        rows.into()
    }
}

/// Combines the losses of all turns, because a single one measured in seconds is not significant.
fn losses_of_turns(turns: &[Turn], workload: &str) -> Value {
    let taken = turns.iter().filter_map(|turn| turn.times.get(workload));
    let losses = taken.map(|times| {
        let losses = losses(times, |rounds| rounds).into_iter();
        losses
            .map(|(variant, loss)| (variant.to_owned(), json!(rounded(loss))))
            .collect()
    });
    side_by_side(&[losses.map(Value::Object).collect()])
}

/// Exits and processor time per second of an idle guest, some time after the last workload.
fn at_rest(guest: &mut Guest) -> Result<Value> {
    guest.shell(&format!("sleep {REST_SECONDS}"))?;
    let before = Cost::so_far(guest.vmm.pid())?;
    guest.shell(&format!("sleep {IDLE_SECONDS}"))?;
    let cost = Cost::so_far(guest.vmm.pid())?.since(&before);
    Ok(cost.each(IDLE_SECONDS))
}

/// How much longer the chosen rounds took than with reporting off.
fn losses(times: &Times, chosen: impl Fn(&[u64]) -> &[u64]) -> BTreeMap<&'static str, f64> {
    let sum = |rounds: &Vec<u64>| chosen(rounds).iter().sum::<u64>() as f64;
    let Some(off) = times.get(OFF.0).map(sum).filter(|off| *off > 0.0) else {
        return BTreeMap::new();
    };
    times
        .iter()
        .filter(|(variant, _)| **variant != OFF.0)
        .map(|(variant, rounds)| (*variant, (sum(rounds) / off - 1.0) * 100.0))
        .collect()
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

/// Runs a warm-up round and then the measured rounds; returns nanoseconds of each.
///
/// Tasks that share a processor slow each other down. With several tasks, the only figure is therefore the time until
/// the last one has ended all of its rounds.
fn measure(guest: &mut Guest, arguments: &str, rounds: usize) -> Result<Vec<u64>> {
    let mut course = |rounds| {
        guest.shell(&format!(
            "mkdir -p /tmp && guest-mem workload {arguments} --rounds {rounds}"
        ))
    };
    course(1)?;
    let text = course(rounds)?;
    let by_task = times_by_task(&text);
    if by_task.is_empty() || by_task.values().any(|times| times.len() != rounds) {
        bail!("not {rounds} rounds of each task in {text:?}");
    }
    if by_task.len() == 1 {
        return Ok(by_task.into_values().flatten().collect());
    }
    let ends = by_task.values().map(|times| times.iter().sum());
    Ok(ends.max().into_iter().collect())
}

/// Parses lines `task 0 round 1 12345 ns`.
fn times_by_task(text: &str) -> BTreeMap<u64, Vec<u64>> {
    let mut times: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        if let ["task", task, "round", _, ns, ..] = words.as_slice()
            && let (Ok(task), Ok(ns)) = (task.parse(), ns.parse())
        {
            times.entry(task).or_default().push(ns);
        }
    }
    times
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_each_task() {
        let text = "task 0 round 0 5 ns\ntask 1 round 0 7 ns\nelse\ntask 0 round 1 6 ns";
        let times = BTreeMap::from([(0, vec![5, 6]), (1, vec![7])]);
        assert_eq!(times_by_task(text), times);
    }

    #[test]
    fn losses_of_turns_are_each_against_off_of_the_same_turn() {
        let turn = |off, bitmap| Turn {
            times: BTreeMap::from([(
                "churn",
                Times::from([("off", vec![off, off]), ("bitmap", vec![bitmap, bitmap])]),
            )]),
            ..Turn::default()
        };
        // A machine that is busier in the second turn slows both.
        let turns = [turn(100, 101), turn(200, 210), turn(100, 103)];
        assert_eq!(
            losses_of_turns(&turns, "churn"),
            json!({ "bitmap": { "median": 3.0, "min": 1.0, "max": 5.0 } })
        );
    }
}
