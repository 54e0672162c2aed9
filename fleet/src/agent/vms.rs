//! The VMs of this host: the thread of each, its last reading, and its orders in progress.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::locks::VmLock;
use crate::execute::{Order, OrderError};
use crate::host::{Process, ProcessIdentity};
use crate::model::{
    Bytes, FeatureLevel, GuestClaims, InForce, Interlock, Lessons, VmFacts, VmId, VmPolicy,
};
use crate::sample::{Found, SocketIdentity, VmReading};
use crate::worker::{OrderDone, VmWorker};

/// An unconfirmed order that returns memory is sent again after this time, doubled each time.
const RESEND_MS: u64 = 1000;
/// Maximum interval.
const RESEND_MS_MAX: u64 = 30_000;
/// An act that could not be undone is tried again after this time.
const UNDO_AGAIN_MS: u64 = 5000;

/// A balloon order that ended without a confirmation or rejection.
#[derive(Clone, Copy, Debug)]
struct Unconfirmed {
    to: Bytes,
    /// Whether it returns memory: such an order is sent until it is confirmed.
    gives: bool,
    tries: u32,
    /// When that was known, and when it is sent again, on the planner's clock.
    at_ms: u64,
    again_ms: u64,
}

/// One VM.
#[derive(Debug)]
pub(super) struct Vm {
    pub(super) id: VmId,
    pub(super) socket: PathBuf,
    pub(super) identity: SocketIdentity,
    owner: u32,
    pub(super) worker: VmWorker,
    _lock: VmLock,
    /// The process behind the socket from which the last reading came.
    process: u64,
    pub(super) epoch: u64,
    pub(super) reading: Option<VmReading>,
    pub(super) rates: Rates,
    pub(super) missed: u32,
    pub(super) failure: Option<&'static str>,
    /// A balloon that was ordered and is not confirmed.
    pub(super) ordered: Option<Bytes>,
    unconfirmed: Option<Unconfirmed>,
    /// Orders that have not ended, those of them that undo something, and when the last one ended.
    pub(super) orders: u32,
    undoings: u32,
    order_ended_ms: u64,
    /// Whether an order may still be executed later: the VMM did not respond to it, and has responded to none since.
    /// The same holds for orders of an agent before this one.
    order_left: bool,
    /// Until then nothing is undone, because an attempt was made a moment ago.
    undo_again_ms: u64,
    /// The direction in which the balloon was last moved, and when, on the planner's clock.
    pub(super) moved: Option<(Direction, u64)>,
    pub(super) pinned: bool,
    /// Whether it is being saved or woken.
    held: bool,
    /// Whether it is being moved to or from another host.
    moves: bool,
}

/// The direction of a balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Inflate,
    Deflate,
}

/// Change between the last two readings.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rates {
    pub(super) net_per_s: i64,
    pub(super) repopulated_per_s: u64,
}

/// All of them by name, and the numbers that distinguish machines.
#[derive(Debug, Default)]
pub(super) struct Vms {
    by_name: BTreeMap<VmId, Vm>,
    workers: u64,
    epochs: u64,
    /// Sockets that are not served, with reasons.
    refused: BTreeMap<VmId, (SocketIdentity, StartRefusal)>,
}

/// The reason why a socket is not served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StartRefusal {
    pub(super) why: String,
    /// Number of further scans for which this result is reused, because the check is expensive.
    pub(super) looks: u32,
}

impl From<std::io::Error> for StartRefusal {
    fn from(error: std::io::Error) -> Self {
        Self {
            why: error.to_string(),
            looks: 0,
        }
    }
}

/// The changes found by a scan for sockets.
#[derive(Debug, Default)]
pub(super) struct ScanChange {
    pub(super) appeared: Vec<VmId>,
    pub(super) replaced: Vec<VmId>,
    pub(super) went: Vec<VmId>,
    /// Sockets that are newly refused.
    pub(super) refused: Vec<(VmId, String)>,
}

