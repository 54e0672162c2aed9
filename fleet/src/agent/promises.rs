//! Reservations: decides on requests, keeps the ledger, and releases reservations that are no longer needed.
//!
//! Requests come from the local socket and, through the store, from remote clients. This module decides on both with
//! the same ledger.

use std::collections::{BTreeMap, BTreeSet};

use super::AdmissionCounts;
use super::clock::Clock;
use super::journal::Journal;
use super::request::{ConfirmRequest, ReleaseRequest, ReserveAnswer, ReserveRequest};
use super::rounds::VmRounds;
use super::standby::Standbys;
use super::status::ReservationStatus;
use crate::admission::{Admission, HostHeadroom, Obstacle, Refusal, Request as Wanted, admit};
use crate::agent_config::AgentConfig;
use crate::cluster::{HeldReservation, RemoteReservation, StoreView};
use crate::http::{Request, Response};
use crate::model::{Bytes, HostFacts, Ledger};
use crate::reservations::{Reservation, ReservationError, ReservationPhase, Reservations};

/// Maximum length of a VM's name.
const NAME_BYTES_MAX: usize = 256;

/// The basis of a decision: the configuration, and the current host and VMs.
#[derive(Clone, Copy)]
pub(super) struct Situation<'a> {
    pub(super) config: &'a AgentConfig,
    pub(super) facts: &'a HostFacts,
    pub(super) rounds: &'a VmRounds,
    pub(super) standby: &'a Standbys,
}

impl Situation<'_> {
    /// For how many seconds the host could not be read, if that is too long to grant reservations.
    fn blind_for(&self) -> Option<u64> {
        let age_ms = self.rounds.now_ms().saturating_sub(self.facts.at_ms);
        let most = self.config.planning.admission.facts_age_max;
        (age_ms > most.0).then_some(age_ms / 1000)
    }
}

/// Maximum number of refused VMs whose needs are kept.
const WAITING_MAX: usize = 256;

/// A refusal.
struct Refused {
    why: String,
    /// Whether it can never fit on this host.
    for_good: bool,
    /// The memory needed, if only memory is missing.
    needs: Option<Bytes>,
}

impl Refused {
    fn now(why: String) -> Self {
        Self {
            why,
            for_good: false,
            needs: None,
        }
    }

    fn of(refusal: &Refusal) -> Self {
        let short = |obstacle: &Obstacle| matches!(obstacle, Obstacle::Short(_));
        let too_large = |obstacle: &Obstacle| matches!(obstacle, Obstacle::TooLarge(_));
        Self {
            why: refusal.to_string(),
            for_good: refusal.obstacles.iter().any(too_large),
            needs: (refusal.obstacles.iter().all(short)).then_some(refusal.needed),
        }
    }
}

/// The requested amount of either kind of memory.
trait HasSize {
    /// Memory of the VM.
    fn size(&self) -> Bytes;
}

impl HasSize for Wanted {
    fn size(&self) -> Bytes {
        self.max
    }
}

impl HasSize for Bytes {
    fn size(&self) -> Bytes {
        *self
    }
}

/// A VM that was refused, and may try again.
#[derive(Debug)]
struct Waiting {
    needs: Bytes,
    asked_ms: u64,
}

/// All reservations of this host.
#[derive(Debug)]
pub(super) struct Promises {
    book: Reservations,
    clock: Clock,
    counts: AdmissionCounts,
    /// By name.
    waiting: BTreeMap<String, Waiting>,
}

impl Promises {
    pub(super) fn new(book: Reservations, clock: Clock) -> Self {
        Self {
            book,
            clock,
            counts: AdmissionCounts::default(),
            waiting: BTreeMap::new(),
        }
    }

    /// The responses so far.
    pub(super) fn counts(&self) -> &AdmissionCounts {
        &self.counts
    }

    /// Memory that is reserved and not used yet.
    pub(super) fn outstanding(&self, config: &AgentConfig, rounds: &VmRounds) -> Bytes {
        self.book.outstanding(
            self.clock.moment(),
            config.planning.admission.reservation,
            |name| rounds.seen(name),
        )
    }

