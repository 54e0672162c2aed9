//! Checks that each shell accepts its completions, and that the manual pages have no errors.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::apt::{self, Need};
use crate::guest::make::quiet;

const NEEDS: [Need; 3] = [
    Need {
        package: "zsh",
        why: "checks the completions of zsh",
    },
    Need {
        package: "fish",
        why: "checks the completions of fish",
    },
    Need {
        package: "mandoc",
        why: "checks manual pages",
    },
];

/// Folders of generated files, each with the command that checks one file. None of them runs the file.
const CHECKS: [(&str, &[&str]); 4] = [
    ("bash-completion/completions", &["bash", "-n"]),
    ("zsh/site-functions", &["zsh", "-f", "-n"]),
    (
        "fish/vendor_completions.d",
        &["fish", "--no-config", "--no-execute"],
    ),
    // The generator's blank lines and empty dates are warnings.
    ("man/man1", &["mandoc", "-T", "lint", "-W", "error"]),
];

/// Checks all files in `docs`, which the programs have written.
pub(super) fn check(docs: &Path) -> Result<()> {
    apt::ensure(&NEEDS)?;
    for (folder, command) in CHECKS {
        let files = files(&docs.join(folder))?;
        ensure!(!files.is_empty(), "the programs wrote no file to {folder}");
        for file in &files {
            let mut check = Command::new(command[0]);
            quiet(check.args(&command[1..]).arg(file))?;
        }
        println!("{folder}: {} accepts {} files", command[0], files.len());
    }
    Ok(())
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let reading = || format!("reading {}", folder.display());
    let entries = fs::read_dir(folder).with_context(reading)?;
    let mut files = entries
        .map(|entry| Ok(entry.with_context(reading)?.path()))
        .collect::<Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}
