//! Records which pages are written after a snapshot, so that the next snapshot needs to save only these.

use std::path::Path;

use machine::memory::{GuestMemory, WriteTracker, WrittenPages};

use super::SnapshotError;
use super::chain::{SavedBase, real};
use super::link::{Base, Link};

/// The record of one machine.
#[derive(Debug)]
pub struct Recorder {
    pub(super) tracker: WriteTracker,
    /// Pages that were written since the base and are no longer in the tracker.
    unsaved: Option<WrittenPages>,
    base: Option<SavedBase>,
}

impl Recorder {
    /// A record without a base, which begins now.
    pub fn new(tracker: WriteTracker) -> Self {
        Self {
            tracker,
            unsaved: None,
            base: None,
        }
    }

    /// The base of a new snapshot in `folder` that has only what was written since the one in `base`.
    ///
    /// # Errors
    /// Writes since that one have not been recorded, or the new one cannot be based on it.
    pub fn base(
        recorder: Option<&Self>,
        base: &Path,
        folder: &Path,
    ) -> Result<Base, SnapshotError> {
        let recorded = recorder.and_then(|it| it.base.as_ref());
        match recorded.filter(|it| it.folder == real(base)) {
            Some(recorded) => recorded.of_new(folder),
            None => Err(SnapshotError::NotRecorded {
                path: base.to_owned(),
            }),
        }
    }

    /// The pages that were written since the last call.
    ///
    /// # Errors
    /// KVM cannot return its log: the machine has ended.
    pub(super) fn take(&mut self) -> Result<WrittenPages, SnapshotError> {
        let written = self.tracker.take().map_err(SnapshotError::Track)?;
        match &mut self.unsaved {
            Some(unsaved) => unsaved.add_all(&written),
            unsaved => *unsaved = Some(written.clone()),
        }
        Ok(written)
    }

    /// All pages that were written since the base.
    ///
    /// # Errors
    /// As for [`Recorder::take`].
    pub fn take_all(&mut self) -> Result<WrittenPages, SnapshotError> {
        let written = self.take()?;
        Ok(self.unsaved.clone().unwrap_or(written))
    }

    /// The snapshot in `folder` is complete. Everything that was taken is in it.
    pub fn saved(&mut self, folder: &Path, link: &Link) {
        let before = link.base.as_ref().and(self.base.as_ref());
        self.base = Some(SavedBase {
            id: link.id.clone(),
            folder: real(folder),
            length: before.map_or(0, |base| base.length) + 1,
        });
        self.unsaved = None;
    }

    /// The machine's RAM.
    pub fn memory(&self) -> &GuestMemory {
        self.tracker.memory()
    }

    /// Whether a differential snapshot can follow.
    pub fn has_base(&self) -> bool {
        self.base.is_some()
    }
}
