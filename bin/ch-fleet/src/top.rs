//! `ch-fleet top`: the host and its VMs, again and again.

use std::io::Write;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::args::{Output, TopOptions};
use crate::ask::Agent;
use crate::tables;

/// Shortest and longest time between two rounds, seconds.
const DELAY_SECONDS: std::ops::RangeInclusive<f64> = 0.1..=3600.0;

pub(crate) fn run(
    agent: &Agent,
    options: &TopOptions,
    output: Output,
    out: &mut dyn Write,
) -> Result<()> {
    ensure!(
        DELAY_SECONDS.contains(&options.delay),
        "--delay must lie between {} and {} seconds",
        DELAY_SECONDS.start(),
        DELAY_SECONDS.end()
    );
    let delay = Duration::from_secs_f64(options.delay);
    batch(agent, options.count, delay, output, out)
}

/// One round after the other.
fn batch(
    agent: &Agent,
    count: Option<u64>,
    delay: Duration,
    output: Output,
    out: &mut dyn Write,
) -> Result<()> {
    let mut round = 0;
    loop {
        let status = agent.status()?;
        match output {
            Output::Json => writeln!(out, "{}", api::to_ascii_json(&status)?),
            Output::Table => tables::status(out, &status).and_then(|()| writeln!(out)),
        }
        .and_then(|()| out.flush())
        .context("Cannot write the answer")?;
        round += 1;
        if count.is_some_and(|count| round >= count) {
            return Ok(());
        }
        thread::sleep(delay);
    }
}
