//! One guest of the burst experiment on a separate thread. It is idle until its turn.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use integration_tests::linux::Guest;

use crate::host::OOM_SCORE_ADJ_DEFAULT;
use crate::plan::Burst;
use crate::recorder::Recorder;

/// Progress of the guests' threads.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Number of completed turns.
    pub(crate) done: AtomicU64,
    /// A guest stopped responding.
    pub(crate) broken: AtomicBool,
}

/// A guest waiting for its turn; ends when dropped.
#[derive(Debug)]
pub(crate) struct Turner {
    turn: Option<Sender<()>>,
    busy: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Turner {
    /// Boots a guest and leaves it idle.
    pub(crate) fn start(
        plan: &Burst,
        number: usize,
        recorder: &Arc<Recorder>,
        progress: &Arc<Progress>,
    ) -> Result<Turner> {
        let memory = format!("size={}", plan.guest_bytes);
        let command_line = plan.reporting.command_line(plan.order);
        let vmm = plan.reporting.machine(&memory, &command_line).start()?;
        let score = format!("/proc/{}/oom_score_adj", vmm.pid());
        std::fs::write(score, OOM_SCORE_ADJ_DEFAULT).context("oom_score_adj")?;
        recorder.watch(number, vmm.pid());
        let mut guest = Guest::on_socket(vmm, "serial.sock")?;
        guest.wait_init()?;
        guest.wait_serving()?;
        let idle_bytes = plan.guest_bytes.saturating_sub(guest.memory_bytes("free")?);
        recorder.own_use(number, idle_bytes);
        let (turn, turns) = mpsc::channel();
        let busy = Arc::new(AtomicBool::new(false));
        let mut guest_turn = GuestTurn {
            guest,
            number,
            idle_bytes,
            burst_bytes: plan.burst_bytes,
            hold: Duration::from_millis(plan.hold_ms),
            recorder: Arc::clone(recorder),
        };
        let (flag, progress) = (Arc::clone(&busy), Arc::clone(progress));
        let thread = thread::spawn(move || {
            while turns.recv().is_ok() {
                if let Err(error) = guest_turn.run() {
                    println!("guest {number}: {:.300}", format!("{error:#}"));
                    progress.broken.store(true, Ordering::SeqCst);
                    return;
                }
                progress.done.fetch_add(1, Ordering::SeqCst);
                flag.store(false, Ordering::SeqCst);
            }
        });
        Ok(Turner {
            turn: Some(turn),
            busy,
            thread: Some(thread),
        })
    }

    /// Starts a turn; false if the last one has not ended.
    pub(crate) fn take_turn(&self) -> bool {
        if self.busy.swap(true, Ordering::SeqCst) {
            return false;
        }
        // A thread that has ended has recorded it in the progress.
        self.turn.as_ref().is_some_and(|turn| turn.send(()).is_ok())
    }
}

impl Drop for Turner {
    fn drop(&mut self) {
        self.turn = None;
        if let Some(thread) = self.thread.take() {
            // A panic does not matter at the end.
            let _ = thread.join();
        }
    }
}

/// A turn: allocate, hold, free.
struct GuestTurn {
    guest: Guest,
    number: usize,
    idle_bytes: u64,
    burst_bytes: u64,
    hold: Duration,
    recorder: Arc<Recorder>,
}

impl GuestTurn {
    fn run(&mut self) -> Result<()> {
        let top = self.idle_bytes + self.burst_bytes;
        self.recorder.own_use(self.number, top);
        self.guest.command(&format!("alloc {}", self.burst_bytes))?;
        thread::sleep(self.hold);
        self.guest.command("free")?;
        self.recorder.own_use(self.number, self.idle_bytes);
        Ok(())
    }
}
