//! Metrics in the OpenMetrics text format, for Prometheus.
//!
//! All metrics come from the published data; a scrape queries no VM. Names have the prefix `ch_` and base units. A VM's
//! only labels are its name and its host's, so that the number of series stays small. Properties that change during the
//! VM's life are in `ch_vm_info`. When a VM ends, its series end. A guest's counters restart with each machine, whose
//! number is `ch_vm_epoch`.

mod families;
mod host;
mod store;
mod vm;

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, text};
use prometheus_client::registry::Registry;

use families::Out;

use crate::agent::{Published, Snapshot};
use crate::sample::RequestCounters;

/// All figures as text.
pub(crate) fn render(snapshot: &Arc<Snapshot>, published: &Published) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Scrape {
        snapshot: Arc::clone(snapshot),
        requests: Arc::clone(&published.requests),
    }));
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = text::encode(&mut text, &registry);
    text
}

/// The data for one scrape.
#[derive(Debug)]
struct Scrape {
    snapshot: Arc<Snapshot>,
    requests: Arc<RequestCounters>,
}

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut out = Out { encoder };
        host::write(&mut out, &self.snapshot)?;
        host::write_requests(&mut out, &self.snapshot.status.host.name, &self.requests)?;
        store::write(&mut out, &self.snapshot.status)?;
        vm::write(&mut out, &self.snapshot.status)
    }
}
