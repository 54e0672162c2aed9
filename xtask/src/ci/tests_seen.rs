//! Data about single tests from the output of the steps: durations, skipped or retried tests with reasons, and cache
//! hits instead of builds.

use std::fs;
use std::path::Path;
use std::time::Duration;

/// Number of slowest tests shown.
const SLOWEST: usize = 20;

/// Collected line by line.
#[derive(Debug, Default)]
pub(super) struct TestsSeen {
    timed: Vec<(Duration, String)>,
    /// Names, with the reason if the runner gives one.
    skipped: Vec<(String, Option<String>)>,
    /// `name: why`.
    tried_twice: Vec<String>,
    caches: Vec<String>,
}

impl TestsSeen {
    /// Parses one line of a step's output. Supported are nextest, `cargo test` and our own runners.
    pub(super) fn read(&mut self, line: &str) {
        let line = line.trim();
        if let Some(rest) = line.strip_prefix("AGAIN ") {
            self.tried_twice.push(rest.trim().into());
        } else if let Some(rest) = line.strip_prefix("cache: ") {
            self.cache(rest.into());
        } else if let Some(rest) = line.strip_prefix("SKIP  ") {
            self.skip(rest);
        } else if let Some((name, why)) = ignored(line) {
            self.skipped.push((name.into(), why.map(str::to_string)));
        } else if let Some((word, rest)) = line.split_once(" [")
            && let Some((time, rest)) = rest.split_once("] ")
        {
            let rest = without_count(rest);
            match word {
                "PASS" | "FAIL" => {
                    let name = rest.split(": ").next().unwrap_or(rest);
                    if let Some(took) = seconds(time) {
                        self.timed.push((took, name.into()));
                    }
                }
                "SKIP" => self.skip(rest),
                _ => {}
            }
        }
    }

    /// Merges the results of another step's output.
    pub(super) fn add(&mut self, other: Self) {
        self.timed.extend(other.timed);
        self.skipped.extend(other.skipped);
        self.tried_twice.extend(other.tried_twice);
        for cache in other.caches {
            self.cache(cache);
        }
    }

    fn cache(&mut self, what: String) {
        if !self.caches.contains(&what) {
            self.caches.push(what);
        }
    }

    /// Reads the records of tests that could not run here, `NAME: WHY` on each line. Returns the number of tests: one
    /// may have several reasons.
    pub(super) fn read_skips(&mut self, lines: &str) -> u64 {
        let before = self.skipped.len();
        for line in lines.lines() {
            let name = line.split(": ").next();
            let known = self.skipped[before..].iter().any(|it| name == Some(&it.0));
            if !known {
                self.skip(line);
            }
        }
        (self.skipped.len() - before) as u64
    }

    fn skip(&mut self, text: &str) {
        let (name, why) = match text.trim().split_once(": ") {
            Some((name, why)) => (name, Some(why.to_string())),
            None => (text.trim(), None),
        };
        self.skipped.push((name.into(), why));
    }

    /// The paragraphs of the summary; `sources` is where reasons of ignored tests are looked up.
    pub(super) fn summary(mut self, sources: &Path) -> String {
        let mut text = String::new();
        self.timed.sort();
        self.timed.reverse();
        let slowest = self.timed.iter().take(SLOWEST);
        paragraph(
            &mut text,
            "Slowest tests",
            slowest.map(|(took, name)| format!("{:8.2} s  {name}", took.as_secs_f64())),
        );
        paragraph(&mut text, "Taken from caches", self.caches.into_iter());
        let title = format!("Tried twice ({})", self.tried_twice.len());
        paragraph(&mut text, &title, self.tried_twice.into_iter());
        let title = format!("Skipped ({})", self.skipped.len());
        let skipped = self.skipped.into_iter().map(|(name, why)| {
            let why = why.or_else(|| reason(sources, &name));
            format!("{name}: {}", why.as_deref().unwrap_or("ignored"))
        });
        paragraph(&mut text, &title, skipped);
        text
    }
}

fn paragraph(text: &mut String, title: &str, lines: impl Iterator<Item = String>) {
    let lines: Vec<String> = lines.map(|line| format!("  {line}\n")).collect();
    if !lines.is_empty() {
        text.push_str(&format!("\n{title}:\n{}", lines.concat()));
    }
}

