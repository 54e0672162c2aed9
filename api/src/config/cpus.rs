//! vCPUs.

use serde::{Deserialize, Serialize};

use super::serde_rules::enabled;
use crate::options::{OptionError, Options, ValueError, parse_strings};

/// vCPUs of a VM that does not say otherwise.
pub const DEFAULT_VCPUS: u32 = 1;
/// A PVH guest starts with four-level paging, which reaches 46 bits, whatever the host could do.
pub const DEFAULT_MAX_PHYS_BITS: u8 = 46;

/// vCPUs of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct CpusConfig {
    /// vCPUs that run at boot.
    pub boot_vcpus: u32,
    /// vCPUs the VM can grow to.
    pub max_vcpus: u32,
    /// How the guest sees them arranged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology: Option<CpuTopology>,
    /// Hyper-V enlightenments.
    #[serde(default)]
    pub kvm_hyperv: bool,
    /// Upper limit on the guest's physical address width, in bits; the host's width limits it too.
    #[serde(default = "default_max_phys_bits")]
    pub max_phys_bits: u8,
    /// Host CPUs each vCPU may run on; a vCPU not named may run anywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Vec<CpuAffinity>>,
    /// Optional CPU features.
    #[serde(default)]
    pub features: CpuFeatures,
    /// Whether the guest may itself run VMs.
    #[serde(default = "enabled")]
    pub nested: bool,
    /// Which vCPUs may share a physical core.
    #[serde(default)]
    pub core_scheduling: CoreScheduling,
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot_vcpus: DEFAULT_VCPUS,
            max_vcpus: DEFAULT_VCPUS,
            topology: None,
            kvm_hyperv: false,
            max_phys_bits: DEFAULT_MAX_PHYS_BITS,
            affinity: None,
            features: CpuFeatures::default(),
            nested: true,
            core_scheduling: CoreScheduling::default(),
        }
    }
}

fn default_max_phys_bits() -> u8 {
    DEFAULT_MAX_PHYS_BITS
}

/// Threads, cores, dies and packages; their product is the number of vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct CpuTopology {
    /// Hardware threads in a core.
    pub threads_per_core: u16,
    /// Cores in a die.
    pub cores_per_die: u16,
    /// Dies in a package.
    pub dies_per_package: u16,
    /// Packages (sockets).
    pub packages: u16,
}

/// Pins one vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct CpuAffinity {
    /// Index of the vCPU, from 0.
    pub vcpu: u32,
    /// Host CPUs it may run on, by the host's numbers.
    pub host_cpus: Vec<usize>,
}

/// Optional CPU features; all off unless asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct CpuFeatures {
    /// Advanced Matrix Extensions.
    #[serde(default)]
    pub amx: bool,
}

/// Core scheduling: which vCPUs the host may run on sibling threads of one core.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum CoreScheduling {
    /// Only vCPUs of this VM share a core.
    #[default]
    Vm,
    /// No two vCPUs share a core.
    Vcpu,
    /// The host decides.
    Off,
}

impl CpusConfig {
    /// Syntax of `--cpus`.
    pub const SYNTAX: &str = "vCPU parameters \"boot=<boot_vcpus>,max=<max_vcpus>,\
        topology=<threads_per_core>:<cores_per_die>:<dies_per_package>:<packages>,kvm_hyperv=on|off,\
        max_phys_bits=<maximum_number_of_physical_bits>,affinity=<list_of_vcpus_with_their_associated_cpuset>,\
        features=<list_of_features_to_enable>,nested=on|off,core_scheduling=vm|vcpu|off\"";

    /// Reads the value of `--cpus`. `max` is `boot` when it is not given.
    ///
    /// # Errors
    /// An unknown key or a malformed value.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let options = Options::parse(
            "cpus",
            text,
            &[
                "boot",
                "max",
                "topology",
                "kvm_hyperv",
                "max_phys_bits",
                "affinity",
                "features",
                "nested",
                "core_scheduling",
                "profile",
            ],
            &[],
        )?;
        options.unsupported("profile")?;
        let boot_vcpus = options.parsed("boot")?.unwrap_or(DEFAULT_VCPUS);
        let affinity = options.integer_map("affinity")?.map(|pairs| {
            pairs
                .into_iter()
                .map(|(vcpu, host_cpus)| CpuAffinity { vcpu, host_cpus })
                .collect()
        });
        Ok(Self {
            boot_vcpus,
            max_vcpus: options.parsed("max")?.unwrap_or(boot_vcpus),
            topology: options.read("topology", CpuTopology::parse)?,
            kvm_hyperv: options.toggle("kvm_hyperv")?.unwrap_or(false),
            max_phys_bits: options
                .parsed("max_phys_bits")?
                .unwrap_or(DEFAULT_MAX_PHYS_BITS),
            affinity,
            features: options
                .read("features", CpuFeatures::parse)?
                .unwrap_or_default(),
            nested: options.toggle("nested")?.unwrap_or(true),
            core_scheduling: options
                .word(
                    "core_scheduling",
                    &[
                        ("vm", CoreScheduling::Vm),
                        ("vcpu", CoreScheduling::Vcpu),
                        ("off", CoreScheduling::Off),
                    ],
                )?
                .unwrap_or_default(),
        })
    }
}

impl CpuTopology {
    fn parse(text: &str) -> Result<Self, ValueError> {
        let malformed = || ValueError::Topology(text.to_owned());
        let counts: Vec<u16> = text
            .split(':')
            .map(|count| count.parse().map_err(|_| malformed()))
            .collect::<Result<_, _>>()?;
        let [threads_per_core, cores_per_die, dies_per_package, packages] = counts[..] else {
            return Err(malformed());
        };
        Ok(Self {
            threads_per_core,
            cores_per_die,
            dies_per_package,
            packages,
        })
    }
}

impl CpuFeatures {
    fn parse(text: &str) -> Result<Self, ValueError> {
        let mut features = Self::default();
        for name in parse_strings(text) {
            match name.as_str() {
                "amx" => features.amx = true,
                _ => {
                    return Err(ValueError::Word {
                        word: name,
                        known: "amx".to_owned(),
                    });
                }
            }
        }
        Ok(features)
    }
}
