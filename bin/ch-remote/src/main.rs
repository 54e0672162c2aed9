//! `ch-remote`: controls a VMM over its API socket.
//!
//! Each command sends one request. The VMM's response is printed unchanged, with two exceptions. `reclaim-stats` prints
//! a table on a terminal. `status` of hinting and of reporting prints only a part of the statistics. An error is
//! printed as a chain of causes on standard error. The exit status is then 1, or 2 for a usage error. Commands and
//! arguments are Cloud Hypervisor's. The commands of endpoints that `api` marks as `Ours` are additions.

mod args;
mod command;
mod reclaim_table;
mod units;
mod watch;

#[cfg(test)]
mod tests;

use std::io::{self, IsTerminal, Read, Write};
use std::process::ExitCode;

use anyhow::{Context, Result};
use api::{Client, Endpoint, HintingReport, ReclaimStats, to_ascii_json};
use clap::{CommandFactory, Parser};

use args::Arguments;
use command::{Command, OutputFormat, Request};
use reclaim_table::Sample;

fn main() -> ExitCode {
    if let Some(status) = program_docs::requested(Arguments::command) {
        return status;
    }
    let arguments = Arguments::parse();
    let stdout = io::stdout();
    let terminal = stdout.is_terminal();
    match run(
        &arguments,
        &mut io::stdin().lock(),
        &mut stdout.lock(),
        terminal,
    ) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of the output, for example `head`, has closed the pipe. That is not a failure.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", api::chain_report("ch-remote", error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// Executes the command. The streams are parameters so that tests can inspect them.
fn run(
    arguments: &Arguments,
    input: &mut dyn Read,
    output: &mut dyn Write,
    terminal: bool,
) -> Result<()> {
    let client = Client::new(&arguments.api_socket).with_timeout(arguments.timeout());
    let call =
        |Request {
             endpoint,
             body,
             fds,
         }: &Request| { client.call_with_fds(*endpoint, body.as_deref(), fds) };
    let answer = match &arguments.command {
        Command::Call(request) => call(request)?,
        Command::Create(path) => call(&Request::create(path, input)?)?,
        Command::ReclaimStats(options) if options.watch => {
            return watch::watch(&client, options, output, terminal);
        }
        Command::ReclaimStats(options) if options.output(terminal) == OutputFormat::Table => {
            let stats = client.reclaim_stats()?;
            let table = Sample::single(&stats).to_table();
            Some(table.trim_end().to_owned())
        }
        Command::ReclaimStats(_) => client.call(Endpoint::VmReclaimStats, None)?,
        Command::HintingStatus => {
            let ReclaimStats { hinting, hint, .. } = client.reclaim_stats()?;
            Some(to_ascii_json(&HintingReport { hinting, hint })?)
        }
        Command::ReportingStatus => Some(to_ascii_json(&client.reclaim_stats()?.reporting)?),
    };
    if let Some(answer) = answer {
        writeln!(output, "{answer}")
            .and_then(|()| output.flush())
            .context("Cannot write the output")?;
    }
    Ok(())
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    // Only errors of standard output have a plain I/O error at the root; a broken API socket is a client error.
    error.downcast_ref::<api::ClientError>().is_none()
        && error
            .root_cause()
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
