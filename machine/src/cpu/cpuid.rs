//! The guest's CPUID: KVM's leaves with our topology, names and limits.
//!
//! Leaf numbers and bits: Intel SDM volume 2 (CPUID), AMD APM volume 3
//! (appendix E), Documentation/virt/kvm/x86/cpuid.rst.

use std::arch::x86_64::__cpuid;

use api::config::CpusConfig;
use hypervisor::bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use hypervisor::{HYPERV_MSRS, Kvm};

use super::{CpuError, Topology, hyperv};

/// Physical address bits of a processor that does not report them.
const PHYS_BITS_DEFAULT: u8 = 36;
/// KVM's local APIC timer counts nanoseconds.
const KVM_APIC_BUS_KHZ: u32 = 1_000_000;

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_MTRR: u32 = 1 << 12;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const LEAF7_EDX_AMX_TILE: u32 = 1 << 24;
/// AMX: BF16, TILE, INT8.
const LEAF7_EDX_AMX: u32 = 1 << 22 | LEAF7_EDX_AMX_TILE | 1 << 25;
/// AMX-FP16 and AMX-COMPLEX.
const LEAF7_1_EAX_AMX: u32 = 1 << 21;
const LEAF7_1_EDX_AMX: u32 = 1 << 8;
/// XCR0 bits of the AMX tiles.
const LEAFD_EAX_XTILE: u32 = 1 << 17 | 1 << 18;
const XTILE_COMPONENTS: [u32; 2] = [17, 18];
const LEAF80000001_ECX_CMP_LEGACY: u32 = 1 << 1;
const LEAF80000001_ECX_SVM: u32 = 1 << 2;
const LEAF80000001_ECX_TOPOEXT: u32 = 1 << 22;
const LEAF80000007_EDX_INVARIANT_TSC: u32 = 1 << 8;

/// KVM's own leaves. Behind those of Hyper-V, they are moved by [`MOVED`]: guests look for them in steps of that size.
const KVM_CPUID_SIGNATURE: u32 = 0x4000_0000;
const KVM_CPUID_FEATURES: u32 = 0x4000_0001;
const KVM_FEATURE_MSI_EXT_DEST_ID: u32 = 1 << 15;
/// TSC and APIC frequencies, a convention shared by hypervisors.
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
const MOVED: u32 = 0x100;

/// Level types of leaves 0xb and 0x1f.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;
const LEVEL_DIE: u32 = 5;

/// The guest's physical address bits: the host's, but at most `max_phys_bits`.
///
/// # Errors
/// KVM does not return the host's CPUID.
pub fn guest_phys_bits(kvm: &Kvm, max_phys_bits: u8) -> Result<u8, CpuError> {
    let supported = kvm.supported_cpuid().map_err(CpuError::Prepare)?;
    Ok(host_phys_bits(supported.as_slice()).min(max_phys_bits))
}

/// The CPUID that KVM supports, with the features that this configuration needs. To be called before the first vCPU of a
/// machine is created.
///
/// # Errors
/// The host lacks a feature, or KVM does not return its CPUID.
pub(super) fn supported_cpuid(kvm: &Kvm, config: &CpusConfig) -> Result<CpuId, CpuError> {
    if config.kvm_hyperv && !kvm.supports_hyperv_synic() {
        return Err(CpuError::NotSupported { what: "kvm_hyperv" });
    }
    let permitted = config.features.amx
        && match kvm.request_amx() {
            Err(hypervisor::Error::Ioctl { source, .. })
                if source.raw_os_error() == Some(libc::EBUSY) =>
            {
                return Err(CpuError::AmxTooLate);
            }
            permitted => permitted.is_ok(),
        };
    let supported = kvm.supported_cpuid().map_err(CpuError::Prepare)?;
    let mut leaves = supported.as_slice().iter();
    let has_amx = leaves
        .any(|leaf| leaf.function == 7 && leaf.index == 0 && leaf.edx & LEAF7_EDX_AMX_TILE != 0);
    if config.features.amx && !(permitted && has_amx) {
        return Err(CpuError::NotSupported {
            what: "features=amx",
        });
    }
    Ok(supported)
}

