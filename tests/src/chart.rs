//! Draws host memory over time as an SVG.

use chart::{Frame, Sheet};

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 60.0;
/// Vertical position of the legend.
const LEGEND: f64 = HEIGHT - 14.0;

/// A sheet with one frame for curves of bytes over seconds.
#[derive(Debug)]
pub struct Chart {
    sheet: Sheet,
    frame: Frame,
}

impl Chart {
    /// Axes from 0 to `seconds`, or 1 if that is more, and to `bytes`.
    pub fn new(title: &str, seconds: f64, bytes: u64) -> Self {
        let frame = Frame {
            left: LEFT,
            top: TOP,
            width: WIDTH - LEFT - RIGHT,
            height: HEIGHT - TOP - BOTTOM,
            x_max: seconds.max(1.0),
            y_max: bytes as f64,
        };
        let mut sheet = Sheet::new(title, LEFT, WIDTH, HEIGHT);
        let mib = |bytes: f64| format!("{:.0} MiB", bytes / f64::from(1 << 20));
        sheet.axes(&frame, |seconds| format!("{seconds:.0} s"), mib);
        Self { sheet, frame }
    }

    /// A curve through points of seconds and bytes.
    pub fn curve(&mut self, points: &[(f64, u64)], colour: &str, width: f64) {
        let points: Vec<(f64, f64)> = points.iter().map(|(s, b)| (*s, *b as f64)).collect();
        self.sheet.curve(&self.frame, &points, colour, width);
    }

    /// Marks a time with a label.
    pub fn moment(&mut self, seconds: f64, words: &str) {
        let x = self.frame.x(seconds);
        let dashed = "stroke=\"#888888\" stroke-width=\"2\" stroke-dasharray=\"4 3\"";
        self.sheet.line((x, TOP), (x, self.frame.bottom()), dashed);
        self.sheet.label(x + 5.0, TOP + 12.0, words);
    }

    /// Adds a legend for curves of this colour below the chart, at the horizontal position `across`.
    pub fn legend(&mut self, across: f64, colour: &str, words: &str) {
        self.sheet.legend(LEFT + across, LEGEND, colour, words);
    }

    /// A sentence below the chart.
    pub fn note(&mut self, words: &str) {
        self.sheet.label(LEFT, LEGEND, words);
    }

    /// The content of the SVG file.
    pub fn svg(self) -> String {
        self.sheet.svg()
    }
}
