//! Host memory over time as an SVG: what is in use, and one line for each guest.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::recorder::Sample;

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 60.0;
/// More points than a screen has columns only make the file large.
const POINTS_MAX: usize = 800;

/// Where data lies on the sheet.
struct Scale {
    seconds: f64,
    bytes: f64,
}

impl Scale {
    fn x(&self, seconds: f64) -> f64 {
        LEFT + seconds / self.seconds * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, bytes: u64) -> f64 {
        HEIGHT - BOTTOM - bytes as f64 / self.bytes * (HEIGHT - TOP - BOTTOM)
    }
}

/// The chart of a recording on a host of `total_bytes`.
pub(crate) fn svg(title: &str, total_bytes: u64, samples: &[Sample]) -> String {
    let scale = Scale {
        seconds: samples.last().map_or(1.0, |sample| sample.seconds.max(1.0)),
        bytes: total_bytes as f64,
    };
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"26\" font-size=\"16\">{title}</text>\n"
    );
    axes(&mut text, &scale, total_bytes);
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
        // The golden angle keeps neighbours apart however many there are.
        let colour = format!("hsl({}, 60%, 45%)", number * 137 % 360);
        polyline(&mut text, &scale, curve, &colour, 1.0);
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
    polyline(&mut text, &scale, &used, "black", 2.0);
    let y = HEIGHT - 14.0;
    label(
        &mut text,
        LEFT,
        y,
        "black: memory of the host in use; colours: resident set of each guest's VMM",
    );
    text + "</svg>\n"
}

fn axes(text: &mut String, scale: &Scale, total_bytes: u64) {
    for quarter in 0..=4u64 {
        let bytes = total_bytes / 4 * quarter;
        let y = scale.y(bytes);
        writeln!(
            text,
            "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{:.1}\" y2=\"{y:.1}\" stroke=\"#dddddd\"/>",
            WIDTH - RIGHT
        )
        .expect("writing to a string");
        label(text, 8.0, y + 4.0, &format!("{} MiB", bytes >> 20));
    }
    let step = (scale.seconds / 8.0).ceil().max(1.0);
    let mut seconds = 0.0;
    while seconds <= scale.seconds {
        let x = scale.x(seconds) - 8.0;
        label(text, x, HEIGHT - BOTTOM + 18.0, &format!("{seconds:.0} s"));
        seconds += step;
    }
}

fn polyline(text: &mut String, scale: &Scale, curve: &[(f64, u64)], colour: &str, width: f64) {
    let points: Vec<String> = corners(scale, curve)
        .iter()
        .map(|(x, y)| format!("{x},{y}"))
        .collect();
    writeln!(
        text,
        "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\" points=\"{}\"/>",
        points.join(" ")
    )
    .expect("writing to a string");
}

/// Where a curve is on the sheet, without what lies within a level line: an idle guest is one.
fn corners(scale: &Scale, curve: &[(f64, u64)]) -> Vec<(String, String)> {
    let mut corners: Vec<(String, String)> = Vec::new();
    for (seconds, bytes) in curve {
        let x = format!("{:.1}", scale.x(*seconds));
        let y = format!("{:.1}", scale.y(*bytes));
        let level = corners.iter().rev().take_while(|corner| corner.1 == y);
        if level.count() >= 2 {
            corners.pop();
        }
        corners.push((x, y));
    }
    corners
}

fn label(text: &mut String, x: f64, y: f64, words: &str) {
    writeln!(text, "<text x=\"{x:.1}\" y=\"{y:.1}\">{words}</text>").expect("writing to a string");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn corners_leave_out_what_is_within_a_level_line() {
        let scale = Scale {
            seconds: 10.0,
            bytes: 100.0,
        };
        let curve = [
            (0.0, 7),
            (1.0, 50),
            (2.0, 50),
            (3.0, 50),
            (4.0, 50),
            (5.0, 9),
        ];
        let kept: Vec<String> = corners(&scale, &curve)
            .into_iter()
            .map(|(x, _)| x)
            .collect();
        let at = |seconds| format!("{:.1}", scale.x(seconds));
        assert_eq!(kept, [at(0.0), at(1.0), at(4.0), at(5.0)]);
    }
}
