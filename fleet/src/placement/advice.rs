//! Proposes which VMs to move, to empty a host or to relieve one that is short of memory.
//!
//! The result is advice only. After a move, a VM rests before it is moved
//! again, longer each time (OpenShift's descheduler does the same), because frequent migrations can cost more than they
//! gain.

use serde::{Deserialize, Serialize};

use crate::admission::Request;
use crate::config::{Config, Millis};
use crate::model::{Bytes, HostState, PriorityClass, VmId};

use super::HostCapacity;
use super::choose::fits;

/// Minimum rest between two moves.
const REST: Millis = Millis::seconds(15 * 60);
/// Maximum rest.
const REST_MAX: Millis = Millis::seconds(6 * 3600);

/// A VM that could be moved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MovableVm {
    /// Its name.
    pub id: VmId,
    /// Its guaranteed memory.
    pub min: Bytes,
    /// Its configured size.
    pub max: Bytes,
    /// Host memory that it occupies: the amount that a move copies and frees.
    pub resident: Bytes,
    /// Its priority class.
    pub class: PriorityClass,
    /// Whether it can be moved (no assigned device, no operation in progress).
    pub movable: bool,
    /// Why not; also absent if its agent is older.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub obstacle: Option<String>,
    /// Its moves so far.
    pub moved: Option<MoveHistory>,
}

/// Cost of a VM's moves so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveHistory {
    /// End of the last move, ms.
    pub at_ms: u64,
    /// Its duration.
    pub duration_ms: u64,
    /// Moves within the last day.
    pub times: u32,
}

/// One move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Move {
    /// The VM.
    pub vm: VmId,
    /// The target host.
    pub to: String,
    /// Bytes to copy.
    pub bytes: Bytes,
}

/// Reasons why a VM stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StayReason {
    /// It cannot be moved, for this reason.
    Fixed(String),
    /// It was moved recently, and rests until this time, ms.
    Rests(u64),
    /// It fits on no host.
    NoHost,
}

/// Proposed moves, in this order, and VMs that should leave but stay.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Moves {
    /// Moves.
    pub moves: Vec<Move>,
    /// VMs that stay.
    pub stay: Vec<(VmId, StayReason)>,
}

/// How long a VM rests after a move.
pub fn cool_down(history: &MoveHistory) -> Millis {
    let once = REST.0.max(history.duration_ms);
    Millis((once << history.times.saturating_sub(1).min(16)).min(REST_MAX.0))
}

/// Chooses target hosts for the VMs of a host that is drained. `hosts` are the other hosts; planned moves are booked on
/// a copy of them.
pub fn drain(vms: &[MovableVm], hosts: &[HostCapacity], now_ms: u64, config: &Config) -> Moves {
    let mut order: Vec<&MovableVm> = vms.iter().collect();
    // The largest first, because it fits on the fewest hosts.
    order.sort_by(|a, b| needs(b).cmp(&needs(a)).then_with(|| a.id.cmp(&b.id)));
    let mut fleet = hosts.to_vec();
    let mut moves = Moves::default();
    for vm in order {
        // Draining is the operator's request, so rests are ignored.
        consider(vm, &mut fleet, &mut moves, now_ms, false, config);
    }
    moves
}

/// Chooses the VMs that should leave a host so that it becomes yellow. Empty if its state is not worse.
pub fn rebalance(
    host: &HostCapacity,
    vms: &[MovableVm],
    others: &[HostCapacity],
    now_ms: u64,
    config: &Config,
) -> Moves {
    let mut moves = Moves::default();
    if host.headroom.state < HostState::Orange {
        return moves;
    }
    let ledger = &host.headroom.ledger;
    let goal = ledger.usable.part(config.thresholds.orange.leave);
    let mut missing = goal - (ledger.available - ledger.granted);
    let mut order: Vec<&MovableVm> = vms.iter().collect();
    // The smallest that suffices, otherwise the largest, so that there are few moves and few bytes to copy. Low classes
    // before high ones.
    order.sort_by_key(|vm| {
        let suffices = vm.resident >= missing;
        let bytes = if suffices {
            vm.resident.0
        } else {
            u64::MAX - vm.resident.0
        };
        (vm.class, !suffices, bytes, vm.id.clone())
    });
    let mut fleet = others.to_vec();
    for vm in order {
        if missing == Bytes::ZERO {
            break;
        }
        if consider(vm, &mut fleet, &mut moves, now_ms, true, config) {
            missing -= vm.resident;
        }
    }
    moves
}

/// A VM needs its resident memory on the new host, not only its minimum.
fn needs(vm: &MovableVm) -> Bytes {
    vm.resident.max(vm.min).min(vm.max)
}

fn consider(
    vm: &MovableVm,
    fleet: &mut [HostCapacity],
    moves: &mut Moves,
    now_ms: u64,
    rests: bool,
    config: &Config,
) -> bool {
    let mut stay = |reason| {
        moves.stay.push((vm.id.clone(), reason));
        false
    };
    if !vm.movable {
        return stay(StayReason::Fixed(vm.obstacle.clone().unwrap_or_default()));
    }
    let rested_ms = vm
        .moved
        .map_or(0, |moved| moved.at_ms + cool_down(&moved).0);
    if rests && now_ms < rested_ms {
        return stay(StayReason::Rests(rested_ms));
    }
    let request = Request {
        min: needs(vm),
        max: vm.max,
    };
    let best = fleet
        .iter_mut()
        .filter(|host| fits(&request, host, now_ms, config).is_ok())
        .min_by(|a, b| {
            a.fullness()
                .total_cmp(&b.fullness())
                .then_with(|| a.id.cmp(&b.id))
        });
    let Some(host) = best else {
        return stay(StayReason::NoHost);
    };
    host.book(request.needs(config));
    moves.moves.push(Move {
        vm: vm.id.clone(),
        to: host.id.clone(),
        bytes: vm.resident,
    });
    true
}
