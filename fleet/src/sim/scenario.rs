//! Scenario files: hosts, guests of every character, faults, and expectations.

use serde::{Deserialize, Serialize};

use crate::config::{Config, Millis, SafetyRule};
use crate::model::{Bytes, Fraction, PriorityClass};

/// A scenario.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Its name.
    pub name: String,
    /// Description of what it shows.
    #[serde(default)]
    pub about: String,
    /// Seed of all randomness.
    #[serde(default)]
    pub seed: u64,
    /// Its duration.
    pub lasts: Millis,
    /// Time after which measurements count, so that the start phase is excluded.
    #[serde(default)]
    pub settle: Millis,
    /// The hosts.
    pub hosts: Hosts,
    /// The steps of virtual time.
    #[serde(default)]
    pub time: Steps,
    /// The guests on each host.
    pub guests: Vec<GuestGroup>,
    /// The faults.
    #[serde(default)]
    pub trouble: Trouble,
    /// The manager of the memory.
    #[serde(default = "ours")]
    pub managers: Vec<ManagerKind>,
    /// Search for the number of guests that each manager can carry.
    #[serde(default)]
    pub search: Option<Search>,
    /// Expectations for our manager.
    #[serde(default)]
    pub check: Check,
    /// The safety rule that the scenario demonstrates: with it, all expectations are met; without it, some are not.
    #[serde(default)]
    pub shows: Option<SafetyRule>,
    /// The planner's configuration.
    #[serde(default)]
    pub config: Config,
}

fn ours() -> Vec<ManagerKind> {
    vec![ManagerKind::Ours]
}

/// `[hosts]`
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hosts {
    /// Their number.
    #[serde(default = "one")]
    pub count: u32,
    /// Memory of each.
    pub memory: Bytes,
    /// Memory that the host itself uses.
    #[serde(default)]
    pub overhead: Bytes,
}

fn one() -> u32 {
    1
}

/// `[time]`
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Steps {
    /// Time step of guests and hosts.
    pub tick: Millis,
    /// Interval between samples of guests.
    pub sample: Millis,
    /// Interval between our manager's plans; the others use the intervals in their descriptions.
    pub plan: Millis,
}

impl Default for Steps {
    fn default() -> Self {
        Self {
            tick: Millis::seconds(1),
            sample: Millis::seconds(5),
            plan: Millis::seconds(2),
        }
    }
}

/// How a guest's balloon driver behaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Character {
    /// Follows its target at 1 GiB per second, and reports free pages.
    #[default]
    Ideal,
    /// Follows its target at 20 MiB per second.
    Slow,
    /// Never inflates.
    Stuck,
    /// Inflates to a tenth of its memory, and then stops.
    HalfStuck,
    /// Claims that it inflated, and keeps using the memory.
    Lying,
    /// Reports no free pages.
    Hardened,
    /// Stops responding when its balloon makes it short of memory.
    Wedging,
}

/// A guest's use of memory over time.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(tag = "shape", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Load {
    /// Constant use.
    Steady {
        /// Fraction of its memory.
        level: Fraction,
    },
    /// Moves randomly between two values.
    Walk {
        /// The lower one.
        low: Fraction,
        /// The upper one.
        high: Fraction,
        /// Approximate duration of a move.
        period: Millis,
    },
    /// Alternates between high and low; all guests of a group simultaneously if `together`.
    Burst {
        /// Use between bursts.
        low: Fraction,
        /// Use during bursts.
        high: Fraction,
        /// Time from one burst to the next.
        period: Millis,
        /// Duration of a burst.
        lasts: Millis,
        /// Whether all guests burst at the same time.
        #[serde(default)]
        together: bool,
    },
    /// Grows until it is full.
    Grow {
        /// Initial use.
        from: Fraction,
        /// Final use.
        to: Fraction,
        /// Duration of the growth.
        over: Millis,
    },
    /// Allocates and frees continuously.
    Churn {
        /// The mean.
        level: Fraction,
        /// Amplitude.
        swing: Fraction,
    },
}

