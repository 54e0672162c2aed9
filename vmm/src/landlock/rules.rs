//! A set of rules, and its enforcement by the kernel.

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use api::VmConfig;
use api::config::LandlockConfig;
use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr,
};

use super::needs::{self, Need, READ, WRITE};
use super::{LandlockError, of_config};

/// The minimum that the kernel must support: the rights of Linux 6.2, as in upstream.
const REQUIRED: ABI = ABI::V3;

/// The rules of one layer: rights for a path and everything beneath it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rules(Vec<Rule>);

#[derive(Debug, PartialEq, Eq)]
struct Rule {
    /// The canonical path, for comparisons.
    path: PathBuf,
    access: BitFlags<AccessFs>,
}

impl Rules {
    /// Rules for the paths in the configuration, and its `landlock_rules`.
    pub(super) fn of(config: &VmConfig) -> Result<Self, LandlockError> {
        let own = config.landlock_rules.iter().flatten();
        let own = own.map(Rule::configured).collect::<Result<Vec<_>, _>>()?;
        let derived = of_config(config);
        let derived = derived.iter().filter_map(Rule::derived);
        Ok(Self(derived.chain(own).collect()))
    }

    /// Rules for threads that read figures about this process.
    pub(super) fn of_observers() -> Result<Self, LandlockError> {
        Ok(Self(vec![Rule::new(Path::new("/proc"), READ)?]))
    }

    /// Rules for a thread that only removes `socket`.
    pub(super) fn of_removal(socket: Option<&Path>) -> Result<Self, LandlockError> {
        let removes = AccessFs::RemoveFile.into();
        let rule = socket.map(|path| Rule::new(needs::folder(path), removes));
        Ok(Self(rule.transpose()?.into_iter().collect()))
    }

    /// Whether the rules allow `need`. The kernel combines the rights of all folders above the file.
    pub(super) fn allow(&self, need: &Need) -> bool {
        let Ok(path) = need.path.canonicalize() else {
            // If the file does not exist, the rights of its folder decide whether it can be created.
            let folder = needs::folder(&need.path).canonicalize();
            let made = need.access | AccessFs::MakeReg;
            return !need.creates || folder.is_ok_and(|folder| self.rights(&folder).contains(made));
        };
        let access = needs::fitting(&path, need.access);
        self.rights(&path).contains(access)
    }

    fn rights(&self, path: &Path) -> BitFlags<AccessFs> {
        let above = self.0.iter().filter(|rule| path.starts_with(&rule.path));
        above.fold(BitFlags::EMPTY, |rights, rule| rights | rule.access)
    }

    /// The rules in the kernel, not yet enforced.
    pub(super) fn ruleset(&self) -> Result<RulesetCreated, LandlockError> {
        let ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::from_all(REQUIRED))
            .map_err(LandlockError::Unavailable)?;
        // Older kernels allow every `ioctl` on an open device.
        let mut ruleset = ruleset
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::IoctlDev)
            .and_then(Ruleset::create)
            .map_err(LandlockError::Enforce)?;
        for rule in &self.0 {
            let path = PathFd::new(&rule.path).map_err(LandlockError::Path)?;
            ruleset = ruleset
                .add_rule(PathBeneath::new(path, rule.access))
                .map_err(LandlockError::Enforce)?;
        }
        Ok(ruleset)
    }

    /// Confines the calling thread and all threads it starts from now on, irrevocably.
    pub(super) fn enforce(&self) -> Result<(), LandlockError> {
        let enforced = self.ruleset()?.restrict_self();
        enforced.map(drop).map_err(LandlockError::Enforce)
    }
}

impl Rule {
    fn new(path: &Path, access: BitFlags<AccessFs>) -> Result<Self, LandlockError> {
        // Opened only for its error, which names the path.
        PathFd::new(path).map_err(LandlockError::Path)?;
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let access = needs::fitting(&path, access);
        Ok(Self { path, access })
    }

    /// One of `landlock_rules`, whose access has been validated.
    fn configured(config: &LandlockConfig) -> Result<Self, LandlockError> {
        let mut access = BitFlags::EMPTY;
        if config.access.contains('r') {
            access |= READ;
        }
        if config.access.contains('w') {
            access |= WRITE;
        }
        Self::new(&config.path, access)
    }

    /// `None` for a file that does not exist, because the error from opening it is clearer.
    fn derived(need: &Need) -> Option<Self> {
        if need.creates {
            touch(&need.path);
        }
        Self::new(&need.path, need.access).ok()
    }
}

/// Creates the file, because a rule needs an existing file; the alternative would be a rule for the whole folder.
fn touch(path: &Path) {
    if fs::exists(path).is_ok_and(|exists| exists) {
        return;
    }
    let made = File::options()
        .write(true)
        .create_new(true)
        .custom_flags(libc::O_NOCTTY)
        .open(path);
    if let Err(error) = made {
        log::info!("Cannot create {}: {error}", path.display());
    }
}
