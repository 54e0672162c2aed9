//! A scripted VM on virtual time: guest, VMM, and the thread that serves it.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::time::Duration;
use std::{fs, mem};

use api::{ClientError, Endpoint};

use crate::agent::no_harm::Turns;
use crate::execute::{Addressed, GroupFile, Order, OrderError};
use crate::host::{Process, ProcessIdentity};
use crate::model::{Bytes, FeatureLevel, GuestClaims, Interlock, ReclaimFigures, VmId, VmSample};
use crate::placement::SplitMix64;
use crate::sample::{PoolUse, SampleFailure, VmReading};
use crate::worker::{OrderDone, VmEvent, VmEventKind, latest};

const MIB: u64 = 1 << 20;
/// Pages that a guest's programs can newly touch in a tick, and that balloons can move.
const TOUCH: u64 = 64 * MIB;
const DEADLINE_MS: u64 = 1000;
const SAMPLE_MS: u64 = 5000;
const SETTLING_MS: u64 = 500;

/// Temporary faults of a VMM or its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::VariantArray)]
pub(super) enum Fault {
    /// No responses, no effects.
    Hang,
    /// No responses; requests are executed much later.
    Late,
    /// Queries are answered; orders time out and are executed much later.
    LateOrders,
    /// Orders are rejected.
    Refuse,
    /// Orders are confirmed without effect.
    NoEffect,
    /// Malformed responses.
    Garbage,
    /// The socket has no listener.
    Refused,
    /// The process cannot be inspected.
    Unreadable,
    /// No statistics from the guest.
    Silent,
    /// The guest claims a balloon that it does not have.
    Lie,
    /// The guest claims an impossible size.
    Giant,
    /// Counters jump to the maximum and back.
    Counters,
    /// The balloon moves very slowly.
    Slow,
}

/// The fixed properties of a VM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Character {
    pub(super) level: FeatureLevel,
    /// Stops responding when its cache is taken.
    pub(super) wedges: bool,
}

/// The agent's side of the connection.
struct Line {
    orders: Receiver<Addressed>,
    number: u64,
    due_ms: u64,
    failures: u32,
    settle_until_ms: u64,
    /// The current process behind the socket, as seen by this connection, and their number.
    seen: (i32, u64),
    claims: Option<GuestClaims>,
    /// Pending orders, and the current one with its end.
    waiting: Vec<Order>,
    busy: Option<(u64, Option<Order>)>,
}

pub(super) struct Machine {
    pub(super) name: String,
    socket: PathBuf,
    _listener: UnixListener,
    proc: PathBuf,
    pid: i32,
    character: Character,
    configured: u64,
    used: u64,
    goal: u64,
    cache: u64,
    idle: u64,
    pub(super) target: u64,
    actual: u64,
    requested: u64,
    discarded: u64,
    stalls: u64,
    pub(super) paused: bool,
    high: Option<u64>,
    max: Option<u64>,
    swap: u64,
    pub(super) killed: bool,
    fault: Option<(Fault, u64)>,
    /// Orders that will be executed although their caller no longer waits.
    late: Vec<(u64, Order)>,
    pub(super) turns: Turns,
    line: Option<Line>,
}

impl Machine {
    pub(super) fn start(
        folder: &Path,
        name: &str,
        pid: i32,
        character: Character,
        configured: u64,
    ) -> Self {
        let socket = folder.join(format!("vms/{name}.sock"));
        // The file exists only if the VM is replaced.
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let proc = folder.join(format!("proc/{pid}"));
        fs::create_dir_all(&proc).unwrap();
        let fields = vec!["0"; 18].join(" ");
        fs::write(proc.join("stat"), format!("1 (vmm) S {fields} 7 0")).unwrap();
        Self {
            name: name.to_owned(),
            socket,
            _listener: listener,
            proc,
            pid,
            character,
            configured,
            used: configured / 8,
            goal: configured / 4,
            cache: 0,
            idle: 0,
            target: 0,
            actual: 0,
            requested: 0,
            discarded: 0,
            stalls: 0,
            paused: false,
            high: None,
            max: None,
            swap: 0,
            killed: false,
            fault: None,
            late: Vec::new(),
            turns: Turns::default(),
            line: None,
        }
    }

    pub(super) fn end(self) {
        fs::remove_dir_all(&self.proc).unwrap();
        // Another machine may already use the name.
        let _ = fs::remove_file(&self.socket);
    }

