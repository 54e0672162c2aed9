//! The VMs of this host: who serves each, what was last heard of it, what is under way to it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::model::{Bytes, FeatureLevel, Interlock, VmFacts, VmId, VmPolicy};
use crate::sample::{Found, SocketIdentity, VmReading};
use crate::worker::VmWorker;

/// One VM.
#[derive(Debug)]
pub(super) struct Vm {
    pub(super) id: VmId,
    pub(super) socket: PathBuf,
    pub(super) identity: SocketIdentity,
    pub(super) worker: VmWorker,
    /// Which process behind the socket the last reading came from.
    process: u64,
    pub(super) epoch: u64,
    pub(super) reading: Option<VmReading>,
    pub(super) rates: Rates,
    pub(super) missed: u32,
    pub(super) failure: Option<&'static str>,
    /// A balloon that was ordered and is not confirmed.
    pub(super) ordered: Option<Bytes>,
    /// Which way the balloon was last moved, and when on the planner's clock.
    pub(super) moved: Option<(Direction, u64)>,
    pub(super) pinned: bool,
}

/// Which way a balloon goes.
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

/// All of them by name, and the numbers that tell machines apart.
#[derive(Debug, Default)]
pub(super) struct Vms {
    by_name: BTreeMap<VmId, Vm>,
    workers: u64,
    epochs: u64,
}

/// What a look for sockets changed.
#[derive(Debug, Default)]
pub(super) struct ScanChange {
    pub(super) appeared: Vec<VmId>,
    pub(super) replaced: Vec<VmId>,
    pub(super) went: Vec<VmId>,
}

impl Vms {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Vm> {
        self.by_name.values()
    }

    pub(super) fn get(&self, name: &str) -> Option<&Vm> {
        self.by_name.get(name)
    }

    pub(super) fn get_mut(&mut self, name: &str) -> Option<&mut Vm> {
        self.by_name.get_mut(name)
    }

    /// Follows what was found. `start` makes the thread for a socket under a number that no other ever had.
    pub(super) fn follow(
        &mut self,
        found: Vec<Found>,
        mut start: impl FnMut(&Found, u64) -> std::io::Result<VmWorker>,
    ) -> ScanChange {
        let mut change = ScanChange::default();
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
            self.workers += 1;
            match start(&found, self.workers) {
                Ok(worker) => {
                    self.epochs += 1;
                    let vm = Vm::new(&found, worker, self.epochs);
                    if !change.replaced.contains(&vm.id) {
                        change.appeared.push(vm.id.clone());
                    }
                    self.by_name.insert(vm.id.clone(), vm);
                }
                // The next look tries again.
                Err(error) => log::error!("no thread for the VM {:?}: {error}", found.name),
            }
        }
        change.went = before.into_keys().collect();
        change
    }

    /// Has every VM served by a new thread.
    pub(super) fn restart(&mut self, start: impl Fn(&Found, u64) -> std::io::Result<VmWorker>) {
        for vm in self.by_name.values_mut() {
            self.workers += 1;
            let found = Found {
                name: vm.id.as_str().to_owned(),
                socket: vm.socket.clone(),
                identity: vm.identity,
            };
            match start(&found, self.workers) {
                Ok(worker) => {
                    vm.worker = worker;
                    // A new thread counts the processes behind the socket from the beginning.
                    vm.process = 0;
                    vm.ordered = None;
                }
                Err(error) => log::error!("no thread for the VM {:?}: {error}", vm.id),
            }
        }
    }

    /// Takes a reading over. True when another machine stands behind the name than before.
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
        } else if let Some(before) = &vm.reading {
            vm.rates = rates(before, &reading).unwrap_or(vm.rates);
        }
        vm.process = process;
        vm.missed = 0;
        vm.failure = None;
        vm.reading = Some(reading);
        replaced
    }
}

impl Vm {
    fn new(found: &Found, worker: VmWorker, epoch: u64) -> Self {
        Self {
            id: VmId::from(found.name.as_str()),
            socket: found.socket.clone(),
            identity: found.identity,
            worker,
            process: 0,
            epoch,
            reading: None,
            rates: Rates::default(),
            missed: 0,
            failure: None,
            ordered: None,
            moved: None,
            pinned: false,
        }
    }

    /// The balloon that was last asked for, by whomever.
    pub(super) fn target(&self) -> Bytes {
        let read = self
            .reading
            .as_ref()
            .map_or(Bytes::ZERO, |reading| reading.sample.balloon_target);
        self.ordered.unwrap_or(read)
    }

    /// As the planner sees it; `None` before the first good sample, when not even its size is known.
    pub(super) fn facts(&self, policy: impl FnOnce(Bytes) -> VmPolicy) -> Option<VmFacts> {
        let reading = self.reading.as_ref()?;
        let mut sample = reading.sample;
        sample.balloon_target = self.target();
        Some(VmFacts {
            id: self.id.clone(),
            epoch: self.epoch,
            level: reading.level,
            configured: reading.configured,
            has_balloon: reading.has_balloon,
            policy: policy(reading.configured),
            interlock: self.interlock(),
            sample: Some(sample),
            missed_samples: self.missed,
        })
    }

    pub(super) fn interlock(&self) -> Option<Interlock> {
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

/// `None` when too little time lies between the two.
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
