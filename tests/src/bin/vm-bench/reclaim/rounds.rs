//! A guest that frees memory and touches it again, and the host's measurements.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::linux::{Guest, Machine};
use integration_tests::wait::wait_for;
use serde_json::Value;

use super::plan::{Block, Combination, Way};
use super::residency_trace::{Recording, ResidencyTrace, faults};

const GUEST_BYTES: u64 = 1 << 30;
/// Below the total memory that the guest reports when all unpluggable memory is plugged in.
const GUEST_TOLD_BYTES: u64 = 900 * MIB;
/// RAM is unplugged in blocks of this size.
const UNPLUG_BLOCK_BYTES: u64 = 2 * MIB;
/// Every other block of this is freed, or all of [`ALL_BYTES`].
const BLOCKS_BYTES: u64 = 832 * MIB;
const ALL_BYTES: u64 = 700 * MIB;
/// Percentages of the freed bytes whose return is timed.
pub(super) const SHARES: [u64; 3] = [50, 95, 99];
/// Percentage of return after which the wait ends.
const ENOUGH_PERCENT: u64 = 99;
/// Time without a decrease after which no more is expected: mainline pauses for two seconds between parts of its lists.
const QUIET: Duration = Duration::from_secs(7);
/// Time for the guest to touch most of its memory in small pages, on a busy emulated host.
const TOUCH_DEADLINE: Duration = Duration::from_secs(900);
const FALL_DEADLINE: Duration = Duration::from_secs(300);
/// The bitmap tracker delays memory that was reused within four seconds of a report, so each measured free follows a
/// rest.
const BITMAP_REST: Duration = Duration::from_millis(4500);

/// One free, and one reuse of the same memory.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) freed_bytes: u64,
    pub(super) blocks: u64,
    /// The free itself, as the guest timed it.
    pub(super) free_ms: f64,
    /// Resident bytes before.
    pub(super) before_bytes: u64,
    /// Bytes returned at the end.
    pub(super) back_bytes: u64,
    /// Time until each of [`SHARES`] had returned, if ever.
    pub(super) to_ms: [Option<f64>; 3],
    pub(super) bytes_per_second: Option<f64>,
    /// Batches that the device counted.
    pub(super) batches: u64,
    pub(super) ranges: u64,
    pub(super) discarded_bytes: u64,
    pub(super) discard_syscalls: u64,
    /// Page faults of the VMM until all memory was reused.
    pub(super) faults: u64,
    pub(super) sample_ms: Option<f64>,
    /// Time until the guest had all ballooned or unplugged memory again.
    pub(super) deflate_ms: Option<f64>,
    /// The touch itself, as the guest timed it.
    pub(super) touch_ms: f64,
    pub(super) touch_faults: u64,
}

/// A booted guest and the path by which its memory returns.
#[derive(Debug)]
pub(super) struct ReclaimGuest {
    guest: Guest,
    way: Way,
}

impl ReclaimGuest {
    /// Boots the guest for this combination and those that share it.
    pub(super) fn boot(combination: &Combination) -> Result<Self> {
        let way = combination.way;
        let balloon = match way {
            Way::Mainline | Way::Bitmap => "size=0,free_page_reporting=on",
            Way::Hinting => "size=0,free_page_hinting=on",
            Way::Inflate | Way::Unplug => "size=0",
        };
        let mut command_line = String::new();
        if let Some(tracker) = way.tracker() {
            command_line = format!("page_reporting.tracker={tracker}");
        }
        if let Some(order) = combination.block.order() {
            command_line += &format!(" page_reporting.page_reporting_order={order}");
        }
        if way == Way::Unplug {
            command_line += " memhp_default_state=online_movable";
        }
        let mut guest = Machine {
            memory: &combination.memory(),
            arguments: &["--balloon", balloon],
            command_line: &command_line,
            ..Machine::default()
        }
        .serve()?;
        wait_for("all memory in the guest", FALL_DEADLINE, || {
            let total = guest.memory_bytes("total")?;
            Ok((total > GUEST_TOLD_BYTES).then_some(()))
        })?;
        Ok(Self { guest, way })
    }

