//! Decides whether another VM fits on a host, and if not, what would make it fit.
//!
//! The decision is a pure function, and is made twice in a fleet. The placer that looks for a host decides from the
//! data that the host published. The host's agent then decides from its current data. Only the agent's decision counts.
//! The caller must keep the ledger unchanged during the decision, and record the reservation before the next one
//! ([`Ledger::promised`]). Therefore exactly ten of a hundred requests succeed if the memory suffices for ten.
//!
//! A VM is admitted on memory that is available now. Memory that the other guests may take simultaneously is
//! subtracted, as is memory that is reserved or granted and not used yet. Memory that balloons could still return is
//! reported to the client, and never reserved.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::{Config, Millis};
use crate::model::{Bytes, Fraction, HostState, Ledger};

/// A VM that is to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Its guaranteed memory.
    pub min: Bytes,
    /// Its maximum memory: its configured size.
    pub max: Bytes,
}

impl Request {
    /// The memory that must be available for its start.
    pub fn needs(&self, config: &Config) -> Bytes {
        self.min + (self.max - self.min).part(config.admission.above_min)
    }
}

/// The host's data for admission.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HostHeadroom {
    /// The ledger.
    pub ledger: Ledger,
    /// The host's state.
    pub state: HostState,
    /// Memory that balloons could return without harm.
    pub freeable: Bytes,
    /// The part of it that would arrive within the reaction time, at the measured speed.
    pub freeable_soon: Bytes,
}

/// An acceptance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admission {
    /// The memory to record as reserved until the VM runs.
    pub promise: Bytes,
    /// The memory that can still be reserved after that.
    pub left: Bytes,
}

/// A refusal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Refusal {
    /// The memory that the VM needs.
    pub needed: Bytes,
    /// The memory that can be reserved.
    pub free: Bytes,
    /// All obstacles.
    pub obstacles: Vec<Obstacle>,
    /// Remedies, each sufficient alone, easiest first. Empty if there is none.
    pub remedies: Vec<Remedy>,
}

/// An obstacle for a VM.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Obstacle {
    /// It needs this much more than can be reserved.
    Short(Bytes),
    /// The host has to recover first.
    State(HostState),
    /// All VMs together would exceed the operator's limit.
    Overcommit {
        /// Configured memory with this VM, as a multiple of the usable memory.
        would_be: f64,
        /// The limit.
        allowed: f64,
    },
    /// It exceeds the maximum that this host can ever give to a new VM.
    TooLarge(Bytes),
}

/// A remedy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Remedy {
    /// Retry after the guests have returned this amount, which takes about this long.
    Wait {
        /// The amount.
        for_bytes: Bytes,
        /// The time.
        about: Millis,
    },
    /// Confirm or release reservations of this amount.
    Release(Bytes),
    /// A minimum of at most this amount.
    LowerMinimum(Bytes),
    /// A configured size of at most this amount.
    Shrink(Bytes),
    /// Stop or move VMs that occupy this amount.
    MakeRoom(Bytes),
    /// `admission.overcommit_max` of at least this.
    RaiseOvercommit(f64),
}

/// Decides on a VM.
///
/// # Errors
/// [`Refusal`] with all obstacles and remedies.
pub fn admit(
    request: &Request,
    headroom: &HostHeadroom,
    config: &Config,
) -> Result<Admission, Refusal> {
    let ledger = &headroom.ledger;
    let needed = request.needs(config);
    let free = ledger.firm_free - config.newcomers_leave(ledger.usable);
    let obstacles = obstacles(request, headroom, needed, free, config);
    if obstacles.is_empty() {
        return Ok(Admission {
            promise: needed,
            left: free - needed,
        });
    }
    let remedies = remedies(request, headroom, needed, free, &obstacles, config);
    Err(Refusal {
        needed,
        free,
        obstacles,
        remedies,
    })
}

fn obstacles(
    request: &Request,
    headroom: &HostHeadroom,
    needed: Bytes,
    free: Bytes,
    config: &Config,
) -> Vec<Obstacle> {
    let ledger = &headroom.ledger;
    let mut obstacles = Vec::new();
    let most = ledger.usable - config.newcomers_leave(ledger.usable);
    let largest = ledger.usable.scale(config.admission.overcommit_max);
    if needed > most {
        obstacles.push(Obstacle::TooLarge(most));
    } else if request.max > largest {
        obstacles.push(Obstacle::TooLarge(largest));
    } else if needed > free {
        obstacles.push(Obstacle::Short(needed - free));
    }
    if headroom.state > HostState::Yellow {
        obstacles.push(Obstacle::State(headroom.state));
    }
    let allowed = config.admission.overcommit_max;
    let would_be = (ledger.configured + ledger.promised + request.max).ratio(ledger.usable);
    if would_be > allowed || ledger.usable == Bytes::ZERO {
        obstacles.push(Obstacle::Overcommit { would_be, allowed });
    }
    obstacles
}

