//! Parts of generated pages: short cells with longer texts below the table, and the comparison with the file.

use std::fmt::Write as _;
use std::fs;

use crate::root;

/// Maximum number of words in a cell.
const CELL_WORDS_MAX: usize = 15;

/// Meanings of the rows of one table. A cell has the first sentence, and the text below the table the other ones.
#[derive(Clone, Debug, Default)]
pub struct Meanings {
    below: String,
}

impl Meanings {
    /// The cell of the row `name` with this meaning.
    ///
    /// # Panics
    /// The first sentence is too long for a cell.
    pub fn cell(&mut self, name: &str, meaning: &str) -> String {
        let meaning = meaning.trim().trim_end_matches('.');
        let (first, rest) = match meaning.split_once(". ") {
            Some((first, rest)) if words(meaning) > CELL_WORDS_MAX => (first, Some(rest)),
            _ => (meaning, None),
        };
        assert!(
            words(first) <= CELL_WORDS_MAX,
            "the first sentence about {name} has more than {CELL_WORDS_MAX} words: {first}"
        );
        if let Some(rest) = rest {
            let _ = writeln!(self.below, "- {name}: {rest}.");
        }
        first.replace('|', "\\|")
    }

    /// The text below the table, which is empty if the cells have everything.
    #[must_use]
    pub fn below(self) -> String {
        match self.below.is_empty() {
            true => String::new(),
            false => format!("\n{}", self.below),
        }
    }
}

fn words(text: &str) -> usize {
    text.split_whitespace().count()
}

/// Compares a page with what `generate` makes of its present text; writes it if `UPDATE_GENERATED` is set. `path` is
/// relative to the root, and `update` the command that writes the page.
///
/// # Panics
/// The page differs, or cannot be read or written.
pub fn expect_page(path: &str, update: &str, generate: impl Fn(&str) -> String) {
    let file = root().join(path);
    let old = fs::read_to_string(&file).unwrap_or_default();
    let new = generate(&old);
    if std::env::var_os("UPDATE_GENERATED").is_some() {
        fs::write(&file, &new).expect("the page can be written");
    } else {
        assert!(
            old == new,
            "{path} is out of date; write it again: UPDATE_GENERATED=1 {update}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meaning_that_is_too_long_for_a_cell_continues_below_the_table() {
        let mut meanings = Meanings::default();
        assert_eq!(
            meanings.cell("`a`", "Short. And clear."),
            "Short. And clear"
        );
        let long = "Size of the a|b. ".to_owned() + &"It has many words. ".repeat(4);
        assert_eq!(meanings.cell("`b`", &long), "Size of the a\\|b");
        let below = meanings.below();
        assert!(
            below.starts_with("\n- `b`: It has many words. It "),
            "{below}"
        );
        assert!(below.ends_with("many words.\n"), "{below}");
    }

    #[test]
    #[should_panic(expected = "first sentence about `a`")]
    fn first_sentence_that_is_too_long_is_refused() {
        Meanings::default().cell("`a`", &"word ".repeat(16));
    }
}
