//! The demonstration as a chart: one line per sample in the terminal, and an SVG at the end.

use integration_tests::MIB;
use integration_tests::chart::Chart;

use crate::recording::{Outcome, Phase, Recording, Sample};

const BAR_COLUMNS: u64 = 50;

/// One sample as a bar of host memory in use.
pub(crate) fn terminal_line(sample: &Sample, full_bytes: u64, colour: bool) -> String {
    let filled = (sample.resident_bytes * BAR_COLUMNS / full_bytes).min(BAR_COLUMNS);
    let bar: String = (0..BAR_COLUMNS)
        .map(|column| if column < filled { '█' } else { '·' })
        .collect();
    let (on, off) = match (colour, sample.phase) {
        (false, _) => ("", ""),
        (true, Phase::Freed) => ("\x1b[32m", "\x1b[0m"),
        (true, _) => ("\x1b[33m", "\x1b[0m"),
    };
    format!(
        "{:6.1} s  {on}{bar}{off} {:5} MiB resident, {:5} MiB given back",
        sample.seconds,
        sample.resident_bytes / MIB,
        sample.discarded_bytes / MIB,
    )
}

/// Colour, name and value of a curve.
type Series = (&'static str, &'static str, fn(&Sample) -> u64);

/// Host memory over time, with the time of the free marked.
pub(crate) fn svg(recording: &Recording, result: &Outcome) -> String {
    let title = format!(
        "Host memory held by a 1 GiB guest: {} MiB returned to the host in {:.1} s",
        (result.peak_bytes - result.floor_bytes) / MIB,
        result.seconds
    );
    let seconds = recording.samples.last().map_or(0.0, |last| last.seconds);
    let mut chart = Chart::new(&title, seconds, recording.configured_bytes);
    chart.moment(recording.freed_seconds, "the guest frees");
    let series: [Series; 2] = [
        ("#c0392b", "resident on the host", |s| s.resident_bytes),
        ("#27ae60", "given back by reports since the free", |s| {
            s.discarded_bytes
        }),
    ];
    for (index, (colour, name, value)) in series.into_iter().enumerate() {
        let samples = recording.samples.iter();
        let points: Vec<_> = samples.map(|s| (s.seconds, value(s))).collect();
        chart.curve(&points, colour, 2.0);
        chart.legend(index as f64 * 260.0, colour, name);
    }
    chart.svg()
}
