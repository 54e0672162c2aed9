//! Runs the scenarios named on the command line: `cargo run --release -p fleet --example simulate -- FILE…`.
//! `--plot=FILE` draws a plot, `--seed=N` sets another seed, and `--without=RULE` switches off a safety rule. It does
//! the same as `ch-fleet simulate`, without the agent.

use std::error::Error;
use std::process::ExitCode;

use fleet::sim::{SimulateOptions, run_cli};

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut options = SimulateOptions::default();
    for argument in std::env::args().skip(1) {
        match argument.split_once('=') {
            Some(("--plot", path)) => options.plot = Some(path.into()),
            Some(("--seed", seed)) => options.seed = Some(seed.parse()?),
            Some(("--without", rule)) => {
                options.without.push(rule.parse()?);
            }
            _ if argument == "--json" => options.json = true,
            _ => options.scenarios.push(argument.into()),
        }
    }
    let holds = run_cli(&options, &mut std::io::stdout())?;
    Ok(if holds {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