    /// The needs of each refused VM, while a reservation for it would have been kept.
    pub(super) fn wanted(&mut self, config: &AgentConfig, rounds: &VmRounds) -> Vec<Bytes> {
        let oldest_ms = rounds
            .now_ms()
            .saturating_sub(config.planning.admission.reservation.0);
        self.waiting
            .retain(|vm, waiting| waiting.asked_ms >= oldest_ms && !rounds.has_vm(vm));
        self.waiting.values().map(|waiting| waiting.needs).collect()
    }

    /// `PUT fleet.reserve`
    pub(super) fn reserve(
        &mut self,
        request: &Request,
        situation: Situation<'_>,
        journal: &mut Journal,
    ) -> Result<Response, Response> {
        let asked: ReserveRequest = request.json()?;
        let vm = vm_name(&asked.vm, situation.rounds)?;
        if situation.standby.holds(&vm) {
            return Err(Response::error(409, &[in_standby(&vm)]));
        }
        self.reserve_for(&vm, &asked, uid_of(request), situation, journal)
            .map(|answer| Response::json(&answer))
    }

    /// The same for a VM that may be in standby.
    pub(super) fn reserve_for(
        &mut self,
        vm: &str,
        asked: &ReserveRequest,
        uid: u32,
        situation: Situation<'_>,
        journal: &mut Journal,
    ) -> Result<ReserveAnswer, Response> {
        let config = situation.config;
        let policy = config.vm_policy(vm, asked.memory);
        let wanted = Wanted {
            min: asked.min.unwrap_or(policy.min).min(asked.memory),
            max: asked.memory,
        };
        if let Some(held) = self.held_already(vm, (wanted, asked.huge_pages), uid, situation) {
            return Ok(held);
        }
        let verdict = if asked.huge_pages {
            self.verdict(vm, &wanted.max, situation, journal, Self::admit_to_pool)
        } else {
            self.verdict(vm, &wanted, situation, journal, Self::admit)
        };
        if !asked.dry_run {
            let needs = verdict.as_ref().err().and_then(|refused| refused.needs);
            self.remember(vm, needs, situation.rounds.now_ms());
        }
        let admission = verdict.map_err(|refused| {
            let what = format!("{} for {vm:?} are refused", asked.memory);
            let status = if refused.for_good { 422 } else { 409 };
            Response::error(status, &[what, refused.why])
        })?;
        let reservation = if asked.dry_run {
            None
        } else {
            let hold = config.planning.admission.reservation;
            let made = self
                .book
                .reserve(
                    vm,
                    (wanted.max, admission.promise),
                    asked.huge_pages,
                    uid,
                    (self.clock.moment(), hold),
                )
                .map_err(|error| book_error(&error))?;
            Some(made)
        };
        Ok(ReserveAnswer {
            reservation,
            firm_free_after: admission.left,
        })
    }

    /// Ids of the remote reservations whose VM does not run yet.
    pub(super) fn remote_ids(&self) -> BTreeSet<String> {
        let waiting = self.held_for_others();
        waiting.into_iter().map(|held| held.id).collect()
    }

    /// Keeps the reservations of VMs that are being moved here, until they run.
    pub(super) fn keep(&mut self, ids: &BTreeSet<String>, config: &AgentConfig) {
        let hold = config.planning.admission.reservation;
        for id in ids {
            match self.book.prolong(id, self.clock.moment(), hold) {
                Ok(()) | Err(ReservationError::Unknown { .. }) => {}
                Err(error) => log::error!("{}", api::chain_report("reservations", &error)),
            }
        }
    }

    /// Drops the reservation of a VM whose memory is free.
    pub(super) fn forget(&mut self, vm: &str) {
        match self.book.release(vm) {
            Ok(_) | Err(ReservationError::Unknown { .. }) => {}
            Err(error) => log::error!("{}", api::chain_report("reservations", &error)),
        }
    }

    /// `PUT fleet.confirm`
    pub(super) fn confirm(
        &mut self,
        request: &Request,
        config: &AgentConfig,
    ) -> Result<Response, Response> {
        let asked: ConfirmRequest = request.json()?;
        self.may_change(&asked.reservation, request)?;
        let hold = config.planning.admission.reservation;
        let confirmed = self
            .book
            .confirm(&asked.reservation, self.clock.moment(), hold)
            .map_err(|error| book_error(&error))?;
        Ok(Response::json(&confirmed))
    }

