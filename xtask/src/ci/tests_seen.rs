//! Collects from the output of the steps: durations of tests, skipped, retried and failed tests with reasons, and cache
//! hits.

use std::fs;
use std::path::Path;
use std::time::Duration;

/// Number of slowest tests shown.
const SLOWEST: usize = 20;

/// Number of lines shown of what a failed test printed. nextest prints some before the message of a panic.
const FAILED_LINES: usize = 20;

/// Collected line by line.
#[derive(Debug, Default)]
pub(super) struct TestsSeen {
    timed: Vec<(Duration, String)>,
    /// Names, with the reason if the runner gives one.
    skipped: Vec<(String, Option<String>)>,
    /// `name: why`.
    tried_twice: Vec<String>,
    failed: Vec<Failure>,
    /// Whether further lines belong to the last failed test.
    in_failure: bool,
    caches: Vec<String>,
}

/// Failures, and the first lines that explain them.
#[derive(Debug)]
struct Failure {
    what: String,
    lines: Vec<String>,
}

impl TestsSeen {
    /// Parses one line of a step's output. Supported are nextest, `cargo test` and our own runners.
    pub(super) fn read(&mut self, line: &str) {
        if self.in_failure {
            self.continue_failure(line);
        }
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
                "PASS" | "FAIL" | "TRY 2 PASS" | "TRY 2 FAIL" => {
                    let name = rest.split(": ").next().unwrap_or(rest);
                    if let Some(took) = seconds(time) {
                        self.timed.push((took, name.into()));
                    }
                    match word {
                        "PASS" => {}
                        "TRY 2 PASS" => self.pass_again(rest),
                        _ => self.fail(rest),
                    }
                }
                "TRY 1 FAIL" => self.fail(rest),
                "SKIP" => self.skip(rest),
                _ => {}
            }
        }
    }

    fn fail(&mut self, what: &str) {
        // nextest names each failed test again at its end.
        if self.failed.iter().all(|known| known.what != what) {
            self.failed.push(Failure {
                what: what.into(),
                lines: Vec::new(),
            });
            self.in_failure = true;
        }
    }

    /// A test that has failed passed when it was tried again.
    fn pass_again(&mut self, what: &str) {
        let Some(at) = self.failed.iter().position(|known| known.what == what) else {
            return;
        };
        let first = self.failed.remove(at);
        let mut lines = first.lines.iter().map(|line| line.trim());
        // The message follows the place of the panic.
        let why = lines
            .find(|it| it.contains("panicked at"))
            .and(lines.next());
        let why = why.unwrap_or("failed at first");
        self.tried_twice.push(format!("{what}: {why}"));
    }

    /// Adds a line to the last failed test, unless the line belongs to the next test.
    fn continue_failure(&mut self, line: &str) {
        const NEXT: [&str; 10] = [
            "PASS",
            "FAIL",
            "FLAKY",
            "SKIP",
            "SLOW",
            "TRY",
            "AGAIN",
            "ran for",
            "Summary",
            "Cancelling",
        ];
        let Some(failure) = self.failed.last_mut() else {
            return;
        };
        let text = line.trim();
        if NEXT.iter().any(|word| text.starts_with(word)) || failure.lines.len() == FAILED_LINES {
            self.in_failure = false;
        } else if !text.is_empty() {
            failure.lines.push(line.trim_end().into());
        }
    }

    /// Records a step that failed, with its last lines, unless the tests that failed in it are known.
    pub(super) fn step_failed(&mut self, step: &str, last: impl IntoIterator<Item = String>) {
        if self.failed.is_empty() {
            self.failed.push(Failure {
                what: format!("the step {step}"),
                lines: last.into_iter().collect(),
            });
        }
    }

    /// Merges the results of another step's output.
    pub(super) fn add(&mut self, other: Self) {
        self.failed.extend(other.failed);
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
        // At the end, where the reader of a long log looks first.
        let title = format!("Failed ({})", self.failed.len());
        let failed = self.failed.into_iter().flat_map(|Failure { what, lines }| {
            let lines = lines.into_iter().map(|line| format!("  {line}"));
            std::iter::once(what).chain(lines)
        });
        paragraph(&mut text, &title, failed);
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
            "\nSlowest tests:\n    120.00 s  guest_boots\n      1.50 s  guest_ends\n      0.10 s  api tests::a_b\n\n\
             Failed (1):\n  guest_boots: no: answer\n"
        );
    }

    fn failures(seen: TestsSeen) -> String {
        let text = seen.summary("/nowhere".as_ref());
        let at = text.find("\nFailed").expect("failures");
        text[at..].into()
    }

    #[test]
    fn failed_tests_are_named_once_with_the_lines_that_say_why() {
        let mut seen = seen(&[
            "        FAIL [   0.105s] ( 1/40) api tests::a_b",
            "  stderr ───",
            "",
            "    thread 'tests::a_b' panicked at api/src/lib.rs:3:5:",
            "    left: 1",
            "        PASS [   0.105s] ( 2/40) api tests::c",
            "     Summary [   0.2s] 2 tests run: 1 passed, 1 failed",
            "        FAIL [   0.105s] ( 1/40) api tests::a_b",
        ]);
        seen.step_failed("unit tests", [String::from("error: test run failed")]);
        assert_eq!(
            failures(seen),
            "\nFailed (1):\n  api tests::a_b\n      stderr ───\n        \
             thread 'tests::a_b' panicked at api/src/lib.rs:3:5:\n        left: 1\n"
        );
    }

    #[test]
    fn failed_test_shows_a_bounded_number_of_lines() {
        let mut lines = vec!["FAIL [ 120.00s] guest_boots: the kernel logged: ["];
        lines.extend([" oops"; 2 * FAILED_LINES]);
        assert_eq!(
            failures(seen(&lines)).lines().count(),
            "\nFailed".lines().count() + 1 + FAILED_LINES
        );
    }

    #[test]
    fn step_that_fails_without_a_failed_test_shows_its_last_lines() {
        let mut seen = seen(&["    Compiling api", "error[E0308]: mismatched types"]);
        seen.step_failed("build", [String::from("error[E0308]: mismatched types")]);
        assert_eq!(
            failures(seen),
            "\nFailed (1):\n  the step build\n    error[E0308]: mismatched types\n"
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
    fn test_that_passes_when_tried_again_is_no_failure() {
        let seen = seen(&[
            "  TRY 1 FAIL [   0.085s] (───) api tests::always",
            "    thread 'tests::always' (7) panicked at api/src/lib.rs:3:20:",
            "    always",
            "  TRY 1 FAIL [   0.086s] (───) api tests::flaky",
            "    thread 'tests::flaky' (8) panicked at api/src/lib.rs:9:20:",
            "    late",
            "    stack backtrace:",
            "  TRY 2 PASS [   0.500s] (1/3) api tests::flaky",
            "  TRY 2 FAIL [   0.250s] (3/3) api tests::always",
            "     Summary [   0.154s] 2 tests run: 1 passed (1 flaky), 1 failed, 0 skipped",
            "   FLAKY 2/2 [   0.004s] (1/3) api tests::flaky",
            "  TRY 2 FAIL [   0.250s] (3/3) api tests::always",
        ]);
        assert_eq!(
            seen.summary("/nowhere".as_ref()),
            "\nSlowest tests:\n      0.50 s  api tests::flaky\n      0.25 s  api tests::always\n      \
             0.25 s  api tests::always\n\nTried twice (1):\n  api tests::flaky: late\n\n\
             Failed (1):\n  api tests::always\n        \
             thread 'tests::always' (7) panicked at api/src/lib.rs:3:20:\n        always\n"
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
