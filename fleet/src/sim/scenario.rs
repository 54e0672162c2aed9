//! Scenario files: hosts, guests of every character, what goes wrong, and what must hold in the end.

use serde::{Deserialize, Serialize};

use crate::config::{Config, Millis, SafetyRule};
use crate::model::{Bytes, Fraction, PriorityClass};

/// A scenario.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What it is called.
    pub name: String,
    /// What it shows.
    #[serde(default)]
    pub about: String,
    /// All chance comes from here.
    #[serde(default)]
    pub seed: u64,
    /// How long it lasts.
    pub lasts: Millis,
    /// What counts only from here on: starting is not what is compared.
    #[serde(default)]
    pub settle: Millis,
    /// The hosts.
    pub hosts: Hosts,
    /// The steps of virtual time.
    #[serde(default)]
    pub time: Steps,
    /// Who runs on each host.
    pub guests: Vec<GuestGroup>,
    /// What goes wrong.
    #[serde(default)]
    pub trouble: Trouble,
    /// Who manages the memory.
    #[serde(default = "ours")]
    pub managers: Vec<ManagerKind>,
    /// Find out how many guests each manager can carry.
    #[serde(default)]
    pub search: Option<Search>,
    /// What must hold for ours.
    #[serde(default)]
    pub check: Check,
    /// The safety rule that the scenario is about: with it everything holds, without it something does not.
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
    /// How many.
    #[serde(default = "one")]
    pub count: u32,
    /// Memory of each.
    pub memory: Bytes,
    /// What the host itself uses.
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
    /// Guests and hosts move on by this.
    pub tick: Millis,
    /// Guests are asked this often.
    pub sample: Millis,
    /// Ours plans this often; the others keep the interval that they are described with.
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
    /// Does what it is told, at 1 GiB per second, and reports free pages.
    #[default]
    Ideal,
    /// Does it at 20 MiB per second.
    Slow,
    /// Never inflates.
    Stuck,
    /// Inflates a tenth of its memory, and then no more.
    HalfStuck,
    /// Says that it inflated and keeps using the memory.
    Lying,
    /// Reports no free pages.
    Hardened,
    /// Stops answering when its balloon makes it short of memory.
    Wedging,
}

/// How a guest's own use of memory goes.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(tag = "shape", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Load {
    /// Always the same.
    Steady {
        /// Part of its memory.
        level: Fraction,
    },
    /// Wanders between two values.
    Walk {
        /// The lower one.
        low: Fraction,
        /// The upper one.
        high: Fraction,
        /// About how long a way takes.
        period: Millis,
    },
    /// High for a while, then low for a while; all guests of a group together when `together`.
    Burst {
        /// Between bursts.
        low: Fraction,
        /// In bursts.
        high: Fraction,
        /// From burst to burst.
        period: Millis,
        /// How long each one is.
        lasts: Millis,
        /// Whether all burst at once.
        #[serde(default)]
        together: bool,
    },
    /// Grows until it is full.
    Grow {
        /// In the beginning.
        from: Fraction,
        /// In the end.
        to: Fraction,
        /// How long it takes.
        over: Millis,
    },
    /// Allocates and frees all the time.
    Churn {
        /// The mean.
        level: Fraction,
        /// How far up and down.
        swing: Fraction,
    },
}

/// `[[guests]]`
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestGroup {
    /// How many on each host. In a search: their weight.
    pub count: u32,
    /// Configured memory of each.
    pub memory: Bytes,
    /// How the driver behaves.
    #[serde(default)]
    pub character: Character,
    /// How the guest uses memory.
    pub load: Load,
    /// Page cache that the guest cannot do without, as a part of its memory.
    #[serde(default)]
    pub hot_cache: Fraction,
    /// How fast its cache grows, bytes a second: files that are read once.
    #[serde(default)]
    pub cache_fill: Bytes,
    /// Memory it is guaranteed.
    #[serde(default = "half")]
    pub min: Fraction,
    /// How much it matters.
    #[serde(default)]
    pub class: PriorityClass,
    /// When the first one starts.
    #[serde(default)]
    pub start: Millis,
    /// And the others one after the other, this much later each.
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
    /// Hosts that die, spread evenly over the time, as a part of all.
    pub hosts_die: Fraction,
    /// The store stalls at each of these times.
    pub store_stalls: Vec<Millis>,
    /// And for so long.
    pub store_stall_lasts: Millis,
    /// VMs that arrive in a minute and have to be placed, as a part of all.
    pub arrivals_per_min: Fraction,
    /// Samples that are lost, as a part of all.
    pub samples_lost: Fraction,
}

/// Who manages the memory.
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
    /// Nobody: free page reporting alone.
    #[strum(serialize = "reporting only")]
    None,
}

impl ManagerKind {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// `[search]`: how many guests can be carried with so few stalls.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Search {
    /// From this number on.
    pub from: u32,
    /// To this one.
    pub to: u32,
    /// Stalled guest time, as a part of all guest time, that is allowed. No guest may be killed.
    pub stalled_max: Fraction,
}

/// `[check]`: what must hold for ours.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Check {
    /// Stalled guest time, as a part of all guest time.
    pub stalled_max: Fraction,
    /// Guests killed by the host.
    pub killed_max: u64,
    /// Changes of direction of one balloon in an hour, worst of all balloons: more is a limit cycle.
    pub reversals_per_hour_max: f64,
    /// More guests than the best of the others, as a part of theirs. Only with a search.
    pub more_guests_min: Fraction,
    /// The guests' balloons together must hold this part of their memory at least once.
    pub ballooned_peak_min: Fraction,
    /// And never more than this part.
    pub ballooned_peak_max: Fraction,
    /// Time in red, as a part of all.
    pub red_max: Fraction,
    /// Balloon requests, as a mean for each guest and hour.
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
            // Rounding the running sum leaves no guest over.
            let until = (u64::from(total) * weight / weights) as u32;
            group.count = until - placed;
            placed = until;
        }
        scaled
    }
}
