//! The figures of all rounds as distributions, as JSON and as a table.

use serde_json::{Map, Value, json};

use super::plan::Combination;
use super::rounds::{Round, SHARES};

const MIB: f64 = (1 << 20) as f64;
const GIB: f64 = (1 << 30) as f64;

/// A combination and its results.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) combination: Combination,
    /// Empty if the host does not support it.
    pub(super) rounds: Vec<Round>,
    /// Rate of the bare system calls for the same memory.
    pub(super) bare_bytes_per_second: Option<f64>,
}

/// Minimum, median and maximum of figures. A missing figure counts as larger than any other.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Spread {
    min: Option<f64>,
    median: Option<f64>,
    p95: Option<f64>,
    max: Option<f64>,
}

impl Spread {
    fn of(figures: impl Iterator<Item = Option<f64>>) -> Self {
        let mut sorted: Vec<f64> = figures
            .map(|figure| figure.unwrap_or(f64::INFINITY))
            .collect();
        sorted.sort_by(f64::total_cmp);
        // The smallest figure that this percentage does not exceed.
        let at = |percent: usize| {
            let rank = (sorted.len() * percent).div_ceil(100).max(1);
            let figure = sorted.get(rank - 1).copied();
            figure.filter(|figure| figure.is_finite())
        };
        Self {
            min: at(0),
            median: at(50),
            p95: at(95),
            max: at(100),
        }
    }

    fn json(self) -> Value {
        let [min, median, p95, max] = [self.min, self.median, self.p95, self.max].map(rounded);
        json!({ "min": min, "median": median, "p95": p95, "max": max })
    }
}

/// Rounds to two decimals.
fn rounded(figure: Option<f64>) -> Option<f64> {
    figure.map(|figure| (figure * 100.0).round() / 100.0)
}

impl Row {
    fn spread(&self, figure: impl Fn(&Round) -> Option<f64>) -> Spread {
        Spread::of(self.rounds.iter().map(figure))
    }

    fn to_ms(&self, share: usize) -> Spread {
        self.spread(|round| round.to_ms[share])
    }

    fn back_percent(&self) -> Spread {
        self.spread(|round| Some(round.back_bytes as f64 * 100.0 / round.freed_bytes as f64))
    }

    fn rate(&self) -> Spread {
        self.spread(|round| round.bytes_per_second.map(|rate| rate / MIB))
    }

    fn per_gib(&self, count: impl Fn(&Round) -> u64) -> Spread {
        self.spread(|round| Some(count(round) as f64 * GIB / round.freed_bytes as f64))
    }

    /// Includes deflation.
    fn touch_ms(&self) -> Spread {
        self.spread(|round| Some(round.touch_ms + round.deflate_ms.unwrap_or(0.0)))
    }

    fn bare_mib_per_second(&self) -> Option<f64> {
        self.bare_bytes_per_second.map(|rate| rate / MIB)
    }

    fn of_bare(&self) -> Option<f64> {
        Some(self.rate().median? / self.bare_mib_per_second()?)
    }

    pub(super) fn json(&self) -> Value {
        let Combination {
            way,
            backing,
            block,
        } = self.combination;
        let head = json!({
            "way": way.word(),
            "tracker": way.tracker(),
            "backing": backing.word(),
            "block": block.to_string(),
        });
        if self.rounds.is_empty() {
            let mut row = head;
            row["skipped"] = "the host has no such memory to give".into();
            return row;
        }
        let to_ms = (0..)
            .zip(SHARES)
            .map(|(at, percent)| (percent.to_string(), self.to_ms(at).json()));
        let rounds: Vec<Value> = self.rounds.iter().map(round_json).collect();
        let mut row = head;
        row["to_ms"] = Value::Object(to_ms.collect::<Map<_, _>>());
        row["back_percent"] = self.back_percent().json();
        row["mib_per_second"] = self.rate().json();
        row["bare_mib_per_second"] = rounded(self.bare_mib_per_second()).into();
        row["batches_per_gib"] = self.per_gib(|round| round.batches).json();
        row["touch_ms"] = self.touch_ms().json();
        row["rounds"] = rounds.into();
        row
    }
}

fn round_json(round: &Round) -> Value {
    json!({
        "freed_bytes": round.freed_bytes,
        "blocks": round.blocks,
        "free_ms": rounded(Some(round.free_ms)),
        "resident_before_bytes": round.before_bytes,
        "back_bytes": round.back_bytes,
        "to_ms": round.to_ms.map(rounded),
        "mib_per_second": rounded(round.bytes_per_second.map(|rate| rate / MIB)),
        "batches": round.batches,
        "ranges": round.ranges,
        "discarded_bytes": round.discarded_bytes,
        "discard_syscalls": round.discard_syscalls,
        "faults": round.faults,
        "sample_ms": rounded(round.sample_ms),
        "deflate_ms": rounded(round.deflate_ms),
        "touch_ms": rounded(Some(round.touch_ms)),
        "touch_faults": round.touch_faults,
    })
}

const HEAD: [&str; 17] = [
    "way", "tracker", "backing", "block", "freed", "back", "50 %", "95 %", "min", "max", "99 %",
    "MiB/s", "of bare", "batches", "calls", "touch", "faults",
];
/// Number of left-aligned columns with words; figures are right-aligned.
const WORD_COLUMNS: usize = 3;

