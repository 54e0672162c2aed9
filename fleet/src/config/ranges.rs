//! The range of every key: one table for the check, the messages and the reference (`docs/fleet-settings.md`).
//!
//! A value out of its range is always a mistake, such as a time that makes a loop busy, or a size that no host has.
//! [`super::check`] has the conditions between values.

use std::fmt;

use api::ReportingPolicy;
use device_facts::reporting_policy::Unit;

use super::{Config, ConfigFault, Millis, PolicyConfig};
use crate::model::{Amount, Bytes, Fraction};

const MIB: u64 = 1 << 20;
/// More memory than any host has.
const SIZE_MAX: u64 = 64 << 40;
const SECOND: u64 = 1000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// A value, by its kind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Quantity {
    Time(u64),
    Size(u64),
    Part(f64),
    Count(u64),
    Number(f64),
}

/// The values that a key may have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Range {
    /// Milliseconds.
    Time(u64, u64),
    /// Bytes.
    Size(u64, u64),
    /// A fraction.
    Part(f64, f64),
    /// Bytes, or a fraction.
    Amount((u64, u64), (f64, f64)),
    Count(u64, u64),
    Number(f64, f64),
}

impl Range {
    pub(crate) fn allows(self, value: Quantity) -> bool {
        match (self, value) {
            (Self::Time(min, max), Quantity::Time(value))
            | (Self::Size(min, max) | Self::Amount((min, max), _), Quantity::Size(value))
            | (Self::Count(min, max), Quantity::Count(value)) => (min..=max).contains(&value),
            // No range contains NaN.
            (Self::Part(min, max) | Self::Amount(_, (min, max)), Quantity::Part(value))
            | (Self::Number(min, max), Quantity::Number(value)) => (min..=max).contains(&value),
            _ => false,
        }
    }
}

/// A fraction in the syntax of a file.
fn part(part: f64) -> String {
    format!("{}%", (part * 1e4).round() / 100.0)
}

/// In the syntax of a file.
#[cfg(test)]
impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Time(ms) => write!(f, "{}", Millis(ms)),
            Self::Size(bytes) => f.write_str(&size(bytes)),
            Self::Part(fraction) => f.write_str(&part(fraction)),
            Self::Count(count) => write!(f, "{count}"),
            Self::Number(number) => write!(f, "{number}"),
        }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Time(min, max) => write!(f, "{} to {}", Millis(min), Millis(max)),
            Self::Size(min, max) => write!(f, "{} to {}", size(min), size(max)),
            Self::Part(min, max) => write!(f, "{} to {}", part(min), part(max)),
            Self::Amount((min, max), parts) => write!(
                f,
                "{} to {}, or {} to {}",
                size(min),
                size(max),
                part(parts.0),
                part(parts.1)
            ),
            Self::Count(min, max) => write!(f, "{min} to {max}"),
            Self::Number(min, max) => write!(f, "{min} to {max}"),
        }
    }
}

/// A size in the syntax of a file.
pub(crate) fn size(bytes: u64) -> String {
    api::exact_bytes(bytes, &["", "KiB", "MiB", "GiB", "TiB"])
}

impl From<Millis> for Quantity {
    fn from(value: Millis) -> Self {
        Self::Time(value.0)
    }
}

impl From<Bytes> for Quantity {
    fn from(value: Bytes) -> Self {
        Self::Size(value.0)
    }
}

impl From<Fraction> for Quantity {
    fn from(value: Fraction) -> Self {
        Self::Part(value.0)
    }
}

impl From<Amount> for Quantity {
    fn from(value: Amount) -> Self {
        match value {
            Amount::Bytes(bytes) => bytes.into(),
            Amount::Part(part) => part.into(),
        }
    }
}

impl From<u32> for Quantity {
    fn from(value: u32) -> Self {
        Self::Count(value.into())
    }
}

impl From<u64> for Quantity {
    fn from(value: u64) -> Self {
        Self::Count(value)
    }
}

impl From<f64> for Quantity {
    fn from(value: f64) -> Self {
        Self::Number(value)
    }
}

/// One key.
pub(crate) struct Row<T> {
    /// The key in the syntax of a file, prefixed with its sections.
    pub(crate) key: &'static str,
    pub(crate) range: Range,
    pub(crate) value: fn(&T) -> Quantity,
}

/// Rows of a table: the path of the field in its type is the key; its range follows.
macro_rules! rows {
    ($type:ty: $($($field:ident).+ $([$index:literal])? = $range:expr;)*) => {
        &[$($crate::config::ranges::Row {
            key: stringify!($($field).+),
            range: $range,
            value: |all: &$type| all.$($field).+ $([$index])?.into(),
        }),*]
    };
}
pub(crate) use rows;

use Range as R;

const WHOLE: Range = R::Part(0.0, 1.0);

