//! Checks that every test named in the documentation exists.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use super::root;

/// Documents whose tables name the test of each statement.
const WITH_TESTS: [&str; 2] = ["docs/threat-model.md", "docs/testing.md"];
/// Words in the style of a test name that are not test names.
const OTHER_NAMES: [&str; 3] = [
    "file_bytes_max",
    "memory_restore_mode",
    "subject_condition_outcome",
];
/// A shorter name is that of an option or of a figure.
const UNDERSCORES_MIN: usize = 2;

/// Every Rust file of the repository.
fn sources() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("the folder can be read") {
            let path = entry.expect("the folder can be read").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if path.is_dir() && name != "target" && !name.starts_with('.') {
                folders.push(path);
            } else if name.ends_with(".rs") {
                found.push(path);
            }
        }
    }
    found
}

/// The names of all functions.
fn functions() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for path in sources() {
        let text = fs::read_to_string(&path).expect("sources are text");
        for (at, _) in text.match_indices("fn ") {
            let rest = text[at + 3..].chars();
            let name: String = rest
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect();
            names.insert(name);
        }
    }
    names
}

/// The texts between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .flat_map(|line| line.split('`').skip(1).step_by(2))
}

/// Whether the word looks like a test's name, where `…` and `*` stand for anything.
fn is_name(word: &str) -> bool {
    let mut letters = word.chars();
    letters.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "_…*".contains(c))
        && word.matches('_').count() >= UNDERSCORES_MIN
        && !OTHER_NAMES.contains(&word)
}

fn matches(name: &str, pattern: &str) -> bool {
    let mut parts = pattern.split(['…', '*']);
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else {
        return false;
    };
    let parts: Vec<_> = parts.collect();
    let Some((last, middle)) = parts.split_last() else {
        return rest.is_empty();
    };
    for part in middle {
        let Some(at) = rest.find(part) else {
            return false;
        };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

#[test]
fn every_named_test_exists() {
    let functions = functions();
    let mut checked = 0;
    for document in WITH_TESTS {
        let text = fs::read_to_string(root().join(document)).expect("the document is text");
        for name in quoted(&text).filter(|word| is_name(word)) {
            let exists = functions.contains(name)
                || functions.iter().any(|function| matches(function, name));
            assert!(exists, "{document} names the test {name}");
            checked += 1;
        }
    }
    assert!(checked > 50, "{checked}");
}

#[test]
fn names_are_told_from_other_words() {
    assert!(is_name("client_that_never_ends") && is_name("cocoon_boots_qcow2_…"));
    for other in [
        "free_memory",
        "file_bytes_max",
        "--log-file-bytes-max",
        "a_B_c",
    ] {
        assert!(!is_name(other), "{other}");
    }
    assert!(matches("a_b_c", "a_b_c") && matches("a_b_c", "a_…") && matches("a_b_c", "a_*_c"));
    assert!(!matches("a_b_c", "a_b") && !matches("a_b_c", "…_d") && !matches("a_b_c", "b_…"));
}
