#![allow(clippy::unwrap_used)]
//! Tests moves with scripted VMMs, and agents that are killed before and after every call that they make.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::mover::{Home, HomeVm, Mover};
use super::step::ReceiveOrder;
use super::vmms::{Seen, SeenVm, SendRequest, Sent, Vmms};
use crate::admission::Request;
use crate::cluster::{
    Keys, MoveOrder, MovePhase, MovePicture, MoveRecord, Needs, PlaceError, PlaceRefusal, Placed,
    Wanted, order_moves,
};
use crate::host::ProcessIdentity;
use crate::model::Bytes;
use crate::store::{Committed, LeaseId, Listing, MemoryStore, Revision, Store, StoreError, Txn};

const VM: &str = "db";
/// Of each move; the order is for two at a time.
const LIMIT: Bytes = Bytes(50 << 20);
/// Rounds of both agents after which a scenario must have ended.
const ROUNDS: usize = 160;
/// Virtual time of a round.
const ROUND_MS: u64 = 300;
/// Rounds that a migration takes.
const PASSES: u32 = 4;

/// What goes wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Fault {
    #[default]
    None,
    /// The target lacks something.
    Missing,
    /// The target's VMM does not start.
    NoStart,
    /// The connection breaks after two passes.
    Cut,
    /// The source's VMM rejects the request.
    Rejected,
    /// The target's VMM is killed after two passes.
    TargetKilled,
    /// The source's VMM is killed after two passes.
    SourceKilled,
    /// No host has room.
    NoRoom,
}

/// One VMM.
#[derive(Clone, Debug)]
struct Vmm {
    process: ProcessIdentity,
    has_vm: bool,
    /// Its request to receive a VM: number and address.
    receiving: Option<(u32, String)>,
    /// Results of such requests.
    received: BTreeMap<u32, ReceiveOrder>,
    /// Where the VM is being sent, and the passes so far.
    sending: Option<(String, u32)>,
}

#[derive(Debug, Default)]
struct World {
    vmms: BTreeMap<PathBuf, Vmm>,
    made: u32,
    fault: Fault,
    /// Host and id.
    reserved: BTreeSet<(String, String)>,
    was_killed: bool,
}

impl World {
    fn number(&mut self) -> u32 {
        self.made += 1;
        self.made
    }

    fn add(&mut self, socket: &Path, has_vm: bool) {
        let pid = i32::try_from(self.number()).unwrap();
        let process = ProcessIdentity {
            pid,
            start_ticks: 1,
        };
        let vmm = Vmm {
            process,
            has_vm,
            receiving: None,
            received: BTreeMap::new(),
            sending: None,
        };
        self.vmms.insert(socket.to_owned(), vmm);
    }

    /// The hosts on which the VM runs.
    fn runs_on(&self) -> Vec<String> {
        let running = self.vmms.iter().filter(|(_, vmm)| vmm.has_vm);
        running
            .map(|(socket, _)| socket.iter().nth(1).unwrap().display().to_string())
            .collect()
    }

    /// Lets all migrations make a pass.
    fn pass(&mut self) {
        let sources: Vec<PathBuf> = self.vmms.keys().cloned().collect();
        for source in sources {
            let sending = self.vmms.get(&source).and_then(|vmm| vmm.sending.clone());
            let Some((url, passes)) = sending else {
                continue;
            };
            let target = self.vmms.iter().find_map(|(socket, vmm)| {
                let (number, at) = vmm.receiving.as_ref()?;
                (*at == url).then(|| (socket.clone(), *number))
            });
            let Some((target, number)) = target else {
                self.vmms.get_mut(&source).unwrap().sending = None;
                continue;
            };
            match (self.fault, passes) {
                (Fault::Cut, 2) => {
                    self.vmms.get_mut(&source).unwrap().sending = None;
                    self.end_receiving(&target, "the connection broke");
                }
                (Fault::TargetKilled, 2) => {
                    self.vmms.remove(&target);
                }
                (Fault::SourceKilled, 2) => {
                    self.vmms.remove(&source);
                    self.was_killed = true;
                    self.end_receiving(&target, "the source has gone");
                }
                (_, PASSES) => {
                    self.vmms.remove(&source);
                    let vmm = self.vmms.get_mut(&target).unwrap();
                    vmm.has_vm = true;
                    vmm.receiving = None;
                    vmm.received.insert(number, ReceiveOrder::Done);
                }
                _ => {
                    let vmm = self.vmms.get_mut(&source).unwrap();
                    vmm.sending = Some((url, passes + 1));
                }
            }
        }
    }

