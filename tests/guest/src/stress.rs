//! `guest-mem stress`: concurrently runs everything that may interact with page reporting.
//!
//! Memory churns and is checked byte by byte ([`crate::churn`]), while each [disturbance](crate::disturb) repeats one
//! action. At the end, everything is restored, and free memory must be reported.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::churn::{Churn, Plan as ChurnPlan};
use crate::disturb::{self, DISTURBANCES, Disturbance, Done};
use crate::random::Random;
use crate::size;

const USAGE: &str =
    "usage: guest-mem stress --seconds N --seed N --bytes SIZE [--threads N] [--without NAME]…";

/// Interval of progress messages.
const LOG_SECONDS: u64 = 30;
/// Maximum time for a disturbance to notice that it must end; a busy emulator is slow.
const END_DEADLINE: Duration = Duration::from_secs(240);

#[derive(Debug, PartialEq, Eq)]
struct Plan {
    seconds: u64,
    churn: ChurnPlan,
    without: Vec<String>,
}

/// The results of one disturbance.
#[derive(Debug, Default)]
struct Count {
    done: AtomicU64,
    refused: AtomicU64,
    absent: AtomicBool,
}

/// Runs everything and prints the results.
pub(crate) fn run(arguments: &[&str]) -> Result<(), String> {
    let plan = plan(arguments)?;
    disturb::prepare();
    let churn = Churn::start(plan.churn)?;
    let chosen: Vec<&Disturbance> = DISTURBANCES
        .iter()
        .filter(|what| !plan.without.iter().any(|name| name == what.name))
        .collect();
    let result = disturb_for(&plan, &chosen, &churn);
    disturb::restore()?;
    let tally = churn.stop()?;
    let counts = result?;
    let [steps, verified, zero] = [&tally.steps, &tally.verified_bytes, &tally.zero_bytes]
        .map(|figure| figure.load(Ordering::Relaxed));
    println!("stress: churn steps={steps} verified={verified} zero={zero}");
    for (what, count) in chosen.iter().zip(counts.iter()) {
        let [done, refused] = [&count.done, &count.refused].map(|n| n.load(Ordering::Relaxed));
        if count.absent.load(Ordering::Relaxed) {
            println!("stress: {} absent", what.name);
        } else {
            println!("stress: {} done={done} refused={refused}", what.name);
        }
    }
    disturb::everything_free_is_reported()?;
    println!(
        "ok stress seconds={} seed={}",
        plan.seconds, plan.churn.seed
    );
    Ok(())
}

fn plan(arguments: &[&str]) -> Result<Plan, String> {
    let mut plan = Plan {
        seconds: 0,
        churn: ChurnPlan {
            bytes: 0,
            seed: 1,
            threads: 2,
        },
        without: Vec::new(),
    };
    for pair in arguments.chunks(2) {
        match *pair {
            ["--seconds", value] => plan.seconds = size::parse(value)?,
            ["--seed", value] => plan.churn.seed = size::parse(value)?,
            ["--bytes", value] => plan.churn.bytes = size::parse(value)?,
            ["--threads", value] => plan.churn.threads = size::parse(value)?,
            ["--without", name] if DISTURBANCES.iter().any(|what| what.name == name) => {
                plan.without.push(name.into());
            }
            _ => return Err(USAGE.into()),
        }
    }
    if plan.seconds == 0 || plan.churn.bytes == 0 {
        return Err(USAGE.into());
    }
    Ok(plan)
}

