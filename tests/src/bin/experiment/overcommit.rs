//! Measures how many guests a host holds. Guests start one after another; each touches its memory, frees it and idles.
//!
//! The host is full when the next guest's peak makes the kernel kill a guest, or leaves the guest without memory to
//! continue. A run that ends for another reason has no count. The result is compared with the number of idle guests
//! that would fit: (host − one peak) / idle resident size.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Error, Result};
use integration_tests::MIB;
use integration_tests::linux::Guest;
use serde::Serialize;
use serde_json::json;

use crate::host::{Host, OOM_SCORE_ADJ_DEFAULT};
use crate::outcome::Outcome;
use crate::plan::Overcommit;
use crate::recorder::Recorder;
use crate::{chart, patience};

/// A host with less than this share available has no memory for the next guest.
const SHORT_SHARE: u64 = 32;

/// Why no more guests start.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    /// All that were asked for run.
    Asked(usize),
    /// The host has no memory for one more.
    Full(String),
    /// Anything else: how many guests the host holds is not known.
    Other(String),
}

impl End {
    /// Guest `number` failed, or others ended in the meantime.
    fn of(number: usize, lost: usize, error: Option<&Error>, memory: &Memory) -> Self {
        let what = match lost {
            0 => format!("guest {number} did not make it"),
            lost => format!("guest {number} cost {lost} guests their lives"),
        };
        if memory.kills > 0 {
            return Self::Full(what);
        }
        let refused = error.is_some_and(|error| {
            // The error contains the VMM's output as text.
            format!("{error:#}").contains("Cannot allocate memory (os error 12)")
        });
        if lost == 0 && (refused || memory.is_short()) {
            return Self::Full(format!(
                "{what}, with {} MiB available",
                memory.available_bytes / MIB
            ));
        }
        Self::Other(format!(
            "{what}, with {} MiB available and no process killed for memory",
            memory.available_bytes / MIB
        ))
    }

    fn text(&self) -> String {
        match self {
            Self::Asked(count) => format!("the {count} guests asked for run"),
            Self::Full(why) => why.clone(),
            Self::Other(why) => format!("ended for another reason than memory: {why}"),
        }
    }

    fn is_for_memory(&self) -> bool {
        !matches!(self, Self::Other(_))
    }
}

/// The host's memory when a guest failed.
#[derive(Clone, Copy, Debug)]
struct Memory {
    total_bytes: u64,
    available_bytes: u64,
    /// Processes killed for lack of memory since the experiment began.
    kills: u64,
}

impl Memory {
    fn of(host: &Host, kills_before: u64) -> Result<Self> {
        Ok(Self {
            total_bytes: host.total_bytes()?,
            available_bytes: host.available_bytes()?,
            kills: host.oom_kills()?.saturating_sub(kills_before),
        })
    }

    fn is_short(&self) -> bool {
        self.available_bytes < self.total_bytes / SHORT_SHARE
    }
}

/// One guest that fitted.
#[derive(Clone, Debug, Serialize)]
struct Row {
    guests: usize,
    seconds: f64,
    /// Available memory of the host, after this guest's free and settling.
    available_bytes: u64,
    /// Resident set at the peak and after the free.
    peak_bytes: u64,
    idle_bytes: u64,
    /// The idle guest's own use, as it reports it.
    own_use_bytes: u64,
}