    fn end_receiving(&mut self, socket: &Path, why: &str) {
        if let Some(vmm) = self.vmms.get_mut(socket)
            && let Some((number, _)) = vmm.receiving.take()
        {
            let failed = ReceiveOrder::Failed(why.to_owned());
            vmm.received.insert(number, failed);
        }
    }
}

/// Ends the agent that makes the call of this number.
#[derive(Clone, Debug, Default)]
struct Killer {
    calls: Arc<AtomicUsize>,
    at: usize,
}

struct Killed;

impl Killer {
    fn call(&self) {
        if self.calls.fetch_add(1, Ordering::Relaxed) == self.at {
            panic::resume_unwind(Box::new(Killed));
        }
    }

    /// Makes a call that may end before or after it.
    fn around<T>(&self, call: impl FnOnce() -> T) -> T {
        self.call();
        let result = call();
        self.call();
        result
    }
}

#[derive(Debug)]
struct DeadlyStore {
    store: Arc<MemoryStore>,
    killer: Killer,
}

impl Store for DeadlyStore {
    fn list(&self, prefix: &str, until: Instant) -> Result<Listing, StoreError> {
        self.killer.around(|| self.store.list(prefix, until))
    }

    fn commit(&self, txn: &Txn, until: Instant) -> Result<Committed, StoreError> {
        self.killer.around(|| self.store.commit(txn, until))
    }

    fn grant(&self, lasts: Duration, until: Instant) -> Result<LeaseId, StoreError> {
        self.store.grant(lasts, until)
    }

    fn keep_alive(&self, lease: LeaseId, until: Instant) -> Result<(), StoreError> {
        self.store.keep_alive(lease, until)
    }

    fn revoke(&self, lease: LeaseId, until: Instant) -> Result<(), StoreError> {
        self.store.revoke(lease, until)
    }

    fn await_change(
        &self,
        prefix: &str,
        since: Revision,
        until: Instant,
    ) -> Result<bool, StoreError> {
        self.store.await_change(prefix, since, until)
    }
}

/// The VMMs of one host, as its agent reaches them.
struct FakeVmms {
    host: String,
    world: Rc<RefCell<World>>,
    killer: Killer,
    orders: BTreeMap<PathBuf, u32>,
}

fn socket(host: &str, vm: &str) -> PathBuf {
    PathBuf::from(format!("/{host}/{vm}"))
}

impl Vmms for FakeVmms {
    fn look(&mut self, socket: &Path) -> Seen {
        self.killer.call();
        let world = self.world.borrow();
        match world.vmms.get(socket) {
            None => Seen::Nobody,
            Some(vmm) if !vmm.has_vm => Seen::Empty(Some(vmm.process)),
            Some(vmm) => Seen::Vm(SeenVm {
                process: Some(vmm.process),
                is_paused: false,
                sending: vmm
                    .sending
                    .as_ref()
                    .map(|(_, passes)| Bytes((*passes).into())),
            }),
        }
    }

    fn has_ended(&mut self, process: ProcessIdentity) -> bool {
        let world = self.world.borrow();
        world.vmms.values().all(|vmm| vmm.process != process)
    }

    fn needs(&mut self, _: &Path) -> Result<Needs, String> {
        self.killer.call();
        Ok(Needs::default())
    }

    fn missing(&mut self, _: &Needs) -> Option<String> {
        let is_missing = self.world.borrow().fault == Fault::Missing;
        is_missing.then(|| "the disk is missing".to_owned())
    }

    fn socket_of(&mut self, vm: &str) -> Result<PathBuf, String> {
        Ok(socket(&self.host, vm))
    }

    fn start(&mut self, socket: &Path) -> Result<(), String> {
        let (killer, world) = (self.killer.clone(), Rc::clone(&self.world));
        killer.around(|| {
            if world.borrow().fault == Fault::NoStart {
                return Err("no program".to_owned());
            }
            let mut world = world.borrow_mut();
            assert!(!world.vmms.contains_key(socket), "two VMMs at one socket");
            world.add(socket, false);
            Ok(())
        })?;
        self.orders.remove(socket);
        Ok(())
    }

    fn receive(&mut self, socket: &Path, url: Option<&str>) {
        let killer = self.killer.clone();
        killer.around(|| {
            let mut world = self.world.borrow_mut();
            if url.is_none() {
                world.end_receiving(socket, "cancelled");
            }
            let number = world.number();
            let Some(vmm) = world.vmms.get_mut(socket) else {
                return;
            };
            let url = url.map_or_else(|| format!("tcp:{number}"), str::to_owned);
            match vmm.receiving {
                Some(_) => drop(vmm.received.insert(number, ReceiveOrder::Busy)),
                None => vmm.receiving = Some((number, url)),
            }
            self.orders.insert(socket.to_owned(), number);
        });
    }

