//! Measures how fast bursts can follow each other. Guests take turns: each allocates most of its memory, holds it and
//! frees it. The host has room for the idle guests and two bursts.
//!
//! The sooner the memory of a freed burst returns to the host, the shorter the interval can be.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use integration_tests::MIB;
use serde::Serialize;
use serde_json::json;

use crate::chart;
use crate::host::Host;
use crate::outcome::Outcome;
use crate::plan::Burst;
use crate::recorder::{Recorder, Sample};
use crate::turns::{Progress, Turner};

/// Range of intervals in which the shortest is searched, and precision of the search.
const INTERVAL_MS_MIN: f64 = 500.0;
const INTERVAL_MS_MAX: f64 = 32_000.0;
const TRIALS_MAX: u32 = 6;
/// Maximum fraction of turns that find their guest still busy; with more, the interval is not sustained.
const LATE_SHARE_MAX: f64 = 0.05;
/// Interval at which a waiting trial checks for failures.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// The trial of one interval.
#[derive(Clone, Debug, Serialize)]
struct Trial {
    interval_ms: f64,
    lasted: bool,
    why: String,
    turns: u64,
    late: u64,
    oom_kills: u64,
    seconds: f64,
    bursts_per_minute: f64,
    /// Resident memory above the guests' own use, integrated over the trial.
    excess_gib_minutes: f64,
}

pub(crate) fn run(plan: &Burst) -> Result<Outcome> {
    let host = Host::enter(plan.host_bytes)?;
    println!(
        "host: {} MiB, {} MiB of them available; {} guests of {} MiB take turns of {} MiB; reporting {}",
        host.total_bytes()? / MIB,
        host.available_bytes()? / MIB,
        plan.guests,
        plan.guest_bytes / MIB,
        plan.burst_bytes / MIB,
        plan.reporting.word()
    );
    if let Some(seed) = plan.seed {
        println!("arrivals from seed {seed}");
    }
    let mut fleet: Option<Fleet> = None;
    let mut trials: Vec<Trial> = Vec::new();
    let mut best: Option<(Trial, Vec<Sample>)> = None;
    let (mut low, mut high) = (INTERVAL_MS_MIN, INTERVAL_MS_MAX);
    loop {
        let interval_ms = plan
            .interval_ms
            .map_or((low * high).sqrt(), |interval| interval as f64);
        let mut running = match fleet.take() {
            Some(fleet) => fleet,
            None => Fleet::start(plan, &host)?,
        };
        let (trial, samples) = running.trial(plan, &host, interval_ms)?;
        println!(
            "interval {:6.2} s: {}, {} turns, {} late, {:.1} a minute, excess {:.2} GiB·min",
            interval_ms / 1000.0,
            trial.why,
            trial.turns,
            trial.late,
            trial.bursts_per_minute,
            trial.excess_gib_minutes
        );
        if trial.lasted {
            high = interval_ms;
            best = Some((trial.clone(), samples));
            fleet = Some(running);
        } else {
            low = interval_ms;
            best = best.or(Some((trial.clone(), samples)));
        }
        trials.push(trial);
        if plan.interval_ms.is_some() || trials.len() as u32 == TRIALS_MAX {
            break;
        }
    }
    let (best, samples) = best.expect("there was a trial");
    summary(plan, &host, &trials, &best, &samples)
}

/// The guests and their recordings.
struct Fleet {
    turners: Vec<Turner>,
    progress: Arc<Progress>,
    recorder: Arc<Recorder>,
}

impl Fleet {
    fn start(plan: &Burst, host: &Host) -> Result<Fleet> {
        let recorder = Arc::new(Recorder::start(host));
        let progress = Arc::<Progress>::default();
        let turners = (0..plan.guests)
            .map(|number| Turner::start(plan, number, &recorder, &progress))
            .collect::<Result<_>>()?;
        Ok(Fleet {
            turners,
            progress,
            recorder,
        })
    }

    /// Makes the guests take turns until the time is over or one of them fails.
    fn trial(
        &mut self,
        plan: &Burst,
        host: &Host,
        interval_ms: f64,
    ) -> Result<(Trial, Vec<Sample>)> {
        let kills = host.oom_kills()?;
        let done = self.progress.done.load(Ordering::SeqCst);
        let begin = self.recorder.seconds();
        let started = Instant::now();
        let end = started + Duration::from_millis(plan.duration_ms);
        let mut arrivals = Arrivals::new(plan, interval_ms);
        let (mut next, mut asked, mut late) = (started, 0u64, 0u64);
        let lost = || -> Result<bool> {
            Ok(host.oom_kills()? > kills || self.progress.broken.load(Ordering::SeqCst))
        };
        let mut lasted = true;
        while Instant::now() < end && lasted {
            if Instant::now() < next {
                thread::park_timeout(LOOK_INTERVAL.min(next - Instant::now()));
                lasted = !lost()?;
                continue;
            }
            let (guest, pause) = arrivals.next(self.turners.len());
            asked += 1;
            late += u64::from(!self.turners[guest].take_turn());
            next += pause;
        }
        let seconds = started.elapsed().as_secs_f64();
        let turns = self.progress.done.load(Ordering::SeqCst) - done;
        let samples: Vec<Sample> = self.recorder.samples();
        let punctual = late as f64 <= asked as f64 * LATE_SHARE_MAX;
        let why = match (lasted, punctual || plan.seed.is_some()) {
            (false, _) => "a guest was lost",
            (true, false) => "turns came too late",
            (true, true) => "lasted",
        };
        let trial = Trial {
            interval_ms,
            lasted: why == "lasted",
            why: why.to_owned(),
            turns,
            late,
            oom_kills: host.oom_kills()? - kills,
            seconds,
            bursts_per_minute: turns as f64 * 60.0 / seconds,
            excess_gib_minutes: excess_gib_minutes(&samples, begin),
        };
        Ok((trial, samples))
    }
}

