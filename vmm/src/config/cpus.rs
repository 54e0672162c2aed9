//! The `cpus` section.

use std::collections::BTreeSet;

use api::config::{CpuAffinity, CpuTopology, CpusConfig};

use super::error::CpusFault;

/// The most that any KVM supports. The host's limit may be lower, and is checked at boot.
pub(super) const VCPUS_MAX: u32 = 4096;
/// A smaller width cannot hold the PCI hole below 4 GiB and some RAM above it.
const PHYS_BITS_MIN: u8 = 36;
/// The maximum that x86-64 defines (Intel SDM volume 3, section 4.1.4).
const PHYS_BITS_MAX: u8 = 52;

pub(super) fn check(cpus: &CpusConfig) -> Result<(), CpusFault> {
    let (boot, max) = (cpus.boot_vcpus, cpus.max_vcpus);
    if boot == 0 || boot > max || max > VCPUS_MAX {
        return Err(CpusFault::Count {
            boot,
            max,
            limit: VCPUS_MAX,
        });
    }
    let bits = cpus.max_phys_bits;
    if !(PHYS_BITS_MIN..=PHYS_BITS_MAX).contains(&bits) {
        return Err(CpusFault::PhysBits {
            bits,
            min: PHYS_BITS_MIN,
            max: PHYS_BITS_MAX,
        });
    }
    if let Some(topology) = &cpus.topology {
        let product = vcpus_of(topology);
        if product != u64::from(max) {
            return Err(CpusFault::Topology { product, max });
        }
    }
    affinity(cpus.affinity.as_deref().unwrap_or_default(), max)
}

fn vcpus_of(topology: &CpuTopology) -> u64 {
    // Four 16-bit factors cannot overflow 64 bits.
    u64::from(topology.threads_per_core)
        * u64::from(topology.cores_per_die)
        * u64::from(topology.dies_per_package)
        * u64::from(topology.packages)
}

fn affinity(affinity: &[CpuAffinity], max: u32) -> Result<(), CpusFault> {
    let mut seen = BTreeSet::new();
    for CpuAffinity { vcpu, host_cpus } in affinity {
        let vcpu = *vcpu;
        if vcpu >= max {
            let last = max - 1;
            return Err(CpusFault::AffinityOfUnknownVcpu { vcpu, last });
        }
        if !seen.insert(vcpu) {
            return Err(CpusFault::AffinityTwice { vcpu });
        }
        if host_cpus.is_empty() {
            return Err(CpusFault::AffinityEmpty { vcpu });
        }
    }
    Ok(())
}
