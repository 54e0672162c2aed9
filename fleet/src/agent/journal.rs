//! What happened lately, for people: a bounded list of short lines with a number each.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::clock::unix_ms;

/// Entries kept. Some ten minutes of a busy host, a day of a quiet one.
const ENTRIES_MAX: usize = 1024;

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalEntry {
    /// Its number; grows by one.
    pub number: u64,
    /// When, ms since the Unix epoch.
    pub unix_ms: u64,
    /// What kind of thing: `state`, `action`, `vm`, `admission`, `agent`.
    pub kind: String,
    /// Which VM it is about; empty when none.
    pub vm: String,
    /// What.
    pub text: String,
}

/// A part of the journal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalPage {
    /// The entries, oldest first.
    pub entries: Vec<JournalEntry>,
    /// Where to go on.
    pub next: u64,
}

/// The journal.
#[derive(Debug, Default)]
pub(super) struct Journal {
    entries: VecDeque<JournalEntry>,
    next: u64,
}

impl Journal {
    /// Enters something, and logs it.
    pub(super) fn enter(&mut self, kind: &str, vm: &str, text: String) {
        log::info!(target: "ch_fleet", "kind={kind} vm={vm:?} {text}");
        if self.entries.len() == ENTRIES_MAX {
            self.entries.pop_front();
        }
        self.entries.push_back(JournalEntry {
            number: self.next,
            unix_ms: unix_ms(),
            kind: kind.to_owned(),
            vm: vm.to_owned(),
            text,
        });
        self.next += 1;
    }

    /// The latest of a kind.
    pub(super) fn last_of(&self, kind: &str) -> Option<String> {
        let mut latest = self.entries.iter().rev();
        latest
            .find(|entry| entry.kind == kind)
            .map(|entry| entry.text.clone())
    }

    /// Everything from `since` on.
    pub(super) fn since(&self, since: u64) -> JournalPage {
        JournalPage {
            entries: self
                .entries
                .iter()
                .filter(|entry| entry.number >= since)
                .cloned()
                .collect(),
            next: self.next,
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
