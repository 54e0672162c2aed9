//! Saves a machine while it runs.
//!
//! ```text
//!  thread        owner of the machine
//!  pass 0        runs     all pages that hold data
//!  pass n        runs     pages written during the previous pass
//!  last pass     paused   the last pages; its state
//!  finish        resumed  checksums, configuration and state; synced, renamed
//! ```
//! The files are those of a paused machine at the moment of the pause. Writes are recorded as for a migration.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use api::VmConfig;
use machine::memory::{ContentFiles, WrittenPages};

use super::files::NewSnapshot;
use super::pass::write_pass;
use super::recorder::Recorder;
use super::saveable::require_content_is_ours;
use super::{Link, Progress, SnapshotError, SnapshotState};

/// The machine is paused as soon as the rest can be written in this time.
const PAUSE: Duration = Duration::from_millis(50);
/// Passes with the machine running, at most. A guest that writes as fast as the files is then paused for longer.
const PASSES_MAX: u32 = 16;

/// The owner of the machine: what only its thread can do.
pub trait LiveOwner: Send {
    /// Pauses the machine, unless it is paused, and returns its configuration and its state.
    ///
    /// # Errors
    /// The machine has ended, was replaced, does not pause, or cannot be saved.
    fn pause(&mut self) -> Result<(VmConfig, SnapshotState), SnapshotError>;

    /// Resumes the machine if [`LiveOwner::pause`] has paused it, also if that failed later.
    ///
    /// # Errors
    /// It cannot be resumed.
    fn resume(&mut self) -> Result<(), SnapshotError>;

    /// The snapshot is on stable storage, or nothing of it is left. The record of writes continues if there is one.
    fn end(&mut self, end: Result<LiveReport, SnapshotError>, recorder: Option<Recorder>);
}

/// The figures of a completed snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveReport {
    /// Passes over RAM, the last one with the machine paused.
    pub passes: u32,
    /// RAM written in all passes.
    pub data_bytes: u64,
    /// How long the machine was paused, if it was resumed.
    pub paused: Duration,
}

/// A running machine to be saved.
#[derive(Debug)]
pub struct LiveSave {
    /// An existing folder without a snapshot.
    pub folder: PathBuf,
    /// The place in its chain. With a base, only what was written since is saved.
    pub link: Link,
    /// The record of the writes to the machine's RAM.
    pub recorder: Recorder,
    /// Whether the record continues after the snapshot.
    pub keeps_recording: bool,
    /// The figures while it runs.
    pub progress: Arc<Progress>,
    /// Ends it soon if set.
    pub cancel: Arc<AtomicBool>,
}

impl LiveSave {
    /// Saves the machine; returns when [`LiveOwner::end`] has returned.
    pub fn run(mut self, owner: &mut dyn LiveOwner) {
        let end = self.save(owner).map_err(|error| match self.is_cancelled() {
            true => SnapshotError::Cancelled,
            false => error,
        });
        let Self {
            folder,
            link,
            mut recorder,
            keeps_recording,
            ..
        } = self;
        if end.is_ok() {
            recorder.saved(&folder, &link);
        }
        let keeps = match end {
            Ok(_) => keeps_recording,
            Err(_) => recorder.has_base(),
        };
        // Otherwise, the guest's writes are no longer recorded.
        let recorder = keeps.then_some(recorder);
        owner.end(end, recorder);
    }

    fn save(&mut self, owner: &mut dyn LiveOwner) -> Result<LiveReport, SnapshotError> {
        let folder = self.folder.clone();
        let mut new = NewSnapshot::create(&folder)?;
        let memory = self.recorder.tracker.memory().clone();
        let files = new.memory_files(&memory)?;
        let differs = self.link.base.is_some();
        // Otherwise, what was written so far is in the first pass.
        let first = match differs {
            true => Some(self.recorder.take_all()?),
            false => self.recorder.take().map(|_| None)?,
        };
        let content = ContentFiles::new(&memory, files, differs);
        let mut content = content.map_err(SnapshotError::Content)?;
        let (passes, mut written) = self.write_while_running(first, &mut content)?;
        let begun = Instant::now();
        let saved = owner.pause().and_then(|(config, mut state)| {
            require_content_is_ours(&config)?;
            // Saving the state may have written to RAM.
            written.add_all(&self.recorder.take()?);
            self.write_pass(Some(&written), &mut content)?;
            state.link = Some(self.link.clone());
            Ok((config, state))
        });
        let resumed = owner.resume();
        let paused = begun.elapsed();
        let (config, state) = saved?;
        resumed?;
        let data_bytes = content.data_bytes();
        let tables = content.finish().map_err(SnapshotError::Content)?;
        new.finish(&config, &state, &tables)?;
        Ok(LiveReport {
            passes: passes + 1,
            data_bytes,
            paused,
        })
    }

    /// Writes RAM until the rest is small, or does not become smaller. Returns the number of passes, and the rest.
    fn write_while_running(
        &mut self,
        mut pages: Option<WrittenPages>,
        content: &mut ContentFiles,
    ) -> Result<(u32, WrittenPages), SnapshotError> {
        let mut passes = 0;
        loop {
            let (before, begun) = (content.data_bytes(), Instant::now());
            self.write_pass(pages.as_ref(), content)?;
            let bytes = (content.data_bytes() - before).max(1);
            let seconds_per_byte = begun.elapsed().as_secs_f64() / bytes as f64;
            content.sync_data().map_err(SnapshotError::Content)?;
            passes += 1;
            let left = self.recorder.take()?;
            let is_small = seconds_per_byte * left.bytes() as f64 <= PAUSE.as_secs_f64();
            let grows = pages.is_some_and(|last| left.bytes() >= last.bytes());
            if is_small || grows || passes == PASSES_MAX {
                return Ok((passes, left));
            }
            pages = Some(left);
        }
    }

    fn write_pass(
        &self,
        written: Option<&WrittenPages>,
        content: &mut ContentFiles,
    ) -> Result<(), SnapshotError> {
        let memory = self.recorder.tracker.memory();
        write_pass(memory, written, content, &self.progress, || {
            self.is_cancelled()
        })
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }
}
