//! A direct run on this machine's KVM, with the same environment as in the emulated host.
//!
//! `unshare` gives the command a mount and a process namespace. Inside, as process 1, [`inside`] builds a root of tmpfs
//! with this machine's folders bound into it, plus `/guest` and `/share`. It runs the command there. Nothing is created
//! on the machine. When process 1 ends, the kernel ends everything in the namespace.
#![allow(unsafe_code)]
// UNSAFETY: mount, chroot, prctl and waitpid have no safe wrapper in std.

use std::ffi::{CString, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::job::{Job, Outcome};
use crate::paths;
use crate::process::{self, Tie};

/// Parameters of the process inside the namespaces.
#[derive(Debug, clap::Args)]
pub(crate) struct Inside {
    /// Empty directory that becomes the root
    #[arg(long)]
    root: PathBuf,
    /// NAME=PATH: file to link as NAME under /guest
    #[arg(long)]
    guest: Vec<OsString>,
    /// Directory to bind to /share
    #[arg(long)]
    share: Option<PathBuf>,
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

/// Runs the job and returns its command's result.
pub(crate) fn run(job: &Job) -> Result<Outcome> {
    become_root()?;
    let root = paths::target().join("testbed-root");
    fs::create_dir_all(&root).with_context(|| format!("creating {}", root.display()))?;
    let own = std::env::current_exe().context("the path of this program")?;
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child=KILL", "--"]);
    command
        .arg(own)
        .args(["testbed", "inside", "--root"])
        .arg(&root);
    for (name, path) in job.artefacts.files() {
        let mut link = OsString::from(format!("{name}="));
        link.push(path);
        command.arg("--guest").arg(link);
    }
    if let Some(share) = &job.share {
        command.arg("--share").arg(share);
    }
    command.arg("--").args(&job.options.command);
    let bin_dir = job
        .bins
        .first()
        .and_then(|bin| bin.parent())
        .context("no binaries")?;
    let mut path = bin_dir.as_os_str().to_os_string();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    command
        .env("PATH", path)
        .env("TESTBED", "direct")
        .env("GUEST_KERNEL", job.options.kernel.name());
    // A direct run inside an emulated host keeps the parameters that guests need there.
    if std::env::var_os("GUEST_CMDLINE_EXTRA").is_none() {
        command.env("GUEST_CMDLINE_EXTRA", "");
    }
    let child = process::spawn_tied(&mut command, Tie::Kill, Vec::new())?;
    let Some(ended) = process::wait(child, job.timeout())? else {
        return Ok(Outcome::TimedOut);
    };
    // If unshare itself was killed, there is no status of the command.
    let code = ended.code().with_context(|| format!("unshare: {ended}"))?;
    Ok(Outcome::Exit(u8::try_from(code).unwrap_or(255)))
}

/// Restarts this program with sudo if it does not run as root.
fn become_root() -> Result<()> {
    // SAFETY: geteuid takes nothing and always succeeds.
    if unsafe { libc::geteuid() } == 0 {
        return Ok(());
    }
    let mut path = OsString::from("PATH=");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let error = Command::new("sudo")
        .args(["-E", "env"])
        .arg(path)
        .arg(std::env::current_exe().context("the path of this program")?)
        .args(std::env::args_os().skip(1))
        .exec();
    Err(error).context("a testbed on this machine's KVM needs root: starting sudo")
}

/// Process 1 of the namespace: returns the command's status.
pub(crate) fn inside(plan: &Inside) -> Result<u8> {
    let cwd = std::env::current_dir().context("the current directory")?;
    build_root(plan)?;
    let root = CString::new(plan.root.as_os_str().as_bytes()).context("the root's path")?;
    // SAFETY: a NUL-terminated string that lives until the call returns.
    if unsafe { libc::chroot(root.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error()).context("chroot");
    }
    std::env::set_current_dir(&cwd).with_context(|| format!("going to {}", cwd.display()))?;
    let (program, args) = plan.command.split_first().context("no command")?;
    let child = match Command::new(program)
        .args(args)
        .stdin(std::process::Stdio::null())
        .spawn()
    {
        Ok(child) => child,
        Err(error) => {
            eprintln!("testbed: {}: {error}", program.display());
            return Ok(if error.kind() == io::ErrorKind::NotFound {
                127
            } else {
                126
            });
        }
    };
    reap_until(child.id())
}

fn build_root(plan: &Inside) -> Result<()> {
    let root = &plan.root;
    mount(Path::new("tmpfs"), root, Some("tmpfs"), 0)?;
    for entry in fs::read_dir("/").context("reading /")? {
        let entry = entry.context("reading /")?;
        let target = root.join(entry.file_name());
        let kind = entry.file_type().context("reading /")?;
        if kind.is_symlink() {
            let link = fs::read_link(entry.path()).context("reading /")?;
            std::os::unix::fs::symlink(link, &target).context("filling the root")?;
        } else if entry.file_name() == "proc" {
            fs::create_dir(&target).context("filling the root")?;
            mount(Path::new("proc"), &target, Some("proc"), 0)?;
        } else if kind.is_dir()
            && !["guest", "share"]
                .iter()
                .any(|own| entry.file_name() == *own)
        {
            fs::create_dir(&target).context("filling the root")?;
            mount(&entry.path(), &target, None, libc::MS_BIND | libc::MS_REC)?;
        }
    }
    for link in &plan.guest {
        let text = link.to_str().context("a path of the guest's files")?;
        let (name, path) = text.split_once('=').context("--guest NAME=PATH")?;
        let target = root.join("guest").join(name);
        fs::create_dir_all(target.parent().context("a file is in a folder")?)
            .and_then(|()| std::os::unix::fs::symlink(path, target))
            .context("filling /guest")?;
    }
    if let Some(share) = &plan.share {
        fs::create_dir(root.join("share")).context("creating /share")?;
        mount(share, &root.join("share"), None, libc::MS_BIND)?;
    }
    Ok(())
}

fn mount(source: &Path, target: &Path, kind: Option<&str>, flags: libc::c_ulong) -> Result<()> {
    let text = |path: &Path| CString::new(path.as_os_str().as_bytes()).context("a path");
    let (from, to) = (text(source)?, text(target)?);
    let kind = CString::new(kind.unwrap_or_default()).context("a file system's name")?;
    // SAFETY: three NUL-terminated strings that live until the call returns, and no data.
    let result = unsafe {
        libc::mount(
            from.as_ptr(),
            to.as_ptr(),
            kind.as_ptr(),
            flags,
            std::ptr::null(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error())
            .with_context(|| format!("mounting {} on {}", source.display(), target.display()));
    }
    Ok(())
}

/// Reaps everything that ends in the namespace until the command has.
fn reap_until(pid: u32) -> Result<u8> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is valid for writing during the call.
        let ended = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if ended == pid.cast_signed() {
            let code = if libc::WIFSIGNALED(status) {
                128 + libc::WTERMSIG(status)
            } else {
                libc::WEXITSTATUS(status)
            };
            return Ok(u8::try_from(code).unwrap_or(255));
        }
        if ended < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            bail!("waiting for the command: {}", io::Error::last_os_error());
        }
    }
}
