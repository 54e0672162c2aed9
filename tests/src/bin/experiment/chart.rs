//! Chart of host memory over time: memory in use, and one line per guest.

use std::collections::BTreeMap;

use integration_tests::chart::Chart;

use crate::recorder::Sample;

/// Maximum number of points: more than a screen has columns only enlarge the file.
const POINTS_MAX: usize = 800;

/// The chart of a recording on a host of `total_bytes`.
pub(crate) fn svg(title: &str, total_bytes: u64, samples: &[Sample]) -> String {
    let seconds = samples.last().map_or(0.0, |last| last.seconds);
    let mut chart = Chart::new(title, seconds, total_bytes);
    let step = samples.len().div_ceil(POINTS_MAX).max(1);
    let thin: Vec<&Sample> = samples.iter().step_by(step).collect();
    let mut guests: BTreeMap<usize, Vec<(f64, u64)>> = BTreeMap::new();
    for sample in &thin {
        for (number, bytes) in &sample.resident_bytes {
            let curve = guests.entry(*number).or_default();
            curve.push((sample.seconds, *bytes));
        }
    }
    for (number, curve) in &guests {
        // The golden angle makes neighbouring colours distinct for any number of guests.
        let colour = format!("hsl({}, 60%, 45%)", number * 137 % 360);
        chart.curve(curve, &colour, 1.0);
    }
    let used: Vec<(f64, u64)> = thin
        .iter()
        .map(|sample| {
            (
                sample.seconds,
                total_bytes.saturating_sub(sample.available_bytes),
            )
        })
        .collect();
    chart.curve(&used, "black", 2.0);
    chart.note("black: memory of the host in use; colours: resident set of each guest's VMM");
    chart.svg()
}