impl Vms {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Vm> {
        self.by_name.values()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Vm> {
        self.by_name.values_mut()
    }

    pub(super) fn get(&self, name: &str) -> Option<&Vm> {
        self.by_name.get(name)
    }

    pub(super) fn get_mut(&mut self, name: &str) -> Option<&mut Vm> {
        self.by_name.get_mut(name)
    }

    /// Processes the sockets found. `start` creates the thread for a socket under a unique number.
    pub(super) fn follow(
        &mut self,
        found: Vec<Found>,
        mut start: impl FnMut(&Found, u64) -> Result<(VmWorker, VmLock), StartRefusal>,
    ) -> ScanChange {
        let mut change = ScanChange::default();
        let mut refused_before = std::mem::take(&mut self.refused);
        let mut before = std::mem::take(&mut self.by_name);
        for found in found {
            let known = before.remove(found.name.as_str());
            if let Some(vm) = known {
                if vm.identity == found.identity && vm.socket == found.socket {
                    self.by_name.insert(vm.id.clone(), vm);
                    continue;
                }
                change.replaced.push(vm.id.clone());
            }
            let id = VmId::from(found.name.as_str());
            let refused = refused_before.remove(&id);
            let refused = refused.filter(|(identity, _)| *identity == found.identity);
            if let Some((identity, refusal)) = &refused
                && refusal.looks > 0
            {
                let refusal = StartRefusal {
                    why: refusal.why.clone(),
                    looks: refusal.looks - 1,
                };
                self.refused.insert(id, (*identity, refusal));
                continue;
            }
            self.workers += 1;
            match start(&found, self.workers) {
                Ok(served) => {
                    self.epochs += 1;
                    let vm = Vm::new(&found, served, self.epochs);
                    if !change.replaced.contains(&vm.id) {
                        change.appeared.push(vm.id.clone());
                    }
                    self.by_name.insert(vm.id.clone(), vm);
                }
                // A later scan tries again.
                Err(refusal) => {
                    if refused.is_none_or(|(_, before)| before.why != refusal.why) {
                        change.refused.push((id.clone(), refusal.why.clone()));
                    }
                    self.refused.insert(id, (found.identity, refusal));
                }
            }
        }
        change.went = before.into_keys().collect();
        change
    }

    /// Makes a new thread serve every VM.
    pub(super) fn restart(&mut self, start: impl Fn(&Found, u64) -> std::io::Result<VmWorker>) {
        for vm in self.by_name.values_mut() {
            self.workers += 1;
            let found = Found {
                name: vm.id.as_str().to_owned(),
                socket: vm.socket.clone(),
                identity: vm.identity,
                owner: vm.owner,
                fault: None,
            };
            match start(&found, self.workers) {
                Ok(worker) => {
                    vm.worker = worker;
                    // A new thread counts the processes behind the socket from the beginning.
                    vm.process = 0;
                    vm.ordered = None;
                    (vm.orders, vm.undoings) = (0, 0);
                    // Orders that the previous thread received may still be executed.
                    vm.order_left = true;
                }
                Err(error) => log::error!("cannot start a thread for the VM {:?}: {error}", vm.id),
            }
        }
    }

