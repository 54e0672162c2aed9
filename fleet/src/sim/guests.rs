//! The guests of one host, stored as columns of numbers, because a million of them must be simulated quickly.
//!
//! A guest's memory is in one of five places, whose sum is its configured size. It is used by programs, in the page
//! cache, free but still resident on the host, free and absent, or in the balloon. Loads move memory between the first
//! three. Free page reporting makes resident free memory absent. The balloon takes free memory first, then cache, and
//! never memory of programs. A guest stalls if its programs need memory that it lacks, if required cache is missing, or
//! if the host runs out of memory.
//!
//! All amounts are MiB as `f32`, which are exact to a tenth of a page cluster at the sizes of guests.

use crate::placement::SplitMix64;

use super::scenario::{Character, GuestGroup, Load};

/// Memory that a guest's kernel keeps free, as a fraction of its size.
const WATERMARK: f32 = 0.02;
/// Fraction of the resident free memory that is reported per second: mainline reports a sixteenth every two seconds.
const REPORT_RELAXED: f32 = 1.0 / 32.0;
/// The same with the eager policy.
const REPORT_EAGER: f32 = 0.2;
/// MiB per second.
const INFLATE: f32 = 1024.0;
const INFLATE_SLOW: f32 = 20.0;
const DEFLATE: f32 = 2048.0;
/// Fraction of time that is lost if all of the required cache is missing.
const COLD_CACHE: f32 = 0.5;
/// Seconds until a killed guest runs again.
const RESTART_S: f32 = 30.0;
/// MiB per second that a guest's programs can touch for the first time.
const TOUCH: f32 = 1024.0;

/// The columns.
#[derive(Debug, Default)]
pub(super) struct Guests {
    pub(super) group: Vec<u16>,
    pub(super) configured: Vec<f32>,
    pub(super) used: Vec<f32>,
    pub(super) cache: Vec<f32>,
    pub(super) free_resident: Vec<f32>,
    pub(super) balloon: Vec<f32>,
    pub(super) target: Vec<f32>,
    /// Limit of its host memory; infinite without a limit.
    pub(super) limit: Vec<f32>,
    pub(super) eager: Vec<bool>,
    pub(super) paused: Vec<bool>,
    /// Seconds until it runs; negative if it runs.
    pub(super) down_s: Vec<f32>,
    /// Total seconds stalled for lack of memory.
    pub(super) stalled_s: Vec<f32>,
    /// Stalled fraction of the last tick.
    pub(super) stalling: Vec<f32>,
    /// The count that `/proc/vmstat` would show.
    pub(super) stall_events: Vec<u32>,
    pub(super) discarded: Vec<f32>,
    pub(super) repopulated: Vec<f32>,
    pub(super) epoch: Vec<u32>,
    level: Vec<f32>,
    phase: Vec<f32>,
    random: Vec<u32>,
}

impl Guests {
    pub(super) fn len(&self) -> usize {
        self.configured.len()
    }

    /// Adds a guest of this group that starts after `down_s` seconds.
    pub(super) fn push(
        &mut self,
        group: u16,
        kind: &GuestGroup,
        down_s: f32,
        random: &mut SplitMix64,
    ) {
        self.group.push(group);
        self.configured.push(mib(kind.memory.0));
        for column in [
            &mut self.used,
            &mut self.cache,
            &mut self.free_resident,
            &mut self.balloon,
            &mut self.target,
            &mut self.stalled_s,
            &mut self.stalling,
            &mut self.discarded,
            &mut self.repopulated,
        ] {
            column.push(0.0);
        }
        self.limit.push(f32::INFINITY);
        self.eager.push(false);
        self.paused.push(false);
        self.down_s.push(down_s);
        self.stall_events.push(0);
        self.epoch.push(1);
        self.level.push(unit(random.next()));
        self.phase.push(unit(random.next()));
        self.random.push(random.next() as u32 | 1);
    }

    pub(super) fn resident(&self, i: usize) -> f32 {
        self.used[i] + self.cache[i] + self.free_resident[i]
    }

    pub(super) fn running(&self, i: usize) -> bool {
        self.down_s[i] < 0.0 && !self.paused[i]
    }

    fn absent(&self, i: usize) -> f32 {
        (self.configured[i] - self.resident(i) - self.balloon[i]).max(0.0)
    }

