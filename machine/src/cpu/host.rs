//! Checks whether this host can continue saved vCPUs, before RAM gets its content.
//!
//! KVM accepts nearly every CPUID, and a guest that uses a feature the processor lacks crashes later. Leaf numbers and
//! bits are explained in `cpuid.rs`.

use ::state::{Part, StateError, parts};
use hypervisor::bindings::kvm_cpuid_entry2;
use hypervisor::{Kvm, VcpuState};

use super::state::VcpusState;
use super::vcpus::Vcpus;

const PART: Part = parts::VCPUS;

/// KVM ignores frequency differences below this (`tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;
/// Maximum number of differences listed in one error. A host of another vendor has hundreds.
const LISTED_MAX: usize = 16;

const MSR_ARCH_CAPABILITIES: u32 = 0x10a;

#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

impl Register {
    fn name(self) -> &'static str {
        self.into()
    }

    fn of(self, leaf: &kvm_cpuid_entry2) -> u32 {
        match self {
            Eax => leaf.eax,
            Ebx => leaf.ebx,
            Ecx => leaf.ecx,
            Edx => leaf.edx,
        }
    }
}

/// Registers in which each bit is a feature: function, index and register. Other hosts may have more features.
const FEATURES: &[(u32, u32, Register)] = &[
    (1, 0, Ecx),
    (1, 0, Edx),
    (6, 0, Eax),
    (7, 0, Ebx),
    (7, 0, Ecx),
    (7, 0, Edx),
    (7, 1, Eax),
    (7, 1, Ebx),
    (7, 1, Ecx),
    (7, 1, Edx),
    (7, 2, Edx),
    (0xd, 0, Eax),
    (0xd, 0, Edx),
    (0xd, 1, Eax),
    (0xd, 1, Ecx),
    (0xd, 1, Edx),
    (0x1e, 1, Eax),
    (0x4000_0001, 0, Eax),
    (0x4000_0003, 0, Eax),
    (0x4000_0003, 0, Edx),
    (0x4000_0101, 0, Eax),
    (0x8000_0001, 0, Ecx),
    (0x8000_0001, 0, Edx),
    (0x8000_0007, 0, Edx),
    (0x8000_0008, 0, Ebx),
    (0x8000_000a, 0, Edx),
    (0x8000_0021, 0, Eax),
];

/// Bits that KVM changes with the guest's registers: OSXSAVE and MONITOR; APIC; OSPKE.
const CHANGING: &[(u32, u32, Register, u32)] = &[
    (1, 0, Ecx, 1 << 27 | 1 << 3),
    (1, 0, Edx, 1 << 9),
    (7, 0, Ecx, 1 << 4),
];

/// AMX-FP16 and AMX-COMPLEX. Version 0.1.0 did not hide them from guests without tiles, which have no use for them.
const WITHOUT_TILES: &[(u32, u32, Register, u32)] = &[(7, 1, Eax, 1 << 21), (7, 1, Edx, 1 << 8)];

/// The features that this host provides to the vCPUs of one configuration.
#[derive(Debug, Clone)]
pub(crate) struct HostCpu {
    cpuid: Vec<kvm_cpuid_entry2>,
    /// Whether the configuration gives AMX to the guest.
    has_amx: bool,
    msr_indices: Vec<u32>,
    arch_capabilities: Option<u64>,
    tsc_khz: Option<u32>,
    scales_tsc: bool,
}