/// `[[guests]]`
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestGroup {
    /// Their number on each host; in a search, their weight.
    pub count: u32,
    /// Configured memory of each.
    pub memory: Bytes,
    /// How the driver behaves.
    #[serde(default)]
    pub character: Character,
    /// How the guest uses memory.
    pub load: Load,
    /// Page cache that the guest requires, as a fraction of its memory.
    #[serde(default)]
    pub hot_cache: Fraction,
    /// Growth rate of its cache per second, from files that are read once.
    #[serde(default)]
    pub cache_fill: Bytes,
    /// Guaranteed memory.
    #[serde(default = "half")]
    pub min: Fraction,
    /// Priority class.
    #[serde(default)]
    pub class: PriorityClass,
    /// Start time of the first one.
    #[serde(default)]
    pub start: Millis,
    /// Delay between the starts of successive guests.
    #[serde(default)]
    pub stagger: Millis,
}

fn half() -> Fraction {
    Fraction(0.5)
}

/// `[trouble]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Trouble {
    /// Fraction of hosts that fail, spread evenly over the time.
    pub hosts_die: Fraction,
    /// The store stalls at each of these times.
    pub store_stalls: Vec<Millis>,
    /// Duration of each stall.
    pub store_stall_lasts: Millis,
    /// VMs to place that arrive per minute, as a fraction of all.
    pub arrivals_per_min: Fraction,
    /// Fraction of samples that are lost.
    pub samples_lost: Fraction,
}

/// The manager of the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, strum::IntoStaticStr)]
#[serde(rename_all = "kebab-case")]
pub enum ManagerKind {
    /// The planner of this crate.
    #[strum(serialize = "ch-fleet")]
    Ours,
    /// oVirt's MOM with its default ballooning rules.
    #[strum(serialize = "MOM")]
    Mom,
    /// Proxmox VE's automatic ballooning.
    Proxmox,
    /// xapi's squeezed.
    #[strum(serialize = "squeezed")]
    Squeezed,
    /// No manager: free page reporting alone.
    #[strum(serialize = "reporting only")]
    None,
}

impl ManagerKind {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// `[search]`: searches for the number of guests that can be carried within the limit on stalls.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Search {
    /// Minimum number of guests.
    pub from: u32,
    /// Maximum number of guests.
    pub to: u32,
    /// Maximum stalled fraction of all guest time. No guest may be killed.
    pub stalled_max: Fraction,
}

/// `[check]`: expectations for our manager.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Check {
    /// Maximum stalled fraction of all guest time.
    pub stalled_max: Fraction,
    /// Maximum number of guests killed by the host.
    pub killed_max: u64,
    /// Maximum changes of direction per hour, for the worst balloon; more is a limit cycle.
    pub reversals_per_hour_max: f64,
    /// Minimum of additional guests compared with the best of the others, as a fraction of theirs. Only with a search.
    pub more_guests_min: Fraction,
    /// Minimum peak fraction of the guests' memory in balloons.
    pub ballooned_peak_min: Fraction,
    /// Maximum fraction of the guests' memory in balloons.
    pub ballooned_peak_max: Fraction,
    /// Maximum fraction of time in red.
    pub red_max: Fraction,
    /// Maximum mean of balloon requests per guest and hour.
    pub requests_per_guest_hour_max: f64,
}

impl Default for Check {
    fn default() -> Self {
        Self {
            stalled_max: Fraction(1.0),
            killed_max: 0,
            reversals_per_hour_max: 12.0,
            more_guests_min: Fraction(-1.0),
            ballooned_peak_min: Fraction(0.0),
            ballooned_peak_max: Fraction(1.0),
            red_max: Fraction(1.0),
            requests_per_guest_hour_max: f64::INFINITY,
        }
    }
}

impl Scenario {
    /// Guests on each host.
    pub fn guests_per_host(&self) -> u32 {
        self.guests.iter().map(|group| group.count).sum()
    }

    /// The same scenario with a safety rule switched off.
    #[must_use]
    pub fn without(&self, rule: SafetyRule) -> Self {
        let mut without = self.clone();
        without.config.control.safety.switch_off(rule);
        without
    }

    /// The same scenario with `total` guests on each host, in the same proportions.
    pub(super) fn scaled(&self, total: u32) -> Self {
        let mut scaled = self.clone();
        let weights = u64::from(self.guests_per_host().max(1));
        let (mut placed, mut weight) = (0, 0);
        for group in &mut scaled.guests {
            weight += u64::from(group.count);
            // Rounding the running sum makes the total exact.
            let until = (u64::from(total) * weight / weights) as u32;
            group.count = until - placed;
            placed = until;
        }
        scaled
    }
}
