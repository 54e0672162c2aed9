//! The plan for the emulated host, in the format that its init reads (`tests/guest/src/outer.rs`). A part is
//! `NAME LENGTH\n` followed by that many bytes; the last part is `end`. Lists have a NUL after each item.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, IsTerminal as _, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};

use super::job::{Job, KernelChoice};

/// Folder of our binaries in the outer machine.
const BIN_DIR: &str = "/opt/vmm/bin";

/// Guests inside must not use the TSC-deadline timer: if the outer machine loses its interrupt (see `OUTER_TIMERS`),
/// the guest's is lost, too.
const GUEST_CMDLINE_EXTRA: &str = "lapic=notscdeadline";

const SEED_BYTES: u64 = 64;

/// The plan for this job.
pub(super) fn bytes(job: &Job) -> Result<Vec<u8>> {
    let cwd = std::env::current_dir().context("the current directory")?;
    let links = job.artefacts.files().into_iter().map(|(name, path)| {
        let mut link = OsString::from(format!("{name}="));
        link.push(path);
        link
    });
    let mut plan = Vec::new();
    part(&mut plan, "argv", &list(&job.options.command));
    part(&mut plan, "env", &list(environment(job.options.kernel)));
    part(&mut plan, "cwd", cwd.as_os_str().as_bytes());
    part(&mut plan, "bins", &list(&job.bins));
    part(&mut plan, "guest", &list(links));
    if job.options.icount {
        // A counted run must be repeatable, so nothing may differ from run to run.
        part(&mut plan, "copy-guest", b"");
        part(&mut plan, "libraries", &list(libraries(&job.bins)?));
    } else {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        part(&mut plan, "time", now.to_string().as_bytes());
        part(&mut plan, "seed", &seed().context("reading random bytes")?);
    }
    part(&mut plan, "end", b"");
    Ok(plan)
}

/// What the kernel and the dynamic loader open for these programs: each file, and each symbolic link on the way to it as
/// `PATH=TARGET`.
fn libraries(bins: &[PathBuf]) -> Result<BTreeSet<OsString>> {
    let cache = "/etc/ld.so.cache";
    let mut opened = BTreeSet::new();
    if Path::new(cache).exists() {
        opened.insert(cache.to_owned());
    }
    for bin in bins {
        let output = Command::new("ldd").arg(bin).output().context("ldd")?;
        // A static program has none, which is an error for ldd.
        let text = String::from_utf8_lossy(&output.stdout);
        let words = text.split_whitespace().filter(|it| it.starts_with('/'));
        opened.extend(words.map(str::to_owned));
    }
    let mut files = BTreeSet::new();
    for path in opened {
        let mut path = PathBuf::from(path);
        while let Some((link, target)) = first_link(&path)? {
            let rest = path.strip_prefix(&link)?;
            let folder = link.parent().context("the root is no link")?;
            let next = folder.join(&target);
            path = match rest.as_os_str().is_empty() {
                true => next,
                false => next.join(rest),
            };
            let mut both = link.into_os_string();
            both.push("=");
            both.push(target);
            files.insert(both);
        }
        files.insert(path.into_os_string());
    }
    Ok(files)
}

/// The shortest beginning of the path that is a symbolic link, and its target.
fn first_link(path: &Path) -> Result<Option<(PathBuf, PathBuf)>> {
    let mut ancestors: Vec<&Path> = path.ancestors().collect();
    ancestors.reverse();
    for part in ancestors {
        let name = || part.display().to_string();
        if fs::symlink_metadata(part).with_context(name)?.is_symlink() {
            return Ok(Some((
                part.to_owned(),
                fs::read_link(part).with_context(name)?,
            )));
        }
    }
    Ok(None)
}

fn part(plan: &mut Vec<u8>, name: &str, contents: &[u8]) {
    plan.extend(format!("{name} {}\n", contents.len()).as_bytes());
    plan.extend(contents);
}

fn list(items: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for item in items {
        bytes.extend(item.as_ref().as_bytes());
        bytes.push(0);
    }
    bytes
}

fn seed() -> io::Result<Vec<u8>> {
    let mut seed = Vec::new();
    File::open("/dev/urandom")?
        .take(SEED_BYTES)
        .read_to_end(&mut seed)?;
    Ok(seed)
}

/// The caller's environment with the testbed's additions.
fn environment(kernel: KernelChoice) -> impl Iterator<Item = OsString> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut with_bins = OsString::from(format!("{BIN_DIR}:"));
    with_bins.push(path);
    let terminal = if io::stdout().is_terminal() {
        "yes"
    } else {
        "no"
    };
    let ours: [(OsString, OsString); 5] = [
        ("PATH".into(), with_bins),
        ("TESTBED".into(), "emulated".into()),
        ("GUEST_CMDLINE_EXTRA".into(), GUEST_CMDLINE_EXTRA.into()),
        ("GUEST_KERNEL".into(), kernel.name().into()),
        // The command itself writes to a pipe, so it cannot detect the terminal.
        ("TESTBED_TERMINAL".into(), terminal.into()),
    ];
    std::env::vars_os()
        .filter(|(key, _)| key != "PATH")
        .chain(ours)
        .map(|(mut pair, value)| {
            pair.push("=");
            pair.push(value);
            pair
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environment_puts_our_binaries_first() {
        let path = environment(KernelChoice::Stock)
            .find(|pair| pair.as_bytes().starts_with(b"PATH="))
            .unwrap();
        assert!(path.as_bytes().starts_with(b"PATH=/opt/vmm/bin:"));
    }

    #[test]
    fn links_are_followed_up_to_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path().canonicalize().unwrap();
        fs::create_dir_all(here.join("usr/lib")).unwrap();
        fs::write(here.join("usr/lib/loader"), "").unwrap();
        std::os::unix::fs::symlink("usr/lib", here.join("lib")).unwrap();
        let link = first_link(&here.join("lib/loader")).unwrap();
        assert_eq!(link, Some((here.join("lib"), "usr/lib".into())));
        assert_eq!(first_link(&here.join("usr/lib/loader")).unwrap(), None);
    }

    #[test]
    fn part_has_its_length_before_it() {
        let mut plan = Vec::new();
        part(&mut plan, "argv", &list(["ls", "-l"]));
        part(&mut plan, "end", b"");
        assert_eq!(plan, b"argv 6\nls\0-l\0end 0\n");
    }
}