/// `test NAME ... ignored, WHY`.
fn ignored(line: &str) -> Option<(&str, Option<&str>)> {
    let (name, rest) = line.strip_prefix("test ")?.split_once(" ... ignored")?;
    Some((name, rest.strip_prefix(", ")))
}

/// nextest prints a counter before the name: `( 3/40) api tests::name`.
fn without_count(text: &str) -> &str {
    match text.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
        Some((_, name)) => name.trim_start(),
        None => text,
    }
}

fn seconds(text: &str) -> Option<Duration> {
    let number: f64 = text.trim().strip_suffix('s')?.parse().ok()?;
    Duration::try_from_secs_f64(number).ok()
}

/// The reason in `#[ignore = "…"]` above the test.
fn reason(sources: &Path, test: &str) -> Option<String> {
    let function = test.rsplit([':', ' ']).next()?;
    let wanted = format!("fn {function}(");
    let mut folders = vec![sources.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).ok()?.flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            if path.is_dir() && name != "target" && !name.to_string_lossy().starts_with('.') {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs")
                && let Some(why) = fs::read_to_string(&path)
                    .ok()
                    .and_then(|text| reason_in(&text, &wanted))
            {
                return Some(why);
            }
        }
    }
    None
}

fn reason_in(text: &str, wanted: &str) -> Option<String> {
    let above = &text[..text.find(wanted)?];
    // Attributes of this function alone: back to the end of the one before it.
    let attributes = above.rsplit("\n}\n").next()?;
    let (_, why) = attributes.split_once("#[ignore = \"")?;
    Some(why.split('"').next()?.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(lines: &[&str]) -> TestsSeen {
        let mut seen = TestsSeen::default();
        for line in lines {
            seen.read(line);
        }
        seen
    }

    #[test]
    fn tests_of_each_runner_are_timed_slowest_first() {
        let seen = seen(&[
            "        PASS [   0.105s] ( 1/40) api tests::a_b",
            "FAIL [ 120.00s] guest_boots: no: answer",
            "PASS [   1.50s] guest_ends",
            "        SLOW [> 60.000s] ( 1/40) api tests::a_b",
        ]);
        assert_eq!(
            seen.summary("/nowhere".as_ref()),
            "\nSlowest tests:\n    120.00 s  guest_boots\n      1.50 s  guest_ends\n      0.10 s  api tests::a_b\n"
        );
    }

    #[test]
    fn tests_that_were_skipped_or_tried_twice_are_named_with_the_reason() {
        let seen = seen(&[
            "SKIP [   0.00s] guest_with_tun: no tun",
            "test store::etcd ... ignored, needs etcd",
            "        SKIP [         ] (--) fleet no_such_test",
            "SKIP  the newest source: no network",
            "AGAIN           guest_boots: late",
            "cache: Test kernel: x",
            "cache: Test kernel: x",
        ]);
        assert_eq!(
            seen.summary("/nowhere".as_ref()),
            "\nTaken from caches:\n  Test kernel: x\n\nTried twice (1):\n  guest_boots: late\n\n\
             Skipped (4):\n  guest_with_tun: no tun\n  store::etcd: needs etcd\n  \
             fleet no_such_test: ignored\n  the newest source: no network\n"
        );
    }

    #[test]
    fn tests_that_marked_themselves_as_skipped_are_named_once() {
        let mut seen = TestsSeen::default();
        let lines = "machine a::b: no KVM\nvmm c: no tap: refused\nmachine a::b: no io_uring\n";
        assert_eq!(seen.read_skips(lines), 2);
        assert_eq!(seen.read_skips("machine a::b: no KVM\n"), 1);
        assert_eq!(
            seen.summary("/nowhere".as_ref()),
            "\nSkipped (3):\n  machine a::b: no KVM\n  vmm c: no tap: refused\n  machine a::b: no KVM\n"
        );
    }

    #[test]
    fn reason_of_an_ignored_test_is_found_above_it_and_not_above_others() {
        let text = "#[test]\n#[ignore = \"other\"]\nfn a() {\n}\n\n#[test]\n#[ignore = \"why\"]\nfn b() {}\n\
                    }\n#[test]\nfn c() {}\n";
        assert_eq!(reason_in(text, "fn b("), Some("why".into()));
        assert_eq!(reason_in(text, "fn c("), None);
    }
}
