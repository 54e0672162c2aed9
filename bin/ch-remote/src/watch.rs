//! `reclaim-stats --watch`: refreshes the figures until Ctrl-C.

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use api::{Client, ClientError, ReclaimStats, error_line};

use crate::command::ReclaimStatsArguments;
use crate::reclaim_table::Sample;

/// Time limit of a sample.
const SAMPLE_TIMEOUT: Duration = Duration::from_secs(5);
/// Moves to the top left corner and clears the rest of the screen. Nothing must be restored when Ctrl-C ends the
/// program.
const CLEAR_SCREEN: &str = "\x1b[H\x1b[J";

/// Shows samples until `options.count` is reached, the VMM ends, or the program is interrupted.
///
/// A failed or late sample is shown as such and the watch continues, because the VM may be rebooting.
pub(crate) fn watch(
    client: &Client,
    options: &ReclaimStatsArguments,
    output: &mut dyn Write,
    terminal: bool,
) -> Result<()> {
    let client = client.clone().with_timeout(Some(SAMPLE_TIMEOUT));
    let started = Instant::now();
    let mut previous: Option<(ReclaimStats, Instant)> = None;
    let mut shown = 0_u64;
    loop {
        let asked = Instant::now();
        let text = match client.reclaim_stats() {
            Ok(stats) => {
                let sample = Sample {
                    stats: &stats,
                    previous: previous.as_ref().map(|(stats, _)| stats),
                    interval: previous
                        .as_ref()
                        .map_or(Duration::ZERO, |(_, at)| asked - *at),
                    elapsed: asked - started,
                };
                let text = if terminal {
                    sample.to_table()
                } else {
                    sample.to_line() + "\n"
                };
                previous = Some((stats, asked));
                text
            }
            Err(error) if passes(&error) => {
                previous = None;
                let elapsed_ms = (asked - started).as_millis();
                format!("elapsed_ms={elapsed_ms} error={:?}\n", error_line(&error))
            }
            Err(error) => return Err(error.into()),
        };
        show(output, &text, terminal, &client, options).context("Cannot write the sample")?;
        shown += 1;
        if options.count.is_some_and(|count| shown >= count) {
            return Ok(());
        }
        // Measured from the request, so that a slow response does not extend the interval.
        thread::sleep(options.interval.saturating_sub(asked.elapsed()));
    }
}

/// True for errors that may be gone at the next sample.
fn passes(error: &ClientError) -> bool {
    match error {
        ClientError::TimedOut { .. } => true,
        // An unknown path is a permanent error.
        ClientError::Server(error) => error.status != 404,
        _ => false,
    }
}

fn show(
    output: &mut dyn Write,
    text: &str,
    terminal: bool,
    client: &Client,
    options: &ReclaimStatsArguments,
) -> std::io::Result<()> {
    if terminal {
        let seconds = options.interval.as_secs_f64();
        write!(
            output,
            "{CLEAR_SCREEN}{}, every {seconds} s, Ctrl-C ends\n\n",
            client.socket().display()
        )?;
    }
    output.write_all(text.as_bytes())?;
    output.flush()
}