    /// `PUT fleet.release`
    pub(super) fn release(
        &mut self,
        request: &Request,
        journal: &mut Journal,
    ) -> Result<Response, Response> {
        let asked: ReleaseRequest = request.json()?;
        self.may_change(&asked.reservation, request)?;
        let released: Reservation = self
            .book
            .release(&asked.reservation)
            .map_err(|error| book_error(&error))?;
        let text = format!("reservation of {} released", released.promised);
        journal.enter("admission", &released.vm, text);
        Ok(Response::json(&released))
    }

    /// Follows the VMs: the reservations of VMs that arrived are consumed; those of VMs that left and expired ones are
    /// dropped.
    pub(super) fn follow(&mut self, rounds: &VmRounds, journal: &mut Journal) {
        match self
            .book
            .follow(self.clock.moment(), |name| rounds.seen(name))
        {
            Ok(dropped) => {
                for entry in dropped {
                    let text = format!(
                        "reservation of {} given back, it was {}",
                        entry.promised,
                        entry.phase.name()
                    );
                    journal.enter("admission", &entry.vm, text);
                }
            }
            Err(error) => log::error!("{}", api::chain_report("reservations", &error)),
        }
    }

    /// Decides on requests from the store, after releasing reservations that were withdrawn there. Returns the refused
    /// lines, with the reason.
    pub(super) fn answer_lines(
        &mut self,
        view: &StoreView,
        situation: Situation<'_>,
        journal: &mut Journal,
    ) -> BTreeMap<String, String> {
        if let Some(lines) = &view.lines {
            self.release_withdrawn(lines, journal);
        }
        let mut refused = BTreeMap::new();
        for entry in &view.asked {
            if let Err(why) = self.promise(entry, situation, journal) {
                refused.insert(entry.id.clone(), why);
            }
        }
        refused
    }

    /// Remote reservations whose VM does not run yet.
    pub(super) fn held_for_others(&self) -> Vec<HeldReservation> {
        self.book
            .entries()
            .iter()
            .filter(|entry| entry.remote && entry.phase != ReservationPhase::Running)
            .map(|entry| HeldReservation {
                id: entry.id.clone(),
                vm: entry.vm.clone(),
                max: entry.configured,
                promise: entry.promised,
                starting: entry.phase == ReservationPhase::Starting,
            })
            .collect()
    }

    /// The ledger for admission: with the whole size of pending VMs.
    pub(super) fn headroom(&self, situation: Situation<'_>) -> HostHeadroom {
        let mut ledger = self.ledger(situation);
        // Admission counts reservations towards all memory; pending VMs may grow larger than that.
        let unseen = self
            .book
            .entries()
            .iter()
            .filter(|entry| !entry.huge_pages && situation.rounds.seen(&entry.vm).is_none());
        let unseen: Bytes = unseen.map(|entry| entry.configured).sum();
        ledger.configured += unseen - ledger.promised;
        HostHeadroom {
            ledger,
            ..situation.rounds.plan().headroom()
        }
    }

    pub(super) fn status(&self, config: &AgentConfig, rounds: &VmRounds) -> Vec<ReservationStatus> {
        let settle = config.planning.admission.reservation;
        let each = self
            .book
            .outstanding_each(self.clock.moment(), settle, |name| rounds.seen(name));
        each.map(|(entry, outstanding)| ReservationStatus {
            reservation: entry.clone(),
            outstanding,
        })
        .collect()
    }

    fn ledger(&self, situation: Situation<'_>) -> Ledger {
        let promised = self.outstanding(situation.config, situation.rounds);
        situation
            .rounds
            .ledger(situation.config, situation.facts, promised)
    }

    /// The response to a client that already has a reservation.
    fn held_already(
        &self,
        vm: &str,
        (wanted, huge_pages): (Wanted, bool),
        uid: u32,
        situation: Situation<'_>,
    ) -> Option<ReserveAnswer> {
        let held = self.book.find(vm)?;
        let same =
            held.configured == wanted.max && held.huge_pages == huge_pages && held.owner_uid == uid;
        same.then(|| {
            let left = if huge_pages {
                self.pool_left(situation)
            } else {
                self.ledger(situation).firm_free
            };
            ReserveAnswer {
                reservation: Some(held.clone()),
                firm_free_after: left,
            }
        })
    }

