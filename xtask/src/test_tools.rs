//! `cargo xtask test-tools`: programs of other projects that some tests use; without them these tests are skipped.
//!
//! ```text
//! cache/NAME-VERSION/    installed, for every checkout
//! target/NAME            a link to it, where tests look
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::apt::{self, Need};
use crate::guest::cache::Lock;
use crate::guest::make::quiet;
use crate::paths;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Print why a program cannot be installed, and succeed
    #[arg(long)]
    if_possible: bool,
}

/// A program and its origin.
struct Tool {
    name: &'static str,
    version: &'static str,
    needs: &'static [Need],
    install: fn(&Tool, &Path) -> Result<()>,
}

const TOOLS: [Tool; 1] = [Tool {
    name: "openapi-python-client",
    version: "0.29.1",
    needs: &[Need {
        package: "python3-venv",
        why: "holds the generator of Python clients",
    }],
    install: from_pypi,
}];

/// Installs the missing programs.
pub(crate) fn run(options: &Options) -> Result<()> {
    for tool in &TOOLS {
        match tool.ensure() {
            Ok(place) => println!("{} {}: {}", tool.name, tool.version, place.display()),
            Err(error) if options.if_possible => {
                println!("{} is not available: {error:#}", tool.name);
            }
            Err(error) => return Err(error.context(format!("installing {}", tool.name))),
        }
    }
    Ok(())
}

impl Tool {
    fn ensure(&self) -> Result<PathBuf> {
        let cache = paths::cache()?;
        let place = cache.join(format!("{}-{}", self.name, self.version));
        let program = place.join("bin").join(self.name);
        if !program.exists() {
            let _lock = Lock::take_named(&cache, "tools-lock", "another installation")?;
            // Another run may have installed it while this one waited.
            if !program.exists() {
                eprintln!("Installing {} {}", self.name, self.version);
                apt::ensure(self.needs)?;
                (self.install)(self, &place)?;
            }
            ensure!(program.exists(), "{} has no such program", place.display());
        }
        self.link(&place)?;
        Ok(place)
    }

    /// Makes `target/NAME` point to `place`.
    fn link(&self, place: &Path) -> Result<()> {
        let link = paths::target().join(self.name);
        if fs::read_link(&link).is_ok_and(|old| old == place) {
            return Ok(());
        }
        let beside = link.with_extension("new");
        fs::create_dir_all(paths::target())
            .and_then(|()| match fs::remove_file(&beside) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
                _ => std::os::unix::fs::symlink(place, &beside),
            })
            .and_then(|()| fs::rename(&beside, &link))
            .with_context(|| format!("creating {}", link.display()))
    }
}

/// In a virtual environment of its own.
fn from_pypi(tool: &Tool, place: &Path) -> Result<()> {
    quiet(
        Command::new("python3")
            .args(["-m", "venv", "--clear"])
            .arg(place),
    )?;
    let mut install = Command::new(place.join("bin/pip"));
    install.args(["install", "--quiet", "--disable-pip-version-check"]);
    quiet(install.arg(format!("{}=={}", tool.name, tool.version)))
}
