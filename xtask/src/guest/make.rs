//! Runs kernel builds: a tree of objects next to the source, its configuration, and `make`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::config;
use super::progress::Steps;
use crate::apt::{self, Need};

const TOOLS: &[Need] = &[
    Need {
        package: "gcc",
        why: "compiles the test kernel",
    },
    Need {
        package: "make",
        why: "builds the test kernel",
    },
    Need {
        package: "libc6-dev",
        why: "headers for the kernel's build tools",
    },
    Need {
        package: "flex",
        why: "the kernel's configuration tool",
    },
    Need {
        package: "bison",
        why: "the kernel's configuration tool",
    },
    Need {
        package: "bc",
        why: "kernel build: time constants",
    },
    Need {
        package: "perl",
        why: "kernel build: scripts",
    },
    Need {
        package: "libelf-dev",
        why: "kernel build: objtool",
    },
];

const CCACHE: Need = Need {
    package: "ccache",
    why: "spares checks of the kernel patches what was compiled before",
};
/// Two kernel sources with three configurations each take a quarter of it.
const CCACHE_SIZE: &str = "2G";

/// A tree of objects of one source.
#[derive(Debug)]
pub(super) struct Objects {
    pub(super) source: PathBuf,
    pub(super) dir: PathBuf,
    /// The folder of the compiler's cache, if one is used.
    pub(super) ccache: Option<PathBuf>,
}

impl Objects {
    /// Configures with `fragment` over `allnoconfig`, with the defaults of options that become available. Only files
    /// affected by a changed option are rebuilt.
    pub(super) fn configure(&self, fragment: &str) -> Result<()> {
        let fragment_path = self.write_fragment(fragment)?;
        quiet(self.make().arg("allnoconfig"))?;
        let mut merge = Command::new(self.source.join("scripts/kconfig/merge_config.sh"));
        merge
            .args(["-m", "-O"])
            .arg(&self.dir)
            .arg(self.dir.join(".config"))
            .arg(&fragment_path);
        quiet(merge.current_dir(&self.source))?;
        quiet(self.make().arg("olddefconfig"))?;
        config::check(fragment, &self.config()?)
    }

    /// Configures with `fragment` and its dependencies only; `honoured` is the part that the kernel must accept.
    /// `state` identifies all inputs: the tool runs only if it has changed.
    pub(super) fn configure_only(&self, fragment: &str, honoured: &str, state: &str) -> Result<()> {
        let record = self.dir.join("configured");
        if fs::read_to_string(&record).is_ok_and(|old| old == state) {
            return Ok(());
        }
        let fragment_path = self.write_fragment(fragment)?;
        let mut all = std::ffi::OsString::from("KCONFIG_ALLCONFIG=");
        all.push(&fragment_path);
        quiet(self.make().arg(all).arg("allnoconfig"))?;
        config::check(honoured, &self.config()?)?;
        fs::write(&record, state).with_context(|| format!("writing {}", record.display()))
    }

    fn write_fragment(&self, fragment: &str) -> Result<PathBuf> {
        apt::ensure(TOOLS)?;
        if self.ccache.is_some() {
            apt::ensure(&[CCACHE])?;
        }
        fs::create_dir_all(&self.dir)
            .with_context(|| format!("creating {}", self.dir.display()))?;
        let path = self.dir.join("fragment.config");
        fs::write(&path, fragment).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }

    /// The configuration as written by the kernel's tool.
    pub(super) fn config(&self) -> Result<String> {
        let path = self.dir.join(".config");
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// Builds `targets`; returns the compiler's warnings. `expected` is the number of steps of a full build, if this
    /// may be one.
    pub(super) fn build(
        &self,
        what: &str,
        targets: &[&str],
        expected: Option<usize>,
    ) -> Result<Vec<String>> {
        let log = self.dir.join("build.log");
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        let mut make = self.make();
        make.arg(format!("-j{jobs}")).args(targets);
        let steps = Steps {
            what,
            expected,
            log: &log,
        };
        steps.run(&make)?;
        let text =
            fs::read_to_string(&log).with_context(|| format!("reading {}", log.display()))?;
        // The log of an interrupted build is continued; that of a finished one is not.
        fs::remove_file(&log).with_context(|| format!("removing {}", log.display()))?;
        Ok(text
            .lines()
            .filter(|line| line.contains("warning:") || line.starts_with("WARNING:"))
            .map(str::to_string)
            .collect())
    }

    /// `make` for an out-of-tree build whose result depends on nothing outside its key, at low priority, because it may
    /// run for minutes concurrently with other work.
    fn make(&self) -> Command {
        let mut output = std::ffi::OsString::from("O=");
        output.push(&self.dir);
        let mut make = Command::new("nice");
        make.args(["make", "-C"])
            .arg(&self.source)
            .arg(output)
            .env("LC_ALL", "C")
            .env("KBUILD_BUILD_TIMESTAMP", "@0")
            .env("KBUILD_BUILD_USER", "xtask")
            .env("KBUILD_BUILD_HOST", "testbed")
            // Counts builds in this folder otherwise.
            .env("KBUILD_BUILD_VERSION", "1")
            .env_remove("MAKEFLAGS")
            .env_remove("KCONFIG_CONFIG");
        if let Some(folder) = &self.ccache {
            make.arg("CC=ccache gcc")
                .env("CCACHE_DIR", folder)
                .env("CCACHE_MAXSIZE", CCACHE_SIZE);
        }
        make
    }
}

/// Copies a tree of objects, from which another configuration builds faster than from scratch. Times are kept, because
/// make compares them.
pub(super) fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    let beside = to.with_extension("copying");
    if beside.exists() {
        fs::remove_dir_all(&beside).with_context(|| format!("removing {}", beside.display()))?;
    }
    let mut copy = Command::new("cp");
    copy.args(["-a", "--reflink=auto"]).arg(from).arg(&beside);
    quiet(&mut copy)?;
    fs::rename(&beside, to).with_context(|| format!("creating {}", to.display()))
}

/// Runs a short step; its output matters only if it fails.
pub(crate) fn quiet(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// The standard output of a short step.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {:?}", command.get_program()))?;
    if !output.status.success() {
        bail!(
            "{command:?} failed ({}):\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
