//! `ch-fleet`: memory overcommit for VMs with Cloud Hypervisor's API.
//!
//! `ch-fleet agent` manages the memory of one host's VMs. `ch-fleet fleet` uses the store that several hosts share.
//! Every other command queries a running agent over its socket. Responses are printed on standard output as a table or
//! as JSON, errors as a chain of causes on standard error. `docs/fleet.md` lists the exit statuses.

mod agent_command;
mod allocator;
mod args;
mod ask;
mod config_command;
mod doctor;
mod drain_command;
mod fleet_command;
mod fleet_tables;
mod logger;
mod output;
mod run;
mod screen;
#[cfg(feature = "simulate")]
mod simulate;
mod standby;
mod tables;
mod top;

#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser};

use args::{Arguments, Command, Output};
use ask::{Agent, Unknown};
use fleet::agent::{JournalPage, PinRequest, ReleaseRequest, ReserveAnswer, ReserveRequest};
use fleet::model::Bytes;
use output::print;

fn main() -> ExitCode {
    if let Some(status) = program_docs::requested(Arguments::command) {
        return status;
    }
    let arguments = Arguments::parse();
    match execute(&arguments) {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", api::chain_report("ch-fleet", error.as_ref()));
            ask::exit_code(&error)
        }
    }
}

fn execute(arguments: &Arguments) -> Result<ExitCode> {
    let agent = Agent::new(arguments.socket(), arguments.timeout());
    let mut out = io::stdout().lock();
    match &arguments.command {
        Command::Agent(options) => agent_command::run(options, arguments.socket.as_deref())?,
        Command::Run(options) => return run::run(&agent, options),
        Command::Wake(options) => return standby::wake(&agent, options),
        Command::Standby { vm } => standby::standby(&agent, vm, arguments.output, &mut out)?,
        #[cfg(feature = "simulate")]
        Command::Simulate(options) => return simulate::run(options, arguments.output, &mut out),
        Command::Fleet(command) => {
            return fleet_command::run(command, arguments.timeout(), arguments.output, &mut out);
        }
        Command::Doctor => return doctor::run(&agent, arguments.output, &mut out),
        Command::Top(options) => {
            // The screen locks standard output itself.
            drop(out);
            top::run(&agent, options, arguments.output)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Config(command) => config_command::run(&agent, command, &mut out)?,
        Command::Completions { shell } => {
            program_docs::completions(*shell, &mut Arguments::command(), &mut out);
        }
        Command::Man => program_docs::manual_page(Arguments::command(), &mut out)
            .context("Cannot write the manual page")?,
        command => show(&agent, command, arguments.output, &mut out)?,
    }
    out.flush().context("Cannot write the output")?;
    Ok(ExitCode::SUCCESS)
}

/// Runs commands that send one query and print the response.
fn show(agent: &Agent, command: &Command, output: Output, out: &mut dyn Write) -> Result<()> {
    match command {
        Command::Status => {
            let status = agent.status()?;
            print(out, output, &status, |out| tables::status(out, &status))
        }
        Command::Vms => {
            let status = agent.status()?;
            print(out, output, &status.vms, |out| {
                tables::vms(out, &status.vms)
            })
        }
        Command::Reservations => {
            let held = agent.status()?.reservations;
            print(out, output, &held, |out| tables::reservations(out, &held))
        }
        Command::Explain { vm } => explain(agent, vm.as_deref(), output, out),
        Command::Events { since } => {
            let page: JournalPage = agent.get(&format!("fleet.events?since={since}"))?;
            print(out, output, &page, |out| tables::events(out, &page))
        }
        Command::Reserve(options) => {
            let answer: ReserveAnswer = agent.put(
                "fleet.reserve",
                &ReserveRequest {
                    vm: options.vm.clone(),
                    memory: Bytes(options.memory),
                    min: options.min.map(Bytes),
                    huge_pages: options.huge_pages,
                    dry_run: options.dry_run,
                },
            )?;
            print(out, output, &answer, |out| tables::reserved(out, &answer))
        }
        Command::Release { reservation } => {
            let released: fleet::reservations::Reservation = agent.put(
                "fleet.release",
                &ReleaseRequest {
                    reservation: reservation.clone(),
                },
            )?;
            print(out, output, &released, |out| {
                writeln!(out, "{} of {} released", released.promised, released.vm)
            })
        }
        Command::Discard { vm, .. } => standby::discard(agent, vm),
        Command::Pin { vm } => pin(agent, vm, true),
        Command::Unpin { vm } => pin(agent, vm, false),
        Command::Reload => agent.order("fleet.reload", None),
        _ => Ok(()),
    }
}

fn pin(agent: &Agent, vm: &str, pinned: bool) -> Result<()> {
    let request = PinRequest {
        vm: vm.to_owned(),
        pinned,
    };
    agent.order("fleet.pin", Some(&api::to_ascii_json(&request)?))
}

/// Prints the latest plan, or its part about one VM.
fn explain(agent: &Agent, vm: Option<&str>, output: Output, out: &mut dyn Write) -> Result<()> {
    let plan: serde_json::Value = agent.get("fleet.explain")?;
    let Some(vm) = vm else {
        let status = agent.status()?;
        return print(out, output, &plan, |out| tables::explanations(out, &status));
    };
    let of_vm = |list: &str| {
        let entries = plan[list].as_array().cloned().unwrap_or_default();
        entries.into_iter().filter(|entry| entry["vm"] == vm)
    };
    let Some(explanation) = of_vm("explanations").next() else {
        return Err(Unknown::vm(vm).into());
    };
    let whole = serde_json::json!({
        "explanation": explanation,
        "actions": of_vm("actions").collect::<Vec<_>>(),
    });
    let status = agent.status()?;
    print(out, output, &whole, |out| {
        let line = status.vms.iter().find(|known| known.vm == vm);
        writeln!(out, "{}", line.map_or("", |line| &line.explanation))?;
        tables::figures(out, &explanation)
    })
}

/// True if the reader of the output, for example `head`, has closed the pipe. That is not a failure.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<api::ClientError>().is_none()
        && error
            .root_cause()
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
