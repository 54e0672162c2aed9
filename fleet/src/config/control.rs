//! `[control]`, `[admission]` and `[last_resort]`: speed and limits of the control loop.

use serde::{Deserialize, Serialize};

use super::{Millis, Safety};
use crate::model::{Amount, Bytes, Fraction};

/// `[control]`
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ControlConfig {
    /// Time between two plans; a pressure trigger plans immediately.
    pub plan: Millis,
    /// Time between two samples of a VM.
    pub sample: Millis,
    /// A sample that takes longer is a miss.
    pub sample_deadline: Millis,
    /// Maximum age of a sample for taking memory.
    pub sample_age_max: Millis,
    /// Number of consecutive misses after which nothing more is taken from a VM.
    pub misses_max: u32,
    /// Number of good samples required before memory is taken from a VM.
    pub samples_min: u32,
    /// The agent does not act on differences below this. `dead_band_part` of the VM applies instead if it is more.
    pub dead_band: Bytes,
    /// The same limit as a fraction of the VM's configured size.
    pub dead_band_part: Fraction,
    /// Maximum memory taken from a VM in one plan while the host is yellow. Double while orange, four times while red.
    pub step: Bytes,
    /// The same limit as a fraction of its configured size.
    pub step_part: Fraction,
    /// Available memory that a guest keeps, as a fraction of its memory.
    pub keep: Fraction,
    /// Minimum of `keep`.
    pub keep_min: Bytes,
    /// A guest whose available memory is below this fraction of its memory is suffering.
    pub suffer: Fraction,
    /// A guest with less available memory than this is suffering as well.
    pub suffer_min: Bytes,
    /// Repopulated memory per minute above which a guest's balloon counts as harmful. A fraction of the resident memory.
    pub repopulate_max: Fraction,
    /// Completion time of reports (p99) above which steps are smaller, µs.
    pub report_p99_us_max: u64,
    /// Free fraction of usable memory above which guests in need receive what they lack.
    pub give_above: Fraction,
    /// Free fraction above which the other guests also receive memory.
    pub relax_above: Fraction,
    /// Time without taking memory from a VM after it received some. Doubled for each reversal.
    pub block_take: Millis,
    /// Time without giving memory to a VM after it lost some. A suffering VM does not wait.
    pub block_give: Millis,
    /// Maximum of `block_take` after reversals.
    pub block_max: Millis,
    /// A balloon that moved less than `stuck_rate` for this long is stuck.
    pub stuck_after: Millis,
    /// Rate below which a moving balloon counts as stuck.
    pub stuck_rate: Bytes,
    /// Time after which a stuck balloon is retried, doubled each time.
    pub stuck_retry: Millis,
    /// Maximum time between two attempts with a stuck balloon.
    pub stuck_retry_max: Millis,
    /// Time that the agent needs to get memory back. Memory that guests take during this time must be available.
    pub react: Millis,
    /// Quantile of the growth per window of `react` that the burst figure covers.
    pub burst_quantile: Fraction,
    /// Burst assumed while there are few measurements, as a fraction of the callable liability.
    pub burst_prior: Fraction,
    /// The safety rules in force.
    #[serde(skip)]
    pub safety: Safety,
}

impl Default for ControlConfig {
    fn default() -> Self {
        Self {
            plan: Millis::seconds(2),
            sample: Millis::seconds(5),
            sample_deadline: Millis::seconds(1),
            sample_age_max: Millis::seconds(15),
            misses_max: 3,
            samples_min: 2,
            dead_band: Bytes::mib(16),
            dead_band_part: Fraction(0.01),
            step: Bytes::mib(256),
            step_part: Fraction(0.05),
            keep: Fraction(0.10),
            keep_min: Bytes::mib(256),
            suffer: Fraction(0.04),
            suffer_min: Bytes::mib(64),
            repopulate_max: Fraction(0.01),
            report_p99_us_max: 20_000,
            give_above: Fraction(0.15),
            relax_above: Fraction(0.40),
            block_take: Millis::seconds(10),
            block_give: Millis::seconds(10),
            block_max: Millis::seconds(600),
            stuck_after: Millis::seconds(5),
            stuck_rate: Bytes::mib(15),
            stuck_retry: Millis::seconds(60),
            stuck_retry_max: Millis::seconds(3600),
            react: Millis::seconds(10),
            burst_quantile: Fraction(0.99),
            burst_prior: Fraction(0.10),
            safety: Safety::default(),
        }
    }
}

/// `[admission]`
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct AdmissionConfig {
    /// Fraction of a new VM's memory above its minimum that must also be available.
    pub above_min: Fraction,
    /// Maximum configured memory of all VMs, as a multiple of the usable memory. Limits the risk of unmeasured
    /// behaviour.
    pub overcommit_max: f64,
    /// A reservation that is not confirmed within this time is released.
    pub reservation: Millis,
    /// Maximum age of a host's facts for placing a VM there.
    pub facts_age_max: Millis,
    /// Number of fitting hosts that are compared.
    pub candidates: u32,
}

impl Default for AdmissionConfig {
    fn default() -> Self {
        Self {
            above_min: Fraction(0.0),
            overcommit_max: 4.0,
            reservation: Millis::seconds(60),
            facts_age_max: Millis::seconds(15),
            candidates: 3,
        }
    }
}

/// `[last_resort]`: measures allowed on a red host when nothing else helps. By default none, only reporting.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct LastResortConfig {
    /// Time for which a host must be red before each further step. The time restarts when balloons bring relief.
    pub after: Millis,
    /// Throttle VMs of the lowest classes with `memory.high`.
    pub memory_high: bool,
    /// Let VMs of the lowest classes use the host's swap.
    pub swap: bool,
    /// Pause VMs of the class `batch`.
    pub pause: bool,
    /// Kill VMs of the class `batch`.
    pub kill: bool,
    /// Swap space of a VM that may use it.
    pub swap_max: Amount,
}

impl Default for LastResortConfig {
    fn default() -> Self {
        Self {
            after: Millis::seconds(10),
            memory_high: false,
            swap: false,
            pause: false,
            kill: false,
            swap_max: Amount::Part(Fraction(0.25)),
        }
    }
}