    /// Processes a reading. True if another machine is behind the name than before.
    pub(super) fn sampled(&mut self, name: &str, reading: VmReading, process: u64) -> bool {
        let Some(vm) = self.by_name.get_mut(name) else {
            return false;
        };
        let rebooted = vm
            .reading
            .as_ref()
            .is_some_and(|before| reading.requested < before.requested);
        let replaced = vm.process != 0 && (process != vm.process || rebooted);
        if replaced {
            self.epochs += 1;
            vm.epoch = self.epochs;
            vm.rates = Rates::default();
            vm.moved = None;
            vm.unconfirmed = None;
        } else if let Some(before) = &vm.reading {
            vm.rates = rates(before, &reading).unwrap_or(vm.rates);
        }
        vm.process = process;
        // A sample shows the result of an order without a response.
        vm.unconfirmed = vm
            .unconfirmed
            .filter(|order| reading.sample.at_ms < order.at_ms);
        vm.missed = 0;
        vm.failure = None;
        vm.reading = Some(reading);
        replaced
    }
}

impl Vm {
    fn new(found: &Found, (worker, lock): (VmWorker, VmLock), epoch: u64) -> Self {
        Self {
            id: VmId::from(found.name.as_str()),
            socket: found.socket.clone(),
            identity: found.identity,
            owner: found.owner,
            worker,
            _lock: lock,
            process: 0,
            epoch,
            reading: None,
            rates: Rates::default(),
            missed: 0,
            failure: None,
            ordered: None,
            unconfirmed: None,
            orders: 0,
            undoings: 0,
            order_ended_ms: 0,
            order_left: true,
            undo_again_ms: 0,
            moved: None,
            pinned: false,
            held: false,
            moves: false,
        }
    }

    /// Leaves it alone while it is being saved or woken.
    pub(super) fn hold(&mut self, held: bool) {
        self.held = held;
    }

    /// Leaves it alone while it is being moved.
    pub(super) fn move_it(&mut self, moves: bool) {
        self.moves = moves;
    }

    /// Hands over an order; false if there is no thread to execute it.
    pub(super) fn order(&mut self, order: Order) -> bool {
        let (balloon, undoes) = match &order {
            Order::Balloon(to) => (Some(*to), false),
            order => (None, order.undoes()),
        };
        let to = self
            .reading
            .as_ref()
            .and_then(|reading| reading.process.clone());
        let there = self.worker.order(order, to);
        if there {
            self.orders += 1;
            self.undoings += u32::from(undoes);
            self.ordered = balloon.or(self.ordered);
        }
        there
    }

    /// An order ended.
    pub(super) fn order_done(&mut self, done: &OrderDone, now_ms: u64) {
        self.order_ended(&done.order);
        self.order_ended_ms = now_ms;
        // A VMM executes orders sequentially, so a response means that all before it have ended.
        match &done.result {
            Ok(()) if done.order.asks_vmm() => self.order_left = false,
            Err(error) if error.is_answer() => self.order_left = false,
            Err(error) if error.is_unknown() => self.order_left = true,
            _ => {}
        }
        if done.order.undoes() && done.result.is_err() {
            self.undo_again_ms = now_ms + UNDO_AGAIN_MS;
        }
        if let Order::Balloon(to) = done.order {
            self.balloon_done(to, &done.result, now_ms);
        }
    }

    /// An order is no longer in progress.
    pub(super) fn order_ended(&mut self, order: &Order) {
        self.orders = self.orders.saturating_sub(1);
        if order.undoes() {
            self.undoings = self.undoings.saturating_sub(1);
        }
    }

    fn balloon_done(&mut self, to: Bytes, result: &Result<(), OrderError>, now_ms: u64) {
        if result.is_ok()
            && let Some(reading) = &mut self.reading
        {
            // Until the next sample, this is the known target.
            reading.sample.balloon_target = to;
        }
        if self.ordered != Some(to) {
            // A newer order is in progress.
            return;
        }
        self.ordered = None;
        let before = self.unconfirmed.take();
        let Err(error) = result else {
            return;
        };
        // The maximum size that the balloon may have now.
        let held = self.reading.as_ref().map_or(Bytes::ZERO, |reading| {
            reading.sample.balloon_target.max(reading.sample.ballooned)
        });
        let held = before.map_or(held, |before| held.max(before.to));
        let gives = to < held || before.is_some_and(|before| before.gives && before.to == to);
        if gives || error.is_unknown() {
            let tries = before
                .filter(|before| before.to == to)
                .map_or(0, |before| before.tries + 1);
            let wait = RESEND_MS
                .saturating_mul(1 << tries.min(16))
                .min(RESEND_MS_MAX);
            self.unconfirmed = Some(Unconfirmed {
                to,
                gives,
                tries,
                at_ms: now_ms,
                again_ms: now_ms + wait,
            });
        }
    }

