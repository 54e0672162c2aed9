//! Recent events for the operator: a bounded list of short, numbered lines.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::RwLock;
use serde::{Deserialize, Serialize};

use super::clock::unix_ms;

/// Maximum number of entries: about ten minutes of a busy host, or a day of an idle one.
const ENTRIES_MAX: usize = 1024;

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalEntry {
    /// Its number; grows by one.
    pub number: u64,
    /// When, ms since the Unix epoch.
    pub unix_ms: u64,
    /// Its kind: `state`, `action`, `vm`, `admission`, `standby`, `move`, `agent`.
    pub kind: String,
    /// The VM that it concerns; empty if none.
    pub vm: String,
    /// The text.
    pub text: String,
}

/// A part of the journal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalPage {
    /// The entries, oldest first.
    pub entries: Vec<JournalEntry>,
    /// The number of the next entry, from which to continue.
    pub next: u64,
}

/// The journal. The control loop adds entries; readers access it directly.
#[derive(Clone, Debug, Default)]
pub(super) struct Journal {
    // Locked only briefly: readers copy the entries that they need.
    entries: Arc<RwLock<Entries>>,
}

#[derive(Debug, Default)]
struct Entries {
    kept: VecDeque<JournalEntry>,
    next: u64,
}

impl Journal {
    /// Adds an entry, and logs it.
    pub(super) fn enter(&mut self, kind: &str, vm: &str, text: String) {
        log::info!(target: "ch_fleet", "kind={kind} vm={vm:?} {text}");
        let mut entries = self.entries.write();
        if entries.kept.len() == ENTRIES_MAX {
            entries.kept.pop_front();
        }
        let number = entries.next;
        entries.kept.push_back(JournalEntry {
            number,
            unix_ms: unix_ms(),
            kind: kind.to_owned(),
            vm: vm.to_owned(),
            text,
        });
        entries.next += 1;
    }

    /// The latest of a kind.
    pub(super) fn last_of(&self, kind: &str) -> Option<String> {
        let entries = self.entries.read();
        let mut latest = entries.kept.iter().rev();
        latest
            .find(|entry| entry.kind == kind)
            .map(|entry| entry.text.clone())
    }

    /// Everything from `since` on.
    pub(super) fn since(&self, since: u64) -> JournalPage {
        let entries = self.entries.read();
        JournalPage {
            entries: entries
                .kept
                .iter()
                .filter(|entry| entry.number >= since)
                .cloned()
                .collect(),
            next: entries.next,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn journal_keeps_the_latest_and_goes_on_where_the_reader_was() {
        let mut journal = Journal::default();
        for _ in 0..ENTRIES_MAX + 5 {
            journal.enter("vm", "a", String::new());
        }
        let all = journal.since(0);
        assert_eq!(all.entries.len(), ENTRIES_MAX);
        assert_eq!(all.entries[0].number, 5);
        assert!(journal.since(all.next).entries.is_empty());
        journal.enter("vm", "b", String::new());
        assert_eq!(journal.since(all.next).entries.len(), 1);
    }
}
