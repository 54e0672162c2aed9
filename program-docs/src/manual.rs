//! Manual pages: one for the program and one for each subcommand.
//!
//! The sections come from the declared command line. The text after the help of the program has its exit status and
//! examples, as paragraphs that start with `Exit status:` and `Examples:`.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

/// All programs with manual pages, in the order of the section SEE ALSO.
const PROGRAMS: [&str; 4] = [
    "cloud-hypervisor",
    "ch-remote",
    "ch-fleet",
    "ch-fleet-adapter",
];

/// Data of the program that all its pages share.
struct Program {
    name: String,
    version: String,
    after_help: AfterHelp,
}

/// The text after the help, by the sections of a page.
#[derive(Default)]
struct AfterHelp {
    exit_status: Option<String>,
    examples: Option<String>,
    notes: Vec<String>,
}

impl AfterHelp {
    fn of(text: &str) -> Self {
        let mut parts = Self::default();
        for paragraph in text.split("\n\n") {
            if let Some(status) = paragraph.strip_prefix("Exit status: ") {
                parts.exit_status = Some(status.to_owned());
            } else if let Some(examples) = paragraph.strip_prefix("Examples:\n") {
                parts.examples = Some(examples.to_owned());
            } else if !paragraph.is_empty() {
                parts.notes.push(paragraph.to_owned());
            }
        }
        parts
    }
}

impl Program {
    fn of(command: &Command) -> Self {
        let after_help = command.get_after_help().map(ToString::to_string);
        let version = command.get_version().unwrap_or_default();
        Self {
            name: command.get_name().to_owned(),
            version: version.trim_start_matches('v').to_owned(),
            after_help: AfterHelp::of(&after_help.unwrap_or_default()),
        }
    }
}

/// Writes all pages of the program into `folder`.
pub(crate) fn write_pages(command: Command, folder: &Path) -> io::Result<()> {
    let program = Program::of(&command);
    write_with_subcommands(&program, &built(command), folder)
}

/// Writes the page of the program.
pub(crate) fn write_page(command: Command, out: &mut dyn Write) -> io::Result<()> {
    let program = Program::of(&command);
    page(&program, &built(command), out)
}

fn built(command: Command) -> Command {
    let mut command = for_pages(command).disable_help_subcommand(true);
    command.build();
    command
}

/// Manual pages show a version behind a `v` of their own.
fn for_pages(command: Command) -> Command {
    let version = command
        .get_version()
        .map(|it| it.trim_start_matches('v').to_owned());
    match version {
        Some(version) => command.long_version(version),
        None => command,
    }
}

fn write_with_subcommands(program: &Program, command: &Command, folder: &Path) -> io::Result<()> {
    for subcommand in command.get_subcommands().filter(|it| !it.is_hide_set()) {
        write_with_subcommands(program, subcommand, folder)?;
    }
    let name = Man::new(command.clone()).get_filename();
    let mut file = File::create(folder.join(name))?;
    page(program, command, &mut file)?;
    file.flush()
}

fn page(program: &Program, command: &Command, out: &mut dyn Write) -> io::Result<()> {
    let is_program = command.get_name() == program.name;
    let man = Man::new(command.clone())
        // An empty argument would be lost, and the next ones would take its place.
        .date(" ")
        .source(format!("{} {}", program.name, program.version))
        .manual(format!("{} manual", program.name));
    man.render_title(out)?;
    section(out, |out| man.render_name_section(out))?;
    text(out, "SYNOPSIS", &usage(command))?;
    section(out, |out| man.render_description_section(out))?;
    if command.get_arguments().any(|it| !it.is_hide_set()) {
        section(out, |out| man.render_options_section(out))?;
    }
    if command.get_subcommands().any(|it| !it.is_hide_set()) {
        section(out, |out| man.render_subcommands_section(out))?;
    }
    let AfterHelp {
        exit_status,
        examples,
        notes,
    } = &program.after_help;
    if let Some(status) = exit_status {
        text(out, "EXIT STATUS", status)?;
    }
    if !is_program {
        return text(out, "SEE ALSO", &format!("{}(1)", program.name));
    }
    if !notes.is_empty() {
        text(out, "NOTES", &notes.join("\n"))?;
    }
    if let Some(examples) = examples {
        example(out, examples)?;
    }
    text(out, "SEE ALSO", &other_programs(&program.name))?;
    section(out, |out| man.render_version_section(out))
}

/// The manual pages of the package's other programs.
fn other_programs(name: &str) -> String {
    let others = PROGRAMS.iter().filter(|it| **it != name);
    let pages: Vec<String> = others.map(|it| format!("{it}(1)")).collect();
    pages.join(", ")
}

/// The command line with the required options of the program before a subcommand.
fn usage(command: &Command) -> String {
    let usage = command.clone().render_usage().to_string();
    let lines = usage.trim_start_matches("Usage: ").lines().map(str::trim);
    lines.collect::<Vec<_>>().join("\n")
}

/// A section as clap_mangen renders it, without the definitions at the start of its output, which the title has.
fn section(
    out: &mut dyn Write,
    render: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let mut rendered = Vec::new();
    render(&mut rendered)?;
    let heading = rendered.windows(4).position(|it| it == b".SH ");
    out.write_all(&rendered[heading.unwrap_or(0)..])
}

fn text(out: &mut dyn Write, heading: &str, text: &str) -> io::Result<()> {
    section(out, |out| {
        let mut roff = Roff::default();
        roff.control("SH", [heading]);
        for line in text.lines() {
            roff.text([roman(line)]);
        }
        roff.to_writer(out)
    })
}

/// Lines that are not filled.
fn example(out: &mut dyn Write, lines: &str) -> io::Result<()> {
    section(out, |out| {
        let mut roff = Roff::default();
        roff.control("SH", ["EXAMPLES"]);
        roff.control("nf", []);
        for line in lines.lines() {
            roff.text([roman(line.strip_prefix("  ").unwrap_or(line))]);
        }
        roff.control("fi", []);
        roff.to_writer(out)
    })
}