    fn received(&mut self, socket: &Path) -> ReceiveOrder {
        let world = self.world.borrow();
        let (Some(order), Some(vmm)) = (self.orders.get(socket), world.vmms.get(socket)) else {
            return ReceiveOrder::None;
        };
        match &vmm.receiving {
            Some((number, url)) if number == order => ReceiveOrder::Waits(Some(url.clone())),
            _ => vmm.received[order].clone(),
        }
    }

    fn send(&mut self, socket: &Path, process: ProcessIdentity, request: &SendRequest<'_>) -> Sent {
        assert_eq!(request.bytes_per_second_max, Some(LIMIT));
        let url = request.url;
        let killer = self.killer.clone();
        killer.around(|| {
            let mut world = self.world.borrow_mut();
            let fault = world.fault;
            let Some(vmm) = world.vmms.get_mut(socket) else {
                return Sent::Unknown;
            };
            assert!(vmm.has_vm && vmm.process == process);
            if fault == Fault::Rejected || vmm.sending.is_some() {
                return Sent::Refused("rejected".to_owned());
            }
            vmm.sending = Some((url.to_owned(), 0));
            Sent::Accepted
        })
    }

    fn end(&mut self, socket: &Path) {
        let killer = self.killer.clone();
        killer.around(|| {
            let mut world = self.world.borrow_mut();
            world.end_receiving(socket, "cancelled");
            assert!(!world.vmms[socket].has_vm, "a VM was ended");
            world.vmms.remove(socket);
        });
        self.orders.remove(socket);
    }
}

/// Two hosts, of which `a` is to be emptied.
struct Scenario {
    world: Rc<RefCell<World>>,
    store: Arc<MemoryStore>,
    killer: Killer,
    now_ms: u64,
}

