//! Figures of the host, of decisions and of requests.

use std::fmt;

use prometheus_client::encoding::NoLabelSet;
use prometheus_client::metrics::MetricType;
use strum::VariantArray as _;

use super::families::{Labels, Out, figures};
use crate::agent::{PublishedState, Snapshot, Status};
use crate::cluster::MovePhase;
use crate::model::Bytes;
use crate::reservations::ReservationPhase;
use crate::sample::{DURATION_BUCKETS_SECONDS, RequestCounters};
use crate::standby::Phase;

pub(super) fn write(out: &mut Out<'_>, snapshot: &Snapshot) -> fmt::Result {
    let status = &snapshot.status;
    let host = &status.host;
    let own = || -> Labels { vec![("host", host.name.clone())] };
    let with = |name: &'static str, value: &str| -> Labels {
        let mut labels = own();
        labels.push((name, value.to_owned()));
        labels
    };
    let ledger = &host.ledger;
    let figures_of_ledger = figures! {
        "ch_host_memory_usable_bytes" "Memory that may be handed out", ledger.usable;
        "ch_host_memory_available_bytes" "Available memory above the reserve", ledger.available;
        "ch_host_memory_reserved_bytes" "Memory that is never handed out", ledger.reserved;
        "ch_host_memory_promised_bytes" "Memory reserved for VMs that do not run yet", ledger.promised;
        "ch_host_memory_granted_bytes" "Memory given to guests and not used yet", ledger.granted;
        "ch_host_memory_firm_free_bytes" "Memory that can be reserved for another VM", ledger.firm_free;
        "ch_host_memory_callable_liability_bytes" "Memory that the guests may take back without a request", ledger.callable_liability;
        "ch_host_memory_burst_bytes" "Memory that the guests take back at the same time in all but 1 % of cases", ledger.burst;
        "ch_host_memory_configured_bytes" "Memory of all VMs", ledger.configured;
        "ch_host_memory_resident_bytes" "Host memory the VMs occupy", ledger.resident;
    };
    for (name, help, bytes) in figures_of_ledger {
        out.gauge(name, help, [(own(), bytes.0)])?;
    }
    let pool = &host.pool;
    out.gauge(
        "ch_host_huge_pages_bytes",
        "The pool of huge pages: all of it, free, held by VMs, and reserved for VMs that have not taken it yet",
        [
            (with("kind", "total"), pool.total.0),
            (with("kind", "free"), pool.free.0),
            (with("kind", "held"), pool.held.0),
            (with("kind", "promised"), pool.promised.0),
        ],
    )?;
    out.gauge(
        "ch_host_state",
        "1 for the current state of the host",
        PublishedState::VARIANTS.iter().map(|&state| {
            let value = i64::from(state == host.state);
            (with("state", state.name()), value)
        }),
    )?;
    let pressure = host.facts.pressure;
    let seconds = |us: u64| us as f64 / 1e6;
    out.counter(
        "ch_host_pressure_stall_seconds",
        "Time in which tasks waited for memory",
        [
            (with("kind", "some"), seconds(pressure.some_total_us)),
            (with("kind", "full"), seconds(pressure.full_total_us)),
        ],
    )?;
    out.gauge(
        "ch_host_swap_bytes_per_second",
        "Memory that goes to and comes from swap",
        [
            (with("direction", "in"), host.facts.swap_in_per_s.0),
            (with("direction", "out"), host.facts.swap_out_per_s.0),
        ],
    )?;
    out.gauge(
        "ch_burst_coverage_ratio",
        "How often available memory covers the burst",
        host.burst_coverage.map(|coverage| (own(), coverage)),
    )?;
    out.gauge(
        "ch_host_facts_age_seconds",
        "Age of the host's figures",
        [(own(), host.facts_age_ms as f64 / 1e3)],
    )?;
    out.gauge(
        "ch_host_last_resort",
        "Last resort in effect, as a number; 0 for none",
        [(own(), i64::from(host.last_resort))],
    )?;
    out.gauge(
        "ch_config_last_reload_successful",
        "1 if the last reload of the settings succeeded, else 0",
        [(own(), i64::from(status.reload_ok))],
    )?;
    out.gauge(
        "ch_agent_start_time_seconds",
        "When the agent started, since the Unix epoch",
        [(own(), status.started_unix_ms as f64 / 1e3)],
    )?;
    write_standby(out, status, &with)?;
    out.gauge(
        "ch_moves",
        "Moves of VMs from and to this host, by their phase",
        MovePhase::VARIANTS.iter().map(|&phase| {
            let moves = status.moves.iter().filter(|one| one.phase == phase);
            (with("phase", phase.name()), moves.count() as u64)
        }),
    )?;
    write_decisions(out, snapshot, &own)?;
    out.gauge(
        "ch_reservation_bytes",
        "Memory of reservations, by phase",
        ReservationPhase::VARIANTS.iter().map(|&phase| {
            let bytes: Bytes = status
                .reservations
                .iter()
                .filter(|entry| entry.reservation.phase == phase)
                .map(|entry| entry.outstanding)
                .sum();
            (with("phase", phase.name()), bytes.0)
        }),
    )
}

