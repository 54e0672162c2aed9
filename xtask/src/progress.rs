//! Shows the progress of long-running commands with the remaining time: a bar on a terminal, a line every ten seconds
//! in a log.
//!
//! Work is a [`Plan`] of concurrent lanes; the tasks of a lane run one after another. Each task has an expected time on
//! an idle machine with two processors. If a task reports its progress, the estimate uses that. A lane's delay so far
//! scales the expected times of its remaining tasks.

use std::io::IsTerminal as _;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use parking_lot::{Mutex, MutexGuard};

/// Interval between two lines in a log.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
/// Interval between two updates of a terminal's bar.
const BAR_INTERVAL: Duration = Duration::from_millis(200);
/// Maximum slowness, because a task that had to wait is not representative of later ones.
const SLOWNESS_MAX: f64 = 4.0;
/// The bar's length in parts.
const BAR_PARTS: u64 = 1000;

/// The bar on the terminal, if there is one: other lines must not overwrite it.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Writes a line to stderr, above the bar if there is one.
pub(crate) fn note(line: &str) {
    match &*BAR.lock() {
        Some(bar) => bar.suspend(|| eprintln!("{line}")),
        None => eprintln!("{line}"),
    }
}

/// Tasks in lanes.
#[derive(Debug)]
pub(crate) struct Plan {
    lanes: Mutex<Vec<Vec<Task>>>,
    /// Time of the work after all lanes, which is not part of this plan.
    tail: Duration,
    begin: Instant,
}

#[derive(Debug)]
struct Task {
    name: String,
    expected: Duration,
    state: State,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Waiting,
    Running {
        since: Instant,
        /// Completed and total amount of work.
        done: Option<(u64, u64)>,
    },
    Done {
        took: Duration,
    },
}

/// A running task, which can report its progress.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Running<'a> {
    plan: &'a Plan,
    lane: usize,
    index: usize,
}

impl Running<'_> {
    /// Reports that `done` of `all` is complete.
    pub(crate) fn at(&self, done: u64, all: u64) {
        let mut lanes = self.plan.lock();
        if let State::Running { done: old, .. } = &mut lanes[self.lane][self.index].state {
            *old = (all > 0).then_some((done.min(all), all));
        }
    }
}

