//! The demonstration as a chart: a line a sample in the terminal, an SVG at the end.

use std::fmt::Write as _;

use crate::recording::{Outcome, Phase, Recording, Sample};

const MIB: u64 = 1 << 20;
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

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 50.0;

/// Colour, name and value of a curve.
type Series = (&'static str, &'static str, fn(&Sample) -> u64);

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

/// Host memory over time, with the moment of the free.
pub(crate) fn svg(recording: &Recording, result: &Outcome) -> String {
    let scale = Scale {
        seconds: recording.samples.last().map_or(1.0, |s| s.seconds.max(1.0)),
        bytes: recording.configured_bytes as f64,
    };
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"24\" font-size=\"16\">Host memory held by a 1 GiB guest: \
         {} MiB came back in {:.1} s</text>\n",
        (result.peak_bytes - result.floor_bytes) / MIB,
        result.seconds
    );
    axes(&mut text, &scale, recording.configured_bytes);
    let x = scale.x(recording.freed_seconds);
    line(&mut text, (x, TOP), (x, HEIGHT - BOTTOM), "#888888", "4 3");
    label(&mut text, x + 5.0, TOP + 12.0, "the guest frees");
    let series: [Series; 2] = [
        ("#c0392b", "resident on the host", |s| s.resident_bytes),
        ("#27ae60", "given back by reports since the free", |s| {
            s.discarded_bytes
        }),
    ];
    for (index, (colour, name, value)) in series.into_iter().enumerate() {
        let points: Vec<String> = recording
            .samples
            .iter()
            .map(|s| format!("{:.1},{:.1}", scale.x(s.seconds), scale.y(value(s))))
            .collect();
        writeln!(
            text,
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" points=\"{}\"/>",
            points.join(" ")
        )
        .expect("writing to a string");
        let y = HEIGHT - 12.0;
        let x = LEFT + index as f64 * 260.0;
        line(&mut text, (x, y - 4.0), (x + 24.0, y - 4.0), colour, "");
        label(&mut text, x + 30.0, y, name);
    }
    text + "</svg>\n"
}

fn axes(text: &mut String, scale: &Scale, full_bytes: u64) {
    for quarter in 0..=4u64 {
        let bytes = full_bytes / 4 * quarter;
        let y = scale.y(bytes);
        line(text, (LEFT, y), (WIDTH - RIGHT, y), "#dddddd", "");
        label(text, 8.0, y + 4.0, &format!("{} MiB", bytes / MIB));
    }
    let step = (scale.seconds / 8.0).ceil().max(1.0);
    let mut seconds = 0.0;
    while seconds <= scale.seconds {
        label(
            text,
            scale.x(seconds) - 8.0,
            HEIGHT - BOTTOM + 18.0,
            &format!("{seconds:.0} s"),
        );
        seconds += step;
    }
}

fn line(text: &mut String, from: (f64, f64), to: (f64, f64), colour: &str, dash: &str) {
    writeln!(
        text,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\" stroke-width=\"2\" stroke-dasharray=\"{dash}\"/>",
        from.0, from.1, to.0, to.1
    )
    .expect("writing to a string");
}

fn label(text: &mut String, x: f64, y: f64, words: &str) {
    writeln!(text, "<text x=\"{x:.1}\" y=\"{y:.1}\">{words}</text>").expect("writing to a string");
}
