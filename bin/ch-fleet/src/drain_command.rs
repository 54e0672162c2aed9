//! Implements `ch-fleet fleet drain --execute`. The agents move the VMs; this program gives the order and shows how far
//! they are. If it is ended, the agents continue.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use fleet::cluster::{
    FleetHost, FleetPicture, Keys, MoveOrder, MovePhase, MovePicture, MoveRecord, order_moves,
    remove_move,
};
use fleet::store::{Store, StoreError};
use serde::Serialize;

use crate::tables::clip;

/// Time between two looks at the moves.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// Time between two lines about the progress of a move.
const TELL_AGAIN: Duration = Duration::from_secs(5);

/// The moves from one host.
pub(crate) struct Moves<'a> {
    pub(crate) store: &'a dyn Store,
    pub(crate) keys: Keys,
    pub(crate) host: &'a str,
}

/// What became of the VMs.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Drained {
    /// VMs that have left, with the hosts to which they went.
    pub(crate) moved: BTreeMap<String, String>,
    /// VMs that stay, with the reasons.
    pub(crate) stay: BTreeMap<String, String>,
}

/// Refuses a host whose agent moves no VMs.
///
/// # Errors
/// There is no such agent.
pub(crate) fn require_mover(host: &FleetHost) -> Result<()> {
    let name = &host.host;
    match &host.record {
        Some(record) if record.receives => Ok(()),
        Some(_) => bail!("The agent of {name} moves no VMs: set agent.move_address there"),
        None => {
            bail!("No agent of this version is registered as {name}, so its VMs cannot be moved")
        }
    }
}

impl Moves<'_> {
    /// Forgets the results of earlier moves, and gives the order to move all VMs.
    pub(crate) fn order(&self, order: &MoveOrder, until: Instant) -> Result<()> {
        self.forget(until)?;
        order_moves(self.store, &self.keys, (self.host, Some(order)), until)?;
        Ok(())
    }

    /// Withdraws the order. Moves under way are completed.
    pub(crate) fn withdraw(&self, until: Instant) -> Result<()> {
        order_moves(self.store, &self.keys, (self.host, None), until)?;
        self.forget(until)
    }

    fn forget(&self, until: Instant) -> Result<()> {
        let picture = MovePicture::read(self.store, &self.keys, until)?;
        for stored in &picture.moves {
            let record = &stored.record;
            if record.from == self.host && record.phase.is_over() {
                remove_move(self.store, &self.keys, stored, until)?;
            }
        }
        Ok(())
    }

    /// Shows the moves until every VM has left or is known to stay. `call` is the time limit of a call to the store.
    pub(crate) fn wait(&self, call: Duration) -> Result<Drained> {
        eprintln!(
            "moving; Ctrl-C ends this display, ch-fleet fleet drain {} --undo the moves",
            self.host
        );
        let mut display = Display::default();
        let mut is_failing = false;
        loop {
            match self.look(&mut display, call) {
                Ok(true) => return Ok(display.drained),
                Ok(false) => is_failing = false,
                Err(error) => {
                    // The agents continue when the store does, and so does this.
                    if !std::mem::replace(&mut is_failing, true) {
                        eprintln!("{}", api::error_line(&error));
                    }
                }
            }
            if display.is_withdrawn {
                bail!("The order to move the VMs of {} was withdrawn", self.host);
            }
            thread::sleep(LOOK_AGAIN);
        }
    }

    /// Looks once; true if all is done.
    fn look(&self, display: &mut Display, call: Duration) -> Result<bool, StoreError> {
        // The VMs first: one that leaves meanwhile is then still among them.
        let vms = FleetPicture::vms(self.store, &self.keys, Instant::now() + call)?;
        let picture = MovePicture::read(self.store, &self.keys, Instant::now() + call)?;
        let moves: Vec<&MoveRecord> = picture.from(self.host).collect();
        display.is_withdrawn = !picture.orders.contains_key(self.host);
        display.show(&moves);
        let is_over = |vm: &str| {
            let mut moves = moves.iter();
            moves.any(|record| record.vm == vm && record.phase.is_over())
        };
        // Without its list, the host does not respond now.
        let Some(here) = vms.get(self.host) else {
            return Ok(false);
        };
        let all_over = moves.iter().all(|record| record.phase.is_over());
        let is_done = all_over && here.iter().all(|vm| is_over(vm.id.as_str()));
        if is_done {
            let stay = moves.iter().map(|record| {
                let why = match record.phase {
                    MovePhase::Lost => format!("lost: {}", record.why),
                    _ => record.why.clone(),
                };
                (record.vm.clone(), why)
            });
            display.drained.stay = stay.collect();
        }
        Ok(is_done)
    }
}

/// What was shown so far.
#[derive(Debug, Default)]
struct Display {
    drained: Drained,
    is_withdrawn: bool,
    /// The target and the phase of each move that was seen last, and when it was told.
    seen: BTreeMap<String, (String, MovePhase, Instant)>,
}

impl Display {
    fn show(&mut self, moves: &[&MoveRecord]) {
        for record in moves {
            let seen = self.seen.get(&record.vm);
            let is_new = seen.is_none_or(|(_, phase, _)| *phase != record.phase);
            let is_due = record.phase == MovePhase::Sending
                && seen.is_some_and(|(.., at)| at.elapsed() >= TELL_AGAIN);
            if is_new || is_due {
                eprintln!("{}", line(record));
                let seen = (record.to.clone(), record.phase, Instant::now());
                self.seen.insert(record.vm.clone(), seen);
            }
        }
        let is_there = |vm: &str| moves.iter().any(|record| record.vm == vm);
        // The source removes the record of a VM that has arrived.
        let gone = self.seen.extract_if(.., |vm, _| !is_there(vm));
        for (vm, (to, ..)) in gone {
            eprintln!("{vm}: runs on {to}");
            self.drained.moved.insert(vm, to);
        }
    }
}

fn line(record: &MoveRecord) -> String {
    let (vm, phase) = (&record.vm, record.phase);
    match phase {
        MovePhase::Sending => format!("{vm}: sending to {}, {:#} sent", record.to, record.sent),
        MovePhase::Failing | MovePhase::Failed => format!("{vm}: stays: {}", record.why),
        MovePhase::Lost => format!("{vm}: lost: {}", record.why),
        _ => format!("{vm}: {phase} on {}", record.to),
    }
}

pub(crate) fn table(out: &mut dyn Write, host: &str, drained: &Drained) -> io::Result<()> {
    for (vm, to) in &drained.moved {
        writeln!(out, "{:<20} moved to {to}", clip(vm, 20))?;
    }
    for (vm, why) in &drained.stay {
        writeln!(out, "{:<20} {why}", clip(vm, 20))?;
    }
    match drained.stay.len() {
        0 => writeln!(out, "{host} has no VMs any more"),
        stay => writeln!(out, "{host} still has {stay} VMs"),
    }
}
