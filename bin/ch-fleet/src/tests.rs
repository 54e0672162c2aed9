#![allow(clippy::unwrap_used)]
//! Tests the command line parser.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use clap::{CommandFactory, Parser};

use crate::agent_command::end_on_panic;
use crate::args::Arguments;

#[test]
fn command_line_is_consistent_and_documented() {
    let command = Arguments::command();
    command.clone().debug_assert();
    for sub in command.get_subcommands() {
        assert!(
            sub.get_about().is_some(),
            "{} has no description",
            sub.get_name()
        );
    }
}

#[cfg(feature = "simulate")]
#[test]
fn page_of_the_program_is_that_of_its_command_line() {
    program_docs::expect_reference(Arguments::command());
}

#[cfg(feature = "simulate")]
#[test]
fn misspelt_safety_rule_is_refused_with_the_one_that_it_resembles() {
    let line = ["ch-fleet", "simulate", "a.toml", "--without"];
    let parse = |rule| Arguments::try_parse_from(line.into_iter().chain([rule]));
    for rule in fleet::config::SafetyRule::NAMES {
        parse(*rule).unwrap();
    }
    let message = parse("two-fase").unwrap_err().to_string();
    assert!(message.contains("'two-phase'"), "{message}");
}

#[test]
fn commands_in_the_documentation_are_understood() {
    for command in test_docs::commands_of("ch-fleet") {
        if let Err(error) = Arguments::try_parse_from(command.filled_in(&[])) {
            panic!("{}: {error}", command.place);
        }
    }
}

#[test]
fn settings_in_the_documentation_are_valid() {
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("agent.toml");
    let blocks = test_docs::all_blocks().into_iter();
    let blocks: Vec<_> = blocks.filter(|block| block.language == "toml").collect();
    assert!(!blocks.is_empty());
    for block in blocks {
        std::fs::write(&file, &block.text).unwrap();
        if let Err(error) = fleet::agent_config::load(&file, true) {
            panic!("{}: {}", block.place, api::error_line(&error));
        }
    }
}

#[test]
fn completions_and_manual_page_are_written() {
    let mut script = Vec::new();
    let shell = program_docs::Shell::Bash;
    program_docs::completions(shell, &mut Arguments::command(), &mut script);
    assert!(String::from_utf8(script).unwrap().contains("reserve"));
    let mut page = Vec::new();
    program_docs::manual_page(Arguments::command(), &mut page).unwrap();
    assert!(String::from_utf8(page).unwrap().contains(".SH"));
}

#[test]
fn panic_of_any_thread_ends_the_agent_by_a_signal() {
    const MARK: &str = "CH_FLEET_TEST_PANICS";
    if std::env::var_os(MARK).is_some() {
        end_on_panic();
        let ended = std::thread::spawn(|| panic!("on purpose")).join();
        unreachable!("the process outlived a panic: {ended:?}");
    }
    let name = "tests::panic_of_any_thread_ends_the_agent_by_a_signal";
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(MARK, "1")
        .output()
        .unwrap();
    assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
}
