//! The thread of one VM: takes samples when they are due and executes orders as they arrive.
//!
//! ```text
//!            order              due
//!   carry out ◄──── wait ────► sample ──► event to the control loop
//!       │            ▲  ▲         │
//!       └────────────┘  └─────────┘   a failure is an event as well; each further try waits longer
//! ```
//!
//! Each VM has one thread, and only this thread communicates with the VM. This ensures "one request in flight per VM",
//! so a hanging VMM delays no other VM. A thread blocked in a read costs a few pages of stack and no processor time
//! (decision 9). An order wakes the thread immediately; if a request is in progress, the order waits at most until the
//! request's deadline. A newer order of the same kind replaces an older one that has not been executed yet.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use api::{Client, Peer};

use crate::execute::{Addressed, GroupFiles, Order, OrderError, OrderTarget};
use crate::host::{Process, has_ended, holds_vm};
use crate::model::{FeatureLevel, GuestClaims, VmId};
use crate::sample::{
    Found, ProcessFiles, RequestCounters, Round, SampleFailure, SocketOwners, VmReading,
    failure_kind, read_info, read_vm,
};

/// Stack of a VM's thread: several times the need of parsing a response. Unused stack is only address space.
const STACK_BYTES: usize = 256 << 10;
/// Number of consecutive failures after which the time between two attempts stops doubling.
const BACK_OFF_DOUBLINGS_MAX: u32 = 3;
/// Time between samples while a balloon moves.
const SETTLING_SAMPLE: Duration = Duration::from_millis(500);
/// Number of samples between two checks of the reporting policy. A guest adopts a policy once, when its driver starts,
/// so rare checks suffice.
const POLICY_SAMPLES: u32 = 12;
/// How long a balloon is sampled more often after an order.
const SETTLING: Duration = Duration::from_secs(10);

/// An id that no process has.
const NOBODY: i32 = 0;

/// Parameters of the communication with a VM.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// Time between two samples.
    pub sample: Duration,
    /// Time limit of a request.
    pub deadline: Duration,
    /// Whether to find out what the VM does.
    pub wants_activity: bool,
    /// Paths of processes and control groups.
    pub files: GroupFiles,
    /// Zero of the planner's clock.
    pub clock: Instant,
    /// Counters of requests.
    pub counters: Arc<RequestCounters>,
}

/// The result of an order.
#[derive(Debug)]
pub struct OrderDone {
    /// The order.
    pub order: Order,
    /// Whether it was executed.
    pub result: Result<(), OrderError>,
}

/// An event of a VM's thread.
#[derive(Debug)]
pub struct VmEvent {
    /// The VM.
    pub id: VmId,
    /// The number of the thread, unique among all threads that served this name.
    pub worker: u64,
    /// The kind of event.
    pub kind: VmEventKind,
}

impl VmEvent {
    /// Whether it is a sample.
    pub(crate) fn is_sample(&self) -> bool {
        matches!(self.kind, VmEventKind::Sampled(..))
    }
}

/// See [`VmEvent`].
#[derive(Debug)]
pub enum VmEventKind {
    /// A round of queries succeeded; the number grows with every new process behind the socket.
    Sampled(Box<VmReading>, u64),
    /// A round failed.
    Missed(SampleFailure),
    /// An order was executed or rejected.
    Done(OrderDone),
    /// An order was dropped, because a later one replaced it before it was executed.
    Replaced(Order),
}

/// The handle of a VM's thread. Dropping it ends the thread after its current request, without waiting.
#[derive(Debug)]
pub struct VmWorker {
    orders: Sender<Addressed>,
    number: u64,
}

impl VmWorker {
    /// Starts the thread. `number` distinguishes it from other threads that serve the same name.
    ///
    /// # Errors
    /// The system has no more threads.
    pub fn start(
        found: &Found,
        number: u64,
        options: WorkerOptions,
        events: impl Fn(VmEvent) -> bool + Send + 'static,
    ) -> io::Result<Self> {
        let (orders, received) = mpsc::channel();
        let id = VmId::from(found.name.as_str());
        let phase = phase_of(&found.name, options.sample);
        let thread = Thread::new(found, options);
        thread::Builder::new()
            .name("vm".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                thread.run(&received, phase, |kind| {
                    events(VmEvent {
                        id: id.clone(),
                        worker: number,
                        kind,
                    })
                });
            })?;
        Ok(Self::new(orders, number))
    }

    /// The handle of a VM whose orders go to `orders`.
    pub(crate) fn new(orders: Sender<Addressed>, number: u64) -> Self {
        Self { orders, number }
    }

    /// See [`VmEvent::worker`].
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Sends an order for its target process, without waiting. False if the thread has ended.
    pub fn order(&self, order: Order, to: Option<Process>) -> bool {
        self.orders.send(Addressed { order, to }).is_ok()
    }
}

