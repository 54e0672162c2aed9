//! `docs/commands/PROGRAM.md`: every command and option of a program, generated from its declared command line.

use std::fmt::Write as _;
use std::fs;

use clap::builder::ArgAction;
use clap::{Arg, Command};
use test_docs::{FirstVersions, Meanings, anchors, expect_page, root};

/// Compares the page of a program with its command line; writes the page if `UPDATE_GENERATED` is set.
///
/// # Panics
/// The page differs.
pub fn expect_reference(mut command: Command) {
    let program = command.get_name().to_owned();
    command.build();
    let keys = fs::read_to_string(root().join("docs/options.md")).expect("the page of all keys");
    let keys = anchors(&keys);
    let update = format!("cargo test -p {program} page_of_the_program");
    expect_page(&format!("docs/commands/{program}.md"), &update, |old| {
        page(&command, &keys, old)
    });
}

/// The whole page. `keys` are the anchors of the page of all keys.
fn page(command: &Command, keys: &[String], old: &str) -> String {
    let program = command.get_name();
    let versions = FirstVersions::of(old);
    let mut page = format!(
        "# {program}\n\n\
         This page lists every command and option of `{program}`. It is generated from the program's declarations; a test\n\
         compares the two. [options.md](../options.md) lists the keys of options that accept `key=value`. \"–\" in the column\n\
         Default means that there is no default. The column Since has the version that introduced the option. Options of the\n\
         program itself come before a command, unless the program accepts them anywhere.\n\
         `--help` (`-h`) shows a summary{}. `--generate-docs DIR`, as the only\n\
         option, writes manual pages and completions to `DIR`.\n",
        match command.get_version() {
            Some(_) => ", and `--version` (`-V`) the version",
            None => "",
        }
    );
    let mut path = Vec::new();
    write_command(&mut page, &versions, keys, command, &mut path);
    page
}

fn write_command<'a>(
    page: &mut String,
    versions: &FirstVersions,
    keys: &[String],
    command: &'a Command,
    path: &mut Vec<&'a str>,
) {
    path.push(command.get_name());
    let heading = path.join(" ");
    let about = command.get_about().map(ToString::to_string);
    let about = about.unwrap_or_default();
    let _ = write!(page, "\n## {heading}\n\n{}.\n", about.trim_end_matches('.'));
    let arguments = command.get_arguments();
    let arguments =
        arguments.filter(|it| is_listed(it) && (path.len() == 1 || !it.is_global_set()));
    let arguments: Vec<&Arg> = arguments.collect();
    if !arguments.is_empty() {
        page.push_str(
            "\n| Option | Value | Unit | Default | Since | Meaning |\n| --- | --- | --- | --- | --- | --- |\n",
        );
        let mut meanings = Meanings::default();
        for argument in arguments {
            let name = format!("`{}`", name(argument));
            let row = Row::of(argument, command.get_name(), keys);
            let since = versions.get(&heading, &[&name]);
            let meaning = meanings.cell(&name, &row.meaning);
            let (value, unit, default) = (row.value, row.unit, row.default);
            let _ = writeln!(
                page,
                "| {name} | {value} | {unit} | {default} | {since} | {meaning} |"
            );
        }
        page.push_str(&meanings.below());
    }
    for subcommand in command.get_subcommands() {
        if subcommand.get_name() != "help" {
            write_command(page, versions, keys, subcommand, path);
        }
    }
    path.pop();
}

/// Whether an option has a row. The introduction describes those of all programs.
fn is_listed(argument: &Arg) -> bool {
    !matches!(argument.get_id().as_str(), "help" | "version") && !argument.is_hide_set()
}

/// The name as it is typed; of an argument without a dash, what it stands for.
fn name(argument: &Arg) -> String {
    match (argument.get_long(), argument.get_short()) {
        (Some(long), Some(short)) => format!("--{long}, -{short}"),
        (Some(long), None) => format!("--{long}"),
        (None, Some(short)) => format!("-{short}"),
        (None, None) => values_of(argument),
    }
}

fn values_of(argument: &Arg) -> String {
    let names = argument.get_value_names().unwrap_or_default();
    let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
    match names.is_empty() {
        true => argument.get_id().as_str().to_uppercase(),
        false => names.join(" "),
    }
}

struct Row {
    value: String,
    unit: &'static str,
    default: String,
    meaning: String,
}

