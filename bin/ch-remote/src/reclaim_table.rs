//! Formats `vm.reclaim-stats` as a table for humans and as a line for programs.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::time::Duration;

use api::{ReclaimPath, ReclaimStats, ReportingStatus, format_bytes};

use crate::units::{age, micros, percent};

/// Width of the bar, characters.
const BAR_WIDTH: usize = 40;
const LABEL_WIDTH: usize = 22;
const VALUE_WIDTH: usize = 14;

/// A sample, and the previous one to compute rates.
#[derive(Debug)]
pub(crate) struct Sample<'a> {
    pub(crate) stats: &'a ReclaimStats,
    pub(crate) previous: Option<&'a ReclaimStats>,
    /// Time from `previous` to `stats`.
    pub(crate) interval: Duration,
    /// Time from the first sample to this one.
    pub(crate) elapsed: Duration,
}

impl<'a> Sample<'a> {
    /// A sample without a previous one, and therefore without rates.
    pub(crate) fn single(stats: &'a ReclaimStats) -> Self {
        Self {
            stats,
            previous: None,
            interval: Duration::ZERO,
            elapsed: Duration::ZERO,
        }
    }

    /// Bytes discarded per second over all paths since the previous sample. A reboot resets the counters, which must
    /// not yield a negative rate.
    fn discarded_bytes_per_s(&self) -> u64 {
        let total = |stats: &ReclaimStats| sum(stats, |path| path.discarded_bytes);
        let Some(previous) = self.previous else {
            return 0;
        };
        let grown = total(self.stats).saturating_sub(total(previous));
        let seconds = self.interval.as_secs_f64();
        if seconds > 0.0 {
            (grown as f64 / seconds) as u64
        } else {
            0
        }
    }

    /// One line of `key=value`, in bytes and milliseconds.
    pub(crate) fn to_line(&self) -> String {
        let stats = self.stats;
        let mut line = format!(
            "elapsed_ms={} configured_bytes={} resident_bytes={} reclaimed_bytes={} ballooned_bytes={} \
             balloon_target_bytes={} reported_bytes={} discarded_bytes={} failed_bytes={} \
             repopulated_bytes={} discarded_bytes_per_s={} reporting={} reporting_state={} hinting_state={}",
            self.elapsed.as_millis(),
            stats.configured_bytes,
            stats.resident_bytes,
            stats.reclaimed_bytes,
            stats.ballooned_bytes,
            stats.balloon_target_bytes,
            stats.report.requested_bytes,
            sum(stats, |path| path.discarded_bytes),
            sum(stats, |path| path.failed_bytes),
            stats.repopulated_bytes,
            self.discarded_bytes_per_s(),
            if stats.reporting.active {
                "active"
            } else {
                "inactive"
            },
            word(&stats.reporting.state),
            word(&stats.hinting.state),
        );
        if let Some(free) = stats
            .guest
            .as_ref()
            .and_then(|guest| guest.stats.free_memory)
        {
            append(&mut line, format_args!(" guest_free_bytes={free}"));
        }
        line
    }

    /// The table; every line ends with a line break.
    pub(crate) fn to_table(&self) -> String {
        let mut table = String::new();
        self.memory(&mut table);
        self.state(&mut table);
        self.paths(&mut table);
        self.guest(&mut table);
        table
    }

    fn memory(&self, table: &mut String) {
        let stats = self.stats;
        let share = |part| format!("{:5.1} %", percent(part, stats.configured_bytes));
        row(
            table,
            "Configured",
            &[&format_bytes(stats.configured_bytes)],
        );
        row(
            table,
            "Resident on the host",
            &[
                &format_bytes(stats.resident_bytes),
                &share(stats.resident_bytes),
            ],
        );
        row(
            table,
            "Reclaimed",
            &[
                &format_bytes(stats.reclaimed_bytes),
                &share(stats.reclaimed_bytes),
            ],
        );
        if stats.charged_bytes > 0 {
            let method = format!("({})", stats.charged_method);
            row(
                table,
                "Charged by the host",
                &[&format_bytes(stats.charged_bytes), &method],
            );
        }
        if let Some(swapped) = stats.swapped_bytes {
            row(
                table,
                "In the host's swap",
                &[&format_bytes(swapped), &share(swapped)],
            );
        }
        row(
            table,
            "In the balloon",
            &[
                &format_bytes(stats.ballooned_bytes),
                &share(stats.ballooned_bytes),
            ],
        );
        row(
            table,
            "Balloon target",
            &[&format_bytes(stats.balloon_target_bytes)],
        );
        if self.previous.is_some() {
            row(
                table,
                "Discard rate",
                &[&format!("{}/s", format_bytes(self.discarded_bytes_per_s()))],
            );
        }
        row(
            table,
            "Repopulated",
            &[&format_bytes(stats.repopulated_bytes)],
        );
        append(
            table,
            format_args!(
                "\n[{}] resident\n\n",
                bar(percent(stats.resident_bytes, stats.configured_bytes))
            ),
        );
    }

