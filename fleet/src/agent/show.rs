//! Puts together what is shown.

use super::Status;
use super::control::{Agent, unix_ms};
use super::status::{HostStatus, ReservationStatus, VmStatus};
use super::vms::Vm;
use crate::model::Bytes;
use crate::reservations::outstanding_of;

impl Agent {
    pub(super) fn status(&self) -> Status {
        let now_unix_ms = unix_ms();
        Status {
            unix_ms: now_unix_ms,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_unix_ms: self.started_unix_ms,
            dry_run: self.settings.agent.dry_run,
            reload_ok: self.reload_ok,
            host: self.host_status(),
            store: self.store_status(),
            vms: self.vms.iter().map(|vm| self.vm_status(vm)).collect(),
            reservations: self
                .book
                .entries()
                .iter()
                .map(|entry| ReservationStatus {
                    reservation: entry.clone(),
                    outstanding: outstanding_of(
                        entry,
                        now_unix_ms,
                        self.settings.config.admission.reservation,
                        &|name| self.seen(name),
                    ),
                })
                .collect(),
        }
    }

    fn host_status(&self) -> HostStatus {
        let now_ms = self.now_ms();
        let (plan, memory) = (&self.plan, &self.memory);
        let coverage = plan.host.burst_coverage;
        HostStatus {
            name: self.host_name.clone(),
            state: plan.host.state,
            state_age_ms: now_ms.saturating_sub(memory.state_since_ms),
            facts: self.facts,
            facts_age_ms: now_ms.saturating_sub(self.facts.at_ms),
            ledger: plan.ledger,
            free: plan.host.free.0,
            shortage: plan.host.shortage,
            pending: plan.host.pending,
            owed: plan.host.owed,
            burst_coverage: coverage.is_finite().then_some(coverage),
            last_resort: plan.host.last_resort,
            trigger: self.has_trigger(),
            grants_waiting: self.executor.waiting().len(),
        }
    }

    fn vm_status(&self, vm: &Vm) -> VmStatus {
        let name = vm.id.as_str();
        let policy_name = self.settings.policy_name(name);
        let mut status = VmStatus {
            vm: name.to_owned(),
            socket: vm.socket.display().to_string(),
            epoch: vm.epoch,
            up: vm.missed == 0 && vm.reading.is_some(),
            failure: vm.failure.map(str::to_owned),
            level: vm.level(),
            interlock: vm
                .interlock()
                .map(|interlock| format!("{interlock:?}").to_lowercase()),
            policy: policy_name.to_owned(),
            missed: vm.missed,
            target: vm.target(),
            trusted: true,
            net_per_s: vm.rates.net_per_s,
            repopulated_per_s: vm.rates.repopulated_per_s,
            ..VmStatus::default()
        };
        self.fill_from_reading(vm, policy_name, &mut status);
        if let Some(memory) = self.memory.vm(name) {
            status.suffering = memory.suffering;
        }
        let explained = self
            .plan
            .explanations
            .iter()
            .find(|explanation| explanation.vm == vm.id);
        if let Some(explanation) = explained {
            status.reason = explanation.reason.name().to_owned();
            status.explanation = explanation.to_string();
            status.stuck = explanation.stuck;
            status.trusted = explanation.trusted;
            status.take_blocked_ms = explanation.take_blocked_ms;
            status.callable = explanation.callable;
        }
        status
    }

    fn fill_from_reading(&self, vm: &Vm, policy_name: &str, status: &mut VmStatus) {
        let Some(reading) = &vm.reading else {
            return;
        };
        let policy = self
            .settings
            .config
            .vm_policy(policy_name, reading.configured);
        let sample = &reading.sample;
        status.pid = Some(reading.pid);
        status.class = policy.class;
        status.configured = reading.configured;
        (status.min, status.max) = (policy.min, policy.max);
        status.actual = sample.ballooned;
        status.resident = sample.resident;
        status.swapped = sample.swapped;
        status.sample_age_ms = Some(self.now_ms().saturating_sub(sample.at_ms));
        if let Some(guest) = sample.guest {
            status.guest_available = Some(guest.available);
            status.guest_free = Some(guest.free);
            status.guest_stalls = guest.alloc_stalls;
            status.guest_major_faults = guest.major_faults;
            status.guest_oom_kills = guest.oom_kills;
        }
        if let Some(reclaim) = sample.reclaim {
            status.reported = Some(reclaim.reported);
            status.discarded = Some(reclaim.discarded);
            status.skipped = Some(reclaim.skipped);
            status.repopulated = Some(reclaim.repopulated);
            status.report_p99_us = Some(reclaim.report_p99_us);
            status.reporting = reclaim.reporting_active;
        }
    }

    /// Memory of reservations whose VM is not in the books yet.
    pub(super) fn held_unseen(&self) -> Bytes {
        self.book
            .entries()
            .iter()
            .filter(|entry| self.seen(&entry.vm).is_none())
            .map(|entry| entry.configured)
            .sum()
    }
}