    /// The balloon's size that it claims.
    pub(super) fn claimed(&self, i: usize, character: Character) -> f32 {
        if character == Character::Lying {
            self.target[i]
        } else {
            self.balloon[i]
        }
    }

    /// The host killed it: all of its memory is free, and another machine starts under its name.
    pub(super) fn kill(&mut self, i: usize) {
        (self.used[i], self.cache[i], self.free_resident[i]) = (0.0, 0.0, 0.0);
        (self.balloon[i], self.target[i]) = (0.0, 0.0);
        self.down_s[i] = RESTART_S;
        self.epoch[i] += 1;
        self.limit[i] = f32::INFINITY;
    }

    /// One step of `dt` seconds at the time `t`. `starved` is the fraction of the step that every guest loses because
    /// the host lacks memory.
    pub(super) fn tick(
        &mut self,
        i: usize,
        kind: &GuestGroup,
        t: f32,
        dt: f32,
        starved: f32,
        reporting: bool,
    ) {
        if self.down_s[i] >= 0.0 {
            self.down_s[i] -= dt;
            // A restart counts as stalled time; waiting for the first start does not.
            self.stalling[i] = f32::from(u8::from(self.epoch[i] > 1));
            self.stalled_s[i] += self.stalling[i] * dt;
            return;
        }
        if self.paused[i] {
            self.stalling[i] = 1.0;
            self.stalled_s[i] += dt;
            return;
        }
        self.move_balloon(i, kind.character, dt);
        let wanted = self.demand(i, &kind.load, t, dt) * self.configured[i];
        let short = self.use_memory(i, wanted, dt);
        let cold = self.fill_cache(i, kind, dt);
        if reporting && kind.character != Character::Hardened {
            self.report(i, dt);
        }
        let squeezed = self.hold_to_limit(i);
        let part = (short / (0.01 * self.configured[i])).min(1.0);
        let stall = part.max(cold * COLD_CACHE).max(starved).max(squeezed);
        if part > 0.0 {
            self.stall_events[i] += 1 + (part * 50.0) as u32;
        }
        self.stalling[i] = stall;
        self.stalled_s[i] += stall * dt;
    }

    fn move_balloon(&mut self, i: usize, character: Character, dt: f32) {
        let missing = self.target[i] - self.balloon[i];
        if missing < 0.0 {
            self.balloon[i] += missing.max(-DEFLATE * dt);
            return;
        }
        let rate = match character {
            Character::Stuck | Character::Lying => 0.0,
            Character::Slow => INFLATE_SLOW,
            _ => INFLATE,
        };
        let most = match character {
            Character::HalfStuck => (self.configured[i] * 0.1 - self.balloon[i]).max(0.0),
            _ => f32::INFINITY,
        };
        let watermark = self.configured[i] * WATERMARK;
        let absent = self.absent(i);
        let free = (self.free_resident[i] + absent - watermark).max(0.0);
        let grows = missing.min(rate * dt).min(most).min(free + self.cache[i]);
        // Free memory is taken first, resident or not; then the cache is dropped.
        let from_free = grows.min(free);
        let share = self.free_resident[i] / (self.free_resident[i] + absent).max(1e-3);
        let resident = (from_free * share).min(self.free_resident[i]);
        self.free_resident[i] -= resident;
        self.cache[i] -= grows - from_free;
        self.discarded[i] += resident + grows - from_free;
        self.balloon[i] += grows;
    }

    /// Demand of the programs, as a fraction of the guest's memory.
    fn demand(&mut self, i: usize, load: &Load, t: f32, dt: f32) -> f32 {
        match *load {
            Load::Steady { level } => level.0 as f32,
            Load::Walk { low, high, period } => {
                let (low, high) = (low.0 as f32, high.0 as f32);
                // Moves towards a random value, and draws a new one on arrival.
                let goal = self.phase[i];
                let way = dt * 1000.0 / period.0.max(1) as f32;
                let missing = goal - self.level[i];
                if missing.abs() <= way {
                    self.phase[i] = self.draw(i);
                } else {
                    self.level[i] += way.copysign(missing);
                }
                low + (high - low) * self.level[i]
            }
            Load::Burst {
                low,
                high,
                period,
                lasts,
                together,
            } => {
                let period = period.0 as f32 / 1000.0;
                let shift = if together {
                    0.0
                } else {
                    self.phase[i] * period
                };
                // A burst is at the end of its period, so that the simulation starts quietly.
                let into = (t + shift) % period;
                let bursts = into >= period - lasts.0 as f32 / 1000.0;
                if bursts { high.0 as f32 } else { low.0 as f32 }
            }
            Load::Grow { from, to, over } => {
                let part = (t * 1000.0 / over.0.max(1) as f32).min(1.0);
                from.0 as f32 + (to.0 - from.0) as f32 * part
            }
            Load::Churn { level, swing } => {
                let up = self.draw(i) - 0.5;
                (level.0 + swing.0 * f64::from(up) * 2.0) as f32
            }
        }
    }