pub(crate) fn run(plan: &Overcommit) -> Result<Outcome> {
    let host = Host::enter(plan.host_bytes)?;
    let begin_bytes = host.available_bytes()?;
    let kills_before = host.oom_kills()?;
    println!(
        "host: {} MiB, {} MiB of them available; guests of {} MiB touch {} MiB; reporting {}",
        host.total_bytes()? / MIB,
        begin_bytes / MIB,
        plan.guest_bytes / MIB,
        plan.touch_bytes / MIB,
        plan.reporting.word()
    );
    println!("guests  seconds  available  peak  idle  own use (MiB)");
    let recorder = Recorder::start(&host);
    let mut guests: Vec<Guest> = Vec::new();
    let mut rows: Vec<Row> = Vec::new();
    let mut end = End::Asked(plan.guests_max);
    for number in 1..=plan.guests_max {
        let added = add(plan, &host, &recorder, number, &mut guests);
        let lost = guests
            .iter_mut()
            .filter_map(|guest| guest.vmm.has_ended().ok());
        let lost = lost.filter(|ended| *ended).count();
        match added {
            Ok(row) if lost == 0 => {
                println!(
                    "{:6}  {:7.1}  {:9}  {:4}  {:4}  {:7}",
                    row.guests,
                    row.seconds,
                    row.available_bytes / MIB,
                    row.peak_bytes / MIB,
                    row.idle_bytes / MIB,
                    row.own_use_bytes / MIB
                );
                rows.push(row);
            }
            added => {
                let error = added.err();
                if let Some(error) = &error {
                    println!("{error:#}");
                }
                let memory = Memory::of(&host, kills_before)?;
                end = End::of(number, lost, error.as_ref(), &memory);
                break;
            }
        }
    }
    own_use_when_idle(plan, &mut guests, &mut rows);
    summary(plan, &host, begin_bytes, &recorder, &rows, &end)
}

/// Queries the guests' own use again, because memory that a guest had isolated for a report right after its free did
/// not count as free.
fn own_use_when_idle(plan: &Overcommit, guests: &mut [Guest], rows: &mut [Row]) {
    for (guest, row) in guests.iter_mut().zip(rows) {
        // A killed guest keeps its last figure.
        if let Ok(free_bytes) = patience::free_bytes(guest) {
            row.own_use_bytes = plan.guest_bytes.saturating_sub(free_bytes);
        }
    }
}

/// Starts another guest, which touches and frees memory, and lets it settle.
fn add(
    plan: &Overcommit,
    host: &Host,
    recorder: &Recorder,
    number: usize,
    guests: &mut Vec<Guest>,
) -> Result<Row> {
    let memory = format!("size={}", plan.guest_bytes);
    let command_line = plan.reporting.command_line(plan.order);
    let vmm = plan.reporting.machine(&memory, &command_line).start()?;
    std::fs::write(
        format!("/proc/{}/oom_score_adj", vmm.pid()),
        OOM_SCORE_ADJ_DEFAULT,
    )
    .context("oom_score_adj")?;
    recorder.watch(number, vmm.pid());
    let mut guest = Guest::on_socket(vmm, "serial.sock")?;
    patience::boot(&mut guest)?;
    patience::command(&mut guest, &format!("alloc {}", plan.touch_bytes))?;
    let peak_bytes = guest.vmm.resident_bytes()?;
    patience::command(&mut guest, "free")?;
    thread::sleep(Duration::from_millis(plan.settle_ms));
    let free_bytes = patience::free_bytes(&mut guest)?;
    let idle_bytes = guest.vmm.resident_bytes()?;
    guests.push(guest);
    Ok(Row {
        guests: number,
        seconds: recorder.seconds(),
        available_bytes: host.available_bytes()?,
        peak_bytes,
        idle_bytes,
        own_use_bytes: plan.guest_bytes.saturating_sub(free_bytes),
    })
}