    /// Whether an order ended with an unknown result.
    pub(super) fn is_unconfirmed(&self) -> bool {
        self.unconfirmed.is_some()
    }

    /// An order that returns memory and must be sent again now.
    pub(super) fn to_resend(&self, now_ms: u64) -> Option<Bytes> {
        let order = self.unconfirmed?;
        let due = order.gives && now_ms >= order.again_ms && self.ordered.is_none();
        (due && !self.pinned && !self.held && !self.moves).then_some(order.to)
    }

    /// Whether a recorded pause has no effect: the VM runs although every order ended. A pause that may still be
    /// executed must be undone nevertheless.
    pub(super) fn runs_unasked(&self) -> bool {
        let reading = self.reading.as_ref();
        self.orders == 0
            && !self.order_left
            && reading.is_some_and(|reading| {
                reading.interlock != Some(Interlock::Paused)
                    && reading.sample.at_ms >= self.order_ended_ms
            })
    }

    /// The acts in force that may be undone now.
    fn to_undo(&self, in_force: InForce, now_ms: u64) -> InForce {
        if self.undoings > 0 || now_ms < self.undo_again_ms {
            InForce::default()
        } else {
            in_force
        }
    }

    /// The process that responded last.
    pub(super) fn process(&self) -> Option<ProcessIdentity> {
        let process = self.reading.as_ref()?.process.as_ref();
        process.map(Process::identity)
    }

    /// Whether its socket has no listener any more. A hanging VMM still exists and holds its memory.
    pub(super) fn has_ended(&self) -> bool {
        matches!(self.failure, Some("refused" | "no-socket" | "no-vm"))
    }

    /// Whether its memory is in huge pages, which are not managed.
    pub(super) fn is_huge(&self) -> bool {
        self.reading
            .as_ref()
            .is_some_and(|reading| reading.huge_pages)
    }

    /// The last requested balloon, by any manager. If an order got no response, its target.
    pub(super) fn target(&self) -> Bytes {
        let read = self
            .reading
            .as_ref()
            .map_or(Bytes::ZERO, |reading| reading.sample.balloon_target);
        let unconfirmed = self.unconfirmed.map(|order| order.to);
        self.ordered.or(unconfirmed).unwrap_or(read)
    }

    /// Its facts for the planner. `None` before the first good sample, when not even its size is known, and for a VM
    /// whose memory the host does not manage.
    pub(super) fn facts(
        &self,
        policy: impl FnOnce(Bytes) -> VmPolicy,
        (in_force, lessons): (InForce, Lessons),
        now_ms: u64,
    ) -> Option<VmFacts> {
        let reading = self
            .reading
            .as_ref()
            .filter(|reading| !reading.huge_pages)?;
        let mut sample = reading.sample;
        sample.balloon_target = self.target();
        let mut level = reading.level;
        if lessons.guest_reported && sample.guest.is_none() {
            // It stopped responding before this agent started: its data is out of date, not absent.
            level = level.max(FeatureLevel::L1);
            sample.guest = Some(GuestClaims {
                free: reading.configured,
                available: reading.configured,
                ..GuestClaims::default()
            });
        }
        Some(VmFacts {
            id: self.id.clone(),
            epoch: self.epoch,
            level,
            configured: reading.configured,
            has_balloon: reading.has_balloon,
            policy: policy(reading.configured),
            interlock: self.interlock(),
            in_force: self.to_undo(in_force, now_ms),
            lessons,
            sample: Some(sample),
            missed_samples: self.missed,
        })
    }

    pub(super) fn interlock(&self) -> Option<Interlock> {
        if self.held {
            return Some(Interlock::Snapshot);
        }
        if self.moves {
            return Some(Interlock::Migration);
        }
        if self.pinned {
            return Some(Interlock::Pinned);
        }
        self.reading.as_ref().and_then(|reading| reading.interlock)
    }

