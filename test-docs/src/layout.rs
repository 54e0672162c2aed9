//! Checks the layout of the documents: blank lines, cells of tables, entries of the changelog.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;

use crate::{documents, root};

/// Share of common words from which two entries of the changelog count as one.
const SAME_PERCENT: usize = 70;

/// Every document with its text.
fn texts() -> Vec<(String, String)> {
    let named = |path: std::path::PathBuf| {
        let text = fs::read_to_string(root().join(&path)).unwrap();
        (path.display().to_string(), text)
    };
    documents().into_iter().map(named).collect()
}

/// Number of cells in a row of a table. A bar after a backslash belongs to its cell.
fn cells(row: &str) -> usize {
    row.replace("\\|", "")
        .matches('|')
        .count()
        .saturating_sub(1)
}

#[test]
fn no_document_has_two_blank_lines_in_a_row() {
    let doubled = texts().into_iter().filter(|it| it.1.contains("\n\n\n"));
    let names: Vec<_> = doubled.map(|it| it.0).collect();
    assert!(names.is_empty(), "{names:?}");
}

#[test]
fn each_row_of_a_table_has_as_many_cells_as_its_heading() {
    let mut wrong = Vec::new();
    for (name, text) in texts() {
        let mut expected = None;
        for (index, line) in text.lines().enumerate() {
            if !line.starts_with('|') {
                expected = None;
                continue;
            }
            if cells(line) != *expected.get_or_insert(cells(line)) {
                wrong.push(format!("{name}:{}", index + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn each_entry_of_the_changelog_is_one_line_of_at_most_one_sentence() {
    let text = fs::read_to_string(root().join("CHANGELOG.md")).unwrap();
    let is_entry = |line: &&str| line.starts_with("- ");
    let several: Vec<_> = text
        .lines()
        .filter(is_entry)
        .filter(|line| line.contains(". ") || !line.ends_with('.'))
        .collect();
    assert!(several.is_empty(), "{several:#?}");
    let continued = text.lines().find(|line| line.starts_with(' '));
    assert_eq!(continued, None);
}

#[test]
fn no_two_entries_of_the_changelog_have_nearly_the_same_words() {
    let text = fs::read_to_string(root().join("CHANGELOG.md")).unwrap();
    let entries: Vec<&str> = text.lines().filter(|it| it.starts_with("- ")).collect();
    let words = |entry: &str| entry.split_whitespace().map(str::to_owned).collect();
    let words: Vec<BTreeSet<String>> = entries.iter().map(|it| words(it)).collect();
    for (at, one) in words.iter().enumerate() {
        for (other, another) in words[..at].iter().enumerate() {
            let common = one.intersection(another).count();
            let all = one.union(another).count();
            assert!(
                common * 100 < all * SAME_PERCENT,
                "these entries repeat each other:\n{}\n{}",
                entries[other],
                entries[at]
            );
        }
    }
}
