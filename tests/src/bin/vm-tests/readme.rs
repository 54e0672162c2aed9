//! Runs the README's commands for a first guest. Only paths and the terminal are replaced.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use integration_tests::descriptors::open_terminal;
use integration_tests::linux::COMMAND_DEADLINE;
use integration_tests::outcome::{Outcome, Test};
use integration_tests::paths;
use integration_tests::serial::Serial;
use integration_tests::tests;
use integration_tests::vmm::Vmm;

use crate::debian::DISTRIBUTION_DEADLINE;

pub(crate) fn tests() -> Vec<Test> {
    tests![debian_kernel_boots_the_first_guest_of_the_readme]
}

const README: &str = include_str!("../../../../README.md");
/// Folder of the programs in the README.
const PROGRAMS: &str = "target/release/";
/// Folder of the guest's kernel in the README.
const GUEST: &str = "target/guest/debian/";
/// The VMM's socket in the README.
const SOCKET: &str = "/tmp/vm.sock";

/// The commands that run our programs, in order; the first one starts the VMM.
fn commands() -> Vec<Vec<String>> {
    let section = README
        .split("\n## ")
        .find(|it| it.starts_with("First guest\n"));
    test_docs::blocks("README.md", section.unwrap_or_default())
        .iter()
        .flat_map(test_docs::Block::commands)
        .map(|command| command.words)
        .filter(|words| words[0].starts_with(PROGRAMS))
        .collect()
}

/// The folder of the kernel that `cargo xtask guest build debian` unpacks, or of the same package's kernel in the
/// testbed.
fn kernel_folder() -> Option<PathBuf> {
    let kernels = [
        "debian/vmlinuz",
        "debian-6.12/vmlinuz",
        "debian-6.1/vmlinuz",
    ];
    let kernel = kernels.into_iter().find_map(|it| paths::guest(it).ok())?;
    Some(kernel.parent()?.to_path_buf())
}

fn debian_kernel_boots_the_first_guest_of_the_readme() -> Result<Outcome> {
    let Some(kernel) = kernel_folder() else {
        return Ok(Outcome::Skipped(
            "there is no kernel of Debian's".to_owned(),
        ));
    };
    let commands = commands();
    let (start, controls) = commands
        .split_first()
        .context("no commands in the README")?;
    ensure!(
        start[0].ends_with("/cloud-hypervisor") && controls.len() >= 5,
        "{commands:?}"
    );

    let (mut vmm, mut serial) = start_vmm(start, &kernel)?;
    serial.expect("guest: init", DISTRIBUTION_DEADLINE)?;
    // The shell starts after the modules are loaded, among them those of the balloon and of the power button.
    serial.send("echo the shell: $((6 * 7))")?;
    serial.expect_text("the shell: 42", DISTRIBUTION_DEADLINE)?;
    for words in controls {
        control(words, &vmm.socket()).with_context(|| words.join(" "))?;
    }
    vmm.expect_clean_exit(COMMAND_DEADLINE)?;
    Ok(Outcome::Passed)
}

/// Starts the VMM on a terminal.
fn start_vmm(words: &[String], kernel: &Path) -> Result<(Vmm, Serial)> {
    let kernel = format!("{}/", kernel.display());
    let words: Vec<String> = words[1..]
        .iter()
        .map(|word| word.replace(GUEST, &kernel))
        .collect();
    let mut arguments: Vec<&str> = words.iter().map(String::as_str).collect();
    let socket = arguments.iter().position(|word| *word == "--api-socket");
    let socket = socket.context("no --api-socket")?;
    // The test's own socket takes its place.
    arguments.drain(socket..socket + 2);

    let (master, path) = open_terminal()?;
    let terminal = File::options().read(true).write(true).open(&path)?;
    let input = terminal.try_clone()?;
    let mut vmm = Vmm::spawn_with(&arguments, |command| {
        command
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(terminal));
    })?;
    vmm.wait_api()?;
    Ok((vmm, Serial::over(master)))
}

/// Runs a command of `ch-remote`. One that runs until it is interrupted is ended after its first line.
fn control(words: &[String], socket: &Path) -> Result<()> {
    let name = words[0].strip_prefix(PROGRAMS).unwrap_or_default();
    let socket = socket.display().to_string();
    let mut command = Command::new(paths::program(name)?);
    command.args(words[1..].iter().map(|word| word.replace(SOCKET, &socket)));
    if !words.iter().any(|word| word == "--watch") {
        let output = command.output()?;
        ensure!(output.status.success(), "{output:?}");
        return Ok(());
    }
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    let output = child.stdout.take().context("a pipe")?;
    let read = BufReader::new(output).read_line(&mut line);
    child.kill()?;
    child.wait()?;
    read?;
    ensure!(line.contains("resident"), "the first line is {line:?}");
    Ok(())
}