    pub(super) fn resident(&self) -> u64 {
        self.used + self.cache + self.idle
    }

    pub(super) fn is_limited(&self) -> bool {
        self.high.is_some() || self.max.is_some() || self.swap > 0
    }

    pub(super) fn serve(&mut self, orders: Receiver<Addressed>, number: u64, now_ms: u64) {
        self.line = Some(Line {
            orders,
            number,
            due_ms: now_ms + 250,
            failures: 0,
            settle_until_ms: 0,
            seen: (0, 0),
            claims: None,
            waiting: Vec::new(),
            busy: None,
        });
    }

    /// The agent was killed: orders in progress may still be executed.
    pub(super) fn abandon(&mut self, now_ms: u64, random: &mut SplitMix64) {
        if let Some(line) = self.line.take()
            && let Some((_, Some(order))) = line.busy
            && random.next().is_multiple_of(2)
        {
            self.late.push((now_ms + random.next() % 3000, order));
        }
    }

    pub(super) fn fail(&mut self, fault: Option<Fault>, until_ms: u64) {
        self.fault = fault.map(|fault| (fault, until_ms));
    }

    pub(super) fn want(&mut self, part: f64) {
        self.goal = (self.configured as f64 * part) as u64;
    }

    /// Boots the guest again, in the same process.
    pub(super) fn reboot(&mut self) {
        (self.used, self.cache, self.idle, self.actual) = (self.configured / 16, 0, 0, 0);
        (self.requested, self.stalls) = (0, 0);
    }

    /// Simulates a tick; `free` is the host's free memory.
    pub(super) fn live(&mut self, now_ms: u64, free: &mut u64) {
        if self.fault.is_some_and(|(_, until_ms)| now_ms >= until_ms) {
            self.fault = None;
        }
        let (due, late) = mem::take(&mut self.late)
            .into_iter()
            .partition(|(at_ms, _)| now_ms >= *at_ms);
        self.late = late;
        let due: Vec<(u64, Order)> = due;
        for (_, order) in due {
            self.obey(&order, now_ms);
        }
        if self.paused {
            return;
        }
        self.move_balloon();
        let keeps = self.configured / 50;
        let most = (self.configured - self.actual).saturating_sub(keeps);
        if self.goal > most {
            self.stalls += 1;
        }
        let to = self.goal.min(most);
        if to < self.used {
            let freed = (self.used - to).min(TOUCH);
            self.used -= freed;
            self.idle += freed;
        } else {
            let wish = (to - self.used).min(TOUCH);
            let idle = wish.min(self.idle);
            let absent = (self.configured - self.actual).saturating_sub(self.resident());
            let fresh = (wish - idle).min(absent).min(*free);
            *free -= fresh;
            let cache = (wish - idle - fresh).min(self.cache);
            self.idle -= idle;
            self.cache -= cache;
            self.used += idle + fresh + cache;
        }
        let absent = (self.configured - self.actual).saturating_sub(self.resident() + keeps);
        let cached = (4 * MIB)
            .min((self.configured / 5).saturating_sub(self.cache))
            .min(absent)
            .min(*free);
        *free -= cached;
        self.cache += cached;
        let reported = self.idle / 64;
        self.idle -= reported;
        self.requested += reported;
        self.discarded += reported;
        if let Some(limit) = self.max.or(self.high) {
            let over = self.resident().saturating_sub(limit);
            let idle = over.min(self.idle);
            self.idle -= idle;
            let cache = (over - idle).min(self.cache);
            self.cache -= cache;
        }
    }

    fn move_balloon(&mut self) {
        if self.actual > self.target {
            self.actual -= (self.actual - self.target).min(8 * TOUCH);
            return;
        }
        let rate = match self.fault {
            Some((Fault::Lie, _)) => 0,
            Some((Fault::Slow, _)) => MIB,
            _ => TOUCH,
        };
        let absent = (self.configured - self.actual).saturating_sub(self.resident());
        let grows = (self.target - self.actual)
            .min(rate)
            .min(absent + self.idle + self.cache);
        let idle = grows.saturating_sub(absent).min(self.idle);
        let cache = grows.saturating_sub(absent + idle).min(self.cache);
        self.idle -= idle;
        self.cache -= cache;
        self.actual += grows;
        self.requested += grows;
        self.discarded += idle + cache;
    }

