//! This host as a member of a fleet: joining it, and the status of the shared store.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, SyncSender};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::error::AgentError;
use super::event::Event;
use super::status::StoreStatus;
use super::store_link::{StoreHealth, StoreLink};
use crate::agent_config::{AgentConfig, StoreSection};
use crate::cluster::{HeldReservation, Keys, Member};
use crate::model::Bytes;
use crate::state_file;
use crate::store::Store;

/// How long the store's thread waits for the control loop.
const ANSWER: Duration = Duration::from_secs(5);

/// The status of the membership.
#[derive(Debug)]
pub(super) struct Membership {
    host: String,
    health: Arc<Mutex<StoreHealth>>,
    store: Arc<dyn Store>,
}

impl Membership {
    /// Joins the fleet, if configured: `store`, or the configured one. Dropping the link leaves it.
    pub(super) fn join(
        config: &AgentConfig,
        machine: &str,
        store: Option<Arc<dyn Store>>,
        events: SyncSender<Event>,
    ) -> Result<Option<(Self, StoreLink)>, AgentError> {
        let section = &config.store;
        if store.is_none() && !section.is_used() {
            return Ok(None);
        }
        let host = section.host.clone().unwrap_or_else(|| machine.to_owned());
        Keys::check_host(&host).map_err(AgentError::Name)?;
        let instance = instance(&config.agent.state_dir).map_err(AgentError::Thread)?;
        // Hosts begin with different members, so that they do not all use the same one.
        let member = host.bytes().map(usize::from).sum();
        let store: Arc<dyn Store> = match store {
            Some(store) => store,
            None => section.connect(member).map_err(AgentError::Store)?,
        };
        let member = Member::new(
            section.keys().map_err(AgentError::Store)?,
            (host.clone(), instance),
            (
                section.lease.duration(),
                section.deadline.duration(),
                config.planning.admission.facts_age_max.duration(),
            ),
        );
        let link = StoreLink::start(member, Arc::clone(&store), move |view| {
            let (answer, answered) = mpsc::sync_channel(1);
            events.try_send(Event::Store(Box::new(view), answer)).ok()?;
            answered.recv_timeout(ANSWER).ok()
        })
        .map_err(AgentError::Thread)?;
        let health = link.health();
        let membership = Self {
            host,
            health,
            store,
        };
        Ok(Some((membership, link)))
    }

    /// The name of this host in the fleet.
    pub(super) fn host(&self) -> &str {
        &self.host
    }

    /// The store.
    pub(super) fn store(&self) -> Arc<dyn Store> {
        Arc::clone(&self.store)
    }

    /// The store as this host knows it; `waiting` are reservations of VMs that were placed here and do not run yet.
    pub(super) fn status(
        &self,
        section: &StoreSection,
        waiting: &[HeldReservation],
    ) -> StoreStatus {
        let health = self.health.lock().clone();
        let age = health.good.map(|good| {
            let age = Instant::now().saturating_duration_since(good);
            u64::try_from(age.as_millis()).unwrap_or(u64::MAX)
        });
        StoreStatus {
            host: self.host.clone(),
            endpoints: section.endpoints.clone(),
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
            lease: section.lease,
            calls: health
                .calls
                .calls
                .iter()
                .map(|((call, result), count)| (format!("{} {result}", call.name()), *count))
                .collect(),
        }
    }
}

/// Distinguishes this machine from another one with the same name: created once, kept with the reservations.
fn instance(state_dir: &Path) -> io::Result<String> {
    let path = state_dir.join("instance");
    match fs::read_to_string(&path) {
        Ok(text) if !text.trim().is_empty() => return Ok(text.trim().to_owned()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let made = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    state_file::replace(&path, made.as_bytes())?;
    Ok(made.trim().to_owned())
}
