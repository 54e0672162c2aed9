//! Code blocks of a Markdown file.

use std::mem::take;

use crate::command::Command;
use crate::words;

/// A fenced or indented code block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// File and line.
    pub place: String,
    /// The language after the fence: `toml`, `text`; empty for an indented block.
    pub language: String,
    /// The reason why its commands are neither run nor parsed, if the previous line has one: `<!-- not run: REASON -->`.
    pub not_run: Option<String>,
    /// The reason why tests parse its commands, but do not run them: `<!-- only parsed: REASON -->`.
    pub only_parsed: Option<String>,
    /// Its lines.
    pub text: String,
}

impl Block {
    /// The commands in the block; empty if its language is not a shell's.
    #[must_use]
    pub fn commands(&self) -> Vec<Command> {
        if !self.is_of_a_shell() {
            return Vec::new();
        }
        self.parsed()
    }

    /// The commands of a block whose language is not a shell's, without a prompt such as `host$`.
    #[must_use]
    pub(crate) fn commands_outside_a_shell(&self) -> Vec<Command> {
        if self.is_of_a_shell() {
            return Vec::new();
        }
        let mut commands = self.parsed();
        for command in &mut commands {
            let has_prompt = command
                .words
                .first()
                .is_some_and(|word| word.ends_with(['$', '#', '>']));
            command.words.drain(..usize::from(has_prompt));
        }
        commands
    }

    fn is_of_a_shell(&self) -> bool {
        matches!(self.language.as_str(), "" | "sh" | "bash" | "console")
    }

    fn parsed(&self) -> Vec<Command> {
        // A line that ends with a backslash continues in the next one.
        let text = self.text.replace("\\\n", " ");
        words::commands(&text)
            .into_iter()
            .map(|words| Command {
                place: self.place.clone(),
                words: without_cargo_run(words),
            })
            .collect()
    }
}

/// The code blocks of `text`, the contents of the file `name`.
#[must_use]
pub fn blocks(name: &str, text: &str) -> Vec<Block> {
    let mut found = Vec::new();
    let mut open: Option<(Block, Kind)> = None;
    let mut reasons = Reasons::default();
    let mut after_blank = true;
    for (index, line) in text.lines().enumerate() {
        let place = format!("{name}:{}", index + 1);
        let fence = line.trim_start().strip_prefix("```");
        match (&mut open, fence) {
            (Some((block, Kind::Fenced)), None) => push_line(block, line),
            (Some((_, Kind::Fenced)), Some(_)) => found.extend(open.take().map(|(block, _)| block)),
            (Some((block, Kind::Indented)), _) if line.starts_with("    ") || line.is_empty() => {
                push_line(block, line.strip_prefix("    ").unwrap_or_default());
            }
            _ => {
                found.extend(open.take().map(|(block, _)| block));
                let indented = (after_blank && !line.trim().is_empty())
                    .then(|| line.strip_prefix("    "))
                    .flatten();
                if let Some(language) = fence {
                    open = Some((
                        Block::new(place, language, take(&mut reasons)),
                        Kind::Fenced,
                    ));
                } else if let Some(code) = indented {
                    let mut block = Block::new(place, "", take(&mut reasons));
                    push_line(&mut block, code);
                    open = Some((block, Kind::Indented));
                } else if let Some(text) = reason(line, "not run:") {
                    reasons.not_run = Some(text);
                } else if let Some(text) = reason(line, "only parsed:") {
                    reasons.only_parsed = Some(text);
                } else if !line.trim().is_empty() {
                    reasons = Reasons::default();
                }
            }
        }
        after_blank = line.trim().is_empty();
    }
    found.extend(open.map(|(block, _)| block));
    found
}

/// `cargo run -p PROGRAM … -- WORDS` is the command `PROGRAM WORDS`.
fn without_cargo_run(words: Vec<String>) -> Vec<String> {
    let is_run = words.starts_with(&["cargo".to_owned(), "run".to_owned()]);
    let position = |wanted: &str| words.iter().position(|word| word == wanted);
    let (true, Some(package), Some(end)) = (is_run, position("-p"), position("--")) else {
        return words;
    };
    let program = words.get(package + 1).cloned();
    let rest = words.iter().skip(end + 1).cloned();
    program.into_iter().chain(rest).collect()
}

enum Kind {
    Fenced,
    Indented,
}

/// Those of the next block.
#[derive(Default)]
struct Reasons {
    not_run: Option<String>,
    only_parsed: Option<String>,
}

impl Block {
    fn new(place: String, language: &str, reasons: Reasons) -> Self {
        Self {
            place,
            language: language.trim().to_owned(),
            not_run: reasons.not_run,
            only_parsed: reasons.only_parsed,
            text: String::new(),
        }
    }
}

fn push_line(block: &mut Block, line: &str) {
    block.text.push_str(line);
    block.text.push('\n');
}

fn reason(line: &str, mark: &str) -> Option<String> {
    let comment = line.trim().strip_prefix("<!--")?.trim_start();
    let text = comment.strip_prefix(mark)?.strip_suffix("-->")?;
    Some(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_found_with_their_reasons() {
        let text = "Text\n    no code\n\n    a b \\\n        c\n\n    d\nText\n\n```toml\nx = 1\n```\n\
                    <!-- not run: needs a cluster -->\n\n    e\n\n<!-- only parsed: slow -->\n```sh\nf\n```\n";
        let found = blocks("f.md", text);
        let seen: Vec<_> = found
            .iter()
            .map(|it| {
                (
                    it.place.as_str(),
                    it.language.as_str(),
                    it.not_run.as_deref(),
                    it.only_parsed.as_deref(),
                )
            })
            .collect();
        assert_eq!(
            seen,
            [
                ("f.md:4", "", None, None),
                ("f.md:10", "toml", None, None),
                ("f.md:15", "", Some("needs a cluster"), None),
                ("f.md:18", "sh", None, Some("slow")),
            ]
        );
        let words: Vec<_> = found[0].commands().into_iter().map(|it| it.words).collect();
        assert_eq!(words, [vec!["a", "b", "c"], vec!["d"]]);
        assert!(found[1].commands().is_empty());
        let text = blocks("f.md", "```text\nhost$ a b\nc\n```\n");
        assert!(text[0].commands().is_empty());
        let words: Vec<_> = text[0]
            .commands_outside_a_shell()
            .into_iter()
            .map(|it| it.words)
            .collect();
        assert_eq!(words, [vec!["a", "b"], vec!["c"]]);
        assert!(found[0].commands_outside_a_shell().is_empty());
        let run = blocks("f.md", "    cargo run --release -p prog -- do it\n");
        assert_eq!(run[0].commands()[0].words, ["prog", "do", "it"]);
    }
}
