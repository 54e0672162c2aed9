//! Configuration of vCPUs.

use api_macros::{Words, section};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::options::{OptionValue, ValueError, parse_integer_map, parse_strings};

/// Default number of vCPUs.
pub const DEFAULT_VCPUS: u32 = 1;
/// Default address width. A PVH guest starts with four-level paging, which covers 46 bits, regardless of the host.
pub const DEFAULT_MAX_PHYS_BITS: u8 = 46;

/// vCPUs of the VM.
#[section(option = "cpus", about = "vCPU parameters", unsupported = "profile")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpusConfig {
    /// vCPUs that run at boot.
    #[key("<boot_vcpus>", name = "boot", required, default = DEFAULT_VCPUS)]
    #[schemars(range(min = 1))]
    pub boot_vcpus: u32,
    /// Maximum number of vCPUs; on the command line, the default is `boot`.
    #[key("<max_vcpus>", name = "max", required, default = boot_vcpus)]
    #[schemars(range(min = 1))]
    pub max_vcpus: u32,
    /// Topology of the vCPUs that the guest sees.
    #[key]
    pub topology: Option<CpuTopology>,
    /// Show the guest Hyper-V's interface too, for guests that do not know KVM.
    #[key]
    pub kvm_hyperv: bool,
    /// Upper limit on the guest's physical address width, in bits. The host's width limits it too.
    #[key("<maximum_number_of_physical_bits>", default = DEFAULT_MAX_PHYS_BITS)]
    pub max_phys_bits: u8,
    /// Host CPUs that each vCPU may run on. A vCPU that is not listed may run on any.
    #[key]
    pub affinity: Option<Vec<CpuAffinity>>,
    /// Optional CPU features.
    #[key]
    pub features: CpuFeatures,
    /// Let the guest itself run VMs.
    #[key(default = true)]
    pub nested: bool,
    /// Which vCPUs may share a physical core.
    #[key]
    pub core_scheduling: CoreScheduling,
}

/// Threads, cores, dies and packages; their product is the number of vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
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
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct CpuAffinity {
    /// Index of the vCPU, from 0.
    pub vcpu: u32,
    /// Host CPUs that it may run on, by the host's numbers.
    #[serde(deserialize_with = "crate::bounded::list")]
    pub host_cpus: Vec<usize>,
}

/// Optional CPU features; off by default.
#[section]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuFeatures {
    /// Advanced Matrix Extensions.
    pub amx: bool,
}

/// Core scheduling: which vCPUs the host may run on sibling threads of one core.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema, Words)]
#[schemars(rename = "CoreSchedulingMode")]
pub enum CoreScheduling {
    /// Only vCPUs of this VM share a core.
    #[default]
    #[word("vm")]
    Vm,
    /// No two vCPUs share a core.
    #[word("vcpu")]
    Vcpu,
    /// The host decides.
    #[word("off")]
    Off,
}

impl OptionValue for CpuTopology {
    fn values() -> String {
        "<threads_per_core>:<cores_per_die>:<dies_per_package>:<packages>".to_owned()
    }

    fn read(text: &str) -> Result<Self, ValueError> {
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

impl OptionValue for Vec<CpuAffinity> {
    fn values() -> String {
        "<list_of_vcpus_with_their_associated_cpuset>".to_owned()
    }

    fn read(text: &str) -> Result<Self, ValueError> {
        let pairs = parse_integer_map(text)?.into_iter();
        let pins = pairs.map(|(vcpu, host_cpus)| CpuAffinity { vcpu, host_cpus });
        Ok(pins.collect())
    }
}

impl OptionValue for CpuFeatures {
    fn values() -> String {
        "<list_of_features_to_enable>".to_owned()
    }

    fn read(text: &str) -> Result<Self, ValueError> {
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