/// The order of the guests' turns, and the time between them.
struct Arrivals {
    interval_ms: f64,
    /// State of a xorshift generator; 0 for turns in order at fixed intervals.
    random: u64,
    turn: usize,
}

impl Arrivals {
    fn new(plan: &Burst, interval_ms: f64) -> Arrivals {
        // Zero is the one state a xorshift generator never leaves.
        let random = plan.seed.map_or(0, |seed| seed | 1 << 63);
        Arrivals {
            interval_ms,
            random,
            turn: 0,
        }
    }

    fn next(&mut self, guests: usize) -> (usize, Duration) {
        if self.random == 0 {
            self.turn += 1;
            let pause = Duration::from_secs_f64(self.interval_ms / 1000.0);
            return (self.turn % guests, pause);
        }
        let guest = (self.draw() % guests as u64) as usize;
        let uniform = (self.draw() >> 11) as f64 / (1u64 << 53) as f64;
        // Exponential gaps make independent arrivals.
        let gap_ms = -(1.0 - uniform).ln() * self.interval_ms;
        (guest, Duration::from_secs_f64(gap_ms / 1000.0))
    }

    fn draw(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}

/// The area between the resident memory and the guests' own use, from `begin` on.
fn excess_gib_minutes(samples: &[Sample], begin: f64) -> f64 {
    let area: f64 = samples
        .windows(2)
        .filter(|pair| pair[0].seconds >= begin)
        .map(|pair| pair[0].excess_bytes as f64 * (pair[1].seconds - pair[0].seconds))
        .sum();
    area / (1u64 << 30) as f64 / 60.0
}

fn summary(
    plan: &Burst,
    host: &Host,
    trials: &[Trial],
    best: &Trial,
    samples: &[Sample],
) -> Result<Outcome> {
    let word = plan.reporting.word();
    let sentence = if plan.interval_ms.is_some() || !best.lasted {
        format!(
            "reporting {word}: turns every {:.2} s: {}; {:.1} a minute, excess {:.2} GiB·min",
            best.interval_ms / 1000.0,
            best.why,
            best.bursts_per_minute,
            best.excess_gib_minutes
        )
    } else {
        format!(
            "reporting {word}: the shortest interval that lasts is {:.2} s, {:.1} bursts a minute",
            best.interval_ms / 1000.0,
            best.bursts_per_minute
        )
    };
    let total_bytes = host.total_bytes()?;
    Ok(Outcome {
        name: format!(
            "burst-{word}{}",
            if plan.seed.is_some() { "-arrivals" } else { "" }
        ),
        svg: chart::svg(&sentence, total_bytes, samples),
        figures: json!({
            "plan": plan,
            "host_total_bytes": total_bytes,
            "trials": trials,
            "best": best,
            "samples": samples,
        }),
        sentence,
        fault: None,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::plan::Reporting;

    fn plan(seed: Option<u64>) -> Burst {
        Burst {
            host_bytes: 0,
            guest_bytes: 0,
            burst_bytes: 0,
            guests: 3,
            hold_ms: 0,
            duration_ms: 0,
            interval_ms: Some(2000),
            seed,
            reporting: Reporting::Off,
            order: None,
        }
    }

    #[test]
    fn turns_without_a_seed_come_in_order_at_the_interval() {
        let mut arrivals = Arrivals::new(&plan(None), 2000.0);
        let turns: Vec<_> = (0..4).map(|_| arrivals.next(3)).collect();
        let pause = Duration::from_secs(2);
        assert_eq!(turns, [(1, pause), (2, pause), (0, pause), (1, pause)]);
    }

    #[test]
    fn arrivals_with_a_seed_repeat_and_keep_their_mean() {
        const COUNT: u32 = 10_000;
        let draw = |seed| {
            let mut arrivals = Arrivals::new(&plan(Some(seed)), 2000.0);
            (0..COUNT).map(|_| arrivals.next(3)).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        let total: Duration = draw(7).iter().map(|(_, pause)| *pause).sum();
        let mean = total.as_secs_f64() / f64::from(COUNT);
        assert!((1.9..2.1).contains(&mean), "{mean}");
        for guest in 0..3 {
            let share = draw(7).iter().filter(|turn| turn.0 == guest).count();
            assert!((3000..3700).contains(&share), "{guest}: {share}");
        }
    }

    #[test]
    fn excess_is_the_area_from_the_begin_on() {
        let sample = |seconds, gib: u64| Sample {
            seconds,
            available_bytes: 0,
            resident_bytes: BTreeMap::new(),
            excess_bytes: gib << 30,
        };
        let samples = [
            sample(0.0, 9),
            sample(30.0, 2),
            sample(60.0, 1),
            sample(120.0, 5),
        ];
        assert_eq!(excess_gib_minutes(&samples, 30.0), 2.0);
    }
}
