//! Chooses a host for a VM.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::admission::{Obstacle, Request, admit};
use crate::config::Config;

use super::HostCapacity;

/// A host on which a VM fits.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Candidate {
    /// Its index in the list of hosts.
    pub index: usize,
    /// Its fullness with the VM.
    pub score: f64,
}

/// Reasons why a host is not a candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostRefusal {
    /// Its figures are too old.
    Stale,
    /// Its record has another schema.
    Schema,
    /// It is being drained.
    Draining,
    /// It is orange or red.
    State,
    /// Not enough memory can be reserved.
    Short,
    /// Its VMs together would exceed the overcommit limit.
    Overcommit,
}

impl HostRefusal {
    /// The text about one or several hosts.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Stale => "with old figures",
            Self::Schema => "of another version",
            Self::Draining => "being drained",
            Self::State => "short of memory",
            Self::Short => "with too little unreserved memory",
            Self::Overcommit => "with as much VM memory as is allowed",
        }
    }
}

/// Candidate hosts for a VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Placement {
    /// The candidates, in the order to try them.
    pub candidates: Vec<Candidate>,
    /// Number of hosts on which it fits, compared or not.
    pub fitting: usize,
    /// Number of other hosts by the reason why they are not candidates.
    pub refused: BTreeMap<HostRefusal, usize>,
}

/// A small generator of pseudo-random numbers (splitmix64), which suffices for random choices.
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

/// Finds hosts for a VM. `seed` decides which of the fitting hosts are compared; it must differ from call to call.
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
        // Each fitting host is compared with the same probability (reservoir sampling).
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

/// Whether the VM fits on a host.
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
