//! `[control]`, `[admission]` and `[last_resort]`: speed and limits of the control loop.

use serde::{Deserialize, Serialize};

use super::{Millis, Safety};
use crate::model::{Amount, Bytes, Fraction};

/// `[control]`
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ControlConfig {
    /// Time between two plans; a pressure trigger plans at once.
    pub plan: Millis,
    /// Time between two samples of a VM.
    pub sample: Millis,
    /// A sample that takes longer is a miss.
    pub sample_deadline: Millis,
    /// A sample older than this is no basis for taking.
    pub sample_age_max: Millis,
    /// Misses in a row after which nothing more is taken from a VM.
    pub misses_max: u32,
    /// Good samples a VM needs before anything is taken from it.
    pub samples_min: u32,
    /// Differences below this, or below `dead_band_part` of the VM if that is more, are not acted on.
    pub dead_band: Bytes,
    /// See `dead_band`.
    pub dead_band_part: Fraction,
    /// Most that is taken from a VM in one plan while the host is yellow; orange takes double, red four times as much.
    pub step: Bytes,
    /// And not more than this part of its configured size.
    pub step_part: Fraction,
    /// Available memory a guest keeps, as a part of what it has.
    pub keep: Fraction,
    /// And at least so much.
    pub keep_min: Bytes,
    /// A guest with less available than this part of what it has is suffering.
    pub suffer: Fraction,
    /// And one with less than this.
    pub suffer_min: Bytes,
    /// Memory populated again, as a part of the resident memory and a minute, above which a guest's balloon does harm.
    pub repopulate_max: Fraction,
    /// Answer time of reports (p99) above which less is taken at a time, µs.
    pub report_p99_us_max: u64,
    /// Free part of the usable memory above which guests in need are given memory they lack.
    pub give_above: Fraction,
    /// And above which guests that do not need it get theirs back as well.
    pub relax_above: Fraction,
    /// After something was given to a VM nothing is taken from it for this long; doubled for each reversal.
    pub block_take: Millis,
    /// After something was taken from a VM nothing is given to it for this long, unless it suffers.
    pub block_give: Millis,
    /// The longest a VM is left alone after reversals.
    pub block_max: Millis,
    /// A balloon that moved less than `stuck_rate` for this long is stuck.
    pub stuck_after: Millis,
    /// Bytes a second.
    pub stuck_rate: Bytes,
    /// A stuck balloon is tried again after this time, doubled each time.
    pub stuck_retry: Millis,
    /// But at least this often.
    pub stuck_retry_max: Millis,
    /// Time in which the manager gets memory back: what guests call in meanwhile must be there.
    pub react: Millis,
    /// Part of the windows of `react` whose growth the burst figure covers.
    pub burst_quantile: Fraction,
    /// The part of the callable liability that is taken for the burst while little has been measured.
    pub burst_prior: Fraction,
    /// The rules of safety in force.
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
pub struct AdmissionConfig {
    /// The part of a new VM's memory above its minimum that must be there as well.
    pub above_min: Fraction,
    /// Most memory the VMs may have together, as a multiple of the usable memory; a brake against what was never
    /// measured.
    pub overcommit_max: f64,
    /// A reservation that is not confirmed in this time is given back.
    pub reservation: Millis,
    /// Facts about a host that are older are no basis for placing a VM there.
    pub facts_age_max: Millis,
    /// How many of the hosts that fit are compared.
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

/// `[last_resort]`: what may be done on a red host when nothing else helps. Nothing by default, except telling.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LastResortConfig {
    /// How long a host must be red, without the balloons delivering, before each further step.
    pub after: Millis,
    /// Squeeze VMs of the lowest classes with `memory.high`.
    pub memory_high: bool,
    /// Let those VMs use the host's swap.
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