fn write_standby(
    out: &mut Out<'_>,
    status: &Status,
    with: &dyn Fn(&'static str, &str) -> Labels,
) -> fmt::Result {
    let all = &status.standby;
    let usable = |phase: Phase| {
        let usable = all.iter().filter(|vm| vm.fault.is_none());
        usable.filter(|vm| vm.phase == Some(phase)).count()
    };
    let phases = Phase::VARIANTS.iter();
    let counts = phases.map(|&phase| (phase.name(), usable(phase)));
    let unusable = all.iter().filter(|vm| vm.fault.is_some()).count();
    let counts = counts.chain([("unusable", unusable)]);
    out.gauge(
        "ch_standby_vms",
        "VMs in standby, by their phase",
        counts.map(|(phase, count)| (with("phase", phase), count as u64)),
    )?;
    out.gauge(
        "ch_standby_disk_bytes",
        "Disk space of the VMs in standby",
        all.iter().map(|vm| (with("vm", &vm.vm), vm.disk.0)),
    )
}

fn write_decisions(
    out: &mut Out<'_>,
    snapshot: &Snapshot,
    own: &dyn Fn() -> Labels,
) -> fmt::Result {
    let decisions = &snapshot.decisions;
    out.counter(
        "ch_decisions",
        "Actions by what, why and what became of them",
        decisions
            .actions
            .iter()
            .map(|((action, reason, result), count)| {
                let mut labels = own();
                labels.extend([
                    ("action", (*action).to_owned()),
                    ("reason", (*reason).to_owned()),
                    ("result", (*result).to_owned()),
                ]);
                (labels, *count)
            }),
    )?;
    out.counter("ch_plans", "Plans made", [(own(), decisions.plans)])?;
    out.counter(
        "ch_decision_duration_seconds",
        "Time spent planning",
        [(own(), decisions.plan_us as f64 / 1e6)],
    )?;
    out.counter(
        "ch_oscillations",
        "Balloons that turned round within a minute",
        [(own(), decisions.oscillations)],
    )?;
    out.counter(
        "ch_admission",
        "Answers to requests for memory",
        snapshot
            .admissions
            .answers
            .iter()
            .map(|((result, reason), count)| {
                let mut labels = own();
                labels.extend([
                    ("result", (*result).to_owned()),
                    ("reason", (*reason).to_owned()),
                ]);
                (labels, *count)
            }),
    )
}

pub(super) fn write_requests(
    out: &mut Out<'_>,
    host: &str,
    requests: &RequestCounters,
) -> fmt::Result {
    let counts = requests.snapshot();
    if counts.is_empty() {
        return Ok(());
    }
    let mut family = out.encoder.encode_descriptor(
        "ch_api_request_duration_seconds",
        "Requests to VMMs by endpoint and result",
        None,
        MetricType::Histogram,
    )?;
    for ((op, result), count) in counts {
        let labels: Labels = vec![
            ("host", host.to_owned()),
            ("op", op.to_owned()),
            ("result", result.to_owned()),
        ];
        // The encoder expects the count of each bucket alone; the last bucket is unbounded.
        let mut below = 0;
        let mut buckets: Vec<(f64, u64)> = DURATION_BUCKETS_SECONDS
            .into_iter()
            .zip(count.buckets)
            .map(|(bound, cumulative)| {
                let own = cumulative - below;
                below = cumulative;
                (bound, own)
            })
            .collect();
        buckets.push((f64::INFINITY, count.count - below));
        family
            .encode_family(&labels)?
            .encode_histogram::<NoLabelSet>(count.sum_seconds, count.count, &buckets, None)?;
    }
    Ok(())
}
