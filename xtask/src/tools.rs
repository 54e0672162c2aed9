//! Programs of other projects, installed from their registries or as packages. `cargo xtask test-tools` installs those that tests use;
//! without them, these tests are skipped.
//!
//! ```text
//! cache/NAME-VERSION/bin/NAME    for every checkout
//! target/NAME                    a link to cache/NAME-VERSION, where tests look
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::apt::{self, Need};
use crate::guest::cache::Lock;
use crate::guest::make::quiet;
use crate::{cargo, paths};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Print why a program cannot be installed, and succeed
    #[arg(long)]
    if_possible: bool,
}

/// A program, which its registry has under the same name.
#[derive(Debug)]
pub(crate) struct Tool {
    name: &'static str,
    version: &'static str,
    registry: Registry,
    needs: &'static [Need],
}

#[derive(Debug)]
enum Registry {
    /// Python's; the program gets a separate virtual environment.
    PyPi,
    /// Rust's, with arguments for `cargo install`.
    Crates(&'static [&'static str]),
}

/// Builds the package of the programs.
pub(crate) const CARGO_DEB: Tool = Tool {
    name: "cargo-deb",
    version: "3.8.0",
    registry: Registry::Crates(&["--locked", "--no-default-features"]),
    needs: &[],
};

const FOR_TESTS: [Tool; 3] = [
    Tool {
        name: "openapi-python-client",
        version: "0.29.1",
        registry: Registry::PyPi,
        needs: &[Need {
            package: "python3-venv",
            why: "holds the generator of Python clients",
        }],
    },
    Tool {
        name: "virtiofsd",
        version: "1.14.0",
        registry: Registry::Crates(&["--locked"]),
        needs: &[
            Need {
                package: "libcap-ng-dev",
                why: "virtiofsd, which shares folders with guests",
            },
            Need {
                package: "libseccomp-dev",
                why: "virtiofsd, which shares folders with guests",
            },
        ],
    },
    Tool {
        name: "vhost-device-rng",
        version: "0.1.0",
        // Not locked: its lock file has vhost-user-backend 0.10.0, which starts every ring at used index 0, even one that
        // an earlier process has served. 0.10.1 reads the index.
        registry: Registry::Crates(&[]),
        needs: &[],
    },
];

/// Programs of the distribution that tests use.
const PACKAGES: [Need; 2] = [
    Need {
        package: "qemu-utils",
        why: "qemu-img and qemu-storage-daemon, which make and serve disks of guests",
    },
    Need {
        package: "dpdk-dev",
        why: "dpdk-testpmd, which serves network interfaces of guests",
    },
];

/// Installs the missing programs that tests use.
pub(crate) fn run(options: &Options) -> Result<()> {
    for need in PACKAGES {
        match apt::ensure(&[need]) {
            Err(error) if options.if_possible => {
                println!("{} is not available: {error:#}", need.package);
            }
            result => result?,
        }
    }
    for tool in &FOR_TESTS {
        match tool.install().and_then(|place| tool.link(&place)) {
            Ok(()) => println!("{} {}", tool.name, tool.version),
            Err(error) if options.if_possible => {
                println!("{} is not available: {error:#}", tool.name);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Tool {
    /// The program, which is installed if it is missing.
    pub(crate) fn program(&self) -> Result<PathBuf> {
        Ok(self.install()?.join("bin").join(self.name))
    }

    /// The folder in the cache.
    fn install(&self) -> Result<PathBuf> {
        let cache = paths::cache()?;
        let place = cache.join(format!("{}-{}", self.name, self.version));
        let program = place.join("bin").join(self.name);
        if program.exists() {
            return Ok(place);
        }
        let _lock = Lock::take_named(&cache, "tools-lock", "another installation")?;
        // Another run may have installed it while this one waited.
        if !program.exists() {
            eprintln!("Installing {} {}", self.name, self.version);
            apt::ensure(self.needs)?;
            self.install_in(&place)
                .with_context(|| format!("installing {}", self.name))?;
        }
        Ok(place)
    }

    fn install_in(&self, place: &Path) -> Result<()> {
        match self.registry {
            Registry::PyPi => {
                quiet(
                    Command::new("python3")
                        .args(["-m", "venv", "--clear"])
                        .arg(place),
                )?;
                let mut install = Command::new(place.join("bin/pip"));
                install.args(["install", "--quiet", "--disable-pip-version-check"]);
                quiet(install.arg(format!("{}=={}", self.name, self.version)))
            }
            Registry::Crates(arguments) => {
                let mut install = cargo::command(["install", self.name, "--version", self.version]);
                install
                    .args(["--quiet", "--root"])
                    .arg(place)
                    .args(arguments)
                    .stdin(Stdio::null())
                    .stdout(std::io::stderr());
                let status = install.status().context("starting cargo")?;
                ensure!(status.success(), "cargo install failed ({status})");
                Ok(())
            }
        }
    }

    /// Makes `target/NAME` point to `place`.
    fn link(&self, place: &Path) -> Result<()> {
        let link = paths::target().join(self.name);
        // A folder is a manual installation, which is kept.
        let is_folder = link.is_dir() && !link.is_symlink();
        if is_folder || fs::read_link(&link).is_ok_and(|old| old == place) {
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