/// The model specific registers of the vCPUs of this configuration, in the order to set them.
///
/// # Errors
/// KVM does not return its list.
pub(super) fn msr_indices(kvm: &Kvm, config: &CpusConfig) -> Result<Vec<u32>, CpuError> {
    let mut indices = kvm.msr_indices().map_err(CpuError::Prepare)?;
    if config.kvm_hyperv {
        indices.extend(HYPERV_MSRS);
    }
    Ok(indices)
}

fn host_phys_bits(leaves: &[kvm_cpuid_entry2]) -> u8 {
    leaves
        .iter()
        .find(|leaf| leaf.function == 0x8000_0008)
        .map_or(PHYS_BITS_DEFAULT, |leaf| (leaf.eax & 0xff) as u8)
}

/// The inputs of the guest's CPUID besides the host.
#[derive(Debug, Clone, Copy)]
pub(super) struct CpuidOptions {
    pub(super) topology: Topology,
    pub(super) phys_bits: u8,
    /// Whether the guest may use nested virtualization, if the host supports it.
    pub(super) nested: bool,
    /// Whether the guest has AMX; `supported` must include it then.
    pub(super) amx: bool,
    /// The maximum number of vCPUs of a guest that sees Hyper-V; `None` if it sees KVM alone.
    pub(super) hyperv_vcpus: Option<u32>,
    /// Frequency of the guest's time stamp counter, if known.
    pub(super) tsc_khz: Option<u32>,
}

impl CpuidOptions {
    /// Those of a configuration, on a host that supports `supported`.
    pub(super) fn of(
        config: &CpusConfig,
        topology: Topology,
        supported: &CpuId,
        tsc_khz: Option<u32>,
    ) -> Self {
        Self {
            topology,
            phys_bits: host_phys_bits(supported.as_slice()).min(config.max_phys_bits),
            nested: config.nested,
            amx: config.features.amx,
            hyperv_vcpus: config.kvm_hyperv.then_some(config.max_vcpus),
            tsc_khz,
        }
    }
}

/// The guest's CPUID, complete except for what differs between vCPUs.
#[derive(Debug, Clone)]
pub(super) struct GuestCpuid {
    leaves: Vec<kvm_cpuid_entry2>,
    topology: Topology,
}

impl GuestCpuid {
    /// Adapts the CPUID that KVM supports.
    pub(super) fn new(supported: &[kvm_cpuid_entry2], options: &CpuidOptions) -> Self {
        let mut cpuid = Self {
            leaves: supported.to_vec(),
            topology: options.topology,
        };
        for leaf in &mut cpuid.leaves {
            patch_features(leaf, options);
            if !options.amx {
                hide_amx(leaf);
            }
            patch_caches(leaf, &options.topology);
            patch_amd_topology(leaf, &options.topology);
        }
        cpuid.set_brand_string();
        cpuid.set_timing(options.tsc_khz);
        cpuid.set_topology_leaves();
        if let Some(vcpus) = options.hyperv_vcpus {
            cpuid.put_hyperv_first(vcpus);
        }
        cpuid
    }

    /// The CPUID of one vCPU.
    pub(super) fn of_vcpu(&self, apic_id: u32) -> Result<CpuId, CpuError> {
        let mut leaves = self.leaves.clone();
        for leaf in &mut leaves {
            match leaf.function {
                // The field has eight bits; leaf 0xb holds the whole id.
                1 => leaf.ebx = leaf.ebx & 0x00ff_ffff | apic_id << 24,
                0xb | 0x1f => leaf.edx = apic_id,
                0x8000_001e => patch_amd_apic(leaf, &self.topology, apic_id),
                _ => {}
            }
        }
        CpuId::from_entries(&leaves).map_err(|_too_many| CpuError::CpuidLeaves {
            count: leaves.len(),
        })
    }

    fn find(&mut self, function: u32) -> Option<&mut kvm_cpuid_entry2> {
        self.leaves
            .iter_mut()
            .find(|leaf| leaf.function == function)
    }

    /// The leaf, added if it is missing.
    fn leaf(&mut self, function: u32) -> &mut kvm_cpuid_entry2 {
        let at = self
            .leaves
            .iter()
            .position(|leaf| leaf.function == function)
            .unwrap_or_else(|| {
                self.leaves.push(kvm_cpuid_entry2 {
                    function,
                    ..Default::default()
                });
                self.leaves.len() - 1
            });
        &mut self.leaves[at]
    }

