//! Moves of VMs between hosts: the operator's order to empty a host, and how far each move is.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::Keys;
use super::records::{logged, read, write};
use crate::host::ProcessIdentity;
use crate::model::Bytes;
use crate::store::{Committed, Revision, Store, StoreError, Txn, Write};

/// Maximum length of a text in a record: more would be a faulty VMM's.
const TEXT_CHARS_MAX: usize = 500;

/// How far a move is. Each phase is in the store before it allows anything.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Serialize,
    Deserialize,
    strum::Display,
    strum::IntoStaticStr,
    strum::VariantArray,
)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub enum MovePhase {
    /// The target has reserved the memory.
    Reserved,
    /// The target starts a VMM.
    Starting,
    /// The VMM at the target waits for the VM.
    Receiving,
    /// The source may send the VM.
    Sending,
    /// The VM runs on the target.
    Arrived,
    /// The VM stays on the source. The target ends its VMM.
    Failing,
    /// The VM stays on the source, and nothing is left at the target.
    Failed,
    /// Both VMMs have ended.
    Lost,
}

impl MovePhase {
    /// The name in tables and metrics.
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// Whether only the operator does anything about it now.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Failed | Self::Lost)
    }

    /// Whether the VM may still be sent or is being sent.
    pub fn is_under_way(self) -> bool {
        matches!(
            self,
            Self::Reserved | Self::Starting | Self::Receiving | Self::Sending
        )
    }
}

/// What a VM needs on each host that it runs on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needs {
    /// Files that must exist.
    pub files: Vec<String>,
    /// Folders in which its VMM creates files.
    pub folders: Vec<String>,
    /// Network interfaces that must exist.
    pub taps: Vec<String>,
}

/// One move.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoveRecord {
    /// The VM.
    pub vm: String,
    /// The host that it leaves.
    pub from: String,
    /// The host that it goes to; empty if there is none.
    pub to: String,
    /// How far it is.
    pub phase: MovePhase,
    /// Id of the reservation at the target.
    pub reservation: String,
    /// API socket of the VM on the source.
    pub socket: String,
    /// Its VMM there, and the boot of that host.
    pub process: Option<(ProcessIdentity, String)>,
    /// Size of the VM.
    pub memory: Bytes,
    /// What the target must have.
    pub needs: Needs,
    /// Where the VMM at the target waits.
    #[serde(default)]
    pub url: Option<String>,
    /// Why the VMM at the target has not received the VM, once it says so.
    #[serde(default)]
    pub refused: Option<String>,
    /// Whether the VMM on the source has ended. Unless the target has the VM then, it never will.
    #[serde(default)]
    pub source_gone: bool,
    /// Why the phase was entered, for display.
    #[serde(default)]
    pub why: String,
    /// Bytes sent so far.
    #[serde(default)]
    pub sent: Bytes,
    /// Maximum number of bytes to send per second.
    #[serde(default)]
    pub bytes_per_second_max: Option<Bytes>,
}

impl MoveRecord {
    /// The same in another phase.
    #[must_use]
    pub fn with(&self, phase: MovePhase, why: &str) -> Self {
        Self {
            phase,
            why: why.chars().take(TEXT_CHARS_MAX).collect(),
            ..self.clone()
        }
    }

    /// The same with the target's reason.
    #[must_use]
    pub fn with_refusal(&self, why: &str) -> Self {
        Self {
            refused: Some(why.chars().take(TEXT_CHARS_MAX).collect()),
            ..self.clone()
        }
    }
}

/// The operator's order to move all VMs of a host elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveOrder {
    /// Maximum number of moves at a time.
    pub parallel: u32,
    /// Maximum number of bytes that all its moves together send per second.
    #[serde(default)]
    pub bytes_per_second_max: Option<Bytes>,
    /// The user who gave it, for display.
    pub by: String,
}

