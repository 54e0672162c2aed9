//! Confines the whole process before it starts threads: user, capabilities, resource limits, and a separate root.
//!
//! ```text
//! --resource-limits ─► limits.rs
//! --jail, paths of all options ─► root.rs: mount namespace, whose root shows only these paths
//!                              ─► pid_namespace.rs: pid namespace, of which the VMM is the first process
//! --user, --group ─► identity.rs: user and groups, no capabilities, not dumpable
//! ```
//! The VMM opens the files of its options afterwards, as that user and inside that root. Therefore what a boot can open,
//! a reboot can open as well. The kernel copies all of this to each thread that the process starts.

mod error;
mod identity;
mod limits;
mod pid_namespace;
mod place;
mod root;
mod waiter;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use api::config::ResourceLimitsConfig;
use virtio_devices::reclaim::Pagemap;

pub use error::JailError;
use identity::Identity;
pub use place::Place;

/// The places of this process's jail, once it is in one.
static ENTERED: OnceLock<Vec<PathBuf>> = OnceLock::new();

/// The confinement that the command line requests.
#[derive(Debug)]
pub struct Jail {
    identity: Option<Identity>,
    limits: ResourceLimitsConfig,
    places: Option<Vec<Place>>,
}

impl Jail {
    /// Looks up the user and the group. With `places`, the process gets a root that shows only them.
    ///
    /// # Errors
    /// There is no such user or group.
    pub fn new(
        user: Option<&str>,
        group: Option<&str>,
        limits: ResourceLimitsConfig,
        places: Option<Vec<Place>>,
    ) -> Result<Self, JailError> {
        let identity = user.map(|user| Identity::find(user, group)).transpose()?;
        Ok(Self {
            identity,
            limits,
            places,
        })
    }

    /// Confines the process. Must be called while it has a single thread, and with SIGTERM and SIGINT blocked. With a
    /// jail, it returns in a new process, which is the VMM.
    ///
    /// # Errors
    /// A part is not permitted or not supported. The process must end then, because it is confined in part.
    pub fn enter(self) -> Result<(), JailError> {
        // The VMM runs no other program, so this only deprives an attacker.
        rustix::thread::set_no_new_privs(true)
            .map_err(|source| JailError::failed("forbid new privileges", source))?;
        limits::apply(&self.limits)?;
        let Some(places) = &self.places else {
            return self.change_user();
        };
        pid_namespace::detach_in_background()?;
        let shown = root::enter(places, self.identity.as_ref().map(Identity::owner))?;
        let link = pid_namespace::enter(|| self.assume())?;
        root::mount_proc()?;
        // The process enters one jail.
        let _ = ENTERED.set(shown);
        self.change_user()?;
        link.bind()
    }

    /// Becomes the user, and keeps open what only root can open.
    fn change_user(&self) -> Result<(), JailError> {
        if self.identity.is_some() {
            // A process that is not dumpable cannot open this file.
            Pagemap::keep_open().map_err(JailError::Pagemap)?;
        }
        self.assume()
    }

    fn assume(&self) -> Result<(), JailError> {
        self.identity.as_ref().map_or(Ok(()), Identity::assume)
    }
}

/// The id of this process in the pid namespace where the VMM was started. In a jail, it differs from the process's own
/// view.
pub fn process_id() -> u32 {
    pid_namespace::outside_id()
}

/// Whether this process is in a jail.
pub fn is_entered() -> bool {
    ENTERED.get().is_some()
}

/// Whether the jail of this process, if it is in one, shows `path` or a folder above it. A path that does not exist in
/// a folder that is shown is not outside.
pub fn shows(path: &Path) -> bool {
    let Some(places) = ENTERED.get() else {
        return true;
    };
    // In the jail, all other paths are missing.
    path.symlink_metadata().is_ok()
        || std::path::absolute(path)
            .is_ok_and(|path| places.iter().any(|place| path.starts_with(place)))
}