fn summary(
    plan: &Overcommit,
    host: &Host,
    begin_bytes: u64,
    recorder: &Recorder,
    rows: &[Row],
    end: &End,
) -> Result<Outcome> {
    let samples = recorder.samples();
    let count = rows.len();
    let mut peaks: Vec<u64> = rows.iter().map(|row| row.peak_bytes).collect();
    let peak_bytes = median(&mut peaks);
    let mut idles = idle_sizes(&samples, rows);
    let idle_bytes = median(&mut idles);
    let mut own: Vec<u64> = rows.iter().map(|row| row.own_use_bytes).collect();
    let own_use_bytes = median(&mut own);
    let bound = match idle_bytes {
        0 => 0.0,
        bytes => begin_bytes.saturating_sub(peak_bytes) as f64 / bytes as f64,
    };
    let reporting = plan.reporting.word();
    let why = end.text();
    let (counted, sentence) = if end.is_for_memory() {
        let sentence = format!(
            "{count} guests with reporting {reporting}: {why}; idle {} MiB each ({} MiB by the \
             guest's own figures), {:.0} % of the {bound:.1} that (host − one peak) / idle allows",
            idle_bytes / MIB,
            own_use_bytes / MIB,
            100.0 * count as f64 / bound.max(1.0),
        );
        (format!("{count} guests"), sentence)
    } else {
        let sentence = format!("no count with reporting {reporting}: {why}");
        ("No count, guests".to_owned(), sentence)
    };
    let title = format!(
        "{counted} of {} MiB on a host with {} MiB, reporting {}",
        plan.guest_bytes / MIB,
        host.total_bytes()? / MIB,
        plan.reporting.word()
    );
    Ok(Outcome {
        name: format!("overcommit-{}", plan.reporting.word()),
        svg: chart::svg(&title, host.total_bytes()?, &samples),
        figures: json!({
            "plan": plan,
            "guests": end.is_for_memory().then_some(count),
            "end": why,
            "host_total_bytes": host.total_bytes()?,
            "host_available_at_begin_bytes": begin_bytes,
            "peak_bytes": peak_bytes,
            "idle_bytes": idle_bytes,
            "own_use_bytes": own_use_bytes,
            "guests_bound": bound,
            "oom_kills": host.oom_kills()?,
            "rows": rows,
            "samples": samples,
        }),
        fault: fault(end, count, plan.expect),
        sentence,
    })
}

/// Resident sizes of the guests that had been idle longest when the last row was written: all except the last two.
fn idle_sizes(samples: &[crate::recorder::Sample], rows: &[Row]) -> Vec<u64> {
    let Some(last) = rows.last() else {
        return Vec::new();
    };
    let settled = rows.len().saturating_sub(2).max(1);
    samples
        .iter()
        .rfind(|sample| sample.seconds <= last.seconds)
        .map(|sample| {
            let idle = sample.resident_bytes.iter();
            idle.filter(|(number, _)| **number <= settled)
                .map(|(_, bytes)| *bytes)
                .collect()
        })
        .unwrap_or_default()
}

fn median(values: &mut [u64]) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// Why the run is a failure.
fn fault(end: &End, count: usize, expect: usize) -> Option<String> {
    if !end.is_for_memory() {
        return Some(end.text());
    }
    (count < expect).then(|| format!("{count} guests, {expect} were expected"))
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    fn memory(available_mib: u64, kills: u64) -> Memory {
        Memory {
            total_bytes: 15 << 30,
            available_bytes: available_mib * MIB,
            kills,
        }
    }

    #[test]
    fn host_is_full_when_a_process_was_killed_or_nothing_is_left() {
        let stalled = anyhow!("alloc: no progress for 120 s");
        for end in [
            End::of(22, 1, None, &memory(4000, 1)),
            End::of(22, 0, Some(&stalled), &memory(4000, 1)),
            End::of(22, 0, Some(&stalled), &memory(100, 0)),
        ] {
            assert!(matches!(end, End::Full(_)), "{end:?}");
            assert_eq!(fault(&end, 21, 21), None);
        }
    }

    #[test]
    fn host_is_full_when_a_vmm_gets_no_memory() {
        let refused =
            anyhow!("guest memory: Cannot allocate memory (os error 12)").context("start");
        let end = End::of(22, 0, Some(&refused), &memory(4000, 0));
        assert!(matches!(end, End::Full(_)), "{end:?}");
    }

    #[test]
    fn slowness_and_crashes_give_no_count() {
        let stalled = anyhow!("alloc: no progress for 120 s");
        for end in [
            End::of(6, 0, Some(&stalled), &memory(13_000, 0)),
            // A VMM that ends on its own was not killed for memory, however little is left.
            End::of(6, 1, None, &memory(100, 0)),
        ] {
            assert!(matches!(end, End::Other(_)), "{end:?}");
            assert!(end.text().contains("another reason than memory"), "{end:?}");
            assert!(fault(&end, 5, 0).is_some());
        }
    }

    #[test]
    fn too_few_guests_are_a_fault() {
        assert_eq!(fault(&End::Asked(40), 40, 40), None);
        assert!(fault(&End::Asked(20), 20, 40).is_some());
    }
}
