//! The commands and links in the documentation, for tests that check them.
//!
//! Each program's tests parse its commands with the program's own parser. [`unchecked`] finds commands that no such test
//! covers. A code block whose commands cannot be parsed has `<!-- not run: REASON -->` on the line before it, and one
//! whose commands no test runs has `<!-- only parsed: REASON -->`.

mod blocks;
mod command;
#[cfg(test)]
mod figures;
#[cfg(test)]
mod layout;
mod links;
#[cfg(test)]
mod named_tests;
mod since;
mod table;
mod words;

use std::fs;
use std::path::{Path, PathBuf};

pub use blocks::{Block, blocks};
pub use command::Command;
pub use links::{anchors, links};
pub use since::{ALTERNATIVES, FirstVersions, THIS_VERSION};
pub use table::{Meanings, expect_page};

/// Programs whose tests parse every command in the documentation.
pub const CHECKED_PROGRAMS: &[&str] = &[
    "cargo xtask",
    "ch-fleet",
    "ch-fleet-adapter",
    "ch-remote",
    "cloud-hypervisor",
];

/// The root of the repository.
#[must_use]
pub fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Every Markdown file of the documentation, relative to the root.
///
/// # Panics
/// A folder cannot be read.
#[must_use]
pub fn documents() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for folder in [
        "",
        "api",
        "docs",
        "docs/commands",
        "docs/decisions",
        "docs/results",
        "guest-patches",
        "tests/adopters",
    ] {
        let entries = fs::read_dir(root().join(folder)).expect("the folder can be read");
        for entry in entries {
            let path = entry.expect("the folder can be read").path();
            if path.extension().is_some_and(|ending| ending == "md") {
                let name = path.file_name().expect("a file has a name");
                found.push(Path::new(folder).join(name));
            }
        }
    }
    found.sort();
    found
}

/// All code blocks of the documentation.
///
/// # Panics
/// A document cannot be read.
#[must_use]
pub fn all_blocks() -> Vec<Block> {
    let documents = documents().into_iter();
    documents
        .flat_map(|document| {
            let text = fs::read_to_string(root().join(&document)).expect("the document is text");
            blocks(&document.display().to_string(), &text)
        })
        .collect()
}

/// The commands of one program: `ch-remote`, or `cargo xtask`.
///
/// The words after `cargo run -p PROGRAM … --` are included, and so are commands that a program such as `ch-fleet run`
/// starts. If there are none, the name is wrong.
///
/// # Panics
/// A document cannot be read, or has no command of the program.
#[must_use]
pub fn commands_of(program: &str) -> Vec<Command> {
    let all = all_blocks();
    let checked = all.iter().filter(|block| block.not_run.is_none());
    let found: Vec<_> = checked
        .flat_map(Block::commands)
        .filter(|command| program_of(&command.words).as_deref() == Some(program))
        .collect();
    assert!(!found.is_empty(), "no document has a command of {program}");
    found
}

/// Commands that no test checks, although their blocks give no reason: those of other programs, and those of checked
/// programs in a block whose language is not a shell's.
///
/// # Panics
/// A document cannot be read.
#[must_use]
pub fn unchecked() -> Vec<Command> {
    let all = all_blocks();
    unchecked_in(&all)
}

fn unchecked_in(blocks: &[Block]) -> Vec<Command> {
    let of_checked_program = |command: &Command| {
        program_of(&command.words).is_some_and(|it| CHECKED_PROGRAMS.contains(&it.as_str()))
    };
    let without_reason = blocks.iter().filter(|block| block.not_run.is_none());
    without_reason
        .flat_map(|block| {
            let mut found = block.commands();
            found.retain(|command| !is_checked(&command.words));
            let mut hidden = block.commands_outside_a_shell();
            hidden.retain(of_checked_program);
            found.into_iter().chain(hidden)
        })
        .collect()
}

fn is_checked(words: &[String]) -> bool {
    match program_of(words).as_deref() {
        // Cargo's own commands: their packages must exist.
        Some("cargo build" | "cargo test" | "cargo nextest" | "cargo bench") => {
            let packages = packages();
            let named = words.windows(2).filter(|pair| pair[0] == "-p");
            named.map(|pair| &pair[1]).all(|it| packages.contains(it))
        }
        Some(program) => CHECKED_PROGRAMS.contains(&program),
        None => false,
    }
}

