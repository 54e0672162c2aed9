//! Saves a machine while it runs.
//!
//! ```text
//!  thread        owner of the machine
//!  pass 0        runs     all pages that hold data
//!  pass n        runs     pages written meanwhile
//!  last pass     paused   the last pages; its state
//!  finish        resumed  checksums, configuration and state; synced, renamed
//! ```
//! The files are those of a paused machine at the moment of the pause. Writes are recorded as for a migration.

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use api::VmConfig;
use machine::memory::{
    ContentError, ContentFiles, PageRun, Pages, WriteTracker, WrittenPages, Zone,
};

use super::files::{NewSnapshot, require_content_is_ours};
use super::{Progress, SnapshotError, SnapshotState};

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

    /// The snapshot is on stable storage, or nothing of it is left.
    fn end(&mut self, end: Result<LiveReport, SnapshotError>);
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
    /// The machine's RAM, whose writes are recorded.
    pub tracker: WriteTracker,
    /// The figures while it runs.
    pub progress: Arc<Progress>,
    /// Ends it soon if set.
    pub cancel: Arc<AtomicBool>,
}

impl LiveSave {
    /// Saves the machine; returns when [`LiveOwner::end`] has returned.
    pub fn run(self, owner: &mut dyn LiveOwner) {
        let end = self.save(owner).map_err(|error| match self.is_cancelled() {
            true => SnapshotError::Cancelled,
            false => error,
        });
        // The guest's writes are no longer recorded.
        drop(self);
        owner.end(end);
    }

    fn save(&self, owner: &mut dyn LiveOwner) -> Result<LiveReport, SnapshotError> {
        let mut new = NewSnapshot::create(&self.folder)?;
        let memory = self.tracker.memory();
        let files = (0..memory.zones().len()).map(|at| new.memory_file(at));
        let files: Vec<_> = files.collect::<Result<_, _>>()?;
        let mut content = ContentFiles::new(memory, files).map_err(SnapshotError::Content)?;
        let (passes, mut written) = self.write_while_running(&mut content)?;
        let begun = Instant::now();
        let saved = owner.pause().and_then(|(config, state)| {
            require_content_is_ours(&config)?;
            // Saving the state may have written to RAM.
            written.add_all(&self.take()?);
            self.write_pass(Some(&written), &mut content)?;
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
        &self,
        content: &mut ContentFiles,
    ) -> Result<(u32, WrittenPages), SnapshotError> {
        let mut pages: Option<WrittenPages> = None;
        let mut passes = 0;
        loop {
            let (before, begun) = (content.data_bytes(), Instant::now());
            self.write_pass(pages.as_ref(), content)?;
            let bytes = (content.data_bytes() - before).max(1);
            let seconds_per_byte = begun.elapsed().as_secs_f64() / bytes as f64;
            content.sync_data().map_err(SnapshotError::Content)?;
            passes += 1;
            let left = self.take()?;
            let is_small = seconds_per_byte * left.bytes() as f64 <= PAUSE.as_secs_f64();
            let grows = pages.is_some_and(|last| left.bytes() >= last.bytes());
            if is_small || grows || passes == PASSES_MAX {
                return Ok((passes, left));
            }
            pages = Some(left);
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }

    fn take(&self) -> Result<WrittenPages, SnapshotError> {
        self.tracker.take().map_err(SnapshotError::Track)
    }

    fn write_pass(
        &self,
        written: Option<&WrittenPages>,
        content: &mut ContentFiles,
    ) -> Result<(), SnapshotError> {
        let memory = self.tracker.memory();
        let sizes: Vec<u64> = memory.zones().iter().map(Zone::bytes).collect();
        let content = RefCell::new(content);
        let send = |pages: Pages<'_>| {
            if self.is_cancelled() {
                return Err(Failure(SnapshotError::Cancelled));
            }
            content.borrow_mut().write(pages)?;
            let before: u64 = sizes[..pages.zone as usize].iter().sum();
            self.progress.reach(before + pages.offset);
            Ok(())
        };
        let clear = |run: PageRun| content.borrow_mut().clear(run).map_err(Failure::from);
        memory
            .send_content(written, send, clear)
            .map_err(|Failure(error)| error)?;
        self.progress.reach(sizes.iter().sum());
        Ok(())
    }
}

/// An error of a pass.
struct Failure(SnapshotError);

impl From<ContentError> for Failure {
    fn from(error: ContentError) -> Self {
        Self(SnapshotError::Content(error))
    }
}

/// Rejects a VM with a device whose writes to guest memory are not recorded.
///
/// # Errors
/// The device.
pub fn require_tracked_writes(config: &VmConfig) -> Result<(), SnapshotError> {
    let disks = config.disks.iter().flatten();
    let disks = disks
        .filter(|it| it.vhost_socket.is_some())
        .map(|it| &it.id);
    let nets = config.net.iter().flatten();
    let nets = nets.filter(|it| it.vhost_socket.is_some()).map(|it| &it.id);
    match disks.chain(nets).next() {
        Some(id) => Err(SnapshotError::NotLive {
            id: id.clone().unwrap_or_default(),
            reason: "another process serves it, whose writes to memory are not recorded",
        }),
        None => Ok(()),
    }
}

/// Rejects a VM whose images change after the snapshot: the restored guest would find other data than it knows.
///
/// # Errors
/// The device.
pub fn require_steady_disks(config: &VmConfig) -> Result<(), SnapshotError> {
    let disks = config.disks.iter().flatten();
    let disks = disks.filter(|it| !it.readonly).map(|it| &it.id);
    let pmems = config.pmem.iter().flatten();
    let pmems = pmems.filter(|it| !it.discard_writes).map(|it| &it.id);
    match disks.chain(pmems).next() {
        Some(id) => Err(SnapshotError::NotLive {
            id: id.clone().unwrap_or_default(),
            reason: "its image changes when the VM continues; set keep_paused, copy the image, then resume the VM",
        }),
        None => Ok(()),
    }
}