    /// KVM provides no processor name, so the guest gets the host's.
    fn set_brand_string(&mut self) {
        for function in 0x8000_0002..=0x8000_0004 {
            let host = __cpuid(function);
            let leaf = self.leaf(function);
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (host.eax, host.ebx, host.ecx, host.edx);
        }
        let extended = self.leaf(0x8000_0000);
        extended.eax = extended.eax.max(0x8000_0004);
    }

    fn set_timing(&mut self, tsc_khz: Option<u32>) {
        let invariant = self
            .find(0x8000_0007)
            .is_some_and(|leaf| leaf.edx & LEAF80000007_EDX_INVARIANT_TSC != 0);
        let Some(tsc_khz) = tsc_khz.filter(|_| invariant) else {
            return;
        };
        if let Some(signature) = self.find(KVM_CPUID_SIGNATURE) {
            signature.eax = signature.eax.max(HYPERVISOR_TIMING);
            let timing = self.leaf(HYPERVISOR_TIMING);
            timing.eax = tsc_khz;
            timing.ebx = KVM_APIC_BUS_KHZ;
        }
    }

    fn put_hyperv_first(&mut self, vcpus: u32) {
        for leaf in &mut self.leaves {
            if (KVM_CPUID_SIGNATURE..KVM_CPUID_SIGNATURE + MOVED).contains(&leaf.function) {
                leaf.function += MOVED;
            }
        }
        self.leaf(KVM_CPUID_SIGNATURE + MOVED).eax += MOVED;
        self.leaves.extend(hyperv::leaves(vcpus));
    }

    /// Leaf 0xb exists on every processor, because KVM provides an x2APIC on all. Leaf 0x1f is added if there are dies
    /// to describe, or if the processor has it.
    fn set_topology_leaves(&mut self) {
        let topology = self.topology;
        let intel = self.is_intel();
        let leaf0 = self.leaf(0);
        leaf0.eax = leaf0.eax.max(0xb);
        let with_dies = intel && (topology.dies_per_package > 1 || leaf0.eax >= 0x1f);
        if with_dies {
            leaf0.eax = leaf0.eax.max(0x1f);
        }
        self.leaves
            .retain(|leaf| !matches!(leaf.function, 0xb | 0x1f));
        let package = (topology.package_shift(), topology.threads_per_package());
        let thread = (topology.core_shift(), topology.threads_per_core);
        let die = (topology.die_shift(), topology.threads_per_die());
        self.push_levels(0xb, &[(LEVEL_THREAD, thread), (LEVEL_CORE, package)]);
        if with_dies {
            self.push_levels(
                0x1f,
                &[
                    (LEVEL_THREAD, thread),
                    (LEVEL_CORE, die),
                    (LEVEL_DIE, package),
                ],
            );
        }
    }

    /// One sub-leaf per level (type, (shift to the next level, vCPUs in it)), then one that ends the list.
    fn push_levels(&mut self, function: u32, levels: &[(u32, (u32, u32))]) {
        let end = (0, (0, 0));
        for (index, (kind, (shift, vcpus))) in
            levels.iter().chain(std::iter::once(&end)).enumerate()
        {
            let index = index as u32;
            self.leaves.push(kvm_cpuid_entry2 {
                function,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: *shift,
                ebx: *vcpus,
                ecx: kind << 8 | index,
                ..Default::default()
            });
        }
    }

    fn is_intel(&mut self) -> bool {
        let leaf = self.leaf(0);
        [leaf.ebx, leaf.edx, leaf.ecx]
            .map(u32::to_le_bytes)
            .concat()
            == b"GenuineIntel"
    }
}

fn patch_features(leaf: &mut kvm_cpuid_entry2, options: &CpuidOptions) {
    let threads = options.topology.threads_per_package();
    match (leaf.function, leaf.index) {
        (1, _) => {
            leaf.ecx |= LEAF1_ECX_TSC_DEADLINE | LEAF1_ECX_HYPERVISOR;
            leaf.edx |= LEAF1_EDX_MTRR;
            set_bits(&mut leaf.edx, LEAF1_EDX_HTT, threads > 1);
            if !options.nested {
                leaf.ecx &= !LEAF1_ECX_VMX;
            }
            // Addressable ids in the package, 8 bits: a power of two, or 255 for more.
            let ids = (1u32 << options.topology.package_shift()).min(0xff);
            leaf.ebx = leaf.ebx & !0x00ff_0000 | ids << 16;
        }
        (KVM_CPUID_FEATURES, _) => leaf.eax |= KVM_FEATURE_MSI_EXT_DEST_ID,
        (0x8000_0001, _) if !options.nested => leaf.ecx &= !LEAF80000001_ECX_SVM,
        (0x8000_000a, _) if !options.nested => clear(leaf),
        (0x8000_0008, _) => {
            // Bits 16–23 are the width below a second translation; zero means the same width.
            leaf.eax = leaf.eax & 0xff00_ff00 | u32::from(options.phys_bits);
        }
        _ => {}
    }
}