/// Spreads the first samples of VMs that are found at the same time over the sampling interval.
fn phase_of(name: &str, period: Duration) -> Duration {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    // A new agent should know all VMs soon; later rounds keep the offsets.
    let spread = period.min(Duration::from_secs(2));
    spread.mul_f64((hasher.finish() % 1024) as f64 / 1024.0)
}

struct Thread {
    client: Client,
    options: WorkerOptions,
    /// The owner of the socket.
    owner: u32,
    level_max: FeatureLevel,
    /// Id of the process that began to listen there: no other process receives anything before the next sample.
    listener: Option<i32>,
    process: Option<Process>,
    process_number: u64,
    /// Whether the guest follows a reporting policy, and for how many more samples this is assumed.
    policy: Option<(bool, u32)>,
    /// The last claims of this process's guest.
    claims: Option<GuestClaims>,
    failures: u32,
    settle_until: Option<Instant>,
}

impl Thread {
    fn new(found: &Found, options: WorkerOptions) -> Self {
        Self {
            client: Client::new(&found.socket)
                .at_file(found.identity.file())
                .with_timeout(Some(options.deadline)),
            options,
            owner: found.owner,
            level_max: FeatureLevel::L2,
            listener: None,
            process: None,
            process_number: 0,
            policy: None,
            claims: None,
            failures: 0,
            settle_until: None,
        }
    }

