//! Manual pages and shell completions of our programs, generated from their declared command lines.
//!
//! Every program accepts `--generate-docs DIR` as its only option and writes the files for `/usr/share` or
//! `~/.local/share` there:
//!
//! ```text
//! man/man1/PROGRAM.1                       and a page for each subcommand
//! bash-completion/completions/PROGRAM
//! zsh/site-functions/_PROGRAM
//! fish/vendor_completions.d/PROGRAM.fish
//! ```

mod manual;
#[cfg(any(test, feature = "test-utils"))]
mod reference;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::Command;
pub use clap_complete::Shell;
#[cfg(any(test, feature = "test-utils"))]
pub use reference::expect_reference;

/// The option of every program. It is not a declared one because it excludes arguments that are required otherwise.
const OPTION: &str = "--generate-docs";

/// The shells, each with the folder of its completions and a file's name before and after the program's.
const SHELLS: [(Shell, &str, &str, &str); 3] = [
    (Shell::Bash, "bash-completion/completions", "", ""),
    (Shell::Zsh, "zsh/site-functions", "_", ""),
    (Shell::Fish, "fish/vendor_completions.d", "", ".fish"),
];

/// Writes the files if the arguments of this process ask for them. Returns the exit status in that case.
pub fn requested(command: impl FnOnce() -> Command) -> Option<ExitCode> {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let folder = folder(&arguments)?;
    Some(match write(command(), folder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!(
                "error: cannot write manual pages and completions to {}: {error}",
                folder.display()
            );
            ExitCode::FAILURE
        }
    })
}

fn folder(arguments: &[OsString]) -> Option<&Path> {
    match arguments {
        [option, folder] if option == OsStr::new(OPTION) => Some(Path::new(folder)),
        _ => None,
    }
}

/// Writes manual pages and completions into `folder`, which is created if it does not exist.
///
/// # Errors
/// A file cannot be written.
pub fn write(mut command: Command, folder: &Path) -> io::Result<()> {
    let program = command.get_name().to_owned();
    let pages = folder.join("man/man1");
    fs::create_dir_all(&pages)?;
    // Written before completions, which add help commands to the given command.
    manual::write_pages(command.clone(), &pages)?;
    for (shell, place, before, after) in SHELLS {
        let place = folder.join(place);
        fs::create_dir_all(&place)?;
        let mut script = Vec::new();
        completions(shell, &mut command, &mut script);
        fs::write(place.join(format!("{before}{program}{after}")), script)?;
    }
    Ok(())
}

/// Writes the completions for one shell.
pub fn completions(shell: Shell, command: &mut Command, out: &mut dyn Write) {
    let program = command.get_name().to_owned();
    clap_complete::generate(shell, command, program, out);
}

/// Writes the manual page of the program without those of its subcommands.
///
/// # Errors
/// Writing to `out` fails.
pub fn manual_page(command: Command, out: &mut dyn Write) -> io::Result<()> {
    manual::write_page(command, out)
}

/// Makes `program` write its files and checks that each expected file, named by its path in the folder, contains its
/// text.
///
/// # Panics
/// A file lacks its text, or the program fails.
#[cfg(feature = "test-utils")]
pub fn expect_written(program: &str, expected: &[(&str, &str)]) {
    let folder = tempfile::tempdir().expect("a folder");
    let status = std::process::Command::new(program)
        .arg(OPTION)
        .arg(folder.path())
        .status()
        .expect("the program starts");
    assert!(status.success());
    for (file, text) in expected {
        let found = fs::read_to_string(folder.path().join(file)).expect(file);
        assert!(found.contains(text), "{file} lacks {text}");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use clap::Arg;

    use super::*;

    fn sample() -> Command {
        let size = Arg::new("size").long("size").help("Size in bytes");
        Command::new("sample")
            .about("Shows how it is done")
            .version("v1.2")
            .after_help("It is small.\n\nExit status: 0 success.\n\nExamples:\n  sample grow")
            .arg(Arg::new("socket").long("socket").required(true))
            .subcommand(Command::new("grow").about("Grow it").arg(size))
    }

    #[test]
    fn files_are_where_shells_and_man_look_for_them() {
        let folder = tempfile::tempdir().unwrap();
        write(sample(), &folder.path().join("new")).unwrap();
        for (file, text) in [
            ("man/man1/sample.1", "Shows how it is done"),
            ("man/man1/sample.1", ".SH VERSION\nv1.2\n"),
            ("man/man1/sample.1", ".TH sample 1 \" \" \"sample 1.2\" "),
            (
                "man/man1/sample-grow.1",
                ".TH sample-grow 1 \" \" \"sample 1.2\" ",
            ),
            (
                "man/man1/sample-grow.1",
                ".SH SYNOPSIS\nsample \\-\\-socket <socket> grow [OPTIONS]\n",
            ),
            (
                "man/man1/sample-grow.1",
                ".SH \"EXIT STATUS\"\n0 success.\n",
            ),
            ("man/man1/sample-grow.1", ".SH \"SEE ALSO\"\nsample(1)\n"),
            ("man/man1/sample.1", ".SH EXAMPLES\n.nf\nsample grow\n.fi\n"),
            ("man/man1/sample.1", ".SH NOTES\nIt is small.\n"),
            ("man/man1/sample-grow.1", "Size in bytes"),
            ("bash-completion/completions/sample", "--size"),
            ("zsh/site-functions/_sample", "--size"),
            ("fish/vendor_completions.d/sample.fish", "-l size"),
        ] {
            let file = folder.path().join("new").join(file);
            let found = fs::read_to_string(&file).unwrap();
            assert!(found.contains(text), "{}: {found}", file.display());
        }
        let pages = fs::read_dir(folder.path().join("new/man/man1")).unwrap();
        assert_eq!(pages.count(), 2, "the help command has no page");
    }

    #[test]
    fn file_that_cannot_be_written_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(write(sample(), file.path()).is_err());
    }

    #[test]
    fn only_the_option_alone_with_a_folder_is_a_request() {
        let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        assert_eq!(folder(&words("--generate-docs /d")), Some(Path::new("/d")));
        for other in [
            "--generate-docs",
            "--generate-docs /d more",
            "--cmdline --generate-docs",
        ] {
            assert_eq!(folder(&words(other)), None, "{other}");
        }
    }
}
