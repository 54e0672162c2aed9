//! One command of a code block, with its place in the documentation.

/// A command in the documentation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// File and line.
    pub place: String,
    /// Its words, without quotes; the first one is the program.
    pub words: Vec<String>,
}

impl Command {
    /// The command with placeholders filled in: `off|mainline` becomes `off`, `N` becomes `1`, text in brackets is
    /// removed, a variable gets some value, and `…` becomes `omitted`.
    #[must_use]
    pub fn filled_in(&self, omitted: &[&str]) -> Vec<String> {
        let mut filled = Vec::new();
        let mut in_brackets = false;
        for word in &self.words {
            in_brackets |= word.starts_with('[');
            if in_brackets {
                in_brackets = !word.ends_with(']');
                continue;
            }
            match word.as_str() {
                "…" => filled.extend(omitted.iter().map(|&it| it.to_owned())),
                "N" => filled.push("1".to_owned()),
                _ if word.starts_with('$') => filled.push("value".to_owned()),
                _ => {
                    let first = word.split('|').next().unwrap_or_default();
                    filled.push(first.trim_end_matches('…').to_owned());
                }
            }
        }
        filled
    }
}