    fn run(
        mut self,
        orders: &Receiver<Addressed>,
        phase: Duration,
        report: impl Fn(VmEventKind) -> bool,
    ) {
        let mut due = Instant::now() + phase;
        loop {
            match orders.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Ok(first) => {
                    let (orders, replaced) = latest(first, orders);
                    if !replaced
                        .into_iter()
                        .all(|replaced| report(VmEventKind::Replaced(replaced.order)))
                    {
                        return;
                    }
                    for order in orders {
                        let done = self.carry_out(order);
                        // After an order without a response, its result is queried immediately.
                        let wait = match &done.result {
                            Ok(()) => SETTLING_SAMPLE,
                            Err(_) => Duration::ZERO,
                        };
                        due = due.min(Instant::now() + wait);
                        if !report(VmEventKind::Done(done)) {
                            return;
                        }
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    let begin = Instant::now();
                    if !report(self.sample()) {
                        return;
                    }
                    due = begin + self.pause();
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Time from the start of a sample to the start of the next.
    fn pause(&self) -> Duration {
        if self.failures > 0 {
            let doublings = (self.failures - 1).min(BACK_OFF_DOUBLINGS_MAX);
            return self.options.sample * 2_u32.pow(doublings);
        }
        match self.settle_until {
            Some(until) if Instant::now() < until => SETTLING_SAMPLE.min(self.options.sample),
            _ => self.options.sample,
        }
    }

    fn sample(&mut self) -> VmEventKind {
        let reading = self.read();
        self.remember_policy(reading.as_ref().ok());
        match reading {
            Ok(reading) => {
                self.failures = 0;
                let settled = reading.sample.ballooned == reading.sample.balloon_target;
                if settled {
                    self.settle_until = None;
                }
                VmEventKind::Sampled(Box::new(reading), self.process_number)
            }
            Err(failure) => {
                self.failures = self.failures.saturating_add(1);
                VmEventKind::Missed(failure)
            }
        }
    }

    fn remember_policy(&mut self, reading: Option<&VmReading>) {
        let Some(figures) = reading.and_then(|reading| reading.sample.reclaim) else {
            return;
        };
        let left = self.policy.map_or(POLICY_SAMPLES, |(_, left)| left);
        self.policy = (left > 0).then(|| (figures.policy_in_effect, left - 1));
    }

    fn read(&mut self) -> Result<VmReading, SampleFailure> {
        let at = self.options.clock.elapsed();
        let (info, peer) = read_info(&self.client, &self.options.counters)?;
        let listener = peer.pid;
        let pid = self.identify(peer)?;
        let round = Round {
            client: &self.client.to_peer(listener),
            process: ProcessFiles {
                proc: &self.options.files.proc,
                pid,
            },
            counters: &self.options.counters,
            at_ms: u64::try_from(at.as_millis()).unwrap_or(u64::MAX),
            policy_in_effect: self.policy.map(|(in_effect, _)| in_effect),
            guest_age_ms_max: u64::try_from(self.options.sample.as_millis()).unwrap_or(u64::MAX),
            wants_activity: self.options.wants_activity,
            claims_before: self.claims,
        };
        let mut reading = read_vm(round, &info, &mut self.level_max)?;
        reading.process = self.process.clone();
        self.claims = reading.sample.guest;
        Ok(reading)
    }

    /// Identifies the process that responded. For a new process, everything is unknown.
    fn identify(&mut self, peer: Peer) -> Result<i32, SampleFailure> {
        if !may_listen(peer.uid, self.owner) {
            return Err(SampleFailure::Owner {
                owner: self.owner,
                listener: peer.uid,
            });
        }
        let proc = &self.options.files.proc;
        let listener = peer.pid;
        let same = self.listener.replace(listener) == Some(listener);
        let before = self.process.take().filter(|_| same);
        let process = match before
            .clone()
            .filter(|process| still_runs_vm(proc, process))
        {
            Some(process) => Ok(process),
            None => {
                // The id of an ended process may belong to another one by now, which may even run a VM.
                let ended = peer.has_ended || peer.process.as_ref().is_some_and(has_ended);
                let pid = match ended {
                    true => SocketOwners::read(proc).vmm(self.client.socket(), NOBODY),
                    false => vmm_behind(proc, self.client.socket(), listener),
                };
                let handle = peer.process.filter(|_| pid == listener && !ended);
                // A process that was looked up before and cannot be now counts as the same. A process in another pid
                // namespace cannot be looked up, and is identified by the socket file alone.
                let known = || {
                    let before = before.clone();
                    before.filter(|process| process.pid() == pid && !process.has_ended())
                };
                Process::hold(proc, pid, handle).or_else(known).ok_or(pid)
            }
        };
        let pid = process.as_ref().map_or_else(|pid| *pid, Process::pid);
        self.process = process.ok();
        if self.process != before || self.process_number == 0 {
            self.process_number += 1;
            self.level_max = FeatureLevel::L2;
            self.policy = None;
            self.claims = None;
        }
        Ok(pid)
    }

    fn carry_out(&mut self, order: Addressed) -> OrderDone {
        let begin = Instant::now();
        let client = match self.listener {
            Some(listener) => self.client.to_peer(listener),
            None => self.client.clone(),
        };
        let target = OrderTarget {
            client: &client,
            process: self.process.as_ref(),
            files: &self.options.files,
        };
        let result = target.carry_out(&order);
        let failure = result.as_ref().err();
        let failure = failure.map(|error| error.request().map_or("host", failure_kind));
        let order = order.order;
        self.options
            .counters
            .record(order.name(), failure, begin.elapsed());
        if matches!(order, Order::Balloon(_)) {
            self.settle_until = Some(Instant::now() + SETTLING);
        }
        OrderDone { order, result }
    }
}

/// Whether a process of user `listener` may listen at a socket of user `owner`. Root is always allowed, because it has
/// other means as well.
fn may_listen(listener: u32, owner: u32) -> bool {
    listener == owner || listener == 0
}

/// Whether a process that was looked up before is alive and, as far as visible, runs a VM.
fn still_runs_vm(proc: &Path, process: &Process) -> bool {
    process.lives() && holds_vm(proc, process.pid()).unwrap_or(true)
}

/// The process that runs the VM behind a socket at which `listener` began to listen, by id.
fn vmm_behind(proc: &Path, socket: &Path, listener: i32) -> i32 {
    match holds_vm(proc, listener) {
        Ok(false) => SocketOwners::read(proc).vmm(socket, listener),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            SocketOwners::read(proc).vmm(socket, listener)
        }
        // It runs a VM, or cannot be inspected.
        _ => listener,
    }
}

/// All pending orders in their order of arrival, without those replaced by a later one of the same kind; and the
/// replaced ones.
pub(crate) fn latest(
    first: Addressed,
    orders: &Receiver<Addressed>,
) -> (Vec<Addressed>, Vec<Addressed>) {
    let mut waiting = vec![first];
    let mut replaced = Vec::new();
    while let Ok(order) = orders.try_recv() {
        let same = |earlier: &mut Addressed| earlier.order.is_replaced_by(&order.order);
        replaced.extend(waiting.extract_if(.., same));
        waiting.push(order);
    }
    (waiting, replaced)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    use super::*;
    use crate::agent::fake_vmm::{DEADLINE, FakeVm, GIB, MIB, World};
    use crate::host::ProcessIdentity;
    use crate::model::Bytes;
    use crate::sample::Discovery;

    #[test]
    fn only_the_last_of_each_kind_is_carried_out_and_the_others_are_accounted_for() {
        let (sender, orders) = mpsc::channel();
        let addressed = |order| Addressed { order, to: None };
        let balloon = |mib| addressed(Order::Balloon(Bytes::mib(mib)));
        for order in [addressed(Order::Resume), balloon(2), balloon(3)] {
            sender.send(order).unwrap();
        }
        let (waiting, replaced) = latest(balloon(1), &orders);
        assert_eq!(waiting, [addressed(Order::Resume), balloon(3)]);
        assert_eq!(replaced, [balloon(1), balloon(2)]);
    }

    /// A VM in a separate fake world.
    fn find() -> (World, Found, WorkerOptions) {
        let world = World::new(4 * GIB, 0);
        world.add("a", FakeVm::new(GIB, GIB / 2));
        let pattern = world.socket_of("a").display().to_string();
        let found = Discovery::new(&[pattern]).unwrap().scan().remove(0);
        let files = world.files();
        let options = WorkerOptions {
            sample: Duration::from_millis(50),
            deadline: DEADLINE,
            wants_activity: false,
            files: GroupFiles {
                proc: files.proc,
                cgroup_root: files.cgroup_root,
            },
            clock: Instant::now(),
            counters: Arc::default(),
        };
        (world, found, options)
    }

    /// The same, with a thread.
    fn serve(change: impl FnOnce(&mut Found)) -> (World, VmWorker, Receiver<VmEventKind>) {
        let (world, mut found, options) = find();
        change(&mut found);
        let (events, received) = mpsc::channel();
        let report = move |event: VmEvent| events.send(event.kind).is_ok();
        let worker = VmWorker::start(&found, 1, options, report).unwrap();
        (world, worker, received)
    }

    #[test]
    fn order_for_the_machine_before_is_not_carried_out_on_this_one() {
        let (world, worker, events) = serve(|_| {});
        let VmEventKind::Sampled(reading, _) = events.recv_timeout(DEADLINE).unwrap() else {
            panic!("no sample");
        };
        let process = reading.process.unwrap();
        let before = Process::known(ProcessIdentity {
            start_ticks: process.identity().start_ticks - 1,
            ..process.identity()
        });
        let balloon = |mib| Order::Balloon(Bytes::mib(mib));
        assert!(worker.order(balloon(128), Some(before)));
        let mut done = events.iter().filter_map(|event| match event {
            VmEventKind::Done(done) => Some(done.result),
            _ => None,
        });
        let result = done.next().unwrap();
        assert!(
            matches!(result, Err(OrderError::OtherProcess)),
            "{result:?}"
        );
        assert!(world.vm("a").resizes.is_empty());
        assert!(worker.order(balloon(64), Some(process)));
        done.next().unwrap().unwrap();
        assert_eq!(world.vm("a").target, 64 * MIB);
    }

    #[test]
    fn id_of_a_listener_that_has_ended_names_nobody() {
        let (_world, found, options) = find();
        // This process has that id, and appears to run a VM.
        let own = i32::try_from(std::process::id()).unwrap();
        let identify = |process: Option<OwnedFd>, has_ended| {
            let mut thread = Thread::new(&found, options.clone());
            let pid = thread.identify(Peer {
                pid: own,
                uid: found.owner,
                process,
                has_ended,
            });
            let process = thread.process.map(|process| process.pid());
            (pid.unwrap(), process)
        };
        assert_eq!(identify(None, false), (own, Some(own)));
        assert_eq!(identify(None, true), (NOBODY, None));
        let mut child = Command::new("true").spawn().unwrap();
        let handle = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        child.wait().unwrap();
        assert_eq!(identify(Some(handle), false), (NOBODY, None));
    }

    #[test]
    fn link_that_takes_the_place_of_a_socket_that_was_found_leads_nowhere() {
        let (world, found, options) = find();
        let mut thread = Thread::new(&found, options);
        thread.read().unwrap();
        // The socket of another VM, possibly root's, and a link to it until the next scan for sockets.
        world.add("b", FakeVm::new(GIB, GIB / 2));
        fs::remove_file(&found.socket).unwrap();
        symlink(world.socket_of("b"), &found.socket).unwrap();
        let failure = thread.read().unwrap_err();
        assert_eq!(failure.kind(), "no-socket", "{failure:?}");
        assert_eq!(world.vm("b").requests, 0);
    }

    #[test]
    fn only_the_owner_of_a_socket_and_root_may_listen_there() {
        assert!(may_listen(1000, 1000) && may_listen(0, 1000));
        assert!(!may_listen(1001, 1000) && !may_listen(1000, 0));
    }

    #[test]
    fn socket_of_one_user_at_which_another_listens_is_not_believed() {
        let owner = rustix::process::getuid().as_raw();
        let (_world, _worker, events) = serve(|found| found.owner = owner + 1);
        let event = events.recv_timeout(DEADLINE).unwrap();
        // Root is allowed to.
        assert_eq!(
            owner == 0,
            matches!(event, VmEventKind::Sampled(..)),
            "{event:?}"
        );
        let missed = matches!(event, VmEventKind::Missed(SampleFailure::Owner { .. }));
        assert_eq!(owner != 0, missed, "{event:?}");
    }
}