    fn state(&self, table: &mut String) {
        let stats = self.stats;
        text(table, "Reporting", &reporting(&stats.reporting));
        let wish = stats.reporting.report_now;
        if wish.pending {
            let line = format!("number {} is in progress", wish.id);
            text(table, "Full report", &line);
        }
        let hinting = &stats.hinting;
        if hinting.runs_requested > 0 {
            let line = format!(
                "{}; {} of {} runs completed",
                printable(&hinting.state),
                hinting.runs_completed,
                hinting.runs_requested
            );
            text(table, "Hinting", &line);
        }
        append(
            table,
            format_args!(
                "{:<LABEL_WIDTH$}{}; residency by {} in {}\n\n",
                "Backing",
                printable(&stats.backing),
                printable(&stats.residency_method),
                micros(stats.resident_sample_us)
            ),
        );
        if stats.zones.len() > 1 {
            self.zones(table);
        }
    }

    /// The figures of each zone. A single zone is omitted, because its figures equal the totals.
    fn zones(&self, table: &mut String) {
        row(table, "", &["resident", "of", "pages of"]);
        for zone in &self.stats.zones {
            let backing = printable(&zone.backing);
            let label = format!("{}, {backing}", printable(&zone.id));
            let figures =
                [zone.resident_bytes, zone.configured_bytes, zone.page_bytes].map(format_bytes);
            row(table, &label, &figures.each_ref().map(String::as_str));
        }
        table.push('\n');
    }

    fn paths(&self, table: &mut String) {
        let paths = [&self.stats.report, &self.stats.inflate, &self.stats.hint];
        let all = |table: &mut String, label: &str, value: &dyn Fn(&ReclaimPath) -> String| {
            row(
                table,
                label,
                &paths.map(value).each_ref().map(String::as_str),
            );
        };
        row(table, "", &["report", "inflate", "hint"]);
        all(table, "Requested", &|path| {
            format_bytes(path.requested_bytes)
        });
        all(table, "  ranges", &|path| path.requested_ranges.to_string());
        all(table, "Discarded", &|path| {
            format_bytes(path.discarded_bytes)
        });
        all(table, "  ranges", &|path| path.discarded_ranges.to_string());
        all(table, "  system calls", &|path| {
            path.discard_syscalls.to_string()
        });
        let reasons: BTreeSet<_> = paths
            .iter()
            .flat_map(|path| path.skipped_bytes.keys())
            .collect();
        for reason in reasons {
            let label = format!("Skipped, {}", printable(reason));
            all(table, &label, &|path| {
                format_bytes(path.skipped_bytes.get(reason).copied().unwrap_or(0))
            });
        }
        all(table, "Failed", &|path| format_bytes(path.failed_bytes));
        all(table, "Batches", &|path| path.batches.to_string());
        all(table, "Latency, median", &|path| {
            micros(path.latency_us.p50)
        });
        all(table, "  99 %", &|path| micros(path.latency_us.p99));
        all(table, "  longest", &|path| micros(path.latency_us.max));
        all(table, "Last batch", &|path| {
            path.last_batch
                .map_or_else(|| "-".to_owned(), |batch| format_bytes(batch.bytes))
        });
        all(table, "  completed", &|path| {
            path.last_batch
                .map_or_else(|| "-".to_owned(), |batch| age(batch.age_ms))
        });
    }

    fn guest(&self, table: &mut String) {
        let Some(guest) = &self.stats.guest else {
            return;
        };
        let known = [
            ("free", guest.stats.free_memory),
            ("available", guest.stats.available_memory),
            ("caches", guest.stats.disk_caches),
            ("total", guest.stats.total_memory),
        ];
        let figures: Vec<_> = known
            .iter()
            .filter_map(|(name, value)| {
                value.map(|value| format!("{name} {}", format_bytes(value)))
            })
            .collect();
        append(
            table,
            format_args!(
                "\n{:<LABEL_WIDTH$}{} ({})\n",
                "Guest statistics",
                figures.join(", "),
                age(guest.age_ms)
            ),
        );
        let Some(reporting) = guest.reporting else {
            return;
        };
        let line = format!(
            "{} pending, {} reported and free, {} batches, {} isolation failures",
            reporting.pending_bytes.map_or_else(unknown, format_bytes),
            reporting.reported_bytes.map_or_else(unknown, format_bytes),
            reporting
                .batches
                .map_or_else(unknown, |count| count.to_string()),
            reporting
                .isolation_failures
                .map_or_else(unknown, |count| count.to_string()),
        );
        text(table, "  reporting", &line);
    }
}

