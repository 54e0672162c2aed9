//! Makes the steps of all moves from and to one host.
//!
//! Everything that matters is in the store or in the VMMs. What is kept here only saves repeated requests, so a mover
//! that was killed is replaced by a new one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::admission::Request;
use crate::cluster::{
    Keys, MovePhase, MovePicture, MoveRecord, PlaceError, Placed, StoredMove, Wanted, remove_move,
    write_move,
};
use crate::host::ProcessIdentity;
use crate::model::Bytes;
use crate::state_file::boot_id;
use crate::store::{Revision, Store, StoreError};

use super::step::{Here, SendOrder, SourceSight, Step, TargetSight, There};
use super::vmms::{Seen, SendRequest, Sent, Vmms};

/// Minimum time between two writes of the progress.
const PROGRESS_MS: u64 = 1000;
/// Minimum time between two requests of the same kind.
const AGAIN_MS: u64 = 1000;

/// A VM of this host.
#[derive(Clone, Debug)]
pub(crate) struct HomeVm {
    pub(crate) name: String,
    pub(crate) socket: PathBuf,
    pub(crate) process: Option<ProcessIdentity>,
    pub(crate) request: Request,
    /// Why it cannot be moved now.
    pub(crate) obstacle: Option<String>,
}

/// This host, as its control loop knows it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Home {
    pub(crate) now_ms: u64,
    pub(crate) vms: Vec<HomeVm>,
    /// VMs that are in standby, or on the way there or back.
    pub(crate) standby: BTreeSet<String>,
    /// Ids of the reservations for VMs that do not run yet.
    pub(crate) reserved: BTreeSet<String>,
}

/// What the control loop must know about the moves.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct MoveNews {
    /// VMs to be left alone.
    pub(crate) held: BTreeSet<String>,
    /// Ids of reservations that must not expire.
    pub(crate) kept: BTreeSet<String>,
    /// Reservations that are no longer needed, by id or VM.
    pub(crate) released: BTreeSet<String>,
    /// Events: the VM, and the text.
    pub(crate) events: Vec<(String, String)>,
    /// The moves from and to this host.
    pub(crate) moves: Vec<MoveRecord>,
}

/// What this mover knows of one move.
#[derive(Debug, Default)]
struct Memo {
    phase: Option<MovePhase>,
    since_ms: u64,
    send: SendOrder,
    /// Since when the VM runs and is not sent after an accepted request.
    idle_ms: Option<u64>,
    is_started: bool,
    asked_ms: Option<u64>,
    progress_ms: u64,
}

/// The moves of one host.
pub(crate) struct Mover<'a> {
    host: String,
    keys: Keys,
    store: &'a dyn Store,
    reserve: &'a dyn Fn(&Wanted) -> Result<Placed, PlaceError>,
    /// Time limit of a call to the store.
    call: Duration,
    memos: BTreeMap<(String, String), Memo>,
    released: BTreeSet<String>,
    events: Vec<(String, String)>,
}