fn hide_amx(leaf: &mut kvm_cpuid_entry2) {
    match (leaf.function, leaf.index) {
        (7, 0) => leaf.edx &= !LEAF7_EDX_AMX,
        (7, 1) => {
            leaf.eax &= !LEAF7_1_EAX_AMX;
            leaf.edx &= !LEAF7_1_EDX_AMX;
        }
        (0xd, 0) => leaf.eax &= !LEAFD_EAX_XTILE,
        (0xd, index) if XTILE_COMPONENTS.contains(&index) => clear(leaf),
        (0x1d | 0x1e, _) => clear(leaf),
        _ => {}
    }
}

/// Leaf 4 and its AMD counterpart describe which processors share a cache. Levels 1 and 2 belong to a core and level 3
/// to a die, but never to more processors than share it on the host. Otherwise the guest's scheduler would assume
/// sharing that does not exist.
fn patch_caches(leaf: &mut kvm_cpuid_entry2, topology: &Topology) {
    if !matches!(leaf.function, 4 | 0x8000_001d) || leaf.eax & 0x1f == 0 {
        return;
    }
    let level = (leaf.eax >> 5) & 7;
    let shared_by = if level < 3 {
        1 << topology.core_shift()
    } else {
        1 << topology.die_shift()
    };
    // Ids that share a cache are a power of two in the guest. AMD's hosts may have any number, such as 12.
    let host_shared_by = 1 << ((leaf.eax >> 14 & 0xfff) + 1).ilog2();
    let sharing_ids: u32 = (host_shared_by.min(shared_by) - 1).min(0xfff);
    leaf.eax = leaf.eax & !(0xfff << 14) | sharing_ids << 14;
    if leaf.function == 4 {
        let cores: u32 = 1 << (topology.package_shift() - topology.core_shift());
        leaf.eax = leaf.eax & !(0x3f << 26) | (cores - 1).min(0x3f) << 26;
    }
}

fn patch_amd_topology(leaf: &mut kvm_cpuid_entry2, topology: &Topology) {
    let threads = topology.threads_per_package();
    match leaf.function {
        0x8000_0001 if leaf.ecx & LEAF80000001_ECX_TOPOEXT != 0 => {
            set_bits(&mut leaf.ecx, LEAF80000001_ECX_CMP_LEGACY, threads > 1);
        }
        // Threads in the package minus one, and the number of APIC id bits for them. Reserved on Intel, where the
        // register is zero.
        0x8000_0008 if leaf.ecx != 0 => {
            leaf.ecx =
                leaf.ecx & !0xf0ff | (threads - 1).min(0xff) | topology.package_shift() << 12;
        }
        _ => {}
    }
}

/// Leaf 0x8000_001e: extended APIC id, core, node.
fn patch_amd_apic(leaf: &mut kvm_cpuid_entry2, topology: &Topology, apic_id: u32) {
    let in_package = apic_id & ((1 << topology.package_shift()) - 1);
    let package = apic_id >> topology.package_shift();
    let die = in_package >> topology.die_shift();
    let core = in_package >> topology.core_shift();
    let node = package * topology.dies_per_package + die;
    leaf.eax = apic_id;
    leaf.ebx = (core & 0xff) | (topology.threads_per_core - 1).min(0xff) << 8;
    leaf.ecx = (node & 0xff) | (topology.dies_per_package - 1).min(7) << 8;
    leaf.edx = 0;
}

fn set_bits(register: &mut u32, bits: u32, on: bool) {
    *register = if on {
        *register | bits
    } else {
        *register & !bits
    };
}