    /// Pseudo-random number in 0…1 (xorshift32), one state per guest, so that hosts can be computed in any order.
    fn draw(&mut self, i: usize) -> f32 {
        let mut x = self.random[i];
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        self.random[i] = x;
        (x >> 8) as f32 / (1 << 24) as f32
    }

    /// Gives the programs the memory that they demand, as far as possible; returns the missing amount.
    fn use_memory(&mut self, i: usize, wanted: f32, dt: f32) -> f32 {
        let has = self.configured[i] - self.balloon[i] - self.configured[i] * WATERMARK;
        let gets = wanted.min(has.max(0.0));
        let change = (gets - self.used[i]).min(TOUCH * dt);
        if change < 0.0 {
            self.free_resident[i] -= change;
        } else {
            let reused = change.min(self.free_resident[i]);
            let fresh = (change - reused).min(self.absent(i));
            self.free_resident[i] -= reused;
            self.populate(i, fresh);
            self.cache[i] = (self.cache[i] - (change - reused - fresh)).max(0.0);
        }
        self.used[i] += change;
        (wanted - has).max(0.0)
    }

    /// Makes absent memory resident, previously discarded memory first.
    fn populate(&mut self, i: usize, bytes: f32) {
        let back = bytes.min((self.discarded[i] - self.repopulated[i]).max(0.0));
        self.repopulated[i] += back;
    }

    /// Grows the cache into free memory; returns the missing fraction of the required cache.
    fn fill_cache(&mut self, i: usize, kind: &GuestGroup, dt: f32) -> f32 {
        let hot = self.configured[i] * kind.hot_cache.0 as f32;
        let missing = (hot - self.cache[i]).max(0.0);
        // Required cache is read back at the speed of a disk.
        let wish = (mib(kind.cache_fill.0) + missing.min(200.0)) * dt;
        let free = self.free_resident[i] + self.absent(i) - self.configured[i] * WATERMARK;
        let grows = wish.min(free.max(0.0));
        let reused = grows.min(self.free_resident[i]);
        self.free_resident[i] -= reused;
        self.populate(i, grows - reused);
        self.cache[i] += grows;
        if hot > 0.0 {
            ((hot - self.cache[i]) / hot).clamp(0.0, 1.0)
        } else {
            0.0
        }
    }

    fn report(&mut self, i: usize, dt: f32) {
        let rate = if self.eager[i] {
            REPORT_EAGER
        } else {
            REPORT_RELAXED
        };
        let reported = self.free_resident[i] * (rate * dt).min(1.0);
        self.free_resident[i] -= reported;
        self.discarded[i] += reported;
    }

    /// Applies the limit of its control group by swapping, which costs only this guest.
    fn hold_to_limit(&mut self, i: usize) -> f32 {
        let over = self.resident(i) - self.limit[i];
        if over <= 0.0 {
            return 0.0;
        }
        let free = over.min(self.free_resident[i]);
        self.free_resident[i] -= free;
        let cache = (over - free).min(self.cache[i]);
        self.cache[i] -= cache;
        let used = (over - free - cache).min(self.used[i]);
        self.used[i] -= used;
        (used / (0.01 * self.configured[i])).min(1.0)
    }
}

/// Bytes as MiB.
pub(super) fn mib(bytes: u64) -> f32 {
    bytes as f32 / (1 << 20) as f32
}

/// MiB as bytes.
pub(super) fn bytes(mib: f32) -> crate::model::Bytes {
    crate::model::Bytes((f64::from(mib.max(0.0)) * f64::from(1 << 20)) as u64)
}

fn unit(random: u64) -> f32 {
    (random >> 40) as f32 / (1 << 24) as f32
}