fn unknown() -> String {
    "?".to_owned()
}

/// The state of reporting, in one line.
fn reporting(status: &ReportingStatus) -> String {
    let pausing = match status.state.as_str() {
        "pausing" => ", pausing",
        _ => "",
    };
    match (&status.active, &status.reason) {
        (true, _) => format!("active{pausing}"),
        // The server's reason starts with the same word.
        (false, Some(reason)) => match reason.strip_prefix("inactive: ") {
            Some(why) => format!("inactive{pausing}: {}", printable(why)),
            None => format!("inactive{pausing}: {}", printable(reason)),
        },
        (false, None) => format!("inactive{pausing}"),
    }
}

fn text(table: &mut String, label: &str, value: &str) {
    append(table, format_args!("{label:<LABEL_WIDTH$}{value}\n"));
}

/// The sum of a figure over all paths.
fn sum(stats: &ReclaimStats, figure: impl Fn(&ReclaimPath) -> u64) -> u64 {
    [&stats.report, &stats.inflate, &stats.hint]
        .into_iter()
        .fold(0, |sum, path| sum.saturating_add(figure(path)))
}

fn row(table: &mut String, label: &str, values: &[&str]) {
    append(table, format_args!("{label:<LABEL_WIDTH$}"));
    for value in values {
        append(table, format_args!("{value:>VALUE_WIDTH$}"));
    }
    table.push('\n');
}

fn bar(percent: f64) -> String {
    let filled = ((percent.clamp(0.0, 100.0) / 100.0) * BAR_WIDTH as f64).round() as usize;
    format!("{}{}", "#".repeat(filled), ".".repeat(BAR_WIDTH - filled))
}

/// A state in one word, even if the server sends none.
fn word(state: &str) -> String {
    match state {
        "" => "unknown".to_owned(),
        state => printable(state).replace([' ', '='], "_"),
    }
}

/// Escapes the server's text, so that a terminal does not interpret control characters.
fn printable(text: &str) -> String {
    text.chars()
        .map(|character| {
            if character.is_control() {
                '?'
            } else {
                character
            }
        })
        .collect()
}

fn append(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    text.write_fmt(arguments)
        .expect("writing to a string cannot fail");
}

#[cfg(test)]
mod tests {
    use api::{
        BalloonStats, GuestReporting, GuestSample, HintingStatus, LastBatch, ReportNow,
        ZoneResidency,
    };

    use super::*;

    fn stats(discarded_bytes: u64) -> ReclaimStats {
        ReclaimStats {
            configured_bytes: 1 << 30,
            resident_bytes: 256 << 20,
            reclaimed_bytes: 768 << 20,
            backing: "anonymous-private".to_owned(),
            reporting: ReportingStatus {
                active: true,
                state: "running".to_owned(),
                ..Default::default()
            },
            report: ReclaimPath {
                requested_bytes: discarded_bytes,
                discarded_bytes,
                last_batch: Some(LastBatch {
                    bytes: 64 << 20,
                    ranges: 32,
                    latency_us: 90,
                    age_ms: 1200,
                }),
                ..Default::default()
            },
            guest: Some(GuestSample {
                stats: BalloonStats {
                    free_memory: Some(700 << 20),
                    ..Default::default()
                },
                reporting: None,
                age_ms: 10,
            }),
            ..Default::default()
        }
    }

    fn sample<'a>(stats: &'a ReclaimStats, previous: Option<&'a ReclaimStats>) -> Sample<'a> {
        Sample {
            stats,
            previous,
            interval: Duration::from_secs(2),
            elapsed: Duration::from_millis(2500),
        }
    }

