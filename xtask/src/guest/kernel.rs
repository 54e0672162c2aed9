//! The test kernel: Debian's kernel source, our configuration fragment, one build for every
//! checkout on the machine.
//!
//! ```text
//! cache/source-SOURCE/       unpacked source, shared by all builds from it
//! cache/build-KEY/           objects, kept until the build is done: an interrupted one goes on
//! cache/kernel-KEY/          vmlinux and bzImage; appears complete, by a rename
//! ```
//!
//! KEY is a hash over everything the result depends on, so nothing is ever out of date.

use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};

use super::{Artefacts, config, progress::Steps};
use crate::apt::{self, Need};
use crate::paths;

/// Our configuration fragment.
const FRAGMENT: &str = include_str!("../../guest/stock.config");

/// Raised when the way of building changes and with it the result.
const BUILDER_VERSION: u32 = 1;

const SOURCE: Need = Need {
    package: "linux-source-6.12",
    why: "source of the test kernel",
};
const TARBALL: &str = "/usr/src/linux-source-6.12.tar.xz";
/// The folder inside the tarball.
const SOURCE_DIR: &str = "linux-source-6.12";

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
    Need {
        package: "xz-utils",
        why: "unpacks the kernel source",
    },
];

/// Steps of a full build, for the progress display.
const EXPECTED_STEPS: usize = 2270;

/// Makes `vmlinux` and `bzImage` of `artefacts` exist and be up to date.
pub(crate) fn build(artefacts: &Artefacts) -> Result<()> {
    apt::ensure(&[SOURCE, TOOLS[0]])?;
    let version = apt::version(SOURCE.package).context("the kernel source was just installed")?;
    let tarball_bytes = fs::metadata(TARBALL)
        .with_context(|| format!("{} has no {TARBALL}", SOURCE.package))?
        .len();
    let source_key = key(&[&version, &tarball_bytes.to_string()]);
    let key = key(&[
        &source_key,
        FRAGMENT,
        &BUILDER_VERSION.to_string(),
        &compiler()?,
    ]);
    let stamp = artefacts.vmlinux.with_file_name("key");
    let up_to_date = fs::read_to_string(&stamp).is_ok_and(|old| old == key)
        && artefacts.vmlinux.exists()
        && artefacts.bzimage.exists();
    if up_to_date {
        return Ok(());
    }
    let cache = paths::cache()?;
    let done = cache.join(format!("kernel-{key}"));
    if !done.exists() {
        let _lock = Lock::take(&cache)?;
        // Another run may have finished it while this one waited.
        if !done.exists() {
            apt::ensure(TOOLS)?;
            let source = unpack(&cache, &source_key)?;
            compile(&source, &cache.join(format!("build-{key}")), &done)?;
        }
    }
    paths::link_or_copy(&done.join("vmlinux"), &artefacts.vmlinux)?;
    paths::link_or_copy(&done.join("bzImage"), &artefacts.bzimage)?;
    fs::write(&stamp, key).with_context(|| format!("writing {}", stamp.display()))
}

/// A short hash over `parts`, which are kept apart by their lengths.
fn key(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    let digest = hash.finalize();
    digest
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn compiler() -> Result<String> {
    let output = Command::new("gcc")
        .arg("-dumpfullversion")
        .output()
        .context("starting gcc")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_string())
}

/// Holds the cache for one build at a time; released when dropped or when the process ends.
#[derive(Debug)]
struct Lock {
    _file: File,
}

impl Lock {
    #[allow(unsafe_code)]
    // UNSAFETY: flock is not in std for the oldest supported compiler.
    fn take(cache: &Path) -> Result<Self> {
        let path = cache.join("lock");
        let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
        // SAFETY: flock takes an open descriptor and no pointers.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            eprintln!("Waiting for another build of the test kernel");
            // SAFETY: as above.
            if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } != 0 {
                bail!(
                    "locking {}: {}",
                    path.display(),
                    std::io::Error::last_os_error()
                );
            }
        }
        Ok(Self { _file: file })
    }
}