/// Runs all selected disturbances for the time of the plan; returns the first error.
fn disturb_for(
    plan: &Plan,
    chosen: &[&'static Disturbance],
    churn: &Churn,
) -> Result<Arc<[Count]>, String> {
    let stop = Arc::new(AtomicBool::new(false));
    let counts: Arc<[Count]> = chosen.iter().map(|_| Count::default()).collect();
    let (ended, ends) = mpsc::channel();
    for (number, what) in chosen.iter().copied().enumerate() {
        let (stop, counts, ended) = (Arc::clone(&stop), Arc::clone(&counts), ended.clone());
        // The random streams follow those of the churn.
        let random = Random::new(plan.churn.seed, plan.churn.threads + number as u64);
        thread::spawn(move || {
            let result = repeat(what, random, &stop, &counts[number]);
            // The receiver is dropped only when the process is about to end.
            ended.send((what.name, result)).ok();
        });
    }
    drop(ended);
    let mut left: Vec<&str> = chosen.iter().map(|what| what.name).collect();
    let mut wrong = wait(plan, churn, &ends, &mut left).err();
    stop.store(true, Ordering::Relaxed);
    let deadline = Instant::now() + END_DEADLINE;
    while !left.is_empty() {
        match ends.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((name, result)) => {
                left.retain(|other| *other != name);
                let failure = result.map_err(|error| format!("{name}: {error}"));
                wrong = wrong.or(failure.err());
            }
            Err(RecvTimeoutError::Timeout) => {
                disturb::tell_blocked_tasks();
                return Err(format!("never ended: {}", left.join(", ")));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(format!("panicked: {}", left.join(", ")));
            }
        }
    }
    wrong.map_or(Ok(counts), Err)
}

/// Waits until the time is over or an error occurs.
fn wait(
    plan: &Plan,
    churn: &Churn,
    ends: &mpsc::Receiver<(&'static str, Result<(), String>)>,
    left: &mut Vec<&str>,
) -> Result<(), String> {
    let begin = Instant::now();
    let mut logged_seconds = 0;
    loop {
        churn.tally().check()?;
        let seconds = begin.elapsed().as_secs();
        if seconds >= plan.seconds {
            return Ok(());
        }
        if seconds >= logged_seconds + LOG_SECONDS {
            logged_seconds = seconds;
            let verified = churn.tally().verified_bytes.load(Ordering::Relaxed);
            println!("stress: {seconds} s, {} MiB verified", verified >> 20);
        }
        match ends.recv_timeout(Duration::from_secs(1)) {
            Ok((name, result)) => {
                left.retain(|other| *other != name);
                result.map_err(|error| format!("{name}: {error}"))?;
            }
            // This kernel supports no disturbance; the memory continues to churn.
            Err(RecvTimeoutError::Disconnected) => thread::sleep(Duration::from_secs(1)),
            Err(RecvTimeoutError::Timeout) => (),
        }
    }
}

fn repeat(
    what: &Disturbance,
    mut random: Random,
    stop: &AtomicBool,
    count: &Count,
) -> Result<(), String> {
    let mut state = disturb::State::default();
    while !stop.load(Ordering::Relaxed) {
        match (what.act)(&mut random, &mut state)? {
            Done::Yes => count.done.fetch_add(1, Ordering::Relaxed),
            Done::Refused => count.refused.fetch_add(1, Ordering::Relaxed),
            Done::Absent => {
                count.absent.store(true, Ordering::Relaxed);
                return Ok(());
            }
        };
        let pause = random.below(what.pause_ms_max + 1);
        thread::sleep(Duration::from_millis(pause as u64));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<&str> {
        line.split_ascii_whitespace().collect()
    }

    #[test]
    fn plan_takes_its_options() {
        let line = "--seconds 9 --seed 4 --bytes 2M --threads 3 --without rebind";
        assert_eq!(
            plan(&words(line)),
            Ok(Plan {
                seconds: 9,
                churn: ChurnPlan {
                    bytes: 2 << 20,
                    seed: 4,
                    threads: 3
                },
                without: vec!["rebind".into()],
            })
        );
    }

    #[test]
    fn plan_with_nonsense_tells_usage() {
        for line in [
            "",
            "--seconds 1",
            "--bytes 1M --seconds",
            "--seconds 1 --bytes 1M --without air",
        ] {
            assert_eq!(plan(&words(line)), Err(USAGE.into()), "{line}");
        }
    }

    #[test]
    fn disturbance_that_fails_ends_the_stress() {
        const BROKEN: Disturbance = Disturbance {
            name: "broken",
            pause_ms_max: 1,
            act: |_, _| Err("no".into()),
        };
        let plan = plan(&words("--seconds 60 --bytes 1M")).unwrap();
        let churn = Churn::start(plan.churn).unwrap();
        let error = disturb_for(&plan, &[&BROKEN], &churn).unwrap_err();
        churn.stop().unwrap();
        assert_eq!(error, "broken: no");
    }
}
