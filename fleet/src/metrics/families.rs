//! Writes metric families in the OpenMetrics text format.

use std::fmt;

use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, MetricEncoder, NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::exemplar::Exemplar;

/// Rows of metrics: name and help text, then the value.
macro_rules! figures {
    ($($name:literal $help:literal, $figure:expr;)+) => { [$(($name, $help, $figure)),+] };
}
pub(super) use figures;

/// Labels of one series.
pub(super) type Labels = Vec<(&'static str, String)>;

/// Writes metric families.
pub(super) struct Out<'a> {
    pub(super) encoder: DescriptorEncoder<'a>,
}

impl Out<'_> {
    /// Writes a gauge with a value for each set of labels; omitted if there are none.
    pub(super) fn gauge<V: EncodeGaugeValue>(
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
    pub(super) fn counter<V: EncodeCounterValue>(
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