impl<'a> Mover<'a> {
    /// `reserve` reserves memory for a VM on another host.
    pub(crate) fn new(
        host: String,
        (store, keys): (&'a dyn Store, Keys),
        reserve: &'a dyn Fn(&Wanted) -> Result<Placed, PlaceError>,
        call: Duration,
    ) -> Self {
        Self {
            host,
            keys,
            store,
            reserve,
            call,
            memos: BTreeMap::new(),
            released: BTreeSet::new(),
            events: Vec::new(),
        }
    }

    fn until(&self) -> Instant {
        Instant::now() + self.call
    }

    /// All moves, for the control loop, which must know them before the next steps are made.
    ///
    /// # Errors
    /// The store does not respond.
    pub(crate) fn look(&mut self) -> Result<(MovePicture, MoveNews), StoreError> {
        let picture = MovePicture::read(self.store, &self.keys, self.until())?;
        let mut news = MoveNews {
            released: std::mem::take(&mut self.released),
            events: std::mem::take(&mut self.events),
            ..MoveNews::default()
        };
        for StoredMove { record, .. } in &picture.moves {
            let (leaves, comes) = (record.from == self.host, record.to == self.host);
            let is_held = record.phase.is_under_way() || record.phase == MovePhase::Arrived;
            if leaves && is_held || comes && record.phase.is_under_way() {
                news.held.insert(record.vm.clone());
            }
            if comes && record.phase.is_under_way() {
                news.kept.insert(record.reservation.clone());
            }
            if leaves || comes {
                news.moves.push(record.clone());
            }
        }
        self.forget(&picture);
        Ok((picture, news))
    }

    fn forget(&mut self, picture: &MovePicture) {
        self.memos.retain(|(from, vm), _| {
            let mut records = picture.moves.iter().map(|stored| &stored.record);
            records.any(|record| record.from == *from && record.vm == *vm)
        });
    }

    /// Makes the steps that are possible now, and begins further moves.
    ///
    /// # Errors
    /// The store does not respond.
    pub(crate) fn round(
        &mut self,
        picture: &MovePicture,
        home: &Home,
        vmms: &mut dyn Vmms,
    ) -> Result<(), StoreError> {
        for stored in &picture.moves {
            self.note_phase(&stored.record, home.now_ms);
            if stored.record.from == self.host {
                self.step_source(stored, home, vmms)?;
            } else if stored.record.to == self.host {
                self.step_target(stored, home, vmms)?;
            }
        }
        self.begin(picture, home, vmms)
    }

    fn note_phase(&mut self, record: &MoveRecord, now_ms: u64) {
        if record.from != self.host && record.to != self.host {
            return;
        }
        let memo = self.memos.entry(key(record)).or_default();
        if memo.phase == Some(record.phase) {
            return;
        }
        if record.phase == MovePhase::Reserved {
            // What is known of an earlier move of the VM does not apply to this one.
            *memo = Memo::default();
        }
        memo.phase = Some(record.phase);
        memo.since_ms = now_ms;
        memo.asked_ms = None;
        let text = match record.why.as_str() {
            "" => format!("{} → {}: {}", record.from, record.to, record.phase),
            why => format!("{} → {}: {}: {why}", record.from, record.to, record.phase),
        };
        self.events.push((record.vm.clone(), text));
    }

    fn step_source(
        &mut self,
        stored: &StoredMove,
        home: &Home,
        vmms: &mut dyn Vmms,
    ) -> Result<(), StoreError> {
        let record = &stored.record;
        if record.phase.is_over() || record.phase == MovePhase::Failing {
            return Ok(());
        }
        let (here, sent) = here(record, vmms);
        let now_ms = home.now_ms;
        let memo = self.memos.entry(key(record)).or_default();
        let idles = memo.send == SendOrder::Accepted
            && matches!(
                here,
                Here::Vm {
                    is_sending: false,
                    is_paused: false
                }
            );
        memo.idle_ms = idles.then(|| memo.idle_ms.unwrap_or(now_ms));
        let step = SourceSight {
            record,
            age_ms: now_ms.saturating_sub(memo.since_ms),
            here,
            is_in_standby: home.standby.contains(&record.vm),
            order: &memo.send,
            idle_ms: memo.idle_ms.map_or(0, |since| now_ms.saturating_sub(since)),
        }
        .step();
        if step == Step::Send {
            memo.send = send(record, vmms);
            return Ok(());
        }
        if let Some(sent) = sent
            && step == Step::Wait
            && sent != record.sent
            && now_ms.saturating_sub(memo.progress_ms) >= PROGRESS_MS
        {
            memo.progress_ms = now_ms;
            let record = MoveRecord {
                sent,
                ..record.clone()
            };
            return self.write(&record, stored.changed);
        }
        self.take(step, stored)
    }

    fn step_target(
        &mut self,
        stored: &StoredMove,
        home: &Home,
        vmms: &mut dyn Vmms,
    ) -> Result<(), StoreError> {
        let record = &stored.record;
        if matches!(record.phase, MovePhase::Arrived | MovePhase::Failed) {
            return Ok(());
        }
        let socket = match vmms.socket_of(&record.vm) {
            Ok(socket) => socket,
            Err(why) if record.phase == MovePhase::Reserved => {
                return self.take(Step::Become(MovePhase::Failed, why), stored);
            }
            Err(_) => return Ok(()),
        };
        let there = match vmms.look(&socket) {
            Seen::Nobody => There::Gone,
            Seen::Silent => There::Silent,
            Seen::Empty(_) => There::Empty,
            Seen::Vm(vm) => There::Vm {
                runs: !vm.is_paused,
            },
        };
        let order = vmms.received(&socket);
        let is_new = record.phase == MovePhase::Reserved;
        let obstacle = is_new.then(|| obstacle(record, home, vmms)).flatten();
        let now_ms = home.now_ms;
        let memo = self.memos.entry(key(record)).or_default();
        let step = TargetSight {
            record,
            age_ms: now_ms.saturating_sub(memo.since_ms),
            there,
            order: &order,
            is_started: memo.is_started,
            obstacle,
        }
        .step();
        let is_request = matches!(step, Step::Receive | Step::ReceiveAgain | Step::End);
        if is_request {
            // A VMM may not respond to a request in progress at once.
            if memo
                .asked_ms
                .is_some_and(|at| now_ms.saturating_sub(at) < AGAIN_MS)
            {
                return Ok(());
            }
            memo.asked_ms = Some(now_ms);
        }
        match step {
            Step::Start => {
                memo.is_started = true;
                if let Err(why) = vmms.start(&socket) {
                    return self.take(Step::Become(MovePhase::Failing, why), stored);
                }
                Ok(())
            }
            Step::Receive => {
                vmms.receive(&socket, None);
                Ok(())
            }
            Step::ReceiveAgain => {
                vmms.receive(&socket, record.url.as_deref());
                Ok(())
            }
            Step::End => {
                vmms.end(&socket);
                Ok(())
            }
            step => self.take(step, stored),
        }
    }

    /// Makes a step that changes the record.
    fn take(&mut self, step: Step, stored: &StoredMove) -> Result<(), StoreError> {
        let record = &stored.record;
        match step {
            Step::Become(phase, why) => {
                if phase == MovePhase::Failed {
                    self.released.insert(record.reservation.clone());
                }
                self.write(&record.with(phase, &why), stored.changed)
            }
            Step::Listen(url) => {
                let record = record.with(MovePhase::Receiving, "");
                let url = Some(url);
                self.write(&MoveRecord { url, ..record }, stored.changed)
            }
            Step::TellEnd => {
                let record = MoveRecord {
                    source_gone: true,
                    ..record.clone()
                };
                self.write(&record, stored.changed)
            }
            Step::Refuse(why) => self.write(&record.with_refusal(&why), stored.changed),
            Step::Remove => {
                let text = format!("runs on {}", record.to);
                self.events.push((record.vm.clone(), text));
                // Otherwise the VM could not return for a while.
                self.released.insert(record.vm.clone());
                self.ignore(remove_move(self.store, &self.keys, stored, self.until()))
            }
            _ => Ok(()),
        }
    }

    fn write(&self, record: &MoveRecord, changed: Revision) -> Result<(), StoreError> {
        let until = self.until();
        self.ignore(write_move(self.store, &self.keys, (record, changed), until))
    }

    /// The next round reads what was written, so it does not matter here whether it was.
    fn ignore(&self, result: Result<bool, StoreError>) -> Result<(), StoreError> {
        match result {
            Ok(_) | Err(StoreError::Unknown { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Begins the move of one more VM, if there is an order and not too many are under way.
    fn begin(
        &mut self,
        picture: &MovePicture,
        home: &Home,
        vmms: &mut dyn Vmms,
    ) -> Result<(), StoreError> {
        let Some(order) = picture.orders.get(&self.host) else {
            return Ok(());
        };
        let mine: Vec<&MoveRecord> = picture.from(&self.host).collect();
        let under_way = mine.iter().filter(|it| it.phase.is_under_way()).count();
        if under_way >= order.parallel as usize {
            return Ok(());
        }
        let mut left: Vec<&HomeVm> = home
            .vms
            .iter()
            .filter(|vm| mine.iter().all(|record| record.vm != vm.name))
            // A VM that has just arrived here, or is about to, is not this order's.
            .filter(|vm| {
                let mut moves = picture.moves.iter().map(|stored| &stored.record);
                !moves.any(|record| record.to == self.host && record.vm == vm.name)
            })
            .collect();
        // The largest first, because it fits on the fewest hosts.
        left.sort_by(|a, b| (b.request.min, &a.name).cmp(&(a.request.min, &b.name)));
        let Some(vm) = left.first() else {
            return Ok(());
        };
        let record = MoveRecord {
            bytes_per_second_max: order.share(),
            ..self.planned(vm, vmms)?
        };
        self.memos.remove(&key(&record));
        self.write(&record, Revision(0))
    }

    /// The record of a new move: with the memory reserved, or with the reason why the VM stays.
    fn planned(&self, vm: &HomeVm, vmms: &mut dyn Vmms) -> Result<MoveRecord, StoreError> {
        let record = MoveRecord {
            vm: vm.name.clone(),
            from: self.host.clone(),
            to: String::new(),
            phase: MovePhase::Failed,
            reservation: String::new(),
            socket: vm.socket.display().to_string(),
            process: vm.process.map(|process| (process, boot_id())),
            memory: vm.request.max,
            needs: crate::cluster::Needs::default(),
            url: None,
            refused: None,
            source_gone: false,
            why: String::new(),
            sent: Bytes::ZERO,
            bytes_per_second_max: None,
        };
        let stays = |why: &str| Ok(record.with(MovePhase::Failed, why));
        if let Some(why) = &vm.obstacle {
            return stays(why);
        }
        if vm.process.is_none() {
            return stays("the process of its VMM is unknown");
        }
        let needs = match vmms.needs(&vm.socket) {
            Ok(needs) => needs,
            Err(why) => return stays(&why),
        };
        let wanted = Wanted {
            vm: vm.name.clone(),
            request: vm.request,
            placer: format!("the agent of {}", self.host),
        };
        match (self.reserve)(&wanted) {
            Ok(placed) => Ok(MoveRecord {
                to: placed.host,
                reservation: placed.id,
                phase: MovePhase::Reserved,
                needs,
                ..record
            }),
            Err(PlaceError::Store(error)) => Err(error),
            Err(error) => stays(&api::error_line(&error)),
        }
    }
}

fn key(record: &MoveRecord) -> (String, String) {
    (record.from.clone(), record.vm.clone())
}

/// The VM on this host, and the bytes that were sent.
fn here(record: &MoveRecord, vmms: &mut dyn Vmms) -> (Here, Option<Bytes>) {
    let process = record.process.as_ref();
    let process = process.filter(|(_, boot)| *boot == boot_id());
    let Some((process, _)) = process.filter(|(process, _)| !vmms.has_ended(*process)) else {
        return (Here::Gone, None);
    };
    match vmms.look(Path::new(&record.socket)) {
        Seen::Vm(vm) if vm.process == Some(*process) => {
            let here = Here::Vm {
                is_paused: vm.is_paused,
                is_sending: vm.sending.is_some(),
            };
            (here, vm.sending)
        }
        // Its VM was deleted: a VMM that has sent its VM ends.
        Seen::Empty(found) if found == Some(*process) => (Here::Gone, None),
        // It lives, but does not tell.
        _ => (Here::Silent, None),
    }
}

fn send(record: &MoveRecord, vmms: &mut dyn Vmms) -> SendOrder {
    let (Some((process, _)), Some(url)) = (&record.process, &record.url) else {
        return SendOrder::Refused("the record of the move is incomplete".to_owned());
    };
    let request = SendRequest {
        url,
        bytes_per_second_max: record.bytes_per_second_max,
    };
    match vmms.send(Path::new(&record.socket), *process, &request) {
        Sent::Accepted => SendOrder::Accepted,
        Sent::Refused(why) => SendOrder::Refused(why),
        Sent::Unknown => SendOrder::Unknown,
    }
}

/// Why this host cannot run the VM.
fn obstacle(record: &MoveRecord, home: &Home, vmms: &mut dyn Vmms) -> Option<String> {
    if home.standby.contains(&record.vm) {
        return Some("a VM of this name is in standby there".to_owned());
    }
    if !home.reserved.contains(&record.reservation) {
        return Some("the reservation has expired".to_owned());
    }
    vmms.missing(&record.needs)
}