impl HostCpu {
    /// Finds out what this host provides to `vcpus`, none of which has run or been restored.
    ///
    /// # Errors
    /// KVM fails.
    pub(crate) fn examine(kvm: &Kvm, vcpus: &Vcpus) -> Result<Self, StateError> {
        let cpuid = vcpus.provided_cpuid();
        let (cpuid, tsc_khz) = cpuid.map_err(|error| StateError::host(PART, error))?;
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
            has_amx: vcpus.config().features.amx,
            msr_indices: vcpus.msr_indices.clone(),
            arch_capabilities: kvm.feature_msr(MSR_ARCH_CAPABILITIES),
            tsc_khz,
            scales_tsc: kvm.supports_tsc_scaling(),
        })
    }

    /// Checks whether this host can continue the vCPUs of `state`.
    ///
    /// # Errors
    /// The list of differences.
    pub(crate) fn check(&self, state: &VcpusState) -> Result<(), StateError> {
        let mut all = Vec::new();
        for saved in &state.vcpus {
            for difference in self.differences(&saved.state.read::<VcpuState>()?) {
                if !all.contains(&difference) {
                    all.push(difference);
                }
            }
        }
        let count = all.len();
        all.truncate(LISTED_MAX);
        let mut listed = all.join("; ");
        match count {
            0 => return Ok(()),
            1..=LISTED_MAX => {}
            _ => listed += &format!("; and {} more", count - LISTED_MAX),
        }
        let reason = format!("cannot run on the processor of this host: {listed}");
        Err(StateError::invalid(PART, "vcpus", reason))
    }

    /// Features that `saved` has and this host lacks.
    fn differences(&self, saved: &VcpuState) -> Vec<String> {
        let mut found = Vec::new();
        for leaf in saved.cpuid.iter().copied().map(kvm_cpuid_entry2::from) {
            self.compare_leaf(&leaf, &mut found);
        }
        for msr in &saved.msrs {
            let index = msr.index;
            if msr.data != 0 && !self.msr_indices.contains(&index) {
                found.push(format!("MSR {index:#x}: not available"));
            }
            if index == MSR_ARCH_CAPABILITIES {
                let missing = msr.data & !self.arch_capabilities.unwrap_or(0);
                if missing != 0 {
                    found.push(format!("MSR {index:#x}: bits {missing:#x} are missing"));
                }
            }
        }
        if let (Some(saved), Some(own)) = (saved.tsc_khz, self.tsc_khz) {
            let close =
                u64::from(saved.abs_diff(own)) * 1_000_000 <= u64::from(own) * TSC_TOLERANCE_PPM;
            if !close && !self.scales_tsc {
                found.push(format!(
                    "TSC frequency: {saved} kHz; this host has {own} kHz and cannot scale it"
                ));
            }
        }
        found
    }

    fn compare_leaf(&self, saved: &kvm_cpuid_entry2, found: &mut Vec<String>) {
        let (function, index) = (saved.function, saved.index);
        let own = self.leaf(function, index);
        let own = own.copied().unwrap_or_default();
        let mut differs = |register: Register, text: String| {
            let name = register.name();
            found.push(format!("CPUID {function:#x}.{index} {name}: {text}"));
        };
        for (_, _, register) in FEATURES
            .iter()
            .filter(|it| (it.0, it.1) == (function, index))
        {
            let without_tiles = if self.has_amx { &[] } else { WITHOUT_TILES };
            let changing = CHANGING
                .iter()
                .chain(without_tiles)
                .find(|it| (it.0, it.1, it.2) == (function, index, *register));
            let changing = changing.map_or(0, |it| it.3);
            let missing = register.of(saved) & !register.of(&own) & !changing;
            if missing != 0 {
                differs(*register, format!("bits {missing:#x} are missing"));
            }
        }
        // The vendor, and the layout of the XSAVE area: size and offset of each part.
        let same: &[Register] = match (function, index) {
            (0, _) => &[Ebx, Ecx, Edx],
            (0xd, 2..) if saved.eax != 0 => &[Eax, Ebx],
            // The shape of AMX tiles.
            (0x1d, _) | (0x1e, 0) => &[Eax, Ebx, Ecx],
            _ => &[],
        };
        for register in same {
            let (saved, own) = (register.of(saved), register.of(&own));
            if saved != own {
                differs(*register, format!("{saved:#x}; this host has {own:#x}"));
            }
        }
        if function == 0x8000_0008 {
            // Bits of physical and of virtual addresses.
            for shift in [0, 8] {
                let [saved, own] = [saved.eax, own.eax].map(|eax| eax >> shift & 0xff);
                if saved > own {
                    differs(Eax, format!("{saved} address bits; this host has {own}"));
                }
            }
        }
    }

    fn leaf(&self, function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
        self.cpuid
            .iter()
            .find(|leaf| (leaf.function, leaf.index) == (function, index))
    }
}

#[cfg(test)]
mod tests {
    use hypervisor::{CpuidState, MsrState};

    use super::super::cpuid::tests::leaf;
    use super::*;