    /// Level as a number.
    pub(super) fn level(&self) -> u8 {
        match self.reading.as_ref().map(|reading| reading.level) {
            Some(FeatureLevel::L2) => 2,
            Some(FeatureLevel::L1) => 1,
            Some(FeatureLevel::L0) | None => 0,
        }
    }
}

/// `None` if the interval is too short.
fn rates(before: &VmReading, now: &VmReading) -> Option<Rates> {
    const SHORTEST_MS: u64 = 200;
    let elapsed_ms = now.sample.at_ms.saturating_sub(before.sample.at_ms);
    if elapsed_ms < SHORTEST_MS {
        return None;
    }
    let (before, now) = (before.sample.reclaim?, now.sample.reclaim?);
    let per_s = |bytes: Bytes| bytes.0.saturating_mul(1000) / elapsed_ms;
    let discarded = per_s(now.discarded - before.discarded);
    let repopulated = per_s(now.repopulated - before.repopulated);
    Some(Rates {
        net_per_s: discarded
            .cast_signed()
            .saturating_sub(repopulated.cast_signed()),
        repopulated_per_s: repopulated,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc;
    use std::time::Duration;

    use api::ClientError;

    use super::*;
    use crate::execute::GroupFile;
    use crate::model::VmSample;
    use crate::sample::Discovery;

    fn reading(at_ms: u64) -> VmReading {
        VmReading::of_4_gib(VmSample {
            at_ms,
            ..VmSample::default()
        })
    }

    #[test]
    fn refusal_is_believed_for_some_looks_and_told_once() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("a.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        let found = Discovery::new(&[path.display().to_string()])
            .unwrap()
            .scan();
        let mut vms = Vms::default();
        let mut starts = 0;
        for look in 0..6 {
            let change = vms.follow(found.clone(), |found, number| {
                starts += 1;
                if starts < 3 {
                    return Err(StartRefusal {
                        why: "no VMM listens on the socket yet".to_owned(),
                        looks: 1,
                    });
                }
                let (orders, _received) = mpsc::channel();
                let lock = VmLock::take(&found.identity)?;
                Ok((VmWorker::new(orders, number), lock))
            });
            assert_eq!(change.refused.len(), usize::from(look == 0), "{look}");
            assert_eq!(change.appeared.len(), usize::from(look == 4), "{look}");
        }
        assert_eq!(starts, 3);
    }

    #[test]
    fn pause_that_was_not_answered_may_still_come() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("a.sock");
        let _vmm = UnixListener::bind(&path).unwrap();
        let pattern = path.display().to_string();
        let found = Discovery::new(&[pattern]).unwrap().scan();
        let (orders, _received) = mpsc::channel();
        let lock = VmLock::take(&found[0].identity).unwrap();
        let mut vm = Vm::new(&found[0], (VmWorker::new(orders, 1), lock), 1);
        let end = |vm: &mut Vm, order, result, now_ms| {
            vm.orders = 1;
            vm.order_done(&OrderDone { order, result }, now_ms);
            vm.reading = Some(reading(now_ms));
        };
        // An earlier agent's request may still be executed, too.
        vm.reading = Some(reading(1));
        assert!(!vm.runs_unasked());
        end(&mut vm, Order::Resume, Ok(()), 10);
        assert!(vm.runs_unasked());
        let timeout = Duration::from_secs(1);
        let late = ClientError::TimedOut { timeout };
        end(&mut vm, Order::Pause, Err(late.into()), 20);
        assert!(!vm.runs_unasked());
        end(
            &mut vm,
            Order::Group(GroupFile::MemoryHigh, None),
            Ok(()),
            30,
        );
        assert!(!vm.runs_unasked());
        end(&mut vm, Order::Resume, Ok(()), 40);
        assert!(vm.runs_unasked());
    }
}
