//! The state of all hosts in the store at one moment.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::Deserialize;

use super::records::{logged, read};
use super::{Answer, DrainMark, HostRecord, Keys, RemoteReservations, VmsRecord};
use crate::placement::{HostCapacity, MovableVm};
use crate::store::{LeaseId, Listing, Revision, Store, StoreError};

/// A host in the store.
#[derive(Clone, Debug, Default)]
pub struct FleetHost {
    /// Its name.
    pub host: String,
    /// Its published data; absent if it is not available, or if its record has another version.
    pub record: Option<HostRecord>,
    /// The version of its record; absent if there is none.
    pub schema: Option<u32>,
    /// When the record was written.
    pub record_changed: Revision,
    /// The requests to it; absent if it is not available or not understood.
    pub book: Option<RemoteReservations>,
    /// When the book was written.
    pub book_changed: Revision,
    /// The lease of both.
    pub lease: Option<LeaseId>,
    /// Whether it accepts no new VMs.
    pub drain: Option<DrainMark>,
    /// When the mark was set; 0 without one.
    pub drain_changed: Revision,
}

impl FleetHost {
    /// Whether it is available.
    pub fn is_there(&self) -> bool {
        self.schema.is_some()
    }

    /// The memory that can be placed there: its published value, less later requests. `now_ms` is on the placer's
    /// clock.
    pub fn capacity(&self, now_ms: u64) -> HostCapacity {
        let record = self.record.clone().unwrap_or_default();
        let mut capacity = HostCapacity {
            id: self.host.clone(),
            at_ms: now_ms.saturating_sub(record.facts_age_ms),
            schema: self.schema.unwrap_or_default(),
            draining: self.drain.is_some(),
            headroom: record.headroom,
        };
        let entries = self.book.iter().flat_map(|book| &book.entries);
        for entry in entries.filter(|entry| entry.answer == Answer::Asked) {
            capacity.book(entry.promise);
            // The ledger counts reservations towards the configured memory already.
            capacity.headroom.ledger.configured += entry.max - entry.promise;
        }
        capacity
    }
}

/// All hosts.
#[derive(Clone, Debug, Default)]
pub struct FleetPicture {
    /// The moment.
    pub revision: Revision,
    /// By name.
    pub hosts: Vec<FleetHost>,
}

#[derive(Deserialize)]
struct SchemaOnly {
    schema: u32,
}

impl FleetPicture {
    /// Reads the picture.
    ///
    /// # Errors
    /// The store does not respond. An invalid value is not an error: it only excludes that host as a candidate.
    pub fn read(store: &dyn Store, keys: &Keys, until: Instant) -> Result<Self, StoreError> {
        Self::read_below(store, keys, &keys.hosts(), until)
    }

    /// Reads one host.
    pub(super) fn read_host(
        store: &dyn Store,
        keys: &Keys,
        host: &str,
        until: Instant,
    ) -> Result<(Revision, FleetHost), StoreError> {
        let picture = Self::read_below(store, keys, &keys.host(host), until)?;
        let found = picture.hosts.into_iter().next().unwrap_or(FleetHost {
            host: host.to_owned(),
            ..FleetHost::default()
        });
        Ok((picture.revision, found))
    }

    fn read_below(
        store: &dyn Store,
        keys: &Keys,
        below: &str,
        until: Instant,
    ) -> Result<Self, StoreError> {
        let listing = store.list(below, until)?;
        Ok(Self {
            revision: listing.revision,
            hosts: hosts_of(&listing, &keys.hosts()),
        })
    }

    /// The host of this name.
    pub fn find(&self, host: &str) -> Option<&FleetHost> {
        self.hosts.iter().find(|known| known.host == host)
    }

    /// The host in whose book the line with this id is.
    pub fn holder(&self, id: &str) -> Option<&FleetHost> {
        self.hosts.iter().find(|host| {
            host.book
                .as_ref()
                .is_some_and(|book| book.find(id).is_some())
        })
    }

    /// The VMs of all available hosts.
    ///
    /// # Errors
    /// The store does not respond.
    pub fn vms(
        store: &dyn Store,
        keys: &Keys,
        until: Instant,
    ) -> Result<BTreeMap<String, Vec<MovableVm>>, StoreError> {
        let prefix = keys.all_vms();
        let listing = store.list(&prefix, until)?;
        let pairs = listing.pairs.iter().filter_map(|pair| {
            let host = pair.key.strip_prefix(&prefix)?.to_owned();
            let record: VmsRecord = logged(read(&pair.key, &pair.value))?;
            Some((host, record.vms))
        });
        Ok(pairs.collect())
    }
}

fn hosts_of(listing: &Listing, prefix: &str) -> Vec<FleetHost> {
    let mut hosts: BTreeMap<&str, FleetHost> = BTreeMap::new();
    for pair in &listing.pairs {
        let rest = pair.key.strip_prefix(prefix);
        let Some((name, what)) = rest.and_then(|rest| rest.split_once('/')) else {
            continue;
        };
        let host = hosts.entry(name).or_insert_with(|| FleetHost {
            host: name.to_owned(),
            ..FleetHost::default()
        });
        match what {
            "record" => {
                host.record_changed = pair.changed;
                host.lease = pair.lease;
                let found = logged(read::<SchemaOnly>(&pair.key, &pair.value));
                let schema = found.map_or(0, |found| found.schema);
                if schema == HostCapacity::SCHEMA {
                    host.record = logged(read(&pair.key, &pair.value));
                }
                // A record that has our schema number but does not parse counts as invalid.
                let kept = schema != HostCapacity::SCHEMA || host.record.is_some();
                host.schema = Some(if kept { schema } else { 0 });
            }
            "book" => {
                host.book_changed = pair.changed;
                host.book = logged(read(&pair.key, &pair.value));
            }
            "drain" => {
                host.drain_changed = pair.changed;
                // The existence of a mark counts, not its content.
                host.drain = Some(logged(read(&pair.key, &pair.value)).unwrap_or_default());
            }
            _ => {}
        }
    }
    hosts.into_values().collect()
}
