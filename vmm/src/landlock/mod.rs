//! Landlock: the kernel denies access to files that the configuration does not name (`--landlock`).
//!
//! ```text
//! configuration ─► needs.rs (paths, what for) ─┐
//! landlock_rules, /dev/kvm, /proc ─────────────┴► rules ─► layer on the calling thread and on all it starts later
//! ```
//! A layer cannot be removed. The control thread therefore keeps those of earlier VMs, and [`Confinement`] records
//! them. A path outside the rules is rejected with an error that names the missing rule, instead of failing later with
//! "Permission denied".

mod error;
mod needs;
mod rules;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;

use api::VmConfig;
use hypervisor::KVM_PATH;

pub use error::LandlockError;
pub use needs::{Need, of_config, of_core_file, of_device, of_restore, of_snapshot};
use rules::Rules;

use crate::jail::{self, Place};
use crate::threads::{ThreadKind, ThreadStart};

/// Everything that the VM of `config` opens, and the paths of its rules, for a jail.
pub fn places(config: &VmConfig) -> Vec<Place> {
    let rules = config.landlock_rules.iter().flatten();
    let ruled = rules.map(|rule| Place {
        path: rule.path.clone(),
        writable: rule.access.contains('w'),
        creates: false,
    });
    of_config(config)
        .iter()
        .map(Need::place)
        .chain(ruled)
        .collect()
}

/// The kernel's limit of layers (`LANDLOCK_MAX_NUM_LAYERS`).
const LAYERS_MAX: usize = 16;

/// The layers of the control thread.
#[derive(Debug, Default)]
pub struct Confinement {
    layers: Vec<Rules>,
    /// Whether they include the current VM's rules.
    covers_vm: bool,
}

impl Confinement {
    /// If `config` enables Landlock, confines the calling thread, and all threads that it starts from now on, to the
    /// paths in `config`. Must be called before the machine has threads. Booting the same VM again has no effect.
    ///
    /// # Errors
    /// The kernel has no Landlock, a rule's path cannot be opened, or earlier layers exclude a path.
    pub fn admit(&mut self, config: &VmConfig) -> Result<(), LandlockError> {
        self.check_config(config)?;
        if !config.landlock_enable || self.covers_vm {
            return Ok(());
        }
        let rules = Rules::of(config)?;
        if !self.layers.contains(&rules) {
            if self.layers.len() == LAYERS_MAX {
                return Err(LandlockError::TooManyLayers { max: LAYERS_MAX });
            }
            rules.enforce()?;
            self.layers.push(rules);
        }
        self.covers_vm = true;
        Ok(())
    }

    /// Checks everything that `config` names, as [`Confinement::admit`], which leaves rules that cannot be taken back.
    ///
    /// # Errors
    /// As [`Confinement::check`].
    pub fn check_config(&self, config: &VmConfig) -> Result<(), LandlockError> {
        self.check(&of_config(config))
    }

    /// Checks that the jail of this process shows `needs`, and that every layer allows them. A path that does not exist
    /// passes, because the error from opening it is clearer.
    ///
    /// # Errors
    /// The first path outside the rules.
    pub fn check(&self, needs: &[Need]) -> Result<(), LandlockError> {
        let is_terminal = |need: &Need| need.path == Path::new(needs::PSEUDO_TERMINALS);
        if jail::is_entered() && needs.iter().any(is_terminal) {
            return Err(LandlockError::TerminalInJail);
        }
        // Every jail shows this device. Without it, the errors about paths still come first.
        let mut named = needs.iter().filter(|need| need.path != Path::new(KVM_PATH));
        if let Some(need) = named.find(|need| !jail::shows(&need.path)) {
            return Err(need.outside_jail());
        }
        let outside = |need: &&Need| self.layers.iter().any(|layer| !layer.allow(need));
        match needs.iter().find(outside) {
            Some(need) => Err(need.outside()),
            None => Ok(()),
        }
    }

    /// Called when the VM is deleted: the next VM has its own rules. The layers stay.
    pub fn forget_vm(&mut self) {
        self.covers_vm = false;
    }
}

/// Returns a hook that confines threads started before any VM, which only read files about this process, and then calls
/// `start`.
///
/// # Errors
/// The kernel has no Landlock.
pub fn confine_observers(start: ThreadStart) -> Result<ThreadStart, LandlockError> {
    // Checked here, where an error can still be reported.
    Rules::of_observers()?.ruleset()?;
    Ok(Arc::new(move |kind| {
        use ThreadKind::{EventMonitor, HttpServer, Thresholds};
        if matches!(kind, HttpServer | EventMonitor | Thresholds) {
            let outcome = Rules::of_observers().and_then(|rules| rules.enforce());
            if let Err(error) = outcome {
                // As with a seccomp filter, a thread that cannot be confined must not run.
                log::error!("{}", api::error_line(&error));
                std::process::exit(1);
            }
        }
        start(kind);
    }))
}

/// Confines the calling thread, which from now on only removes the socket at `socket` and its lock: the main thread, and
/// the thread that receives a migration. The latter reads what a peer sends, and starts before the configuration comes.
///
/// # Errors
/// The kernel has no Landlock, or the folder cannot be opened.
pub fn confine_to_removal(socket: Option<&Path>) -> Result<(), LandlockError> {
    Rules::of_removal(socket)?.enforce()
}
