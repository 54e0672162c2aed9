//! `ch-fleet top`: the host and its VMs, refreshed continuously.
//!
//! On a terminal, it shows an interactive screen; otherwise, and with `--batch`, it prints one round after another.

use std::io::{self, IsTerminal, Write};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ratatui::crossterm::event::{self, Event, KeyEventKind};

use crate::args::{Output, TopOptions};
use crate::ask::Agent;
use crate::output::print;
use crate::screen::{Screen, draw};
use crate::tables;

pub(crate) fn run(agent: &Agent, options: &TopOptions, output: Output) -> Result<()> {
    let delay = Duration::from_secs_f64(options.delay);
    let stdout = io::stdout();
    if options.batch || output == Output::Json || !stdout.is_terminal() {
        batch(agent, options.count, delay, output, &mut stdout.lock())
    } else {
        full_screen(agent, options.count, delay)
    }
}

/// Prints one round after another.
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
        print(out, output, &status, |out| {
            tables::status(out, &status)?;
            writeln!(out)
        })?;
        out.flush().context("Cannot write the output")?;
        round += 1;
        if count.is_some_and(|count| round >= count) {
            return Ok(());
        }
        thread::sleep(delay);
    }
}

/// Runs the interactive screen. The terminal is restored in any case.
fn full_screen(agent: &Agent, count: Option<u64>, delay: Duration) -> Result<()> {
    let mut terminal = ratatui::try_init().context("Cannot use the terminal")?;
    let result = follow(&mut terminal, agent, count, delay);
    ratatui::restore();
    result
}

fn follow(
    terminal: &mut ratatui::DefaultTerminal,
    agent: &Agent,
    count: Option<u64>,
    delay: Duration,
) -> Result<()> {
    let mut screen = Screen::new(agent.status()?);
    let mut round = 1;
    loop {
        terminal
            .draw(|frame| draw(frame, &screen))
            .context("Cannot draw")?;
        if count.is_some_and(|count| round >= count) {
            return Ok(());
        }
        let until = Instant::now() + delay;
        while event::poll(until.saturating_duration_since(Instant::now()))
            .context("Cannot read keys")?
        {
            match event::read().context("Cannot read keys")? {
                Event::Key(key) if key.kind == KeyEventKind::Press && !screen.key(key) => {
                    return Ok(());
                }
                _ => {}
            }
            terminal
                .draw(|frame| draw(frame, &screen))
                .context("Cannot draw")?;
        }
        if !screen.paused {
            screen.take(agent.status()?);
            round += 1;
        }
    }
}
