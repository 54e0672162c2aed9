#![allow(clippy::unwrap_used)]
//! The command line itself.

use clap::CommandFactory;

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

#[test]
fn completions_and_manual_page_are_written() {
    let mut script = Vec::new();
    clap_complete::generate(
        clap_complete::Shell::Bash,
        &mut Arguments::command(),
        "ch-fleet",
        &mut script,
    );
    assert!(String::from_utf8(script).unwrap().contains("reserve"));
    let mut page = Vec::new();
    clap_mangen::Man::new(Arguments::command())
        .render(&mut page)
        .unwrap();
    assert!(String::from_utf8(page).unwrap().contains(".SH"));
}