    /// Frees and touches blocks of one size, several times.
    pub(super) fn run(&mut self, block: Block, rounds: usize) -> Result<Vec<Round>> {
        self.rest();
        let (bytes, huge) = match block {
            Block::All => (ALL_BYTES, "always"),
            Block::Bytes(_) if block.order().is_some() => (BLOCKS_BYTES, "never"),
            Block::Bytes(_) => (BLOCKS_BYTES, "always"),
        };
        let answer = self
            .guest
            .command_within(&format!("alloc {bytes} huge={huge}"), TOUCH_DEADLINE)?;
        let id = number(&answer, 2)?;
        let rounds = (0..rounds)
            .map(|_| self.round(id, block))
            .collect::<Result<_>>()?;
        // Memory in use must not have been returned.
        self.guest
            .command_within(&format!("verify {id}"), TOUCH_DEADLINE)?;
        self.guest.command(&format!("free {id}"))?;
        Ok(rounds)
    }

    fn round(&mut self, id: u64, block: Block) -> Result<Round> {
        let pid = self.guest.vmm.pid();
        let picked = self.guest.command(&format!("pick {id} {block}"))?;
        let (blocks, freed_bytes) = (number(&picked, 2)?, number(&picked, 3)?);
        ensure!(freed_bytes > 0, "the guest has no whole blocks of {block}");
        let counted = self.counted()?;
        let faults_before = faults(pid)?;
        let recording = Recording::start(pid)?;

        let sent = Instant::now();
        let dropped = self.guest.command(&format!("drop {id}"))?;
        let free = Duration::from_micros(number(&dropped, 4)?);
        // The response is delayed by the serial port.
        let returned = (sent + free).min(Instant::now());
        let asked = self.ask(freed_bytes, returned)?;
        self.wait_end(&recording, asked, freed_bytes)?;

        let trace = recording.trace();
        let faults_back = faults(pid)?;
        let counts = self.counted()?;
        let deflate_ms = self.take_back()?;
        self.rest();
        let faults_rested = faults(pid)?;
        let refilled = self
            .guest
            .command_within(&format!("refill {id}"), TOUCH_DEADLINE)?;
        Ok(Round {
            freed_bytes,
            blocks,
            free_ms: ms(free),
            before_bytes: recording.before_bytes(),
            back_bytes: trace.back_bytes(),
            to_ms: SHARES.map(|percent| since(&trace, asked, freed_bytes / 100 * percent)),
            bytes_per_second: trace.bytes_per_second(),
            batches: counts.batches - counted.batches,
            ranges: counts.ranges - counted.ranges,
            discarded_bytes: counts.discarded_bytes - counted.discarded_bytes,
            discard_syscalls: counts.discard_syscalls - counted.discard_syscalls,
            faults: faults_back - faults_before,
            sample_ms: trace.interval().map(ms),
            deflate_ms,
            touch_ms: number(&refilled, 4)? as f64 / 1000.0,
            touch_faults: faults(pid)? - faults_rested,
        })
    }

    /// Requests the memory if the guest does not report it; returns the time of the request.
    fn ask(&self, freed_bytes: u64, returned: Instant) -> Result<Instant> {
        let asked = Instant::now();
        match self.way {
            Way::Mainline | Way::Bitmap => return Ok(returned),
            Way::Hinting => {
                let body = r#"{"action":"start"}"#;
                self.guest.vmm.put("vm.balloon-hinting", Some(body))?;
            }
            Way::Inflate => self.resize("desired_balloon", freed_bytes)?,
            Way::Unplug => {
                let gone_bytes = freed_bytes - freed_bytes % UNPLUG_BLOCK_BYTES;
                self.resize("desired_ram", GUEST_BYTES - gone_bytes)?;
            }
        }
        Ok(asked)
    }

