//! Host memory over time, as an SVG.

use std::fmt::Write as _;

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 60.0;
/// Where the legend stands.
const LEGEND: f64 = HEIGHT - 14.0;

/// A sheet with axes, on which curves are drawn.
#[derive(Debug)]
pub struct Chart {
    text: String,
    seconds: f64,
    bytes: f64,
}

impl Chart {
    /// Axes from 0 to `seconds`, or 1 if that is more, and to `bytes`.
    pub fn new(title: &str, seconds: f64, bytes: u64) -> Self {
        let text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             font-family=\"sans-serif\" font-size=\"13\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
             <text x=\"{LEFT}\" y=\"26\" font-size=\"16\">{title}</text>\n"
        );
        let mut chart = Self {
            text,
            seconds: seconds.max(1.0),
            bytes: bytes as f64,
        };
        chart.axes(bytes);
        chart
    }

    fn x(&self, seconds: f64) -> f64 {
        LEFT + seconds / self.seconds * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, bytes: u64) -> f64 {
        HEIGHT - BOTTOM - bytes as f64 / self.bytes * (HEIGHT - TOP - BOTTOM)
    }

    fn axes(&mut self, bytes: u64) {
        for quarter in 0..=4 {
            let bytes = bytes / 4 * quarter;
            let y = self.y(bytes);
            self.line((LEFT, y), (WIDTH - RIGHT, y), "stroke=\"#dddddd\"");
            self.label(8.0, y + 4.0, &format!("{} MiB", bytes >> 20));
        }
        let step = (self.seconds / 8.0).ceil().max(1.0);
        let mut seconds = 0.0;
        while seconds <= self.seconds {
            let x = self.x(seconds) - 8.0;
            self.label(x, HEIGHT - BOTTOM + 18.0, &format!("{seconds:.0} s"));
            seconds += step;
        }
    }

    /// A curve through points of seconds and bytes.
    pub fn curve(&mut self, points: &[(f64, u64)], colour: &str, width: f64) {
        let points: Vec<String> = self
            .corners(points)
            .iter()
            .map(|(x, y)| format!("{x},{y}"))
            .collect();
        let points = points.join(" ");
        self.element(format_args!(
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\" points=\"{points}\"/>"
        ));
    }

    /// Where a curve is on the sheet, without what lies within a level line: an idle guest is one.
    fn corners(&self, points: &[(f64, u64)]) -> Vec<(String, String)> {
        let mut corners: Vec<(String, String)> = Vec::new();
        for (seconds, bytes) in points {
            let x = format!("{:.1}", self.x(*seconds));
            let y = format!("{:.1}", self.y(*bytes));
            let level = corners.iter().rev().take_while(|corner| corner.1 == y);
            if level.count() >= 2 {
                corners.pop();
            }
            corners.push((x, y));
        }
        corners
    }

    /// Names a moment.
    pub fn moment(&mut self, seconds: f64, words: &str) {
        let x = self.x(seconds);
        let dashed = "stroke=\"#888888\" stroke-width=\"2\" stroke-dasharray=\"4 3\"";
        self.line((x, TOP), (x, HEIGHT - BOTTOM), dashed);
        self.label(x + 5.0, TOP + 12.0, words);
    }

    /// Says below the chart what the curves of this colour are, `across` the sheet.
    pub fn legend(&mut self, across: f64, colour: &str, words: &str) {
        let (x, y) = (LEFT + across, LEGEND - 4.0);
        let stroke = format!("stroke=\"{colour}\" stroke-width=\"2\"");
        self.line((x, y), (x + 24.0, y), &stroke);
        self.label(x + 30.0, LEGEND, words);
    }

    /// A sentence below the chart.
    pub fn note(&mut self, words: &str) {
        self.label(LEFT, LEGEND, words);
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), stroke: &str) {
        self.element(format_args!(
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" {stroke}/>",
            from.0, from.1, to.0, to.1
        ));
    }

    fn label(&mut self, x: f64, y: f64, words: &str) {
        self.element(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\">{words}</text>"
        ));
    }

    fn element(&mut self, element: std::fmt::Arguments<'_>) {
        writeln!(self.text, "{element}").expect("writing to a string");
    }

    /// The file.
    pub fn svg(self) -> String {
        self.text + "</svg>\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn corners_leave_out_what_is_within_a_level_line() {
        let chart = Chart::new("", 10.0, 100);
        let curve = [
            (0.0, 7),
            (1.0, 50),
            (2.0, 50),
            (3.0, 50),
            (4.0, 50),
            (5.0, 9),
        ];
        let kept: Vec<String> = chart.corners(&curve).into_iter().map(|(x, _)| x).collect();
        let at = |seconds| format!("{:.1}", chart.x(seconds));
        assert_eq!(kept, [at(0.0), at(1.0), at(4.0), at(5.0)]);
    }
}
