//! What the control thread says to what was asked through the store.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, PoisonError, mpsc};
use std::time::Instant;

use super::answer::book_refusal;
use super::control::{Agent, AgentError, Event, unix_ms};
use super::status::StoreStatus;
use super::store_link::StoreLink;
use crate::cluster::{Account, BookEntry, Held, Keys, Member, Sight};
use crate::config::Millis;
use crate::model::Bytes;
use crate::placement::MovableVm;
use crate::reservations::ReservationPhase;
use crate::store::Store;

/// How long the store's thread waits for the control thread.
const ANSWER: std::time::Duration = std::time::Duration::from_secs(5);

impl Agent {
    /// Joins the fleet, if there is one.
    pub(super) fn join_fleet(
        &mut self,
        store: Option<Arc<dyn Store>>,
    ) -> Result<Option<StoreLink>, AgentError> {
        let settings = self.settings.store.clone();
        if store.is_none() && !settings.is_used() {
            return Ok(None);
        }
        let host = settings
            .host
            .clone()
            .unwrap_or_else(|| self.host_name.clone());
        Keys::check_host(&host).map_err(AgentError::Name)?;
        let instance = instance(&self.settings.agent.state_dir).map_err(AgentError::Thread)?;
        // Hosts begin with different members, so that not all ask the same one.
        let member = host.bytes().map(usize::from).sum();
        let store: Arc<dyn Store> = match store {
            Some(store) => store,
            None => settings.connect(member).map_err(AgentError::Store)?,
        };
        let member = Member::new(
            settings.keys().map_err(AgentError::Store)?,
            (host.clone(), instance),
            (
                settings.lease.duration(),
                settings.deadline.duration(),
                self.settings.config.admission.facts_age_max.duration(),
            ),
        );
        let events = self.events();
        let link = StoreLink::start(member, store, move |sight| {
            let (answer, answered) = mpsc::sync_channel(1);
            events
                .try_send(Event::Store(Box::new(sight), answer))
                .ok()?;
            answered.recv_timeout(ANSWER).ok()
        })
        .map_err(AgentError::Thread)?;
        self.fleet = Some((host, link.health()));
        Ok(Some(link))
    }

    /// Answers what was asked, and says what is so.
    pub(super) fn account(&mut self, sight: &Sight) -> Account {
        if let Some(lines) = &sight.lines {
            self.release_withdrawn(lines);
        }
        let mut refused = BTreeMap::new();
        for entry in &sight.asked {
            if let Err(why) = self.promise(entry) {
                refused.insert(entry.id.clone(), why);
            }
        }
        if !sight.asked.is_empty() {
            self.publish();
        }
        Account {
            ready: !self.is_learning(),
            facts_age_ms: self.now_ms().saturating_sub(self.facts.at_ms),
            books: self.admission_books(),
            vms: self.movable(),
            held: self.held_for_others(),
            refused,
        }
    }

    /// Promises that were taken back by who asked for them. One whose VM is being started is past that.
    fn release_withdrawn(&mut self, lines: &[String]) {
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
                    let text = format!("reservation of {} taken back from afar", entry.promised);
                    self.journal.enter(unix_ms(), "admission", &entry.vm, text);
                }
                Err(error) => log::error!("{}", api::chain_report("reservations", &error)),
            }
        }
    }

    fn promise(&mut self, entry: &BookEntry) -> Result<(), String> {
        let held = self.book.find(&entry.id);
        if held.is_some_and(|held| held.id == entry.id) {
            return Ok(());
        }
        let vm = self.checked_name(entry.vm.clone())?;
        if self.vms.get(&vm).is_some() {
            return Err(format!("a VM {vm:?} runs here already"));
        }
        let wanted = entry.request();
        let verdict = self.verdict(wanted);
        self.tell_verdict(&vm, wanted, &verdict);
        let admission = verdict?;
        let hold = self.settings.config.admission.reservation;
        self.book
            .reserve_remote(
                &entry.id,
                &vm,
                (wanted.max, admission.promise),
                rustix::process::getuid().as_raw(),
                (unix_ms(), hold),
            )
            .map(drop)
            .map_err(|error| book_refusal(&error))
    }

    fn held_for_others(&self) -> Vec<Held> {
        self.book
            .entries()
            .iter()
            .filter(|entry| entry.remote && entry.phase != ReservationPhase::Running)
            .map(|entry| Held {
                id: entry.id.clone(),
                vm: entry.vm.clone(),
                max: entry.configured,
                promise: entry.promised,
                starting: entry.phase == ReservationPhase::Starting,
            })
            .collect()
    }

    fn movable(&self) -> Vec<MovableVm> {
        let vms = self.vms.iter().filter_map(|vm| {
            let reading = vm.reading.as_ref()?;
            let name = self.settings.policy_name(vm.id.as_str());
            let policy = self.settings.config.vm_policy(name, reading.configured);
            Some(MovableVm {
                id: vm.id.clone(),
                min: policy.min,
                max: reading.configured,
                resident: reading.sample.resident,
                class: policy.class,
                movable: vm.missed == 0 && vm.interlock().is_none(),
                moved: None,
            })
        });
        vms.collect()
    }

    /// The books as admission sees them: with the whole size of VMs that are to come.
    pub(super) fn admission_books(&self) -> crate::admission::HostBooks {
        let mut ledger = self.books();
        // Admission counts what is promised towards all memory; VMs to come may grow larger than that.
        ledger.configured += self.held_unseen() - ledger.promised;
        crate::admission::HostBooks {
            ledger,
            ..self.plan.books()
        }
    }

    pub(super) fn store_status(&self) -> Option<StoreStatus> {
        let (host, health) = self.fleet.as_ref()?;
        let health = health
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let age = health.good.map(|good| {
            let age = Instant::now().saturating_duration_since(good);
            u64::try_from(age.as_millis()).unwrap_or(u64::MAX)
        });
        let waiting = self.held_for_others();
        Some(StoreStatus {
            host: host.clone(),
            endpoints: self.settings.store.endpoints.clone(),
            up: health.up,
            registered: health.round.registered,
            error: health.error,
            age_ms: age,
            latency_us: (health.calls.latency_ms * 1e3) as u64,
            lines: health.round.lines,
            held: waiting.len(),
            held_bytes: waiting.iter().map(|held| held.promise).sum::<Bytes>(),
            leases: health.counts.leases,
            leases_lost: health.counts.leases_lost,
            conflicts: health.counts.conflicts,
            lease: Millis(self.settings.store.lease.0),
            calls: health
                .calls
                .calls
                .iter()
                .map(|((call, result), count)| (format!("{} {result}", call.name()), *count))
                .collect(),
        })
    }
}

/// What tells this machine from another one of the same name: made once, kept with the reservations.
fn instance(state_dir: &Path) -> io::Result<String> {
    let path = state_dir.join("instance");
    match fs::read_to_string(&path) {
        Ok(text) if !text.trim().is_empty() => return Ok(text.trim().to_owned()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let made = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    let beside = state_dir.join("instance.new");
    fs::write(&beside, &made)?;
    fs::rename(&beside, &path)?;
    Ok(made.trim().to_owned())
}

/// Shared with the store's thread.
pub(super) type FleetHealth = (
    String,
    Arc<std::sync::Mutex<super::store_link::StoreHealth>>,
);
