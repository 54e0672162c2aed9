//! Chooses a host.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::admission::{Obstacle, Request, admit};
use crate::config::Config;

use super::HostCapacity;

/// A host on which a VM fits.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Candidate {
    /// Its place in the list of hosts.
    pub index: usize,
    /// How full it would be.
    pub score: f64,
}

/// Why a host is no candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostRefusal {
    /// Its figures are too old.
    Stale,
    /// Its record has another form.
    Schema,
    /// It is being emptied.
    Draining,
    /// It is orange or red.
    State,
    /// Not enough memory can be promised.
    Short,
    /// Its VMs together have as much as is allowed.
    Overcommit,
}

impl HostRefusal {
    /// What is said of one or several hosts.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Stale => "with old figures",
            Self::Schema => "of another version",
            Self::Draining => "being drained",
            Self::State => "short of memory",
            Self::Short => "with too little to promise",
            Self::Overcommit => "with as much VM memory as is allowed",
        }
    }
}

/// Where a VM may go.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Placement {
    /// To be tried in this order.
    pub candidates: Vec<Candidate>,
    /// Hosts on which it fits, compared or not.
    pub fitting: usize,
    /// How many of the others were refused for which reason.
    pub refused: BTreeMap<HostRefusal, usize>,
}

/// A small generator of pseudo-random numbers (splitmix64): a draw by lot needs no more.
#[derive(Debug)]
pub(crate) struct SplitMix64(pub(crate) u64);

impl SplitMix64 {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Finds hosts for a VM. `seed` decides which of the fitting hosts are compared: a number that differs from call to
/// call.
pub fn place(
    request: &Request,
    hosts: &[HostCapacity],
    now_ms: u64,
    seed: u64,
    config: &Config,
) -> Placement {
    let mut placement = Placement::default();
    let mut random = SplitMix64(seed);
    let wanted = config.admission.candidates.max(1) as usize;
    for (index, host) in hosts.iter().enumerate() {
        if let Err(refusal) = fits(request, host, now_ms, config) {
            *placement.refused.entry(refusal).or_default() += 1;
            continue;
        }
        placement.fitting += 1;
        let candidate = Candidate {
            index,
            score: host.fullness() + request.needs(config).ratio(host.headroom.ledger.usable),
        };
        // Each fitting host has the same chance to be among those that are compared (reservoir sampling).
        if placement.candidates.len() < wanted {
            placement.candidates.push(candidate);
        } else {
            let place = (random.next() % placement.fitting as u64) as usize;
            if let Some(chosen) = placement.candidates.get_mut(place) {
                *chosen = candidate;
            }
        }
    }
    placement
        .candidates
        .sort_by(|a, b| a.score.total_cmp(&b.score).then(a.index.cmp(&b.index)));
    placement
}

/// Whether a host takes the VM.
pub(super) fn fits(
    request: &Request,
    host: &HostCapacity,
    now_ms: u64,
    config: &Config,
) -> Result<(), HostRefusal> {
    if host.schema != HostCapacity::SCHEMA {
        return Err(HostRefusal::Schema);
    }
    if host.draining {
        return Err(HostRefusal::Draining);
    }
    if now_ms > host.at_ms + config.admission.facts_age_max.0 {
        return Err(HostRefusal::Stale);
    }
    match admit(request, &host.headroom, config) {
        Ok(_) => Ok(()),
        Err(refusal) => Err(match refusal.obstacles.first() {
            Some(Obstacle::State(_)) => HostRefusal::State,
            Some(Obstacle::Overcommit { .. }) => HostRefusal::Overcommit,
            _ => HostRefusal::Short,
        }),
    }
}