    fn obey(&mut self, order: &Order, now_ms: u64) {
        match *order {
            Order::Balloon(to) => {
                self.turns.asked(to.0, now_ms);
                self.target = to.0.min(self.configured);
            }
            Order::Pause => self.paused = true,
            Order::Resume => self.paused = false,
            Order::Group(GroupFile::MemoryHigh, limit) => self.high = limit.map(|limit| limit.0),
            Order::Group(GroupFile::MemoryMax, limit) => self.max = limit.map(|limit| limit.0),
            Order::Group(GroupFile::SwapMax, limit) => {
                self.swap = limit.map_or(0, |limit| limit.0);
            }
            Order::Kill => self.killed = true,
            Order::Report(_) | Order::Save { .. } | Order::End => {}
        }
    }

    fn fault(&self) -> Option<Fault> {
        let wedged = self.character.wedges && self.actual > 0 && self.cache < self.configured / 10;
        self.fault
            .map(|(fault, _)| fault)
            .or_else(|| wedged.then_some(Fault::Silent))
    }

    /// Continues the communication with the agent; returns the events for it.
    pub(super) fn talk(&mut self, now_ms: u64, random: &mut SplitMix64) -> Vec<VmEvent> {
        let Some(mut line) = self.line.take() else {
            return Vec::new();
        };
        let mut kinds = Vec::new();
        if let Some((until_ms, order)) = line.busy.take() {
            if now_ms < until_ms {
                line.busy = Some((until_ms, order));
            } else if let Some(order) = order {
                let result = self.carry_out(&order, now_ms, random);
                if matches!(order, Order::Balloon(_)) {
                    line.settle_until_ms = now_ms + 10_000;
                }
                let wait = if result.is_ok() { SETTLING_MS } else { 0 };
                line.due_ms = line.due_ms.min(now_ms + wait);
                kinds.push(VmEventKind::Done(OrderDone { order, result }));
            } else {
                kinds.push(self.sample(&mut line, now_ms));
            }
        }
        if line.busy.is_none() {
            if let Ok(first) = line.orders.try_recv() {
                let (orders, replaced) = latest(first, &line.orders);
                line.waiting
                    .extend(orders.into_iter().map(|sent| sent.order));
                let replaced = replaced.into_iter().map(|sent| sent.order);
                kinds.extend(replaced.map(VmEventKind::Replaced));
            }
            let silent = matches!(self.fault(), Some(Fault::Hang | Fault::Late));
            if !line.waiting.is_empty() {
                let order = line.waiting.remove(0);
                // The host executes limits and kills.
                let asks = !matches!(order, Order::Group(..) | Order::Kill);
                let late = asks && (silent || self.fault() == Some(Fault::LateOrders));
                line.busy = Some((now_ms + if late { DEADLINE_MS } else { 0 }, Some(order)));
            } else if now_ms >= line.due_ms {
                line.busy = Some((now_ms + if silent { DEADLINE_MS } else { 0 }, None));
            }
        }
        let number = line.number;
        self.line = Some(line);
        kinds
            .into_iter()
            .map(|kind| VmEvent {
                id: VmId::from(self.name.as_str()),
                worker: number,
                kind,
            })
            .collect()
    }

    /// A VMM executes orders in their order of arrival.
    fn obey_after_earlier(&mut self, order: &Order, now_ms: u64) {
        for (_, earlier) in mem::take(&mut self.late) {
            self.obey(&earlier, now_ms);
        }
        self.obey(order, now_ms);
    }

    fn carry_out(
        &mut self,
        order: &Order,
        now_ms: u64,
        random: &mut SplitMix64,
    ) -> Result<(), OrderError> {
        if matches!(order, Order::Group(..) | Order::Kill) {
            if self.fault() == Some(Fault::Unreadable) {
                return Err(OrderError::NoProcess);
            }
            self.obey(order, now_ms);
            return Ok(());
        }
        match self.fault() {
            Some(Fault::Hang) => Err(timed_out().into()),
            Some(Fault::Late | Fault::LateOrders) => {
                let after_ms = self.late.last().map_or(now_ms, |(at_ms, _)| *at_ms);
                self.late
                    .push((after_ms + random.next() % 20_000, order.clone()));
                Err(timed_out().into())
            }
            Some(Fault::Refuse | Fault::Refused) => Err(self.refused().into()),
            Some(Fault::Garbage) => {
                // The result is unknown.
                if random.next().is_multiple_of(2) {
                    self.obey_after_earlier(order, now_ms);
                }
                Err(ClientError::MissingBody { endpoint: "any" }.into())
            }
            Some(Fault::NoEffect) => Ok(()),
            _ => {
                self.obey_after_earlier(order, now_ms);
                Ok(())
            }
        }
    }