fn keys() -> Keys {
    Keys::new("/fleet").unwrap()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

impl Scenario {
    fn new(fault: Fault, kill_at: usize) -> Self {
        let mut world = World {
            fault,
            ..World::default()
        };
        world.add(&socket("a", VM), true);
        world.reserved.insert(("a".to_owned(), VM.to_owned()));
        let store = Arc::<MemoryStore>::default();
        let order = MoveOrder {
            parallel: 2,
            bytes_per_second_max: Some(Bytes(LIMIT.0 * 2)),
            by: "test".to_owned(),
        };
        order_moves(&*store, &keys(), ("a", Some(&order)), soon()).unwrap();
        Self {
            world: Rc::new(RefCell::new(world)),
            store,
            killer: Killer {
                calls: Arc::default(),
                at: kill_at,
            },
            now_ms: 0,
        }
    }

    fn moves(&self) -> Vec<MoveRecord> {
        let picture = MovePicture::read(&*self.store, &keys(), soon()).unwrap();
        let records = picture.moves.into_iter().map(|stored| stored.record);
        records.collect()
    }

    fn home(&self, host: &str) -> Home {
        let world = self.world.borrow();
        let at = socket(host, VM);
        let vms = world.vmms.get(&at).filter(|vmm| vmm.has_vm);
        Home {
            now_ms: self.now_ms,
            vms: vms
                .map(|vmm| HomeVm {
                    name: VM.to_owned(),
                    socket: at,
                    process: Some(vmm.process),
                    request: Request {
                        min: Bytes::gib(1),
                        max: Bytes::gib(1),
                    },
                    obstacle: None,
                })
                .into_iter()
                .collect(),
            standby: BTreeSet::new(),
            reserved: world
                .reserved
                .iter()
                .filter(|(at, _)| at == host)
                .map(|(_, id)| id.clone())
                .collect(),
        }
    }

    /// Runs both agents until nothing changes any more, or an agent is killed; then others continue. Returns whether
    /// one was killed.
    fn run(&mut self) -> bool {
        let mut was_killed = false;
        let mut left = ROUNDS;
        while left > 0 {
            let run = AssertUnwindSafe(|| self.run_agents(&mut left));
            match panic::catch_unwind(run) {
                Ok(()) => break,
                Err(payload) if payload.is::<Killed>() => was_killed = true,
                Err(payload) => panic::resume_unwind(payload),
            }
        }
        was_killed
    }

    fn run_agents(&mut self, left: &mut usize) {
        let (world, killer) = (Rc::clone(&self.world), self.killer.clone());
        let store = DeadlyStore {
            store: Arc::clone(&self.store),
            killer: killer.clone(),
        };
        let reserve = |wanted: &Wanted| {
            killer.around(|| {
                let mut world = world.borrow_mut();
                if world.fault == Fault::NoRoom {
                    return Err(PlaceError::Refused(PlaceRefusal::default()));
                }
                let id = format!("r{}", world.number());
                world.reserved.insert(("b".to_owned(), id.clone()));
                Ok(Placed {
                    host: "b".to_owned(),
                    id,
                    vm: wanted.vm.clone(),
                    promised: wanted.request.max,
                })
            })
        };
        let call = Duration::from_secs(10);
        let mut agents = ["a", "b"].map(|host| {
            let parts: (&dyn Store, Keys) = (&store, keys());
            let mover = Mover::new(host.to_owned(), parts, &reserve, call);
            let vmms = FakeVmms {
                host: host.to_owned(),
                world: Rc::clone(&self.world),
                killer: killer.clone(),
                orders: BTreeMap::new(),
            };
            (host, mover, vmms)
        });
        while *left > 0 {
            for (host, mover, vmms) in &mut agents {
                *left = left.saturating_sub(1);
                let (picture, news) = mover.look().unwrap();
                for id in news.released {
                    let reserved = (host.to_string(), id);
                    world.borrow_mut().reserved.remove(&reserved);
                }
                let home = self.home(host);
                mover.round(&picture, &home, vmms).unwrap();
                self.now_ms += ROUND_MS;
            }
            self.world.borrow_mut().pass();
            self.check();
        }
    }

    /// The VM runs once, unless its VMM was killed.
    fn check(&self) {
        let world = self.world.borrow();
        let runs = world.runs_on().len();
        assert_eq!(runs, usize::from(!world.was_killed), "{world:?}");
    }

    fn expect(&self, fault: Fault) {
        self.check();
        let (world, moves) = (self.world.borrow(), self.moves());
        let told = || format!("{fault:?} {:?} {world:?} {moves:?}", self.killer.at);
        let phase = moves.first().map(|record| record.phase);
        let runs_on = world.runs_on();
        match fault {
            Fault::None => {
                assert_eq!(runs_on, ["b"], "{}", told());
                assert_eq!(phase, None, "{}", told());
            }
            Fault::SourceKilled => {
                assert_eq!(phase, Some(MovePhase::Lost), "{}", told());
                assert!(world.vmms.is_empty(), "{}", told());
            }
            _ => {
                assert_eq!(runs_on, ["a"], "{}", told());
                assert_eq!(phase, Some(MovePhase::Failed), "{}", told());
                assert_eq!(world.vmms.len(), 1, "{}", told());
                assert!(!moves[0].why.is_empty(), "{}", told());
            }
        }
    }
}

const FAULTS: [Fault; 8] = [
    Fault::None,
    Fault::Missing,
    Fault::NoStart,
    Fault::Cut,
    Fault::Rejected,
    Fault::TargetKilled,
    Fault::SourceKilled,
    Fault::NoRoom,
];

#[test]
fn vm_moves_once_or_stays_and_the_reason_is_told() {
    for fault in FAULTS {
        let mut scenario = Scenario::new(fault, usize::MAX);
        assert!(!scenario.run());
        scenario.expect(fault);
        let (world, moves) = (scenario.world.borrow(), scenario.moves());
        let why = moves.first().map_or("", |record| record.why.as_str());
        let expected = match fault {
            Fault::None => "",
            Fault::Missing => "the disk is missing",
            Fault::NoStart => "no program",
            Fault::Cut => "the connection broke",
            Fault::Rejected => "rejected",
            Fault::TargetKilled => "the VMM at the target has ended",
            Fault::SourceKilled => "the source has ",
            Fault::NoRoom => "no host",
        };
        assert!(why.contains(expected), "{fault:?}: {why}");
        // That of a VMM that was killed ends with its process, or at its deadline.
        if fault != Fault::SourceKilled {
            let hosts: Vec<&str> = world
                .reserved
                .iter()
                .map(|(host, _)| host.as_str())
                .collect();
            assert_eq!(hosts, scenario.world.borrow().runs_on(), "{fault:?}");
        }
    }
}

#[test]
fn agent_that_is_killed_at_any_call_leaves_one_vm() {
    for fault in FAULTS {
        let mut calls = 0;
        for kill_at in 0.. {
            let mut scenario = Scenario::new(fault, kill_at);
            if !scenario.run() {
                break;
            }
            scenario.expect(fault);
            calls = kill_at;
            // From here on, both agents only look at the store.
            if kill_at > 150 {
                break;
            }
        }
        assert!(calls > 10, "{fault:?}: {calls}");
    }
}
