//! The samples of one demonstration, and their evaluation.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const MIB: f64 = (1u64 << 20) as f64;
/// Fraction of the decrease after which the memory counts as returned; the last blocks depend on the guest's own
/// activity.
const BACK_SHARE: f64 = 0.95;

/// Older samples of the page tables are not shown.
const AGE_MS_MAX: u64 = 1000;

/// The guest's current activity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub(crate) enum Phase {
    Idle,
    Touching,
    Touched,
    Freed,
}

impl Phase {
    pub(crate) fn name(self) -> &'static str {
        self.into()
    }
}

/// One sample of `vm.reclaim-stats`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) seconds: f64,
    pub(crate) phase: Phase,
    pub(crate) resident_bytes: u64,
    pub(crate) reported_bytes: u64,
    /// Discarded by reports since the guest freed its memory; 0 before. Memory discarded earlier was never used by the
    /// guest.
    pub(crate) discarded_bytes: u64,
}

/// All samples in order.
#[derive(Debug)]
pub(crate) struct Recording {
    pub(crate) configured_bytes: u64,
    pub(crate) samples: Vec<Sample>,
    pub(crate) freed_seconds: f64,
    start: Instant,
    /// Discarded before the free.
    discarded_before: u64,
    last: Value,
}

/// How much memory returned, and how fast.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) peak_bytes: u64,
    pub(crate) floor_bytes: u64,
    /// Time from the free in the guest to 95 % of the decrease.
    pub(crate) seconds: f64,
    pub(crate) reports: u64,
    pub(crate) report_p99_us: u64,
    pub(crate) report_max_us: u64,
}

impl Recording {
    pub(crate) fn new(configured_bytes: u64) -> Self {
        Self {
            configured_bytes,
            samples: Vec::new(),
            freed_seconds: 0.0,
            start: Instant::now(),
            discarded_before: 0,
            last: Value::Null,
        }
    }

    /// Adds a sample. `process_bytes` is the resident set of the VMM's process, which is used where reading page tables
    /// is expensive (Linux before 6.7) and the VMM therefore reads them rarely.
    pub(crate) fn add(
        &mut self,
        phase: Phase,
        stats: &Value,
        process_bytes: u64,
    ) -> Result<Sample> {
        let figure = |pointer: &str| {
            stats
                .pointer(pointer)
                .and_then(Value::as_u64)
                .with_context(|| format!("vm.reclaim-stats has no {pointer}"))
        };
        let discarded = figure("/report/discarded_bytes")?;
        if phase != Phase::Freed {
            self.discarded_before = discarded;
        }
        let resident_bytes = if figure("/resident_age_ms")? > AGE_MS_MAX {
            process_bytes
        } else {
            figure("/resident_bytes")?
        };
        let sample = Sample {
            seconds: self.start.elapsed().as_secs_f64(),
            phase,
            resident_bytes,
            reported_bytes: figure("/report/requested_bytes")?,
            discarded_bytes: discarded - self.discarded_before,
        };
        self.samples.push(sample);
        self.last = stats.clone();
        Ok(sample)
    }

    /// Records that the guest has now freed its memory.
    pub(crate) fn freed(&mut self) {
        self.freed_seconds = self.start.elapsed().as_secs_f64();
    }

    /// # Errors
    /// No memory returned: the demonstration failed.
    pub(crate) fn result(&self) -> Result<Outcome> {
        let peak_bytes = self
            .samples
            .iter()
            .map(|s| s.resident_bytes)
            .max()
            .unwrap_or(0);
        let after: Vec<&Sample> = self
            .samples
            .iter()
            .filter(|s| s.phase == Phase::Freed)
            .collect();
        let floor_bytes = after
            .iter()
            .map(|s| s.resident_bytes)
            .min()
            .unwrap_or(peak_bytes);
        ensure!(
            floor_bytes < peak_bytes / 2,
            "the memory did not come back: {} of {} MiB are still resident",
            floor_bytes >> 20,
            peak_bytes >> 20
        );
        let fall = (peak_bytes - floor_bytes) as f64;
        let enough = after
            .iter()
            .find(|s| (peak_bytes.saturating_sub(s.resident_bytes)) as f64 >= fall * BACK_SHARE)
            .context("no sample after the free")?;
        let figure = |pointer: &str| {
            self.last
                .pointer(pointer)
                .and_then(Value::as_u64)
                .unwrap_or(0)
        };
        Ok(Outcome {
            peak_bytes,
            floor_bytes,
            seconds: enough.seconds - self.freed_seconds,
            reports: figure("/report/batches"),
            report_p99_us: figure("/report/latency_us/p99"),
            report_max_us: figure("/report/latency_us/max"),
        })
    }

    pub(crate) fn to_json(&self, result: &Outcome) -> Result<String> {
        let samples: Vec<Value> = self
            .samples
            .iter()
            .map(|sample| {
                json!({
                    "seconds": sample.seconds,
                    "phase": sample.phase.name(),
                    "resident_bytes": sample.resident_bytes,
                    "reported_bytes": sample.reported_bytes,
                    "discarded_since_free_bytes": sample.discarded_bytes,
                })
            })
            .collect();
        let text = serde_json::to_string_pretty(&json!({
            "configured_bytes": self.configured_bytes,
            "peak_resident_bytes": result.peak_bytes,
            "floor_resident_bytes": result.floor_bytes,
            "returned_bytes": result.peak_bytes - result.floor_bytes,
            "seconds_to_95_percent": result.seconds,
            "reports": result.reports,
            "report_latency_us": { "p99": result.report_p99_us, "max": result.report_max_us },
            "samples": samples,
            "last_reclaim_stats": self.last,
        }))?;
        Ok(text + "\n")
    }
}

impl Outcome {
    /// The final line of the demonstration.
    pub(crate) fn sentence(&self) -> String {
        let returned = (self.peak_bytes - self.floor_bytes) as f64 / MIB;
        format!(
            "{returned:.0} MiB returned to the host, 95 % of them {:.1} s after the guest freed them \
             ({:.0} MiB/s): {:.0} → {:.0} MiB resident, {} reports, p99 {} µs each.",
            self.seconds,
            returned * BACK_SHARE / self.seconds.max(0.001),
            self.peak_bytes as f64 / MIB,
            self.floor_bytes as f64 / MIB,
            self.reports,
            self.report_p99_us,
        )
    }
}
