//! Metrics in the OpenMetrics text format, for Prometheus.
//!
//! All metrics come from the published data; a scrape queries no VM. Names have the prefix `ch_` and base units. A VM's
//! only labels are its name and its host's, so that the number of series stays small; properties that change during the
//! VM's life are in `ch_vm_info`. When a VM ends, its series end. A guest's counters restart with each machine, whose
//! number is `ch_vm_epoch`.

mod host;
mod store;
mod vm;

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, MetricEncoder, NoLabelSet, text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::Registry;

use crate::agent::{Published, Snapshot};
use crate::sample::RequestCounters;

/// Rows of metrics: name and help text, then the value.
macro_rules! figures {
    ($($name:literal $help:literal, $figure:expr;)+) => { [$(($name, $help, $figure)),+] };
}
use figures;

/// Labels of one series.
type Labels = Vec<(&'static str, String)>;

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

/// Writes metric families.
struct Out<'a> {
    encoder: DescriptorEncoder<'a>,
}

impl Out<'_> {
    /// Writes a gauge with a value for each set of labels; omitted if there are none.
    fn gauge<V: EncodeGaugeValue>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels, V)>,
    ) -> fmt::Result {
        self.family(name, help, MetricType::Gauge, values, |mut one, value| {
            one.encode_gauge(&value)
        })
    }

    /// Writes a counter; the encoder appends `_total` to its name.
    fn counter<V: EncodeCounterValue>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels, V)>,
    ) -> fmt::Result {
        self.family(name, help, MetricType::Counter, values, |mut one, value| {
            one.encode_counter::<NoLabelSet, V, u64>(&value, None::<&Exemplar<NoLabelSet, u64>>)
        })
    }

    fn family<V>(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        values: impl IntoIterator<Item = (Labels, V)>,
        encode: impl Fn(MetricEncoder<'_>, V) -> fmt::Result,
    ) -> fmt::Result {
        let mut values = values.into_iter().peekable();
        if values.peek().is_none() {
            return Ok(());
        }
        let mut family = self.encoder.encode_descriptor(name, help, None, kind)?;
        for (labels, value) in values {
            encode(family.encode_family(&labels)?, value)?;
        }
        Ok(())
    }
}
