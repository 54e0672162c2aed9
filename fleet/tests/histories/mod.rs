//! VMs, samples and hosts from which tests compose short histories.

use fleet::config::Config;
use fleet::model::*;

pub(crate) const HOST: Bytes = Bytes::gib(32);

pub(crate) fn vm(name: &str, configured: Bytes, class: PriorityClass, sample: VmSample) -> VmFacts {
    VmFacts {
        id: VmId::from(name),
        epoch: 1,
        level: FeatureLevel::L2,
        configured,
        has_balloon: true,
        policy: VmPolicy {
            min: Bytes::gib(1),
            class,
            ..VmPolicy::halves(configured)
        },
        interlock: None,
        in_force: InForce::default(),
        lessons: Lessons::default(),
        sample: Some(sample),
        missed_samples: 0,
    }
}

/// A balloon of the requested size, in a guest whose available memory is all unused.
pub(crate) fn sample(at_ms: u64, ballooned: Bytes, resident: Bytes, available: Bytes) -> VmSample {
    VmSample {
        at_ms,
        balloon_target: ballooned,
        ballooned,
        resident,
        guest: Some(GuestClaims {
            at_ms,
            available,
            free: available,
            ..GuestClaims::default()
        }),
        ..VmSample::default()
    }
}

/// A host with `free` memory above its reserve.
pub(crate) fn inventory(now_ms: u64, free: Bytes, vms: Vec<VmFacts>) -> Inventory {
    Inventory {
        now_ms,
        host: HostFacts {
            at_ms: now_ms,
            total: HOST,
            available: Config::default().reserve(HOST) + free,
            ..HostFacts::default()
        },
        vms,
        promised: Bytes::ZERO,
        wanted: Vec::new(),
    }
}