/// The keys of [`Config`], except those of policies, and of reporting policies, whose ranges are in `api`.
const CONFIG: &[Row<Config>] = rows! { Config:
    host.reserve = R::Amount((0, SIZE_MAX), (0.0, 0.9));
    thresholds.yellow.enter = WHOLE;
    thresholds.yellow.leave = WHOLE;
    thresholds.orange.enter = WHOLE;
    thresholds.orange.leave = WHOLE;
    thresholds.red.enter = WHOLE;
    thresholds.red.leave = WHOLE;
    // Without pressure there is always 0 %, which must not begin a state.
    thresholds.pressure[0] = R::Part(0.0001, 1.0);
    thresholds.pressure[1] = R::Part(0.0001, 1.0);
    thresholds.pressure[2] = R::Part(0.0001, 1.0);
    thresholds.pressure_below = WHOLE;
    // A plan reads every VM; planning more often than samples arrive has no benefit.
    control.plan = R::Time(50, MINUTE);
    control.sample = R::Time(50, 5 * MINUTE);
    control.sample_deadline = R::Time(10, MINUTE);
    control.sample_age_max = R::Time(100, HOUR);
    control.misses_max = R::Count(1, 100);
    control.samples_min = R::Count(1, 100);
    // VMMs round targets to at most 1 MiB.
    control.dead_band = R::Size(MIB, SIZE_MAX);
    control.dead_band_part = R::Part(0.0, 0.5);
    control.step = R::Size(MIB, SIZE_MAX);
    control.step_part = R::Part(0.001, 1.0);
    control.keep = R::Part(0.0, 0.9);
    control.keep_min = R::Size(0, SIZE_MAX);
    control.suffer = R::Part(0.0, 0.9);
    control.suffer_min = R::Size(0, SIZE_MAX);
    control.repopulate_max = WHOLE;
    control.report_p99_us_max = R::Count(1, 60_000_000);
    control.give_above = WHOLE;
    control.relax_above = WHOLE;
    control.block_take = R::Time(0, HOUR);
    control.block_give = R::Time(0, HOUR);
    control.block_max = R::Time(SECOND, DAY);
    control.stuck_after = R::Time(100, HOUR);
    control.stuck_rate = R::Size(0, 1 << 40);
    control.stuck_retry = R::Time(SECOND, DAY);
    control.stuck_retry_max = R::Time(SECOND, 7 * DAY);
    control.react = R::Time(100, 10 * MINUTE);
    control.burst_quantile = WHOLE;
    control.burst_prior = WHOLE;
    admission.above_min = WHOLE;
    admission.overcommit_max = R::Number(0.1, 100.0);
    admission.reservation = R::Time(SECOND, DAY);
    admission.facts_age_max = R::Time(SECOND, HOUR);
    admission.candidates = R::Count(1, 1000);
    last_resort.after = R::Time(SECOND, HOUR);
    last_resort.swap_max = R::Amount((0, SIZE_MAX), (0.0, 1.0));
    reporting.churn_percent = R::Count(1, 100);
};

/// The keys of each `[policy.NAME]`.
pub(crate) const POLICY: &[Row<PolicyConfig>] = rows! { PolicyConfig:
    min = R::Amount((0, SIZE_MAX), (0.0, 1.0));
    floor = R::Size(0, SIZE_MAX);
    // Linux does not boot with less than 64 MiB, so a smaller limit would make the guest unusable.
    max = R::Amount((64 * MIB, SIZE_MAX), (0.01, 1.0));
    shares = R::Count(0, 1_000_000);
    idle_standby = R::Time(0, 7 * DAY);
    idle_cpu = WHOLE;
    idle_io = R::Size(0, 1 << 40);
};

/// A key with its section, and its value.
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) range: Range,
    pub(crate) value: Quantity,
}

/// The values of `all`; `section` is the prefix of the keys.
pub(crate) fn entries<T>(section: &str, rows: &[Row<T>], all: &T) -> Vec<Entry> {
    let entry = |row: &Row<T>| Entry {
        key: format!("{section}{}", row.key),
        range: row.range,
        value: (row.value)(all),
    };
    rows.iter().map(entry).collect()
}

/// The values of [`Config`], except those of policies.
pub(crate) fn config(config: &Config) -> Vec<Entry> {
    let mut all = entries("", CONFIG, config);
    for (state, policy) in config.reporting.policies() {
        // The VMM rejects a policy out of its bounds.
        all.extend(ReportingPolicy::TABLE.iter().map(|setting| Entry {
            key: format!("reporting.{state}.{}", setting.name),
            range: match setting.unit {
                Unit::Bytes => R::Size(setting.min, setting.max.min(SIZE_MAX)),
                Unit::Order | Unit::Count | Unit::Ms => R::Count(setting.min, setting.max),
            },
            value: match setting.unit {
                Unit::Bytes => Quantity::Size(setting.value(policy)),
                Unit::Order | Unit::Count | Unit::Ms => setting.value(policy).into(),
            },
        }));
    }
    all
}

/// Every value that is out of its range.
pub(crate) fn faults(entries: Vec<Entry>) -> impl Iterator<Item = ConfigFault> {
    entries
        .into_iter()
        .filter(|entry| !entry.range.allows(entry.value))
        .map(|entry| ConfigFault::Range {
            key: entry.key,
            range: entry.range.to_string(),
        })
}