    fn resize(&self, what: &str, bytes: u64) -> Result<()> {
        let body = format!("{{\"{what}\":{bytes}}}");
        self.guest.vmm.put("vm.resize", Some(&body)).map(drop)
    }

    fn wait_end(&self, recording: &Recording, asked: Instant, freed_bytes: u64) -> Result<()> {
        wait_for("the end of the fall", FALL_DEADLINE, || {
            let progress = recording.progress();
            let enough = progress.back_bytes >= freed_bytes / 100 * ENOUGH_PERCENT;
            let last = progress.last_step.unwrap_or(asked).max(asked);
            Ok((enough || last.elapsed() > QUIET).then_some(()))
        })?;
        if self.way == Way::Hinting {
            wait_for("the end of the run of hinting", FALL_DEADLINE, || {
                let stats = self.guest.vmm.get("vm.reclaim-stats")?;
                let hinting = &stats["hinting"];
                let over = hinting["runs_completed"] == hinting["runs_requested"];
                Ok(over.then_some(()))
            })?;
        }
        Ok(())
    }

    /// Deflates the balloon, or plugs memory in again; returns the duration.
    fn take_back(&self) -> Result<Option<f64>> {
        let begin = Instant::now();
        match self.way {
            Way::Inflate => self.resize("desired_balloon", 0)?,
            Way::Unplug => self.resize("desired_ram", GUEST_BYTES)?,
            Way::Mainline | Way::Bitmap | Way::Hinting => return Ok(None),
        }
        wait_for("all of the guest's memory", FALL_DEADLINE, || {
            let info = self.guest.vmm.get("vm.info")?;
            Ok((info["memory_actual_size"] == GUEST_BYTES).then_some(()))
        })?;
        Ok(Some(ms(begin.elapsed())))
    }

    /// Waits a fixed time, because the guest must observe inactivity.
    fn rest(&self) {
        if self.way == Way::Bitmap {
            thread::sleep(BITMAP_REST);
        }
    }

    fn counted(&self) -> Result<Counts> {
        if self.way == Way::Unplug {
            let counters = self.guest.vmm.get("vm.counters")?;
            let figure = |name: &str| {
                let figure = counters["mem0"][name].as_u64();
                figure.with_context(|| format!("no {name} in {counters:#}"))
            };
            return Ok(Counts {
                batches: figure("unplug_requests")?,
                ranges: figure("unplug_requests")?,
                discarded_bytes: figure("unplug_discarded_bytes")?,
                discard_syscalls: figure("unplug_syscalls")?,
            });
        }
        let stats = self.guest.vmm.get("vm.reclaim-stats")?;
        let path = &stats[match self.way {
            Way::Mainline | Way::Bitmap => "report",
            Way::Hinting => "hint",
            Way::Inflate | Way::Unplug => "inflate",
        }];
        let figure = |name: &str| {
            let figure = path.get(name).and_then(Value::as_u64);
            figure.with_context(|| format!("no {name} in {path:#}"))
        };
        Ok(Counts {
            batches: figure("batches")?,
            ranges: figure("requested_ranges")?,
            discarded_bytes: figure("discarded_bytes")?,
            discard_syscalls: figure("discard_syscalls")?,
        })
    }
}

/// The device's counters.
struct Counts {
    batches: u64,
    ranges: u64,
    discarded_bytes: u64,
    discard_syscalls: u64,
}

/// A number in the guest's response, which starts with `ok`.
fn number(answer: &str, word: usize) -> Result<u64> {
    let text = answer.split(' ').nth(word);
    text.and_then(|text| text.parse().ok())
        .with_context(|| format!("no number at word {word} of {answer:?}"))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// Time until `bytes` had returned; 0 if they returned earlier.
fn since(trace: &ResidencyTrace, asked: Instant, bytes: u64) -> Option<f64> {
    let reached = trace.reached(bytes)?;
    Some(ms(reached.saturating_duration_since(asked)))
}