/// Medians, times in milliseconds; the spread for 95 %.
pub(super) fn text(rows: &[Row]) -> String {
    let mut lines = vec![HEAD.map(String::from).to_vec()];
    lines.extend(rows.iter().map(line));
    let widths: Vec<usize> = (0..HEAD.len())
        .map(|column| {
            let cells = lines.iter().filter_map(|line| line.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for line in lines {
        let cells = line.iter().zip(&widths).enumerate();
        let cells: Vec<String> = cells
            .map(|(column, (cell, width))| match column < WORD_COLUMNS {
                true => format!("{cell:<width$}"),
                false => format!("{cell:>width$}"),
            })
            .collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    text + NOTES
}

const NOTES: &str = "\
freed: MiB; back: of them off the host in the end. 50, 95, 99 %: median time in ms until so much of what was freed
is off the host, after the free has returned (reporting) or the host has asked (hinting, inflate, and unplug by
virtio-mem); min and max are of 95 %. MiB/s: from the first to the last; of bare: its share of the rate of the fewest
system calls without a guest.
batches, calls: answers of the device and system calls that discard, a GiB freed. touch: ms until the guest has touched
as much again, deflation or plugging included; faults: the VMM's meanwhile.
";

fn line(row: &Row) -> Vec<String> {
    let Combination {
        way,
        backing,
        block,
    } = row.combination;
    let words = [way.word(), way.tracker().unwrap_or("–"), backing.word()];
    let mut cells: Vec<String> = words.map(String::from).to_vec();
    cells.push(block.to_string());
    let Some(first) = row.rounds.first() else {
        cells.push("the host has no such memory to give".to_owned());
        return cells;
    };
    let [half, most, all] = [0, 1, 2].map(|share| row.to_ms(share));
    cells.extend([
        format!("{}", first.freed_bytes >> 20),
        show(row.back_percent().median, 0, " %"),
        show(half.median, 0, ""),
        show(most.median, 0, ""),
        show(most.min, 0, ""),
        show(most.max, 0, ""),
        show(all.median, 0, ""),
        show(row.rate().median, 0, ""),
        show(row.of_bare(), 2, ""),
        show(row.per_gib(|round| round.batches).median, 1, ""),
        show(row.per_gib(|round| round.discard_syscalls).median, 0, ""),
        show(row.touch_ms().median, 0, ""),
        show(
            row.spread(|round| Some(round.touch_faults as f64)).median,
            0,
            "",
        ),
    ]);
    cells
}

fn show(figure: Option<f64>, digits: usize, unit: &str) -> String {
    figure.map_or_else(
        || "–".to_owned(),
        |figure| format!("{figure:.digits$}{unit}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reclaim::plan::{Backing, Block, Way};

    fn round(to_95_ms: Option<f64>) -> Round {
        Round {
            freed_bytes: 512 << 20,
            blocks: 256,
            free_ms: 1.0,
            before_bytes: 900 << 20,
            back_bytes: 500 << 20,
            to_ms: [Some(1.0), to_95_ms, None],
            bytes_per_second: Some(100.0 * MIB),
            batches: 8,
            ranges: 256,
            discarded_bytes: 512 << 20,
            discard_syscalls: 8,
            faults: 3,
            sample_ms: Some(2.0),
            deflate_ms: Some(5.0),
            touch_ms: 6.0,
            touch_faults: 300,
        }
    }

    fn row(rounds: Vec<Round>) -> Row {
        Row {
            combination: Combination {
                way: Way::Inflate,
                backing: Backing::Memfd,
                block: Block::Bytes(2 << 20),
            },
            rounds,
            bare_bytes_per_second: Some(200.0 * MIB),
        }
    }

    #[test]
    fn spread_takes_what_never_came_for_more_than_any_figure() {
        let spread = Spread::of([Some(3.0), None, Some(1.0)].into_iter());
        assert_eq!((spread.min, spread.median), (Some(1.0), Some(3.0)));
        assert_eq!((spread.p95, spread.max), (None, None));
        let hundred = Spread::of((1..=100).map(|figure| Some(f64::from(figure))));
        assert_eq!((hundred.median, hundred.p95), (Some(50.0), Some(95.0)));
    }

    #[test]
    fn table_has_a_line_a_row_with_every_figure() {
        let text = text(&[row(vec![round(Some(40.0)), round(None)]), row(vec![])]);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        let cells = "inflate – memfd 2M 512 98 % 1 40 40 – – 100 0.50 16.0 16 11 300";
        assert_eq!(lines[1].join(" "), cells);
        assert!(lines[2].join(" ").ends_with("no such memory to give"));
    }

    #[test]
    fn json_has_the_distribution_and_every_round() {
        let json = row(vec![round(Some(40.0))]).json();
        assert_eq!(json["to_ms"]["95"]["median"], 40.0);
        assert_eq!(json["to_ms"]["99"]["max"], Value::Null);
        assert_eq!(json["rounds"][0]["touch_faults"], 300);
        assert!(row(vec![]).json()["skipped"].is_string());
    }
}