    fn sample(&mut self, line: &mut Line, now_ms: u64) -> VmEventKind {
        let failure = match self.fault() {
            Some(Fault::Hang | Fault::Late) => Some(request(timed_out())),
            Some(Fault::Refused) => Some(request(self.refused())),
            Some(Fault::Garbage) => Some(SampleFailure::Form {
                op: Endpoint::VmInfo,
                source: serde_json::from_str::<u8>("lorem").unwrap_err(),
            }),
            Some(Fault::Unreadable) if self.character.level < FeatureLevel::L2 => {
                Some(SampleFailure::Resident {
                    pid: self.pid,
                    source: io::ErrorKind::PermissionDenied.into(),
                })
            }
            _ => None,
        };
        if let Some(failure) = failure {
            line.failures += 1;
            line.due_ms = now_ms + (SAMPLE_MS << (line.failures - 1).min(3));
            return VmEventKind::Missed(failure);
        }
        line.failures = 0;
        if line.seen.0 != self.pid {
            line.seen = (self.pid, line.seen.1 + 1);
            line.claims = None;
        }
        let reading = self.reading(line.claims, now_ms);
        line.claims = reading.sample.guest;
        let settles = reading.sample.ballooned != reading.sample.balloon_target;
        line.due_ms = now_ms
            + if settles && now_ms < line.settle_until_ms {
                SETTLING_MS
            } else {
                SAMPLE_MS
            };
        VmEventKind::Sampled(Box::new(reading), line.seen.1)
    }

    fn reading(&self, before: Option<GuestClaims>, at_ms: u64) -> VmReading {
        let fault = self.fault();
        let ballooned = match fault {
            Some(Fault::Lie) => self.target,
            _ => self.actual,
        };
        let configured = match fault {
            Some(Fault::Giant) => u64::MAX,
            _ => self.configured,
        };
        let free = (self.configured - self.actual).saturating_sub(self.used + self.cache);
        let odd = fault == Some(Fault::Counters) && at_ms.is_multiple_of(2000);
        let now = GuestClaims {
            at_ms,
            free: Bytes(free),
            available: Bytes(free + self.cache),
            alloc_stalls: Some(if odd { u64::MAX } else { self.stalls }),
            major_faults: Some(if odd { u64::MAX } else { 0 }),
            swap_in: Some(Bytes(if odd { u64::MAX } else { 0 })),
            oom_kills: Some(0),
        };
        let guest = match (self.character.level, fault) {
            (FeatureLevel::L0, _) => None,
            (_, Some(Fault::Silent)) => before,
            _ if self.paused => before,
            _ => Some(now),
        };
        let reclaim = (self.character.level == FeatureLevel::L2).then(|| ReclaimFigures {
            reporting_active: true,
            inhibited: false,
            policy_in_effect: true,
            reported: Bytes(self.requested),
            discarded: Bytes(self.discarded),
            report_p99_us: 100,
            ..ReclaimFigures::default()
        });
        VmReading {
            pid: self.pid,
            process: Some(Process::known(ProcessIdentity {
                pid: self.pid,
                start_ticks: 7,
            })),
            huge_pages: false,
            pool: PoolUse::default(),
            level: self.character.level,
            configured: Bytes(configured),
            has_balloon: true,
            interlock: self.paused.then_some(Interlock::Paused),
            sample: VmSample {
                at_ms,
                balloon_target: Bytes(self.target),
                ballooned: Bytes(ballooned),
                resident: Bytes(self.resident()),
                swapped: Bytes::ZERO,
                obtainable: Bytes::ZERO,
                guest,
                reclaim,
            },
            requested: Bytes(self.requested),
            activity: None,
            fixed_by: None,
        }
    }

    fn refused(&self) -> ClientError {
        ClientError::Refused {
            socket: self.socket.clone(),
            source: io::ErrorKind::ConnectionRefused.into(),
        }
    }
}

fn timed_out() -> ClientError {
    ClientError::TimedOut {
        timeout: Duration::from_millis(DEADLINE_MS),
    }
}

fn request(source: ClientError) -> SampleFailure {
    let op = Endpoint::VmInfo;
    SampleFailure::Request { op, source }
}
