//! Errors of Landlock.

use std::path::PathBuf;

use landlock::{PathFdError, RulesetError};

/// Reasons why a VM cannot be confined, or is confined to other paths.
#[derive(Debug, thiserror::Error)]
pub enum LandlockError {
    /// The kernel lacks Landlock.
    #[error(
        "Landlock is not available: the host needs Linux 6.2 or later with CONFIG_SECURITY_LANDLOCK, \
         and landlock in the list of security modules (lsm=)"
    )]
    Unavailable(#[source] RulesetError),
    /// The path of a rule cannot be opened.
    #[error("Cannot open the path of a Landlock rule")]
    Path(#[source] PathFdError),
    /// The kernel rejects a rule or the set of rules.
    #[error("Cannot enforce the Landlock rules")]
    Enforce(#[source] RulesetError),
    /// This process has reached the kernel's limit of layers, because each of its VMs added one.
    #[error(
        "This process has confined {max} VMs one after another, the kernel's limit: start a new one"
    )]
    TooManyLayers {
        /// The kernel's limit.
        max: usize,
    },
    /// A path that the rules do not allow.
    #[error(
        "{} is outside the Landlock rules of this process: name it when the VM is created \
         (landlock_rules, path={},access={access})", path.display(), path.display()
    )]
    Outside {
        /// The file, or the folder of a socket.
        path: PathBuf,
        /// The access that the rule needs, in the option's syntax.
        access: &'static str,
    },
    /// The jail shows files at their own places, but not what the kernel looks for next to them.
    #[error("No pseudo-terminal opens in the jail of this process: use a file, a socket or off")]
    TerminalInJail,
    /// A path that the jail does not show.
    #[error(
        "{} is outside the jail of this process: name it when the VMM is started \
         (--jail path={},access={access})", path.display(), path.display()
    )]
    OutsideJail {
        /// The file, or the folder of a socket.
        path: PathBuf,
        /// The access that the jail must grant, in the option's syntax.
        access: &'static str,
    },
}