fn clear(leaf: &mut kvm_cpuid_entry2) {
    (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn leaf(
        function: u32,
        index: u32,
        registers: [u32; 4],
    ) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn vendor(name: &[u8; 12], max: u32) -> kvm_cpuid_entry2 {
        let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
        leaf(0, 0, [max, word(0), word(8), word(4)])
    }

    fn options(shape: [u32; 4]) -> CpuidOptions {
        let [threads_per_core, cores_per_die, dies_per_package, packages] = shape;
        CpuidOptions {
            topology: Topology {
                threads_per_core,
                cores_per_die,
                dies_per_package,
                packages,
            },
            phys_bits: 40,
            nested: true,
            amx: false,
            hyperv_vcpus: None,
            tsc_khz: Some(2_000_000),
        }
    }

    fn get(cpuid: &CpuId, function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
        cpuid
            .as_slice()
            .iter()
            .find(|leaf| leaf.function == function && leaf.index == index)
            .copied()
    }

    fn intel() -> Vec<kvm_cpuid_entry2> {
        vec![
            vendor(b"GenuineIntel", 0x1f),
            leaf(1, 0, [0x306c3, 0x0010_0800, LEAF1_ECX_VMX, LEAF1_EDX_HTT]),
            leaf(4, 0, [0x1c00_4121, 0, 0, 0]),
            leaf(4, 3, [0x1c03_c163, 0, 0, 0]),
            leaf(4, 4, [0, 0, 0, 0]),
            leaf(7, 0, [0, 0, 0, LEAF7_EDX_AMX | 1]),
            leaf(0xb, 0, [0; 4]),
            leaf(0xd, 17, [8192, 0, 2, 0]),
            leaf(0x4000_0000, 0, [0x4000_0001, 0, 0, 0]),
            leaf(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
            leaf(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
            leaf(0x8000_0007, 0, [0, 0, 0, 1 << 8]),
            leaf(0x8000_0008, 0, [0x002e_3934, 0, 0, 0]),
        ]
    }

    #[test]
    fn cpuid_levels_describe_threads_cores_and_packages() {
        let options = options([2, 3, 1, 2]);
        let cpuid = GuestCpuid::new(&intel(), &options)
            .of_vcpu(options.topology.apic_id(8))
            .unwrap();
        let smt = get(&cpuid, 0xb, 0).unwrap();
        assert_eq!((smt.eax, smt.ebx, smt.ecx, smt.edx), (1, 2, 0x100, 10));
        let core = get(&cpuid, 0xb, 1).unwrap();
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 6, 0x201, 10));
        let end = get(&cpuid, 0xb, 2).unwrap();
        assert_eq!((end.eax, end.ebx, end.ecx), (0, 0, 2));
        let die = get(&cpuid, 0x1f, 2).unwrap();
        assert_eq!((die.eax, die.ebx, die.ecx), (3, 6, 0x502));
    }

    #[test]
    fn cpuid_leaf1_counts_ids_and_shows_the_hypervisor() {
        let cpuid = GuestCpuid::new(&intel(), &options([2, 3, 1, 2]))
            .of_vcpu(9)
            .unwrap();
        let leaf1 = get(&cpuid, 1, 0).unwrap();
        assert_eq!(leaf1.ebx, 9 << 24 | 8 << 16 | 0x0800);
        assert_ne!(leaf1.ecx & LEAF1_ECX_HYPERVISOR, 0);
        assert_ne!(leaf1.ecx & LEAF1_ECX_TSC_DEADLINE, 0);
        assert_ne!(leaf1.ecx & LEAF1_ECX_VMX, 0);
        assert_ne!(leaf1.edx & LEAF1_EDX_HTT, 0);
    }

    #[test]
    fn cpuid_single_vcpu_has_no_siblings() {
        let cpuid = GuestCpuid::new(&intel(), &options([1, 1, 1, 1]))
            .of_vcpu(0)
            .unwrap();
        assert_eq!(get(&cpuid, 1, 0).unwrap().edx & LEAF1_EDX_HTT, 0);
        assert_eq!(get(&cpuid, 4, 3).unwrap().eax >> 14, 0);
        assert_eq!(get(&cpuid, 0xb, 1).unwrap().ebx, 1);
    }

    #[test]
    fn cpuid_caches_are_shared_by_core_and_die() {
        let cpuid = GuestCpuid::new(&intel(), &options([2, 4, 2, 1]))
            .of_vcpu(0)
            .unwrap();
        let (l1, l3) = (get(&cpuid, 4, 0).unwrap(), get(&cpuid, 4, 3).unwrap());
        assert_eq!((l1.eax >> 14) & 0xfff, 1);
        assert_eq!((l3.eax >> 14) & 0xfff, 7);
        assert_eq!(l1.eax >> 26, 7);
        assert_eq!(l1.eax & 0x3fff, 0x1c00_4121 & 0x3fff);
        assert_eq!(get(&cpuid, 4, 4).unwrap().eax, 0);
    }

    #[test]
    fn cpuid_caches_are_never_shared_by_more_than_on_the_host() {
        let mut of_one_cpu = intel();
        of_one_cpu.retain(|leaf| leaf.function != 4);
        // Levels 1 to 3, each with a single processor of the host.
        let levels = [(0, 0x1c00_0121), (2, 0x1c00_0143), (3, 0x1c00_0163)];
        of_one_cpu.extend(levels.map(|(index, eax)| leaf(4, index, [eax, 0, 0, 0])));
        for topology in [[1, 3, 1, 2], [2, 4, 1, 1]] {
            let cpuid = GuestCpuid::new(&of_one_cpu, &options(topology))
                .of_vcpu(0)
                .unwrap();
            for (index, _) in levels {
                let eax = get(&cpuid, 4, index).unwrap().eax;
                assert_eq!((eax >> 14) & 0xfff, 0, "{topology:?}, cache {index}");
            }
        }
    }

    #[test]
    fn cpuid_cache_that_twelve_share_on_the_host_is_not_shared_by_sixteen() {
        let mut supported = intel();
        supported.push(leaf(0x8000_001d, 3, [11 << 14 | 0x163, 0, 0, 0]));
        for (cores, shared_by) in [(16, 8), (8, 8), (3, 4)] {
            let cpuid = GuestCpuid::new(&supported, &options([1, cores, 1, 1]))
                .of_vcpu(0)
                .unwrap();
            let eax = get(&cpuid, 0x8000_001d, 3).unwrap().eax;
            assert_eq!((eax >> 14) & 0xfff, shared_by - 1, "{cores} cores");
        }
    }

    #[test]
    fn cpuid_limits_and_hypervisor_leaves_are_ours() {
        let cpuid = GuestCpuid::new(&intel(), &options([1, 1, 1, 1]))
            .of_vcpu(0)
            .unwrap();
        assert_eq!(get(&cpuid, 0x8000_0008, 0).unwrap().eax, 0x3928);
        assert_eq!(get(&cpuid, 0x4000_0001, 0).unwrap().eax, 0x0100_fefb);
        let timing = get(&cpuid, HYPERVISOR_TIMING, 0).unwrap();
        assert_eq!((timing.eax, timing.ebx), (2_000_000, 1_000_000));
        assert_eq!(get(&cpuid, 0x4000_0000, 0).unwrap().eax, HYPERVISOR_TIMING);
        assert_eq!(get(&cpuid, 7, 0).unwrap().edx, 1);
        assert_eq!(get(&cpuid, 0xd, 17).unwrap().eax, 0);
        assert!(get(&cpuid, 0x8000_0004, 0).is_some());
    }

    #[test]
    fn cpuid_amx_stays_if_it_was_asked_for() {
        let mut supported = intel();
        supported.push(leaf(7, 1, [LEAF7_1_EAX_AMX | 1, 0, 0, LEAF7_1_EDX_AMX]));
        let of = |amx| {
            let options = CpuidOptions {
                amx,
                ..options([1, 1, 1, 1])
            };
            let cpuid = GuestCpuid::new(&supported, &options).of_vcpu(0).unwrap();
            [(7, 0), (7, 1), (0xd, 17)].map(|(function, index)| {
                let leaf = get(&cpuid, function, index).unwrap();
                (leaf.eax, leaf.edx)
            })
        };
        assert_eq!(of(false), [(0, 1), (1, 0), (0, 0)]);
        assert_eq!(
            of(true),
            [
                (0, LEAF7_EDX_AMX | 1),
                (LEAF7_1_EAX_AMX | 1, LEAF7_1_EDX_AMX),
                (8192, 0)
            ]
        );
    }

    #[test]
    fn cpuid_hyperv_comes_first_and_kvm_behind_it() {
        let options = CpuidOptions {
            hyperv_vcpus: Some(4),
            ..options([1, 1, 1, 1])
        };
        let cpuid = GuestCpuid::new(&intel(), &options).of_vcpu(0).unwrap();
        let signature = get(&cpuid, 0x4000_0000, 0).unwrap();
        assert_eq!(signature.ebx.to_le_bytes(), *b"Micr");
        assert_eq!(get(&cpuid, 0x4000_0005, 0).unwrap().eax, 4);
        assert_eq!(get(&cpuid, 0x4000_0100, 0).unwrap().eax, 0x4000_0110);
        assert_eq!(get(&cpuid, 0x4000_0101, 0).unwrap().eax, 0x0100_fefb);
        assert_eq!(get(&cpuid, 0x4000_0110, 0).unwrap().eax, 2_000_000);
        let functions: Vec<_> = cpuid.as_slice().iter().map(|it| it.function).collect();
        let twice = |function: &u32| functions.iter().filter(|it| *it == function).count() > 1;
        let hypervisor = 0x4000_0000..0x4000_0200;
        assert!(
            !functions
                .iter()
                .any(|it| hypervisor.contains(it) && twice(it))
        );
    }

    #[test]
    fn cpuid_timing_is_left_out_when_the_counter_is_not_invariant() {
        let mut supported = intel();
        supported.retain(|leaf| leaf.function != 0x8000_0007);
        let cpuid = GuestCpuid::new(&supported, &options([1, 1, 1, 1]))
            .of_vcpu(0)
            .unwrap();
        assert!(get(&cpuid, HYPERVISOR_TIMING, 0).is_none());
    }

    #[test]
    fn cpuid_nested_off_hides_vmx_and_svm() {
        let mut supported = intel();
        supported.push(leaf(0x8000_0001, 0, [0, 0, LEAF80000001_ECX_SVM | 1, 0]));
        supported.push(leaf(0x8000_000a, 0, [1, 8, 0, 0xff]));
        let options = CpuidOptions {
            nested: false,
            ..options([1, 1, 1, 1])
        };
        let cpuid = GuestCpuid::new(&supported, &options).of_vcpu(0).unwrap();
        assert_eq!(get(&cpuid, 1, 0).unwrap().ecx & LEAF1_ECX_VMX, 0);
        assert_eq!(get(&cpuid, 0x8000_0001, 0).unwrap().ecx, 1);
        assert_eq!(get(&cpuid, 0x8000_000a, 0).unwrap().edx, 0);
    }

    #[test]
    fn cpuid_amd_names_core_node_and_sizes() {
        let supported = vec![
            vendor(b"AuthenticAMD", 0x10),
            leaf(1, 0, [0x00a2_0f10, 0x0800, 0, 0]),
            leaf(0x8000_0000, 0, [0x8000_001f, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0, 0, LEAF80000001_ECX_TOPOEXT, 0]),
            leaf(0x8000_0008, 0, [0x3030, 0, 0x701f, 0]),
            leaf(0x8000_001d, 3, [0x0003_c163, 0, 0, 0]),
            leaf(0x8000_001e, 0, [0; 4]),
        ];
        let options = options([2, 4, 2, 2]);
        // Package 1, die 1, core 2, thread 1.
        let apic_id = options.topology.apic_id(16 + 8 + 4 + 1);
        assert_eq!(apic_id, 0b11101);
        let cpuid = GuestCpuid::new(&supported, &options)
            .of_vcpu(apic_id)
            .unwrap();
        let ext = get(&cpuid, 0x8000_001e, 0).unwrap();
        assert_eq!(ext.eax, apic_id);
        assert_eq!(ext.ebx, 1 << 8 | 0b110);
        assert_eq!(ext.ecx, 1 << 8 | 3);
        assert_eq!(get(&cpuid, 0x8000_0008, 0).unwrap().ecx, 4 << 12 | 15);
        assert_eq!((get(&cpuid, 0x8000_001d, 3).unwrap().eax >> 14) & 0xfff, 7);
        assert!(get(&cpuid, 0x1f, 0).is_none());
        assert_eq!(get(&cpuid, 0xb, 1).unwrap().edx, apic_id);
    }
}