/// The names of the packages in the workspace.
fn packages() -> Vec<String> {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).expect("the manifest is text");
    let members = manifest.split_once("members = [").map_or("", |it| it.1);
    let members = members.split(']').next().unwrap_or_default().split(',');
    members
        .map(|member| member.trim().trim_matches('"'))
        .filter(|member| !member.is_empty())
        .filter_map(|member| {
            let text = fs::read_to_string(root().join(member).join("Cargo.toml")).ok()?;
            let name = text.split_once("name = \"")?.1.split('"').next()?;
            Some(name.to_owned())
        })
        .collect()
}

/// The program, without its folder; for `cargo` with its command.
fn program_of(words: &[String]) -> Option<String> {
    let name = words.first()?.rsplit('/').next()?;
    Some(match words.get(1) {
        Some(command) if name == "cargo" => format!("cargo {command}"),
        _ => name.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn every_command_is_checked_or_says_why_not() {
        let unchecked = unchecked();
        assert!(
            unchecked.is_empty(),
            "indent the block instead of using ```text, or put <!-- not run: REASON --> on the line before it: {unchecked:#?}"
        );
    }

    #[test]
    fn unchecked_commands_are_found_in_blocks_of_every_language() {
        let text = "```text\nhost$ ch-remote ping\nguest# mount x\nch-remote, curl\n```\n\n    mount y\n    ch-remote info\n";
        let words: Vec<_> = unchecked_in(&blocks("f.md", text))
            .into_iter()
            .map(|it| it.words)
            .collect();
        assert_eq!(words, [vec!["ch-remote", "ping"], vec!["mount", "y"]]);
        let text = format!("<!-- not run: REASON -->\n{text}");
        assert_eq!(unchecked_in(&blocks("f.md", &text)).len(), 1);
    }

    #[test]
    fn commands_of_cargo_need_packages_that_exist() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert!(is_checked(&words("cargo build -p test-docs")));
        assert!(is_checked(&words("cargo build --release")));
        assert!(!is_checked(&words("cargo build -p no-such")));
        assert!(!is_checked(&words("make all")));
    }

    #[test]
    fn placeholders_are_filled_in() {
        let words = [
            "x", "…", "off|on", "[DIR]", "[--a", "N]", "--b", "N", "C…", "d=[1]", "$E",
        ];
        let command = Command {
            place: String::new(),
            words: words.map(str::to_owned).to_vec(),
        };
        assert_eq!(
            command.filled_in(&["-s", "/s"]),
            ["x", "-s", "/s", "off", "--b", "1", "C", "d=[1]", "value"]
        );
    }

    /// Whether a test or a step of CI runs the command.
    fn is_run(block: &Block, command: &Command) -> bool {
        const STEPS: &str = include_str!("../../xtask/src/ci/step.rs");
        let words = command.words.join(" ");
        let is_step = STEPS.contains(&format!("\"{words}\""));
        // Other commands set the guest up; `readme.rs` reads this document.
        let is_of_the_first_guest = block.place.starts_with("README.md:")
            && words.contains("target/release/")
            && !words.contains("testbed");
        is_step || is_of_the_first_guest || words == "cargo xtask ci"
    }

    #[test]
    fn every_command_is_run_or_says_why_not() {
        let all = all_blocks();
        let silent = all
            .iter()
            .filter(|it| it.not_run.is_none() && it.only_parsed.is_none());
        let found: Vec<_> = silent
            .flat_map(|block| {
                let commands = block.commands().into_iter();
                commands.filter(|it| !is_run(block, it)).collect::<Vec<_>>()
            })
            .map(|command| format!("{}: {}", command.place, command.words.join(" ")))
            .collect();
        assert!(
            found.is_empty(),
            "put <!-- only parsed: REASON --> on the line before the block: {found:#?}"
        );
    }

    #[test]
    fn every_reason_not_to_run_a_block_is_given() {
        for block in all_blocks() {
            for reason in block.not_run.iter().chain(&block.only_parsed) {
                assert!(reason.len() > 10, "{}: {reason:?}", block.place);
            }
        }
    }

    #[test]
    fn commands_of_each_checked_program_are_found() {
        for program in CHECKED_PROGRAMS {
            assert!(!commands_of(program).is_empty());
        }
    }
}
