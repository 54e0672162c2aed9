//! A mount namespace whose root shows only chosen paths, each at its own place.
//!
//! The root is a read-only tmpfs with empty folders, on which files and folders of the host are bound. `/proc` is new
//! and shows only the VMM. After the change of root, nothing refers to the host's root any more.

// UNSAFETY: leaving the mount namespace of the other threads is unsafe where there are any.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change,
    mount_remount, unmount,
};
use rustix::process::{chdir, pivot_root, umask};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::JailError;
use super::place::Place;

/// Where the new root is mounted before it becomes the root. In this namespace, it hides the host's folder.
const BASE: &str = "/tmp";
/// The new root's size: it has only empty files and folders.
const BASE_OPTIONS: &std::ffi::CStr = c"mode=0755,size=1m";
const PROC: &str = "/proc";

/// Enters the new root and returns the paths that it shows. A path that does not exist is not shown, because the error
/// from opening it is clearer. `owner` owns the files that are created in advance.
pub(super) fn enter(
    places: &[Place],
    owner: Option<(Uid, Gid)>,
) -> Result<Vec<PathBuf>, JailError> {
    let here = std::env::current_dir().map_err(|source| at(Path::new("."), source))?;
    // SAFETY: this process has a single thread, which therefore shares its mounts and working folder with no other.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }
        .map_err(|source| JailError::Namespace(source.into()))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(failed("make the mounts private"))?;
    let sources = sources(places, &here, owner)?;

    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tmpfs", BASE, "tmpfs", flags, BASE_OPTIONS)
        .map_err(failed("mount the jail's root on /tmp"))?;
    chdir(BASE).map_err(failed("enter /tmp"))?;
    let mask = umask(Mode::WGRP | Mode::WOTH);
    let shown = fill(&sources, &here);
    umask(mask);
    let shown = shown?;
    // Both names are the same: the old root comes to lie on the new one, and is unmounted.
    pivot_root(".", ".").map_err(failed("change to the jail's root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(failed("unmount the host's root"))?;
    let flags = flags | MountFlags::BIND | MountFlags::RDONLY;
    mount_remount("/", flags, "").map_err(failed("make the jail's root read-only"))?;
    chdir(&here).map_err(failed("enter the working folder in the jail"))?;
    Ok(shown)
}

/// Mounts `/proc` in the new root. It shows the pid namespace of the calling process.
pub(super) fn mount_proc() -> Result<(), JailError> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let options = c"hidepid=ptraceable,subset=pid";
    mount("proc", PROC, "proc", flags, options)
        .map_err(failed("mount /proc in the jail (Linux 5.8 or later)"))
}

/// A place that exists, by its absolute path and opened.
struct Source {
    path: PathBuf,
    file: OwnedFd,
    is_folder: bool,
    writable: bool,
}

/// Opens the places, folders before their content.
fn sources(
    places: &[Place],
    here: &Path,
    owner: Option<(Uid, Gid)>,
) -> Result<Vec<Source>, JailError> {
    let mut all: Vec<Place> = Vec::new();
    for place in places {
        let path = here.join(&place.path);
        if place.creates {
            create(&path, owner)?;
        }
        // The path may lead through links. Both names must work.
        for path in path.canonicalize().into_iter().chain([path]) {
            let creates = false;
            all.push(Place {
                path,
                creates,
                ..*place
            });
        }
    }
    all.sort();
    let mut sources: Vec<Source> = Vec::new();
    for Place { path, writable, .. } in all {
        if path.starts_with(PROC) {
            continue;
        }
        if path.parent().is_none() {
            return Err(JailError::WholeRoot);
        }
        match sources.last_mut() {
            Some(last) if last.path == path => last.writable |= writable,
            _ => sources.extend(open(path, writable)?),
        }
    }
    Ok(sources)
}

fn open(path: PathBuf, writable: bool) -> Result<Option<Source>, JailError> {
    match rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => {
            let is_folder = fs::metadata(&path)
                .map_err(|source| at(&path, source))?
                .is_dir();
            Ok(Some(Source {
                path,
                file,
                is_folder,
                writable,
            }))
        }
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(None),
        Err(source) => Err(at(&path, source.into())),
    }
}

/// Creates a file that the VMM would create, because only an existing file can be shown.
fn create(path: &Path, owner: Option<(Uid, Gid)>) -> Result<(), JailError> {
    let created = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_NOCTTY)
        .open(path);
    let file = match created {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(error) => return Err(at(path, error)),
    };
    let Some((uid, gid)) = owner else {
        return Ok(());
    };
    rustix::fs::fchown(&file, Some(uid), Some(gid)).map_err(|source| at(path, source.into()))
}

/// Fills the new root, which is the working folder.
fn fill(sources: &[Source], here: &Path) -> Result<Vec<PathBuf>, JailError> {
    let mut shown: Vec<PathBuf> = Vec::new();
    for source in sources {
        let path = &source.path;
        let target = path.strip_prefix("/").unwrap_or(path);
        if shown.iter().any(|folder| path.starts_with(folder)) {
            // In a folder that is shown. A link leads to a path that is shown as well.
            if target.is_symlink() || !target.exists() {
                continue;
            }
        } else {
            make(target, source.is_folder).map_err(|error| at(path, error))?;
        }
        bind(source, target).map_err(|error| at(path, error.into()))?;
        shown.push(path.clone());
    }
    make(Path::new("proc"), true).map_err(|error| at(Path::new(PROC), error))?;
    let folder = here.strip_prefix("/").unwrap_or(here);
    fs::create_dir_all(Path::new(".").join(folder)).map_err(|source| at(here, source))?;
    Ok(shown)
}

/// Makes an empty file or folder to bind on.
fn make(target: &Path, is_folder: bool) -> io::Result<()> {
    if is_folder {
        return fs::create_dir_all(target);
    }
    if let Some(folder) = target.parent() {
        fs::create_dir_all(Path::new(".").join(folder))?;
    }
    File::create(target).map(drop)
}

fn bind(source: &Source, target: &Path) -> rustix::io::Result<()> {
    mount_bind(format!("/proc/self/fd/{}", source.file.as_raw_fd()), target)?;
    let mut flags = MountFlags::BIND | MountFlags::NOSUID | MountFlags::NOEXEC;
    if !source.writable {
        flags |= MountFlags::RDONLY;
    }
    mount_remount(target, flags, "")
}

fn at(path: &Path, source: io::Error) -> JailError {
    JailError::Path {
        path: path.to_owned(),
        source,
    }
}

fn failed(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> JailError {
    move |source| JailError::failed(what, source)
}