impl Row {
    fn of(argument: &Arg, command: &str, keys: &[String]) -> Self {
        let help = argument.get_help().map(ToString::to_string);
        let help = help.unwrap_or_default();
        let (meaning, stated_default) = match help.split_once(" [default: ") {
            Some((meaning, default)) => (meaning.to_owned(), default.split(']').next()),
            None => (help.clone(), None),
        };
        let is_flag = !argument.get_action().takes_values();
        let possible = argument.get_possible_values();
        let possible: Vec<&str> = possible.iter().map(|it| it.get_name()).collect();
        let value = match (is_flag, possible.is_empty()) {
            (true, _) => String::new(),
            (false, true) => format!("`{}`", values_of(argument).replace('|', "\\|")),
            (false, false) => format!("`{}`", possible.join("\\|")),
        };
        let default = match argument.get_action() {
            ArgAction::SetTrue => "off".to_owned(),
            ArgAction::Count => "0".to_owned(),
            _ => default(argument, stated_default),
        };
        Self {
            value,
            unit: unit(argument),
            default,
            meaning: match meaning.split_once(" \"") {
                Some((about, _)) => with_keys(about, argument, command, keys),
                None => meaning,
            },
        }
    }
}

fn default(argument: &Arg, stated: Option<&str>) -> String {
    let values = argument.get_default_values();
    let values: Vec<_> = values.iter().map(|it| it.to_string_lossy()).collect();
    match (argument.is_required_set(), values.is_empty(), stated) {
        (true, ..) => "required".to_owned(),
        (false, false, _) => format!("`{}`", values.join(" ")),
        (false, true, Some(stated)) => stated.to_owned(),
        (false, true, None) => "–".to_owned(),
    }
}

fn unit(argument: &Arg) -> &'static str {
    match values_of(argument).to_ascii_lowercase().as_str() {
        "seconds" => "s",
        "size" => "bytes",
        _ => "",
    }
}

/// The subject of an option whose help has its keys, with a link to their table.
fn with_keys(about: &str, argument: &Arg, command: &str, keys: &[String]) -> String {
    let about = about.trim_end_matches(':');
    let own = argument.get_long().unwrap_or_default();
    let device = command.strip_prefix("add-").unwrap_or(command);
    let of_command = format!("{command}---{own}");
    let candidates = [
        format!("--{own}"),
        format!("--{device}"),
        format!("ch-remote-{command}"),
    ];
    let links: Vec<String> = keys
        .iter()
        .filter(|it| candidates.contains(it) || it.starts_with(&of_command))
        .map(|anchor| format!("[keys](../options.md#{anchor})"))
        .collect();
    assert!(
        !links.is_empty(),
        "docs/options.md has no keys of {own} {command}"
    );
    format!("{about} ({})", links.join(", "))
}

#[cfg(test)]
mod tests {
    use clap::{ArgAction, value_parser};

    use super::*;

    fn sample() -> Command {
        let disk = Arg::new("disk").required(true);
        let grow = Command::new("add-disk").about("Add it");
        let mut sample = Command::new("sample")
            .about("Shows how it is done.")
            .version("v1.2")
            .arg(
                Arg::new("all")
                    .long("all")
                    .short('a')
                    .action(ArgAction::SetTrue)
                    .help("All of it"),
            )
            .arg(
                Arg::new("timeout")
                    .long("timeout")
                    .value_name("SECONDS")
                    .value_parser(value_parser!(u64))
                    .help("Give up then [default: never]"),
            )
            .arg(
                Arg::new("shape")
                    .long("shape")
                    .value_parser(["round", "square"])
                    .default_value("round"),
            )
            .subcommand(
                grow.arg(
                    disk.value_name("DISK")
                        .help("Disk parameters \"path=<path>\""),
                ),
            );
        sample.build();
        sample
    }

    #[test]
    fn page_has_every_option_of_every_command() {
        let page = page(&sample(), &["--disk".to_owned()], "");
        for row in [
            "## sample\n\nShows how it is done.\n",
            "| `--all, -a` |  |  | off | 0.1.0 | All of it |",
            "| `--timeout` | `SECONDS` | s | never | 0.1.0 | Give up then |",
            "| `--shape` | `round\\|square` |  | `round` | 0.1.0 |  |",
            "## sample add-disk\n\nAdd it.\n",
            "| `DISK` | `DISK` |  | required | 0.1.0 | Disk parameters ([keys](../options.md#--disk)) |",
        ] {
            assert!(page.contains(row), "{row} is missing:\n{page}");
        }
        assert!(
            !page.contains("--help` |") && !page.contains("sample help"),
            "{page}"
        );
    }

    #[test]
    fn option_keeps_its_first_version() {
        let old =
            page(&sample(), &["--disk".to_owned()], "").replace("| 0.1.0 | All", "| 0.0.1 | All");
        assert_eq!(page(&sample(), &["--disk".to_owned()], &old), old);
    }
}
