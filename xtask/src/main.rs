//! The project's own commands: `cargo xtask …`.
//!
//! Each command installs the Debian packages that it needs, and lists them with the reasons.

mod apt;
mod bench;
mod cargo;
mod ci;
mod demo;
mod disk;
mod experiment;
mod fleet;
mod fleet_store;
mod fuzz;
mod guest;
mod other_vmm;
mod package;
mod paths;
mod process;
mod progress;
mod results;
mod test_programs;
mod testbed;
mod tools;
mod vm_tests;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    about = "Build, test and demonstrate this project"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build test guests, and work on the kernel patch series
    #[command(subcommand)]
    Guest(GuestCommand),
    /// Run commands on a host whose KVM boots Linux, real or emulated
    #[command(subcommand)]
    Testbed(testbed::Command),
    /// Boot a Linux guest that touches and frees memory, and show how the memory returns to the host
    Demo(demo::Options),
    /// Measure the VMM with a Linux guest
    Bench(bench::Options),
    /// Test the VMM with Linux guests
    VmTests(vm_tests::Options),
    /// Test the fleet agent's page in Chromium, its metrics in Prometheus, and its adapter with placement
    FleetPage,
    /// Measure the fleet agent's use of processor time and memory
    FleetBench(fleet::BenchOptions),
    /// Kill the fleet agent repeatedly while its VMs fail, and check that it does no harm
    FleetChaos(fleet::ChaosOptions),
    /// Test the fleet manager with a real etcd
    FleetStore(fleet_store::Options),
    /// Fuzz the devices for a limited time
    Fuzz(fuzz::Options),
    /// Build the Debian package of the four programs
    Package(package::Options),
    /// Install programs of other projects that some tests use
    TestTools(tools::Options),
    /// Measure the value of reclaimed memory
    #[command(subcommand)]
    Experiment(experiment::Experiment),
    /// Measure the figures of docs/results again, and mark those that are older than the code
    Results(results::Options),
    /// Run all checks for a change
    Ci(ci::Options),
}

#[derive(Debug, Subcommand)]
enum GuestCommand {
    /// Make kernels and an initramfs in target/guest
    Build {
        /// Which kernels
        #[arg(value_enum, default_values = ["stock", "patched"])]
        kernels: Vec<guest::Wanted>,
    },
    /// Create a kernel tree with one commit per patch of the series
    Apply(guest::tree::Options),
    /// Turn the commits of such a tree back into the series
    Refresh(guest::tree::Options),
    /// Build Debian packages of the patched kernel, to be installed in guests
    Package(guest::package::Options),
    /// Test the core of the patches against a model, in user space
    Core(guest::core::Options),
    /// Test the patched kernel with QEMU as its host: NUMA nodes, memory hotplug, virtio-mem
    QemuTest(guest::qemu_test::Options),
    /// Run the unit tests of the series in a kernel under emulation
    Kunit(guest::kunit::Options),
    /// Stress the series in kernels with lockdep, KASAN and KCSAN, under emulation
    Sanitize(guest::sanitize::Options),
    /// Check every prefix of the patch series
    Check(guest::check::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Guest(GuestCommand::Apply(options)) => {
            guest::tree::apply(&options).map(|()| ExitCode::SUCCESS)
        }
        Command::Guest(GuestCommand::Refresh(options)) => {
            guest::tree::refresh(&options).map(|()| ExitCode::SUCCESS)
        }
        Command::Guest(GuestCommand::Package(options)) => {
            guest::package::run(&options).map(|()| ExitCode::SUCCESS)
        }
        Command::Guest(GuestCommand::Core(options)) => guest::core::run(&options),
        Command::Guest(GuestCommand::QemuTest(options)) => guest::qemu_test::run(&options),
        Command::Guest(GuestCommand::Kunit(options)) => guest::kunit::run(&options),
        Command::Guest(GuestCommand::Sanitize(options)) => guest::sanitize::run(&options),
        Command::Guest(GuestCommand::Check(options)) => guest::check::run(&options),
        Command::Guest(GuestCommand::Build { kernels }) => {
            guest::build_kernels(&kernels).map(|()| ExitCode::SUCCESS)
        }
        Command::Testbed(command) => testbed::run(command),
        Command::Demo(options) => demo::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::VmTests(options) => vm_tests::run(&options),
        Command::FleetPage => fleet::page(),
        Command::FleetBench(options) => fleet::bench(&options),
        Command::FleetChaos(options) => fleet::chaos(&options),
        Command::FleetStore(options) => fleet_store::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Package(options) => package::run(&options).map(|()| ExitCode::SUCCESS),
        Command::TestTools(options) => tools::run(&options).map(|()| ExitCode::SUCCESS),
        Command::Experiment(experiment) => experiment::run(&experiment),
        Command::Results(options) => results::run(&options),
        Command::Ci(options) => ci::run(&options),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::Cli;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn commands_in_the_documentation_are_understood() {
        for command in test_docs::commands_of("cargo xtask") {
            // The arguments after `cargo`.
            let words = command.filled_in(&[]).into_iter().skip(1);
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("{}: {error}", command.place);
            }
        }
    }
}