    /// Records that a VM waits for memory, or no longer waits.
    fn remember(&mut self, vm: &str, needs: Option<Bytes>, now_ms: u64) {
        let Some(needs) = needs else {
            self.waiting.remove(vm);
            return;
        };
        if self.waiting.len() < WAITING_MAX || self.waiting.contains_key(vm) {
            let asked_ms = now_ms;
            self.waiting
                .insert(vm.to_owned(), Waiting { needs, asked_ms });
        }
    }

    /// Decides by the ledger of the host's memory.
    fn admit(&mut self, wanted: &Wanted, situation: Situation<'_>) -> Result<Admission, Refused> {
        let verdict = admit(
            wanted,
            &self.headroom(situation),
            &situation.config.planning,
        );
        match &verdict {
            Ok(_) => self.counts.count("admitted", "ok"),
            Err(refusal) => self.counts.count("refused", reason_of(refusal)),
        }
        verdict.map_err(|refusal| Refused::of(&refusal))
    }

    /// Decides by the ledger of the pool of huge pages: no VM returns any of them, so all of the VM must fit.
    fn admit_to_pool(
        &mut self,
        size: &Bytes,
        situation: Situation<'_>,
    ) -> Result<Admission, Refused> {
        let free = self.pool_left(situation);
        if *size <= free {
            self.counts.count("admitted", "ok");
            return Ok(Admission {
                promise: *size,
                left: free - *size,
            });
        }
        self.counts.count("refused", "pool");
        let total = situation.facts.pool.total;
        Err(Refused {
            why: format!(
                "{size} of huge pages requested; {free} of the {total} pool can be reserved",
            ),
            for_good: *size > total,
            needs: None,
        })
    }

    /// Memory of the pool of huge pages that can be reserved.
    fn pool_left(&self, situation: Situation<'_>) -> Bytes {
        let Situation {
            config,
            facts,
            rounds,
            ..
        } = situation;
        let callable = rounds.pool_callable(&facts.pool);
        facts.pool.firm_free(callable) - self.pool_promised(config, rounds)
    }

    /// Memory of the pool of huge pages that is reserved and not taken yet.
    pub(super) fn pool_promised(&self, config: &AgentConfig, rounds: &VmRounds) -> Bytes {
        let settle = config.planning.admission.reservation;
        self.book
            .outstanding_pool(self.clock.moment(), settle, |name| rounds.seen(name))
    }

