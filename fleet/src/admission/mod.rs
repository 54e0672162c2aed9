//! Whether one more VM fits on a host, and if not, what would make it fit.
//!
//! The decision is pure and is made twice for a fleet: by whoever looks for a host, from what the host published, and
//! by the host's agent from what is true now. Only the agent's word counts. Whoever decides must hold the ledger still
//! meanwhile and book the promise before the next decision ([`Ledger::promised`]); that is what makes a hundred requests
//! for ten places end with ten.
//!
//! A VM is admitted on memory that is there now: available, less what the other guests will call in at once, less what
//! was promised or given and is not used yet. What balloons could still bring is told to the one who asks, and never
//! promised.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::{Config, Millis};
use crate::model::{Bytes, Fraction, HostState, Ledger};

/// A VM that wants to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Memory it is guaranteed.
    pub min: Bytes,
    /// Memory it may have: its configured size.
    pub max: Bytes,
}

impl Request {
    /// What must be there for it to start.
    pub fn needs(&self, config: &Config) -> Bytes {
        self.min + (self.max - self.min).part(config.admission.above_min)
    }
}

/// A host as admission sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HostBooks {
    /// The books.
    pub ledger: Ledger,
    /// The host's state.
    pub state: HostState,
    /// What balloons could bring without harm.
    pub freeable: Bytes,
    /// And what of it would come within the reaction time, at the speed that was measured.
    pub freeable_soon: Bytes,
}

/// A yes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admission {
    /// To be booked as promised until the VM runs.
    pub promise: Bytes,
    /// What can still be promised after that.
    pub left: Bytes,
}

/// A no.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Refusal {
    /// What the VM needs.
    pub needed: Bytes,
    /// What can be promised.
    pub free: Bytes,
    /// Everything that stands against it.
    pub obstacles: Vec<Obstacle>,
    /// What would make it fit; each one alone, in the order of ease. Empty when nothing would.
    pub remedies: Vec<Remedy>,
}

/// What stands against a VM.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Obstacle {
    /// It needs so much more than can be promised.
    Short(Bytes),
    /// The host has to recover first.
    State(HostState),
    /// All VMs together would exceed what the operator allowed.
    Overcommit {
        /// Configured memory with this VM, as a multiple of the usable memory.
        would_be: f64,
        /// What is allowed.
        allowed: f64,
    },
    /// It is larger than the most that this host can ever give to a new VM.
    TooLarge(Bytes),
}

/// What would make it fit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Remedy {
    /// Asking again after the guests have given so much, which takes about so long.
    Wait {
        /// So much.
        for_bytes: Bytes,
        /// So long.
        about: Millis,
    },
    /// Confirming or releasing promises of so much.
    Release(Bytes),
    /// A minimum of at most so much.
    LowerMinimum(Bytes),
    /// A configured size of at most so much.
    Shrink(Bytes),
    /// Stopping or moving VMs that occupy so much.
    MakeRoom(Bytes),
    /// `admission.overcommit_max` of at least this.
    RaiseOvercommit(f64),
}

/// Decides.
///
/// # Errors
/// [`Refusal`] with everything that stands against it and what would help.
pub fn admit(request: &Request, books: &HostBooks, config: &Config) -> Result<Admission, Refusal> {
    let ledger = &books.ledger;
    let needed = request.needs(config);
    let free = ledger.firm_free - config.newcomers_leave(ledger.usable);
    let obstacles = obstacles(request, books, needed, free, config);
    if obstacles.is_empty() {
        return Ok(Admission {
            promise: needed,
            left: free - needed,
        });
    }
    let remedies = remedies(request, books, needed, free, &obstacles, config);
    Err(Refusal {
        needed,
        free,
        obstacles,
        remedies,
    })
}

fn obstacles(
    request: &Request,
    books: &HostBooks,
    needed: Bytes,
    free: Bytes,
    config: &Config,
) -> Vec<Obstacle> {
    let ledger = &books.ledger;
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
    if books.state > HostState::Yellow {
        obstacles.push(Obstacle::State(books.state));
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
    books: &HostBooks,
    needed: Bytes,
    free: Bytes,
    obstacles: &[Obstacle],
    config: &Config,
) -> Vec<Remedy> {
    let ledger = &books.ledger;
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
    let recover = if books.state > HostState::Yellow {
        ledger.usable.part(config.thresholds.orange.leave) - ledger.available
    } else {
        Bytes::ZERO
    };
    let missing = (needed - free).max(recover);
    let mut remedies = Vec::new();
    if books.freeable >= missing && books.freeable_soon > Bytes::ZERO {
        let reactions = missing.ratio(books.freeable_soon).ceil().max(1.0);
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
            Self::Short(bytes) => write!(f, "{bytes} are missing"),
            Self::State(state) => write!(f, "the host is {state}"),
            Self::Overcommit { would_be, allowed } => write!(
                f,
                "all VMs together would have {would_be:.2} times the usable memory, {allowed:.2} is allowed"
            ),
            Self::TooLarge(most) => write!(f, "the host can never give more than {most}"),
        }
    }
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wait { for_bytes, about } => {
                write!(
                    f,
                    "wait about {about}, in which guests can give {for_bytes}"
                )
            }
            Self::Release(bytes) => write!(f, "confirm or release reservations of {bytes}"),
            Self::LowerMinimum(min) => write!(f, "ask for a minimum of at most {min}"),
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
            "no: {} needed, {} can be promised; {against}",
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