fn unpack(cache: &Path, source_key: &str) -> Result<PathBuf> {
    let source = cache.join(format!("source-{source_key}"));
    if source.exists() {
        return Ok(source);
    }
    eprintln!("Unpacking {TARBALL}");
    let beside = cache.join("source-unpacking");
    if beside.exists() {
        fs::remove_dir_all(&beside).with_context(|| format!("removing {}", beside.display()))?;
    }
    fs::create_dir_all(&beside).with_context(|| format!("creating {}", beside.display()))?;
    let mut tar = Command::new("tar");
    tar.args(["xf", TARBALL, "-C"]).arg(&beside);
    quiet(&mut tar)?;
    fs::rename(beside.join(SOURCE_DIR), &source)
        .with_context(|| format!("{TARBALL} has no {SOURCE_DIR}"))?;
    fs::remove_dir(&beside).with_context(|| format!("removing {}", beside.display()))?;
    Ok(source)
}

fn compile(source: &Path, build: &Path, done: &Path) -> Result<()> {
    fs::create_dir_all(build).with_context(|| format!("creating {}", build.display()))?;
    configure(source, build)?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let mut make = make(source, build);
    make.arg(format!("-j{jobs}")).args(["vmlinux", "bzImage"]);
    let steps = Steps {
        what: "Test kernel",
        expected: EXPECTED_STEPS,
        log: &build.join("build.log"),
    };
    steps.run(make)?;

    let beside = done.with_extension("new");
    fs::create_dir_all(&beside).with_context(|| format!("creating {}", beside.display()))?;
    paths::link_or_copy(&build.join("vmlinux"), &beside.join("vmlinux"))?;
    paths::link_or_copy(
        &build.join("arch/x86/boot/bzImage"),
        &beside.join("bzImage"),
    )?;
    paths::link_or_copy(&build.join(".config"), &beside.join("config"))?;
    fs::rename(&beside, done).with_context(|| format!("creating {}", done.display()))?;
    // Half a gigabyte of objects that nobody needs again.
    fs::remove_dir_all(build).with_context(|| format!("removing {}", build.display()))
}

fn configure(source: &Path, build: &Path) -> Result<()> {
    let config_path = build.join(".config");
    let fragment_path = build.join("fragment.config");
    let read = |path: &Path| {
        fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
    };
    // An interrupted build left a checked configuration: touching it would rebuild everything.
    if config_path.exists() && config::check(FRAGMENT, &read(&config_path)?).is_ok() {
        return Ok(());
    }
    fs::write(&fragment_path, FRAGMENT)
        .with_context(|| format!("writing {}", fragment_path.display()))?;
    quiet(make(source, build).arg("allnoconfig"))?;
    let mut merge = Command::new(source.join("scripts/kconfig/merge_config.sh"));
    merge
        .args(["-m", "-O"])
        .arg(build)
        .arg(&config_path)
        .arg(&fragment_path);
    quiet(merge.current_dir(source))?;
    quiet(make(source, build).arg("olddefconfig"))?;
    config::check(FRAGMENT, &read(&config_path)?).inspect_err(|_| {
        // So that the next run configures again and does not find a half-right file.
        if let Err(error) = fs::remove_file(&config_path) {
            eprintln!("note: removing {}: {error}", config_path.display());
        }
    })
}

/// `make` for an out-of-tree build whose result depends on nothing outside the key, at low
/// priority because it may run for minutes beside other work.
fn make(source: &Path, build: &Path) -> Command {
    let mut output = std::ffi::OsString::from("O=");
    output.push(build);
    let mut make = Command::new("nice");
    make.args(["make", "-C"])
        .arg(source)
        .arg(output)
        .env("LC_ALL", "C")
        .env("KBUILD_BUILD_TIMESTAMP", "@0")
        .env("KBUILD_BUILD_USER", "xtask")
        .env("KBUILD_BUILD_HOST", "testbed")
        .env_remove("MAKEFLAGS")
        .env_remove("KCONFIG_CONFIG");
    make
}

/// Runs a short step; its output matters only if it fails.
fn quiet(command: &mut Command) -> Result<()> {
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
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_depends_on_every_part_and_on_their_borders() {
        let base = key(&["a", "bc"]);
        assert_eq!(base, key(&["a", "bc"]));
        assert_eq!(base.len(), 16);
        for other in [key(&["ab", "c"]), key(&["a", "bd"]), key(&["a"])] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn fragment_of_the_test_kernel_asks_for_both_of_its_parts() {
        for option in [
            "CONFIG_KVM_AMD=y",
            "CONFIG_PVH=y",
            "CONFIG_PAGE_REPORTING=y",
            "CONFIG_MODULES=n",
        ] {
            assert!(FRAGMENT.lines().any(|line| line == option), "{option}");
        }
    }
}
