//! Assembles the published data: one [`Snapshot`] from all parts of the agent.

use std::sync::Arc;

use super::clock::{Clock, unix_ms};
use super::host_watch::HostWatch;
use super::membership::Membership;
use super::promises::Promises;
use super::rounds::VmRounds;
use super::standby::Standbys;
use super::status::{HostStatus, MoveStatus, PoolStatus, PublishedState, VmStatus};
use super::vms::Vm;
use super::{Published, Snapshot, Status};
use crate::agent_config::AgentConfig;
use crate::cluster::MoveRecord;

/// The parts that a snapshot is made of.
pub(super) struct Parts<'a> {
    pub(super) config: &'a AgentConfig,
    pub(super) reload_ok: bool,
    pub(super) host: &'a HostWatch,
    pub(super) rounds: &'a VmRounds,
    pub(super) promises: &'a Promises,
    pub(super) standby: &'a Standbys,
    pub(super) membership: Option<&'a Membership>,
    pub(super) moves: &'a [MoveRecord],
}

/// Publishes snapshots.
#[derive(Debug)]
pub(super) struct Publisher {
    published: Arc<Published>,
    clock: Clock,
    started_unix_ms: u64,
}

impl Publisher {
    pub(super) fn new(published: Arc<Published>, clock: Clock) -> Self {
        Self {
            published,
            clock,
            started_unix_ms: unix_ms(),
        }
    }

    pub(super) fn publish(&self, parts: &Parts<'_>) {
        self.published.set(Snapshot {
            status: self.status(parts),
            plan: Arc::clone(parts.rounds.plan()),
            decisions: parts.rounds.decisions().clone(),
            admissions: parts.promises.counts().clone(),
        });
    }

    fn status(&self, parts: &Parts<'_>) -> Status {
        let now_ms = self.clock.now_ms();
        let store = parts.membership.map(|membership| {
            let waiting = parts.promises.held_for_others();
            membership.status(&parts.config.store, &waiting)
        });
        Status {
            unix_ms: unix_ms(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_unix_ms: self.started_unix_ms,
            dry_run: parts.config.agent.dry_run,
            reload_ok: parts.reload_ok,
            host: host_status(parts, now_ms),
            store,
            vms: parts
                .rounds
                .vms()
                .map(|vm| vm_status(parts, vm, now_ms))
                .collect(),
            reservations: parts.promises.status(parts.config, parts.rounds),
            standby: parts.standby.status(),
            moves: parts.moves.iter().map(move_status).collect(),
        }
    }
}

fn move_status(record: &MoveRecord) -> MoveStatus {
    let why = record.refused.as_ref().unwrap_or(&record.why);
    MoveStatus {
        vm: record.vm.clone(),
        from: record.from.clone(),
        to: record.to.clone(),
        phase: record.phase,
        sent: record.sent,
        why: why.clone(),
    }
}

fn host_status(parts: &Parts<'_>, now_ms: u64) -> HostStatus {
    let plan = parts.rounds.plan();
    let facts = *parts.host.facts();
    let facts_age_ms = now_ms.saturating_sub(facts.at_ms);
    let coverage = plan.host.burst_coverage;
    HostStatus {
        name: parts.host.name().to_owned(),
        state: if facts_age_ms > parts.config.planning.admission.facts_age_max.0 {
            PublishedState::Unknown
        } else {
            plan.host.state.into()
        },
        state_age_ms: now_ms.saturating_sub(parts.rounds.memory().state_since_ms),
        facts,
        facts_age_ms,
        ledger: plan.ledger,
        pool: PoolStatus {
            total: facts.pool.total,
            free: facts.pool.free,
            held: parts.rounds.pool_held(),
            promised: parts.promises.pool_promised(parts.config, parts.rounds),
        },
        free: plan.host.free.0,
        shortage: plan.host.shortage,
        wanted: plan.host.wanted,
        pending: plan.host.pending,
        owed: plan.host.owed,
        burst_coverage: coverage.is_finite().then_some(coverage),
        last_resort: plan.host.last_resort,
        trigger: parts.host.has_trigger(),
        grants_waiting: parts.rounds.grants_waiting(),
    }
}

fn vm_status(parts: &Parts<'_>, vm: &Vm, now_ms: u64) -> VmStatus {
    let name = vm.id.as_str();
    let policy_name = parts.config.policy_name(name);
    let mut status = VmStatus {
        vm: name.to_owned(),
        socket: vm.socket.display().to_string(),
        epoch: vm.epoch,
        up: vm.missed == 0 && vm.reading.is_some(),
        failure: vm.failure.map(str::to_owned),
        level: vm.level(),
        interlock: vm.interlock().map(|interlock| interlock.to_string()),
        policy: policy_name.to_owned(),
        missed: vm.missed,
        target: vm.target(),
        trusted: true,
        net_per_s: vm.rates.net_per_s,
        repopulated_per_s: vm.rates.repopulated_per_s,
        ..VmStatus::default()
    };
    fill_from_reading(parts.config, vm, now_ms, &mut status);
    if vm.is_huge() {
        status.interlock = Some("huge-pages".to_owned());
        status.explanation = format!(
            "{name}: left alone, its memory comes out of the host's pool of huge pages, of which it holds {}",
            status.pool_held
        );
    }
    if let Some(memory) = parts.rounds.memory().vm(name) {
        status.suffering = memory.suffering;
    }
    let mut explanations = parts.rounds.plan().explanations.iter();
    if let Some(explanation) = explanations.find(|explanation| explanation.vm == vm.id) {
        status.reason = explanation.reason.name().to_owned();
        status.explanation = explanation.to_string();
        status.stuck = explanation.stuck;
        status.trusted = explanation.trusted;
        status.take_blocked_ms = explanation.take_blocked_ms;
        status.callable = explanation.callable;
    }
    status
}

fn fill_from_reading(config: &AgentConfig, vm: &Vm, now_ms: u64, status: &mut VmStatus) {
    let Some(reading) = &vm.reading else {
        return;
    };
    let policy = config
        .planning
        .vm_policy(&status.policy, reading.configured);
    let sample = &reading.sample;
    status.pid = Some(reading.pid);
    status.class = policy.class;
    status.configured = reading.configured;
    (status.min, status.max) = (policy.min, policy.max);
    status.actual = sample.ballooned;
    status.resident = sample.resident;
    status.pool_held = reading.pool.held;
    status.swapped = sample.swapped;
    status.sample_age_ms = Some(now_ms.saturating_sub(sample.at_ms));
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
