//! Threads, cores, dies and packages, and the APIC ids that encode them.
//!
//! An APIC id consists of four bit fields, each as wide as its level requires:
//!
//! ```text
//!   package │ die │ core │ thread
//! ```
//!
//! A level whose size is not a power of two leaves holes in the ids (Intel SDM volume 3, §9.9.1).

use api::config::{CpuTopology, CpusConfig};

use super::CpuError;

/// The arrangement of the vCPUs that the guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// Hardware threads in a core.
    pub threads_per_core: u32,
    /// Cores in a die.
    pub cores_per_die: u32,
    /// Dies in a package.
    pub dies_per_package: u32,
    /// Packages.
    pub packages: u32,
}

impl Topology {
    /// The configured topology, or one package of single-threaded cores.
    ///
    /// # Errors
    /// [`CpuError::Topology`] if its product is not the maximum number of vCPUs.
    pub fn new(config: &CpusConfig) -> Result<Self, CpuError> {
        let topology = config.topology.unwrap_or(CpuTopology {
            threads_per_core: 1,
            cores_per_die: 1,
            dies_per_package: 1,
            packages: 1,
        });
        let mut topology = Self {
            threads_per_core: u32::from(topology.threads_per_core),
            cores_per_die: u32::from(topology.cores_per_die),
            dies_per_package: u32::from(topology.dies_per_package),
            packages: u32::from(topology.packages),
        };
        if config.topology.is_none() {
            topology.cores_per_die = config.max_vcpus;
        }
        // Four 16-bit numbers: no overflow in 64 bits.
        let product = u64::from(topology.threads_per_core)
            * u64::from(topology.cores_per_die)
            * u64::from(topology.dies_per_package)
            * u64::from(topology.packages);
        if product == 0 || product != u64::from(config.max_vcpus) {
            return Err(CpuError::Topology {
                product,
                max: config.max_vcpus,
            });
        }
        Ok(topology)
    }

    /// Bits of the APIC id below the core number.
    pub fn core_shift(&self) -> u32 {
        width(self.threads_per_core)
    }

    /// Bits of the APIC id below the die number.
    pub fn die_shift(&self) -> u32 {
        self.core_shift() + width(self.cores_per_die)
    }

    /// Bits of the APIC id below the package number.
    pub fn package_shift(&self) -> u32 {
        self.die_shift() + width(self.dies_per_package)
    }

    /// vCPUs in a die.
    pub fn threads_per_die(&self) -> u32 {
        self.threads_per_core * self.cores_per_die
    }

    /// vCPUs in a package.
    pub fn threads_per_package(&self) -> u32 {
        self.threads_per_die() * self.dies_per_package
    }

    /// The APIC id of the vCPU with this index: neighbours share a core first, then a die.
    pub fn apic_id(&self, vcpu: u32) -> u32 {
        let thread = vcpu % self.threads_per_core;
        let core = vcpu / self.threads_per_core % self.cores_per_die;
        let die = vcpu / self.threads_per_die() % self.dies_per_package;
        let package = vcpu / self.threads_per_package();
        (package << self.package_shift())
            | (die << self.die_shift())
            | (core << self.core_shift())
            | thread
    }
}

/// The number of bits needed to number `count` items from 0.
fn width(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(vcpus: u32, shape: Option<[u16; 4]>) -> CpusConfig {
        CpusConfig {
            boot_vcpus: vcpus,
            max_vcpus: vcpus,
            topology: shape.map(|[threads, cores, dies, packages]| CpuTopology {
                threads_per_core: threads,
                cores_per_die: cores,
                dies_per_package: dies,
                packages,
            }),
            ..CpusConfig::default()
        }
    }

    #[test]
    fn topology_default_numbers_apics_like_vcpus() {
        let topology = Topology::new(&config(16, None)).unwrap();
        let ids: Vec<u32> = (0..16).map(|vcpu| topology.apic_id(vcpu)).collect();
        assert_eq!(ids, (0..16).collect::<Vec<u32>>());
    }

    #[test]
    fn topology_odd_levels_leave_holes() {
        // 2 threads, 3 cores, 1 die, 2 packages: the core field is 2 bits wide.
        let topology = Topology::new(&config(12, Some([2, 3, 1, 2]))).unwrap();
        let ids: Vec<u32> = (0..12).map(|vcpu| topology.apic_id(vcpu)).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
        assert_eq!(topology.core_shift(), 1);
        assert_eq!(topology.package_shift(), 3);
    }

    #[test]
    fn topology_ids_are_unique_and_ascending() {
        let topology = Topology::new(&config(2 * 5 * 3 * 2, Some([2, 5, 3, 2]))).unwrap();
        let ids: Vec<u32> = (0..60).map(|vcpu| topology.apic_id(vcpu)).collect();
        assert!(ids.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn topology_of_other_size_is_refused() {
        for shape in [[0, 1, 1, 1], [2, 2, 1, 2], [1, 1, 1, 1], [u16::MAX; 4]] {
            assert!(matches!(
                Topology::new(&config(4, Some(shape))),
                Err(CpuError::Topology { max: 4, .. })
            ));
        }
    }
}
