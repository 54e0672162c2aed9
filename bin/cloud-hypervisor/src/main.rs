//! `cloud-hypervisor`: runs one virtual machine, controlled by its command line and its REST API.

mod args;
mod logger;
mod process;
mod run;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use api::options::OptionError;
use clap::{CommandFactory, Parser};

use args::Arguments;

fn main() -> ExitCode {
    let start = Instant::now();
    process::configure();
    if let Some(status) = program_docs::requested(Arguments::command) {
        return status;
    }
    let arguments = Arguments::parse();
    if arguments.version {
        print_version(arguments.v > 0);
        return ExitCode::SUCCESS;
    }
    let outcome = logger::install(
        start,
        arguments.log_file.as_deref(),
        arguments.log_file_bytes_max,
        arguments.v,
    )
    .context("Cannot open the log file")
    .and_then(|()| run::run(&arguments, start));
    log::logger().flush();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", api::chain_report("Cloud Hypervisor", error.as_ref()));
            exit_code(&error)
        }
    }
}

/// Exit status for a failure: 2 if an option cannot be parsed, as for one that clap rejects.
fn exit_code(error: &anyhow::Error) -> ExitCode {
    let is_usage = error.chain().any(|cause| cause.is::<OptionError>());
    ExitCode::from(if is_usage { 2 } else { 1 })
}

/// Prints the version in upstream's format.
fn print_version(with_features: bool) {
    println!("cloud-hypervisor v{}", env!("CARGO_PKG_VERSION"));
    println!(
        "Migration Protocol Versions: {}",
        vmm::migration::wire::VERSION
    );
    if with_features {
        println!("Enabled features: {:?}", run::FEATURES);
    }
}