    #[test]
    fn table_shows_figures_and_shares() {
        let stats = stats(768 << 20);
        let table = sample(&stats, None).to_table();
        for line in [
            "Configured                  1.00 GiB\n",
            "Resident on the host         256 MiB        25.0 %\n",
            "[##########..............................] resident\n",
            "Reporting             active\n",
            "Discarded                    768 MiB           0 B           0 B\n",
            "Last batch                  64.0 MiB             -             -\n",
            "Guest statistics      free 700 MiB (10 ms ago)\n",
        ] {
            assert!(table.contains(line), "{line:?} is not in\n{table}");
        }
        assert!(!table.contains("swap"), "{table}");
    }

    #[test]
    fn table_shows_zones_if_there_are_several() {
        let zone = |id: &str| ZoneResidency {
            id: id.to_owned(),
            backing: "memfd-shared".to_owned(),
            page_bytes: 4096,
            configured_bytes: 512 << 20,
            resident_bytes: 128 << 20,
            ..Default::default()
        };
        let mut stats = stats(0);
        stats.zones = vec![zone("a")];
        assert!(!sample(&stats, None).to_table().contains("a, memfd"));
        stats.zones.push(zone("b\n"));
        let table = sample(&stats, None).to_table();
        let line = "b?, memfd-shared             128 MiB       512 MiB      4.00 KiB\n";
        assert!(table.contains(line), "{line:?} is not in\n{table}");
    }

    #[test]
    fn table_shows_every_reason_to_skip_and_to_be_inactive() {
        let mut stats = stats(0);
        stats.reporting = ReportingStatus {
            active: false,
            reason: Some("inactive: not\x1b[31m negotiated".to_owned()),
            ..Default::default()
        };
        stats
            .report
            .skipped_bytes
            .insert("unaligned".to_owned(), 4096);
        stats
            .inflate
            .skipped_bytes
            .insert("poison".to_owned(), 8192);
        let table = sample(&stats, None).to_table();
        assert!(
            table.contains("Reporting             inactive: not?[31m negotiated"),
            "{table}"
        );
        assert!(
            table.contains("Skipped, poison                  0 B      8.00 KiB"),
            "{table}"
        );
        assert!(
            table.contains("Skipped, unaligned          4.00 KiB           0 B"),
            "{table}"
        );
    }

    #[test]
    fn table_shows_what_is_under_way() {
        let mut stats = stats(0);
        stats.repopulated_bytes = 3 << 20;
        stats.reporting.state = "pausing".to_owned();
        stats.reporting.report_now = ReportNow {
            id: 7,
            pending: true,
            done_id: 6,
        };
        stats.hinting = HintingStatus {
            state: "running".to_owned(),
            command_id: 3,
            runs_requested: 2,
            runs_completed: 1,
        };
        stats.guest.as_mut().unwrap().reporting = Some(GuestReporting {
            pending_bytes: Some(2 << 20),
            reported_bytes: Some(4 << 20),
            batches: Some(9),
            isolation_failures: None,
        });
        let table = sample(&stats, None).to_table();
        for line in [
            "Repopulated                 3.00 MiB\n",
            "Reporting             active, pausing\n",
            "Full report           number 7 is in progress\n",
            "Hinting               running; 1 of 2 runs completed\n",
            "  reporting           2.00 MiB pending, 4.00 MiB reported and free, 9 batches, ? isolation failures\n",
        ] {
            assert!(table.contains(line), "{line:?} is not in\n{table}");
        }
    }

    #[test]
    fn rate_is_what_was_discarded_since_the_sample_before() {
        let (old, new) = (stats(100), stats(300));
        assert_eq!(sample(&new, Some(&old)).discarded_bytes_per_s(), 100);
        assert_eq!(sample(&old, Some(&new)).discarded_bytes_per_s(), 0);
        assert_eq!(sample(&new, None).discarded_bytes_per_s(), 0);
    }

    #[test]
    fn line_is_key_value_pairs() {
        let stats = stats(300);
        let line = sample(&stats, None).to_line();
        assert!(!line.contains('\n'));
        assert!(
            line.split(' ').all(|pair| pair.split('=').count() == 2),
            "{line}"
        );
        assert!(
            line.starts_with(
                "elapsed_ms=2500 configured_bytes=1073741824 resident_bytes=268435456 "
            ),
            "{line}"
        );
        assert!(
            line.ends_with(
                " reporting=active reporting_state=running hinting_state=unknown \
                 guest_free_bytes=734003200"
            ),
            "{line}"
        );
    }

    #[test]
    fn bar_stays_within_its_width() {
        for percent in [-1.0, 0.0, 33.3, 100.0, 250.0, f64::NAN] {
            assert_eq!(bar(percent).len(), BAR_WIDTH, "{percent}");
        }
    }
}
