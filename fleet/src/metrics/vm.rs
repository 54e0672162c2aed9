//! Metrics of the VMs: one table of metrics that always exist, and one of those that only some interfaces provide.

use std::fmt;

use super::families::{Labels, Out, figures};
use crate::agent::{Status, VmStatus};
use crate::model::Bytes;

type Figure = (&'static str, &'static str, fn(&VmStatus) -> u64);
type OptionalFigure = (&'static str, &'static str, fn(&VmStatus) -> Option<u64>);

const FIGURES: [Figure; 11] = figures! {
    "ch_vm_memory_configured_bytes" "Memory of the VM", |vm| vm.configured.0;
    "ch_vm_memory_min_bytes" "Memory it is never driven below", |vm| vm.min.0;
    "ch_vm_memory_max_bytes" "Memory it never gets more of", |vm| vm.max.0;
    "ch_vm_memory_target_bytes" "Memory it is meant to have", |vm| (vm.configured - vm.target).0;
    "ch_vm_memory_actual_bytes" "Memory it has, as the guest claims", |vm| (vm.configured - vm.actual).0;
    "ch_vm_memory_resident_bytes" "Host memory it occupies", |vm| vm.resident.0;
    "ch_vm_memory_swapped_bytes" "Its memory in the host's swap", |vm| vm.swapped.0;
    "ch_vm_memory_callable_bytes" "Memory it may call in without asking", |vm| vm.callable.0;
    "ch_vm_balloon_target_bytes" "Requested balloon size", |vm| vm.target.0;
    "ch_vm_balloon_actual_bytes" "Balloon as the guest claims it", |vm| vm.actual.0;
    "ch_vm_epoch" "Changes when another machine stands behind the name", |vm| vm.epoch;
};

const STATES: [Figure; 6] = figures! {
    "ch_vm_up" "Whether the last sample was good", |vm| u64::from(vm.up);
    "ch_vm_feature_level" "What its interface tells: 0, 1 or 2", |vm| u64::from(vm.level);
    "ch_vm_stuck" "Whether its balloon does not move", |vm| u64::from(vm.stuck);
    "ch_vm_trust" "Whether its claims are believed", |vm| u64::from(vm.trusted);
    "ch_vm_suffering" "Whether it suffered at the last plan", |vm| u64::from(vm.suffering);
    "ch_vm_reporting_active" "Whether free page reporting is at work", |vm| u64::from(vm.reporting);
};

const GUEST_GAUGES: [OptionalFigure; 2] = figures! {
    "ch_vm_guest_free_bytes" "Memory unused inside, as the guest claims", |vm| bytes(vm.guest_free);
    "ch_vm_guest_available_bytes" "Memory available inside, as the guest claims", |vm| bytes(vm.guest_available);
};

const COUNTERS: [OptionalFigure; 7] = figures! {
    "ch_vm_reclaim_reported_bytes" "Memory reported free", |vm| bytes(vm.reported);
    "ch_vm_reclaim_discarded_bytes" "Memory given back to the host", |vm| bytes(vm.discarded);
    "ch_vm_reclaim_skipped_bytes" "Memory left alone on purpose", |vm| bytes(vm.skipped);
    "ch_vm_reclaim_repopulated_bytes" "Memory populated again", |vm| bytes(vm.repopulated);
    "ch_vm_guest_major_faults" "Page faults that needed I/O", |vm| vm.guest_major_faults;
    "ch_vm_guest_alloc_stalls" "Allocations that waited for reclaim", |vm| vm.guest_stalls;
    "ch_vm_guest_oom_kills" "Processes killed for lack of memory", |vm| vm.guest_oom_kills;
};

fn bytes(bytes: Option<Bytes>) -> Option<u64> {
    bytes.map(|bytes| bytes.0)
}

pub(super) fn write(out: &mut Out<'_>, status: &Status) -> fmt::Result {
    let host = &status.host.name;
    let labels = |vm: &VmStatus| -> Labels { vec![("host", host.clone()), ("vm", vm.vm.clone())] };
    out.gauge(
        "ch_vm_info",
        "What is known of the VM, for joins",
        status.vms.iter().map(|vm| {
            let mut labels = labels(vm);
            labels.push(("class", vm.class.to_string()));
            labels.push(("policy", vm.policy.clone()));
            (labels, 1_u64)
        }),
    )?;
    // The figures of a VM without a sample are unknown, not zero.
    let known = || status.vms.iter().filter(|vm| vm.sample_age_ms.is_some());
    for (name, help, figure) in FIGURES {
        out.gauge(name, help, known().map(|vm| (labels(vm), figure(vm))))?;
    }
    for (name, help, figure) in STATES {
        out.gauge(
            name,
            help,
            status.vms.iter().map(|vm| (labels(vm), figure(vm))),
        )?;
    }
    for (name, help, figure) in GUEST_GAUGES {
        let told = known().filter_map(|vm| Some((labels(vm), figure(vm)?)));
        out.gauge(name, help, told)?;
    }
    for (name, help, figure) in COUNTERS {
        let told = known().filter_map(|vm| Some((labels(vm), figure(vm)?)));
        out.counter(name, help, told)?;
    }
    out.gauge(
        "ch_vm_report_latency_p99_seconds",
        "99 of 100 reports were answered within",
        known().filter_map(|vm| Some((labels(vm), vm.report_p99_us? as f64 / 1e6))),
    )?;
    out.gauge(
        "ch_vm_sample_age_seconds",
        "Age of the last good sample",
        known().filter_map(|vm| Some((labels(vm), vm.sample_age_ms? as f64 / 1e3))),
    )
}
