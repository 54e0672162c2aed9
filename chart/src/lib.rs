//! Curves over time as an SVG file.

use std::fmt::{Arguments, Write as _};

/// The area of a sheet in which curves are drawn, and the values at its ends. All lengths are in SVG user units.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// Left edge: `x` is 0 there.
    pub left: f64,
    /// Upper edge: `y` is `y_max` there.
    pub top: f64,
    /// Width.
    pub width: f64,
    /// Height: `y` is 0 at the bottom.
    pub height: f64,
    /// Largest `x`; more than 0.
    pub x_max: f64,
    /// Largest `y`; more than 0.
    pub y_max: f64,
}

impl Frame {
    /// Position of `x` on the sheet.
    pub fn x(&self, x: f64) -> f64 {
        self.left + x / self.x_max * self.width
    }

    /// Position of `y` on the sheet.
    pub fn y(&self, y: f64) -> f64 {
        self.bottom() - y / self.y_max * self.height
    }

    /// Lower edge.
    pub fn bottom(&self) -> f64 {
        self.top + self.height
    }

    fn right(&self) -> f64 {
        self.left + self.width
    }

    /// The points of a curve on the sheet, without points inside horizontal segments, such as those of an idle guest.
    fn corners(&self, points: &[(f64, f64)]) -> Vec<(String, String)> {
        let mut corners: Vec<(String, String)> = Vec::new();
        for (x, y) in points {
            let x = format!("{:.1}", self.x(*x));
            let y = format!("{:.1}", self.y(*y));
            let level = corners.iter().rev().take_while(|corner| corner.1 == y);
            if level.count() >= 2 {
                corners.pop();
            }
            corners.push((x, y));
        }
        corners
    }
}

/// A white sheet with a title.
#[derive(Debug)]
pub struct Sheet {
    text: String,
}

impl Sheet {
    /// An empty sheet; the title begins at `left`.
    pub fn new(title: &str, left: f64, width: f64, height: f64) -> Self {
        let mut sheet = Self {
            text: format!(
                "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
                 font-family=\"sans-serif\" font-size=\"13\">\n\
                 <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
            ),
        };
        let title = escape(title);
        sheet.element(format_args!(
            "<text x=\"{left}\" y=\"26\" font-size=\"16\">{title}</text>"
        ));
        sheet
    }

    /// Draws horizontal lines at each quarter of `y`, and about eight labels below the frame.
    pub fn axes(
        &mut self,
        frame: &Frame,
        x_label: impl Fn(f64) -> String,
        y_label: impl Fn(f64) -> String,
    ) {
        for quarter in 0..=4 {
            let value = frame.y_max / 4.0 * f64::from(quarter);
            let y = frame.y(value);
            self.line((frame.left, y), (frame.right(), y), "stroke=\"#dddddd\"");
            self.label(8.0, y + 4.0, &y_label(value));
        }
        let step = (frame.x_max / 8.0).ceil().max(1.0);
        let mut value = 0.0;
        while value <= frame.x_max {
            self.label(frame.x(value) - 8.0, frame.bottom() + 18.0, &x_label(value));
            value += step;
        }
    }

    /// A curve through `points`.
    pub fn curve(&mut self, frame: &Frame, points: &[(f64, f64)], colour: &str, width: f64) {
        let points: Vec<String> = frame
            .corners(points)
            .iter()
            .map(|(x, y)| format!("{x},{y}"))
            .collect();
        let points = points.join(" ");
        self.element(format_args!(
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\" points=\"{points}\"/>"
        ));
    }

    /// Draws a sample of a curve's colour at `(x, y)` and its label.
    pub fn legend(&mut self, x: f64, y: f64, colour: &str, words: &str) {
        let stroke = format!("stroke=\"{colour}\" stroke-width=\"2\"");
        self.line((x, y - 4.0), (x + 24.0, y - 4.0), &stroke);
        self.label(x + 30.0, y, words);
    }

    /// A straight line; `stroke` are its attributes.
    pub fn line(&mut self, from: (f64, f64), to: (f64, f64), stroke: &str) {
        self.element(format_args!(
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" {stroke}/>",
            from.0, from.1, to.0, to.1
        ));
    }

    /// Text that begins at `(x, y)`.
    pub fn label(&mut self, x: f64, y: f64, words: &str) {
        let words = escape(words);
        self.element(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\">{words}</text>"
        ));
    }

    fn element(&mut self, element: Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "{element}");
    }

    /// The content of the SVG file.
    pub fn svg(self) -> String {
        self.text + "</svg>\n"
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::{Frame, Sheet};

    const FRAME: Frame = Frame {
        left: 10.0,
        top: 20.0,
        width: 100.0,
        height: 50.0,
        x_max: 10.0,
        y_max: 100.0,
    };

    #[test]
    fn corners_leave_out_what_is_within_a_level_line() {
        let curve = [
            (0.0, 7.0),
            (1.0, 50.0),
            (2.0, 50.0),
            (3.0, 50.0),
            (4.0, 50.0),
            (5.0, 9.0),
        ];
        let kept: Vec<String> = FRAME.corners(&curve).into_iter().map(|(x, _)| x).collect();
        assert_eq!(kept, ["10.0", "20.0", "50.0", "60.0"]);
    }

    #[test]
    fn sheet_has_what_was_drawn_on_it() {
        let mut sheet = Sheet::new("a < b & c", 10.0, 120.0, 90.0);
        sheet.axes(&FRAME, |x| format!("{x} s"), |y| format!("{y} B"));
        sheet.curve(&FRAME, &[(0.0, 0.0), (10.0, 100.0)], "red", 2.0);
        let svg = sheet.svg();
        assert!(svg.contains(">a &lt; b &amp; c</text>"));
        assert!(svg.contains("points=\"10.0,70.0 110.0,20.0\""));
        assert!(svg.contains("<text x=\"8.0\" y=\"24.0\">100 B</text>"));
        assert!(svg.contains("<text x=\"102.0\" y=\"88.0\">10 s</text>"));
        assert!(svg.ends_with("</svg>\n"));
    }
}
