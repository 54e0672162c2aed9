//! How many guests a host holds: one after another starts, touches its memory, frees it, idles.
//!
//! The host is full when the next guest's peak makes the kernel kill a guest. The result is compared with the number of
//! idle guests that would fit: (host − one peak) / idle resident size.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use integration_tests::linux::Guest;
use serde::Serialize;
use serde_json::json;

use crate::host::{Host, OOM_SCORE_ADJ_DEFAULT};
use crate::plan::Overcommit;
use crate::recorder::Recorder;
use crate::{Outcome, chart};

const MIB: u64 = 1 << 20;

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
    let mut end = format!("the {} guests asked for run", plan.guests_max);
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
            Ok(_) => {
                end = format!("guest {number} cost {lost} guests their lives");
                break;
            }
            Err(error) => {
                println!("{error:#}");
                end = format!("guest {number} did not make it");
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
        if let Ok(free_bytes) = guest.memory_bytes("free") {
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
    guest.wait_init()?;
    guest.wait_serving()?;
    guest.command(&format!("alloc {}", plan.touch_bytes))?;
    let peak_bytes = guest.vmm.resident_bytes()?;
    guest.command("free")?;
    thread::sleep(Duration::from_millis(plan.settle_ms));
    let free_bytes = guest.memory_bytes("free")?;
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
    end: &str,
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
    let sentence = format!(
        "{count} guests with reporting {}: {end}; idle {} MiB each ({} MiB by the guest's own \
         figures), {:.0} % of the {bound:.1} that (host − one peak) / idle allows",
        plan.reporting.word(),
        idle_bytes / MIB,
        own_use_bytes / MIB,
        100.0 * count as f64 / bound.max(1.0),
    );
    let title = format!(
        "{count} guests of {} MiB on a host with {} MiB, reporting {}",
        plan.guest_bytes / MIB,
        host.total_bytes()? / MIB,
        plan.reporting.word()
    );
    Ok(Outcome {
        name: format!("overcommit-{}", plan.reporting.word()),
        svg: chart::svg(&title, host.total_bytes()?, &samples),
        figures: json!({
            "plan": plan,
            "guests": count,
            "end": end,
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
        fault: (count < plan.expect)
            .then(|| format!("{count} guests, {} were expected", plan.expect)),
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