    fn host() -> HostCpu {
        HostCpu {
            cpuid: vec![
                leaf(0, 0, [0x1f, 1, 2, 3]),
                leaf(1, 0, [0, 0, 0b1100, 1]),
                leaf(7, 0, [0, 0b11, 0, 0]),
                leaf(0xd, 2, [256, 576, 0, 0]),
                leaf(0x8000_0008, 0, [48 << 8 | 40, 0, 0, 0]),
            ],
            has_amx: false,
            msr_indices: vec![0x10, MSR_ARCH_CAPABILITIES],
            arch_capabilities: Some(0b10),
            tsc_khz: Some(2_000_000),
            scales_tsc: false,
        }
    }

    fn vcpu(cpuid: &[kvm_cpuid_entry2], msrs: &[(u32, u64)], tsc_khz: Option<u32>) -> VcpuState {
        let msrs = msrs.iter().map(|&(index, data)| MsrState { index, data });
        VcpuState {
            cpuid: cpuid.iter().copied().map(CpuidState::from).collect(),
            tsc_khz,
            mp_state: 0,
            regs: Default::default(),
            sregs: Default::default(),
            xsave: state::Bytes(Vec::new()),
            xcrs: Vec::new(),
            debug_regs: Default::default(),
            lapic: state::Bytes(Vec::new()),
            msrs: msrs.collect(),
            events: Default::default(),
            nested: None,
        }
    }

    #[test]
    fn host_with_the_same_features_or_more_continues_vcpus() {
        let host = host();
        let msrs = [(0x10, 7), (MSR_ARCH_CAPABILITIES, 0b10), (0x99, 0)];
        let same = vcpu(&host.cpuid, &msrs, Some(2_000_400));
        assert_eq!(host.differences(&same), Vec::<String>::new());
        let less = [
            leaf(1, 0, [0x806f8, 0, 0b0100 | 1 << 27, 0]),
            leaf(7, 0, [0, 1, 1 << 4, 0]),
            leaf(0xd, 9, [0; 4]),
            leaf(0x8000_0008, 0, [48 << 8 | 36, 0, 0, 0]),
        ];
        let less = vcpu(&less, &[], None);
        assert_eq!(host.differences(&less), Vec::<String>::new());
        let scaled = vcpu(&[], &[], Some(3_000_000));
        let scaling = HostCpu {
            scales_tsc: true,
            ..host
        };
        assert_eq!(scaling.differences(&scaled), Vec::<String>::new());
    }

    #[test]
    fn features_of_amx_matter_only_to_guests_that_have_tiles() {
        let saved = vcpu(&[leaf(7, 1, [1 << 21, 0, 0, 1 << 8])], &[], None);
        let mut host = host();
        assert_eq!(host.differences(&saved), Vec::<String>::new());
        host.has_amx = true;
        assert_eq!(
            host.differences(&saved),
            [
                "CPUID 0x7.1 eax: bits 0x200000 are missing",
                "CPUID 0x7.1 edx: bits 0x100 are missing",
            ]
        );
    }

    #[test]
    fn everything_that_a_host_lacks_is_named() {
        let more = [
            leaf(0, 0, [0x1f, 1, 9, 3]),
            leaf(7, 0, [0, 0b10111, 0, 0]),
            leaf(7, 1, [0b1000, 0, 0, 0]),
            leaf(0xd, 2, [256, 640, 0, 0]),
            leaf(0xd, 5, [64, 1088, 0, 0]),
            leaf(0x8000_0008, 0, [57 << 8 | 52, 0, 0, 0]),
        ];
        let msrs = [(0x99, 1), (MSR_ARCH_CAPABILITIES, 0b111)];
        let saved = vcpu(&more, &msrs, Some(2_100_000));
        assert_eq!(
            host().differences(&saved),
            [
                "CPUID 0x0.0 ecx: 0x9; this host has 0x2",
                "CPUID 0x7.0 ebx: bits 0x14 are missing",
                "CPUID 0x7.1 eax: bits 0x8 are missing",
                "CPUID 0xd.2 ebx: 0x280; this host has 0x240",
                "CPUID 0xd.5 eax: 0x40; this host has 0x0",
                "CPUID 0xd.5 ebx: 0x440; this host has 0x0",
                "CPUID 0x80000008.0 eax: 52 address bits; this host has 40",
                "CPUID 0x80000008.0 eax: 57 address bits; this host has 48",
                "MSR 0x99: not available",
                "MSR 0x10a: bits 0x5 are missing",
                "TSC frequency: 2100000 kHz; this host has 2000000 kHz and cannot scale it",
            ]
        );
    }
}