impl MoveOrder {
    /// The limit of one of its moves.
    #[must_use]
    pub fn share(&self) -> Option<Bytes> {
        let share = |all: Bytes| Bytes(all.0 / u64::from(self.parallel.max(1)));
        self.bytes_per_second_max.map(share)
    }
}

/// A move in the store.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredMove {
    /// The move.
    pub record: MoveRecord,
    /// When it was written.
    pub changed: Revision,
}

/// All moves and orders at one moment.
#[derive(Clone, Debug, Default)]
pub struct MovePicture {
    /// The moment.
    pub revision: Revision,
    /// Orders by host.
    pub orders: BTreeMap<String, MoveOrder>,
    /// By source and VM.
    pub moves: Vec<StoredMove>,
}

impl MovePicture {
    /// Reads the picture. Values that cannot be read are left out.
    ///
    /// # Errors
    /// The store does not respond.
    pub fn read(store: &dyn Store, keys: &Keys, until: Instant) -> Result<Self, StoreError> {
        let listing = store.list(&keys.moves(), until)?;
        let mut picture = Self {
            revision: listing.revision,
            ..Self::default()
        };
        for pair in &listing.pairs {
            if let Some(host) = pair.key.strip_prefix(&keys.move_order("")) {
                if let Some(order) = logged(read(&pair.key, &pair.value)) {
                    picture.orders.insert(host.to_owned(), order);
                }
                continue;
            }
            let record: Option<MoveRecord> = logged(read(&pair.key, &pair.value));
            // A record below another key than its own would be changed elsewhere.
            let own = record.filter(|record| keys.vm_move(&record.from, &record.vm) == pair.key);
            if let Some(record) = own {
                let changed = pair.changed;
                picture.moves.push(StoredMove { record, changed });
            }
        }
        Ok(picture)
    }

    /// The moves from this host.
    pub fn from<'a>(&'a self, host: &'a str) -> impl Iterator<Item = &'a MoveRecord> {
        let records = self.moves.iter().map(|stored| &stored.record);
        records.filter(move |record| record.from == host)
    }
}

/// Writes a move if it has not changed since `changed`; 0: if there is none. Returns whether it was written.
///
/// # Errors
/// The store does not respond, and it is unknown whether the move was written.
pub fn write_move(
    store: &dyn Store,
    keys: &Keys,
    (record, changed): (&MoveRecord, Revision),
    until: Instant,
) -> Result<bool, StoreError> {
    let key = keys.vm_move(&record.from, &record.vm);
    let put = Write::Put {
        key: key.clone(),
        value: write(record),
        lease: None,
    };
    commit(store, vec![(key, changed)], put, until)
}

/// Removes a move if it has not changed.
///
/// # Errors
/// As [`write_move`].
pub fn remove_move(
    store: &dyn Store,
    keys: &Keys,
    stored: &StoredMove,
    until: Instant,
) -> Result<bool, StoreError> {
    let key = keys.vm_move(&stored.record.from, &stored.record.vm);
    let expect = vec![(key.clone(), stored.changed)];
    commit(store, expect, Write::Delete { key }, until)
}

/// Gives or withdraws the order to empty a host.
///
/// # Errors
/// The store does not respond.
pub fn order_moves(
    store: &dyn Store,
    keys: &Keys,
    (host, order): (&str, Option<&MoveOrder>),
    until: Instant,
) -> Result<(), StoreError> {
    let key = keys.move_order(host);
    let change = match order {
        Some(order) => Write::Put {
            key,
            value: write(order),
            lease: None,
        },
        None => Write::Delete { key },
    };
    commit(store, Vec::new(), change, until).map(drop)
}

fn commit(
    store: &dyn Store,
    expect: Vec<(String, Revision)>,
    change: Write,
    until: Instant,
) -> Result<bool, StoreError> {
    let writes = vec![change];
    let committed = store.commit(&Txn { expect, writes }, until)?;
    Ok(matches!(committed, Committed::Yes(_)))
}
