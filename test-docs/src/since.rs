//! The first version of each row on a generated page.
//!
//! The column Since of the page records it. When the page is generated again, a row keeps its version, and a new row
//! gets the current version.

use std::collections::BTreeMap;

/// The version of a row that is not on the page yet.
pub const THIS_VERSION: &str = env!("CARGO_PKG_VERSION");

/// The name of rows of which a command line may have only one.
pub const ALTERNATIVES: &str = "one of";

/// The first version of each row, by the heading above its table.
#[derive(Clone, Debug, Default)]
pub struct FirstVersions(BTreeMap<(String, String), String>);

impl FirstVersions {
    /// Reads them from a page.
    #[must_use]
    pub fn of(page: &str) -> Self {
        let mut versions = BTreeMap::new();
        let (mut heading, mut column) = ("", None);
        for line in page.lines() {
            if let Some(text) = line.strip_prefix("## ") {
                (heading, column) = (text, None);
            }
            // A bar in a cell is escaped, so no blank precedes it.
            let cells: Vec<&str> = line.trim_start_matches("| ").split(" | ").collect();
            match column {
                None => column = cells.iter().position(|cell| *cell == "Since"),
                Some(column) => {
                    if let Some(version) = cells.get(column) {
                        let key = (heading.to_owned(), name(&cells).to_owned());
                        versions.insert(key, (*version).to_owned());
                    }
                }
            }
        }
        Self(versions)
    }

    /// The first version of the row that starts with `cells`.
    #[must_use]
    pub fn get(&self, heading: &str, cells: &[&str]) -> &str {
        let key = (heading.to_owned(), name(cells).to_owned());
        self.0.get(&key).map_or(THIS_VERSION, String::as_str)
    }
}

/// Alternatives have no common name, so their syntax identifies them.
fn name<'a>(cells: &[&'a str]) -> &'a str {
    match cells {
        [ALTERNATIVES, syntax, ..] => syntax,
        [name, ..] => name,
        [] => "",
    }
}