impl Plan {
    /// Creates a plan from lanes of tasks with their expected times in seconds, and the time of the work after them.
    pub(crate) fn new(lanes: &[&[(&str, u64)]], tail: Duration) -> Self {
        let task = |(name, seconds): &(&str, u64)| Task {
            name: (*name).into(),
            expected: Duration::from_secs(*seconds),
            state: State::Waiting,
        };
        Self {
            lanes: Mutex::new(
                lanes
                    .iter()
                    .map(|lane| lane.iter().map(task).collect())
                    .collect(),
            ),
            tail,
            begin: Instant::now(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<Task>>> {
        // The data is consistent even if a thread panicked while holding the lock.
        self.lanes.lock()
    }

    /// Runs the next task of a lane.
    pub(crate) fn next<T>(&self, lane: usize, work: impl FnOnce(Running<'_>) -> T) -> T {
        let since = Instant::now();
        let index = {
            let mut lanes = self.lock();
            let index = lanes[lane]
                .iter()
                .position(|task| matches!(task.state, State::Waiting))
                .expect("a lane runs no more tasks than it was given");
            lanes[lane][index].state = State::Running { since, done: None };
            index
        };
        let result = work(Running {
            plan: self,
            lane,
            index,
        });
        let took = since.elapsed();
        self.lock()[lane][index].state = State::Done { took };
        result
    }

    /// Runs `work` and shows the plan's progress until it returns.
    pub(crate) fn show<T>(&self, work: impl FnOnce() -> T) -> T {
        let terminal = std::io::stderr().is_terminal();
        let (ended, ending) = mpsc::channel::<()>();
        thread::scope(|scope| {
            scope.spawn(move || {
                if terminal {
                    self.show_bar(&ending);
                } else {
                    self.show_lines(&ending);
                }
            });
            let result = work();
            drop(ended);
            result
        })
    }

    fn show_lines(&self, ending: &mpsc::Receiver<()>) {
        while ending.recv_timeout(LINE_INTERVAL) == Err(RecvTimeoutError::Timeout) {
            eprintln!("{}", self.line(Instant::now()));
        }
    }

    fn show_bar(&self, ending: &mpsc::Receiver<()>) {
        let style = ProgressStyle::with_template("{bar:30} {wide_msg}")
            .expect("the template is well-formed");
        let bar = ProgressBar::new(BAR_PARTS).with_style(style);
        *BAR.lock() = Some(bar.clone());
        while ending.recv_timeout(BAR_INTERVAL) == Err(RecvTimeoutError::Timeout) {
            let now = Instant::now();
            let elapsed = now.duration_since(self.begin).as_secs_f64();
            let left = self.left(now).as_secs_f64();
            bar.set_position((elapsed / (elapsed + left + 0.001) * BAR_PARTS as f64) as u64);
            bar.set_message(self.line(now));
        }
        *BAR.lock() = None;
        bar.finish_and_clear();
    }

    /// `12 s: the VMM (44 %), Debian packages; about 80 s left`.
    fn line(&self, now: Instant) -> String {
        let running: Vec<String> = self
            .lock()
            .iter()
            .flatten()
            .filter_map(|task| match task.state {
                State::Running { done: None, .. } => Some(task.name.clone()),
                State::Running {
                    done: Some((done, all)),
                    ..
                } => Some(format!("{} ({} %)", task.name, done * 100 / all)),
                State::Waiting | State::Done { .. } => None,
            })
            .collect();
        format!(
            "{} s: {}; about {} s left",
            now.duration_since(self.begin).as_secs(),
            running.join(", "),
            self.left(now).as_secs()
        )
    }

    /// Remaining time until the plan and the following work are done.
    fn left(&self, now: Instant) -> Duration {
        let lanes = self.lock();
        let longest = lanes.iter().map(|lane| lane_left(lane, now)).max();
        longest.unwrap_or_default() + self.tail
    }
}

/// Remaining time of a lane.
fn lane_left(lane: &[Task], now: Instant) -> Duration {
    let slowness = slowness(lane, now);
    lane.iter()
        .map(|task| {
            let expected = task.expected.mul_f64(slowness);
            match task.state {
                State::Done { .. } => Duration::ZERO,
                State::Waiting => expected,
                State::Running { since, done } => {
                    running_left(expected, now.duration_since(since), done)
                }
            }
        })
        .sum()
}

fn running_left(expected: Duration, elapsed: Duration, done: Option<(u64, u64)>) -> Duration {
    let guess = expected.saturating_sub(elapsed).max(expected.mul_f64(0.1));
    let Some((done, all)) = done.filter(|(done, _)| *done > 0) else {
        return guess;
    };
    let share = done as f64 / all as f64;
    let measured = elapsed.mul_f64((1.0 - share) / share);
    // Early progress is unreliable: downloads start slowly, and small crates are compiled first.
    let trust = (share * 3.0).min(1.0);
    measured.mul_f64(trust) + guess.mul_f64(1.0 - trust)
}

/// Ratio of actual to expected time of the lane's finished tasks.
fn slowness(lane: &[Task], now: Instant) -> f64 {
    let (mut took, mut expected) = (0.0, 0.0);
    for task in lane {
        match task.state {
            State::Done { took: time } => {
                took += time.as_secs_f64();
                expected += task.expected.as_secs_f64();
            }
            // A running task that has exceeded its time counts, too.
            State::Running { since, .. } if now.duration_since(since) > task.expected => {
                took += now.duration_since(since).as_secs_f64();
                expected += task.expected.as_secs_f64();
            }
            State::Running { .. } | State::Waiting => {}
        }
    }
    // Tasks whose results already existed took no time and are ignored.
    if took < expected * 0.5 || expected == 0.0 {
        return 1.0;
    }
    (took / expected).min(SLOWNESS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn task(expected: u64, state: State) -> Task {
        Task {
            name: "x".into(),
            expected: SECOND * u32::try_from(expected).unwrap(),
            state,
        }
    }

    #[test]
    fn lane_that_waits_takes_what_is_expected() {
        let lane = [task(30, State::Waiting), task(20, State::Waiting)];
        assert_eq!(lane_left(&lane, Instant::now()), SECOND * 50);
    }

    #[test]
    fn lane_that_was_slow_is_expected_to_stay_so() {
        let done = State::Done { took: SECOND * 60 };
        let lane = [task(30, done), task(20, State::Waiting)];
        assert_eq!(lane_left(&lane, Instant::now()), SECOND * 40);
        let done = State::Done { took: SECOND };
        let lane = [task(30, done), task(20, State::Waiting)];
        assert_eq!(lane_left(&lane, Instant::now()), SECOND * 20);
    }

    #[test]
    fn task_that_counts_is_measured() {
        let left = running_left(SECOND * 10, SECOND * 40, Some((50, 100)));
        assert_eq!(left, SECOND * 40);
        let left = running_left(SECOND * 10, SECOND, Some((0, 100)));
        assert_eq!(left, SECOND * 9);
    }

    #[test]
    fn line_names_what_runs_and_what_is_left() {
        let plan = Plan::new(&[&[("a", 10)], &[("b", 20), ("c", 5)]], SECOND * 30);
        plan.lock()[1][0].state = State::Running {
            since: plan.begin,
            done: Some((1, 2)),
        };
        assert_eq!(plan.line(plan.begin), "0 s: b (50 %); about 40 s left");
        // Half done in ten seconds: ten more, then five for c.
        let later = plan.begin + SECOND * 10;
        assert_eq!(plan.line(later), "10 s: b (50 %); about 45 s left");
    }
}