fn remedies(
    request: &Request,
    headroom: &HostHeadroom,
    needed: Bytes,
    free: Bytes,
    obstacles: &[Obstacle],
    config: &Config,
) -> Vec<Remedy> {
    let ledger = &headroom.ledger;
    let over = obstacles.iter().find_map(|obstacle| match obstacle {
        Obstacle::Overcommit { would_be, .. } => Some(*would_be),
        _ => None,
    });
    if let Some(would_be) = over {
        let room = ledger.usable.scale(config.admission.overcommit_max);
        let size = room - ledger.configured - ledger.promised;
        let mut remedies = vec![Remedy::RaiseOvercommit((would_be * 100.0).ceil() / 100.0)];
        if size >= needed {
            remedies.push(Remedy::Shrink(size));
        }
        return remedies;
    }
    if obstacles
        .iter()
        .any(|obstacle| matches!(obstacle, Obstacle::TooLarge(_)))
    {
        return Vec::new();
    }
    let recover = if headroom.state > HostState::Yellow {
        ledger.usable.part(config.thresholds.orange.leave) - ledger.available
    } else {
        Bytes::ZERO
    };
    let missing = (needed - free).max(recover);
    let mut remedies = Vec::new();
    if headroom.freeable >= missing && headroom.freeable_soon > Bytes::ZERO {
        let reactions = missing.ratio(headroom.freeable_soon).ceil().max(1.0);
        remedies.push(Remedy::Wait {
            for_bytes: missing,
            about: Millis((reactions * config.control.react.0 as f64) as u64),
        });
    }
    if recover == Bytes::ZERO {
        if ledger.promised >= missing {
            remedies.push(Remedy::Release(missing));
        }
        let lower = lowest_minimum(request, free, config.admission.above_min);
        if lower > Bytes::ZERO {
            remedies.push(Remedy::LowerMinimum(lower));
        }
    }
    remedies.push(Remedy::MakeRoom(missing));
    remedies
}

/// The largest minimum with which a VM of this size needs no more than `free`.
fn lowest_minimum(request: &Request, free: Bytes, above_min: Fraction) -> Bytes {
    let spare = free - request.max.part(above_min);
    let part = 1.0 - above_min.0;
    if part > 0.0 {
        spare.scale(1.0 / part).min(request.min)
    } else {
        Bytes::ZERO
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short(bytes) => write!(f, "{bytes} more memory is needed"),
            Self::State(state) => write!(f, "the host is {state}"),
            Self::Overcommit { would_be, allowed } => write!(
                f,
                "all VMs together would have {would_be:.2} times the usable memory, but {allowed:.2} is the limit"
            ),
            Self::TooLarge(most) => write!(f, "a VM on this host can have at most {most}"),
        }
    }
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wait { for_bytes, about } => {
                write!(
                    f,
                    "wait about {about}; guests can release {for_bytes} by then"
                )
            }
            Self::Release(bytes) => write!(f, "confirm or release reservations of {bytes}"),
            Self::LowerMinimum(min) => write!(f, "lower --min to {min}"),
            Self::Shrink(max) => write!(f, "make the VM no larger than {max}"),
            Self::MakeRoom(bytes) => write!(f, "stop or move VMs that occupy {bytes}"),
            Self::RaiseOvercommit(factor) => {
                write!(f, "set admission.overcommit_max to {factor:.2} or more")
            }
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |items: Vec<String>| items.join(", ");
        let against = list(self.obstacles.iter().map(ToString::to_string).collect());
        write!(
            f,
            "the VM needs {}, but only {} can be reserved: {against}",
            self.needed, self.free
        )?;
        if self.remedies.is_empty() {
            return f.write_str(". Nothing would make it fit on this host");
        }
        let remedies: Vec<String> = self.remedies.iter().map(ToString::to_string).collect();
        write!(f, ". To make it fit: {}", remedies.join("; or "))
    }
}

impl std::error::Error for Refusal {}

#[cfg(test)]
mod tests;
