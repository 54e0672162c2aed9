//! Metrics of the shared store; none without a store.

use std::fmt;

use super::families::{Labels, Out, figures};
use crate::agent::Status;

pub(super) fn write(out: &mut Out<'_>, status: &Status) -> fmt::Result {
    let Some(store) = &status.store else {
        return Ok(());
    };
    let own = || -> Labels { vec![("host", status.host.name.clone())] };
    let flags = figures! {
        "ch_store_up" "Whether the store answers", store.up;
        "ch_store_registered" "Whether the host is in the store, to be found by others", store.registered;
    };
    for (name, help, flag) in flags {
        out.gauge(name, help, [(own(), i64::from(flag))])?;
    }
    out.gauge(
        "ch_store_latency_seconds",
        "How long the last answer of the store took",
        [(own(), store.latency_us as f64 / 1e6)],
    )?;
    out.gauge(
        "ch_store_age_seconds",
        "Time since the store was last in step with this host",
        store.age_ms.map(|age| (own(), age as f64 / 1e3)),
    )?;
    out.gauge(
        "ch_store_held_bytes",
        "Memory reserved through the store for VMs that do not run yet",
        [(own(), store.held_bytes.0)],
    )?;
    let counts = figures! {
        "ch_store_leases_lost" "Leases that were over before their time", store.leases_lost;
        "ch_store_conflicts" "Changes rejected because another client changed the same keys first", store.conflicts;
    };
    for (name, help, count) in counts {
        out.counter(name, help, [(own(), count)])?;
    }
    out.counter(
        "ch_store_calls",
        "Calls to the store, by kind and result",
        store.calls.iter().filter_map(|(name, count)| {
            let (call, result) = name.split_once(' ')?;
            let mut labels = own();
            labels.extend([("op", call.to_owned()), ("result", result.to_owned())]);
            Some((labels, *count))
        }),
    )
}
