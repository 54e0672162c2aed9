//! A host's capacity for schedulers, derived from the agent's status.
//!
//! A scheduler compares the sizes of the VMs that it placed on a host with the host's capacity. The published capacity
//! is therefore the size of all VMs present or reserved, plus the memory that the agent could reserve for another VM
//! now. Overcommit is in the first part: the agent grants each reservation from measured memory, so the sizes of the
//! VMs may exceed the host's memory.

use serde::Deserialize;

const MIB: u64 = 1 << 20;
/// Maximum age of the host's figures, ms. With older ones, no free memory is offered.
const FACTS_AGE_MS_MAX: u64 = 15_000;

/// The relevant part of the agent's status. Other fields are ignored.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct AgentStatus {
    pub(crate) version: String,
    pub(crate) unix_ms: u64,
    host: Host,
    vms: Vec<Vm>,
    reservations: Vec<Reservation>,
}

#[derive(Clone, Debug, Deserialize)]
struct Host {
    state: State,
    facts_age_ms: u64,
    ledger: Ledger,
}

/// The agent's memory accounts, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Ledger {
    pub(crate) usable: u64,
    pub(crate) available: u64,
    pub(crate) resident: u64,
    pub(crate) ballooned: u64,
    pub(crate) callable_liability: u64,
    pub(crate) firm_free: u64,
}

#[derive(Clone, Debug, Deserialize)]
struct Vm {
    vm: String,
    configured: u64,
}

#[derive(Clone, Debug, Deserialize)]
struct Reservation {
    vm: String,
    configured: u64,
}

/// The host's state.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Deserialize,
    strum::IntoStaticStr,
    strum::VariantArray,
)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub(crate) enum State {
    Green,
    Yellow,
    Orange,
    Red,
    /// The agent does not respond, or has an unknown state.
    #[default]
    #[serde(other)]
    Unknown,
}

impl State {
    pub(crate) fn name(self) -> &'static str {
        self.into()
    }

    fn admits(self) -> bool {
        matches!(self, Self::Green | Self::Yellow)
    }
}

/// The published values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Offer {
    pub(crate) state: State,
    /// Size of the VMs that are present or reserved, MiB.
    pub(crate) in_use_mib: u64,
    /// Memory that could be reserved for another VM, MiB.
    pub(crate) free_mib: u64,
    pub(crate) vms: usize,
    pub(crate) ledger: Ledger,
    pub(crate) agent_version: String,
    /// Time at which the agent computed it, ms since the Unix epoch.
    pub(crate) unix_ms: u64,
}

impl Offer {
    pub(crate) fn of(status: &AgentStatus) -> Self {
        let host = &status.host;
        let promised = status
            .reservations
            .iter()
            .filter(|held| !status.vms.iter().any(|vm| vm.vm == held.vm))
            .map(|held| held.configured);
        let sizes = status.vms.iter().map(|vm| vm.configured).chain(promised);
        let fresh = host.facts_age_ms <= FACTS_AGE_MS_MAX;
        Self {
            state: host.state,
            in_use_mib: sizes.map(|bytes| bytes.div_ceil(MIB)).sum(),
            free_mib: if fresh && host.state.admits() {
                host.ledger.firm_free / MIB
            } else {
                0
            },
            vms: status.vms.len(),
            ledger: host.ledger,
            agent_version: status.version.clone(),
            unix_ms: status.unix_ms,
        }
    }

    /// The same VMs and no free memory, because the agent does not respond.
    pub(crate) fn held(&self) -> Self {
        Self {
            state: State::Unknown,
            free_mib: 0,
            ..self.clone()
        }
    }

    pub(crate) fn capacity_mib(&self) -> u64 {
        self.in_use_mib.saturating_add(self.free_mib)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use fleet::agent::{PublishedState, ReservationStatus, Status, VmStatus};
    use fleet::model::Bytes;
    use fleet::reservations::{Reservation, ReservationPhase};

    use super::*;

    fn status() -> Status {
        let vm = |name: &str| VmStatus {
            vm: name.to_owned(),
            configured: Bytes::gib(4),
            ..VmStatus::default()
        };
        let held = |name: &str| ReservationStatus {
            reservation: Reservation {
                id: name.to_owned(),
                vm: name.to_owned(),
                configured: Bytes::gib(2),
                promised: Bytes::gib(1),
                phase: ReservationPhase::Promised,
                huge_pages: false,
                owner_uid: 0,
                remote: false,
                since_unix_ms: 0,
                deadline_unix_ms: None,
            },
            outstanding: Bytes::gib(1),
        };
        let mut status = Status {
            vms: vec![vm("a"), vm("b")],
            reservations: vec![held("b"), held("c")],
            ..Status::default()
        };
        status.host.ledger.firm_free = Bytes::gib(3);
        status
    }

    /// Uses the agent's own types, so that the test notices a change of their format.
    fn offer(status: &Status) -> Offer {
        let text = serde_json::to_string(status).unwrap();
        Offer::of(&serde_json::from_str(&text).unwrap())
    }

    #[test]
    fn capacity_is_what_is_here_and_what_could_come() {
        let offer = offer(&status());
        // b is present, so its reservation no longer counts; c has not started yet.
        assert_eq!(offer.in_use_mib, 10 << 10);
        assert_eq!(offer.capacity_mib(), 13 << 10);
        assert_eq!((offer.vms, offer.state), (2, State::Green));
    }

    #[test]
    fn scarce_or_unread_host_offers_no_more_than_what_is_here() {
        for change in [
            |status: &mut Status| status.host.state = PublishedState::Orange,
            |status: &mut Status| status.host.state = PublishedState::Red,
            |status: &mut Status| status.host.facts_age_ms = FACTS_AGE_MS_MAX + 1,
        ] {
            let mut status = status();
            change(&mut status);
            let offer = offer(&status);
            assert_eq!((offer.in_use_mib, offer.free_mib), (10 << 10, 0));
        }
    }

    #[test]
    fn state_of_a_newer_agent_is_unknown_and_offers_nothing() {
        let text = serde_json::to_string(&status()).unwrap();
        let text = text.replace("\"green\"", "\"violet\"");
        let offer = Offer::of(&serde_json::from_str(&text).unwrap());
        assert_eq!((offer.state, offer.free_mib), (State::Unknown, 0));
    }
}