    /// The acceptance, or the refusal from `decide`, if anything can be reserved now.
    fn verdict<W: HasSize>(
        &mut self,
        vm: &str,
        wanted: &W,
        situation: Situation<'_>,
        journal: &mut Journal,
        decide: impl FnOnce(&mut Self, &W, Situation<'_>) -> Result<Admission, Refused>,
    ) -> Result<Admission, Refused> {
        let verdict = if let Some(seconds) = situation.rounds.learns_for() {
            self.counts.count("refused", "learning");
            Err(Refused::now(format!(
                "the agent has just started and does not know every VM yet: retry in {seconds} s"
            )))
        } else if let Some(seconds) = situation.blind_for() {
            self.counts.count("refused", "stale-host");
            Err(Refused::now(format!(
                "the host's memory could not be read for {seconds} s: nothing is reserved until it can"
            )))
        } else {
            decide(self, wanted, situation)
        };
        let size = wanted.size();
        let text = match &verdict {
            Ok(admission) => format!("{size} admitted, {} reserved", admission.promise),
            Err(refused) => format!("{size} refused: {}", refused.why),
        };
        journal.enter("admission", vm, text);
        verdict
    }

    fn promise(
        &mut self,
        entry: &RemoteReservation,
        situation: Situation<'_>,
        journal: &mut Journal,
    ) -> Result<(), String> {
        let held = self.book.find(&entry.id);
        if let Some(held) = held {
            // A line with another request's id must not receive that request's reservation.
            let same = held.id == entry.id
                && held.remote
                && held.vm == entry.vm
                && held.configured == entry.max;
            return match same {
                true => Ok(()),
                false => Err(format!(
                    "reservation id {:?} is already in use on this host",
                    entry.id
                )),
            };
        }
        let vm = checked_name(entry.vm.clone())?;
        if situation.rounds.has_vm(&vm) {
            return Err(format!("VM {vm:?} is already running on this host"));
        }
        if situation.standby.holds(&vm) {
            return Err(in_standby(&vm));
        }
        let wanted = entry.request();
        let verdict = self.verdict(&vm, &wanted, situation, journal, Self::admit);
        // The planner requests the missing memory from guests, as for a VM that was refused locally.
        let needs = verdict.as_ref().err().and_then(|refused| refused.needs);
        self.remember(&vm, needs, situation.rounds.now_ms());
        let admission = verdict.map_err(|refused| refused.why)?;
        let hold = situation.config.planning.admission.reservation;
        self.book
            .reserve_remote(
                &entry.id,
                &vm,
                (wanted.max, admission.promise),
                rustix::process::getuid().as_raw(),
                (self.clock.moment(), hold),
            )
            .map(drop)
            // It was admitted, but cannot be saved.
            .map_err(|error| api::error_line(&error))
    }

    /// Releases reservations that their clients withdrew, except those of VMs that are being started.
    fn release_withdrawn(&mut self, lines: &[String], journal: &mut Journal) {
        let withdrawn: Vec<String> = self
            .book
            .entries()
            .iter()
            .filter(|entry| entry.remote && entry.phase == ReservationPhase::Promised)
            .filter(|entry| !lines.contains(&entry.id))
            .map(|entry| entry.id.clone())
            .collect();
        for id in withdrawn {
            match self.book.release(&id) {
                Ok(entry) => {
                    let text = format!(
                        "reservation of {} withdrawn through the store",
                        entry.promised
                    );
                    journal.enter("admission", &entry.vm, text);
                }
                Err(error) => log::error!("{}", api::chain_report("reservations", &error)),
            }
        }
    }

    /// Only the creator of a reservation, and root, may change it.
    fn may_change(&self, key: &str, request: &Request) -> Result<(), Response> {
        let uid = uid_of(request);
        match self.book.find(key) {
            Some(entry) if uid != 0 && entry.owner_uid != uid => Err(Response::error(
                403,
                &[format!("The reservation {key:?} belongs to another client")],
            )),
            _ => Ok(()),
        }
    }
}

fn in_standby(vm: &str) -> String {
    format!("{vm:?} is in standby: wake or discard it")
}

pub(super) fn uid_of(request: &Request) -> u32 {
    request.peer.map_or(u32::MAX, |peer| peer.uid)
}

/// The name that discovery will use: a path is a socket that may not exist yet.
fn vm_name(vm: &str, rounds: &VmRounds) -> Result<String, Response> {
    let name = if vm.starts_with('/') {
        rounds.name_of_socket(vm.as_ref())
    } else {
        Some(vm.to_owned())
    };
    let refuse = |text: String| Response::error(400, &[text]);
    let name = name.ok_or_else(|| {
        refuse(format!(
            "The socket {vm} matches none of the patterns in discovery.sockets, so the agent would not manage the VM"
        ))
    })?;
    checked_name(name).map_err(refuse)
}

/// A valid name of a VM.
fn checked_name(name: String) -> Result<String, String> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
        return Err(format!("{name:?} is not a valid name for a VM"));
    }
    Ok(name)
}

/// The first obstacle as a word for metrics.
fn reason_of(refusal: &Refusal) -> &'static str {
    match refusal.obstacles.first() {
        Some(Obstacle::State(_)) => "state",
        Some(Obstacle::Overcommit { .. }) => "overcommit",
        Some(Obstacle::TooLarge(_)) => "too-large",
        Some(Obstacle::Short(_)) | None => "memory",
    }
}

fn book_error(error: &ReservationError) -> Response {
    let status = match error {
        ReservationError::Held { .. } | ReservationError::Full => 409,
        ReservationError::Unknown { .. } => 404,
        ReservationError::Save(_) => 500,
    };
    Response::error(status, &api::error_chain(error))
}
