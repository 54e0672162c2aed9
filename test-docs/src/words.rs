//! The words of a command line, as a shell splits them.

/// Splits `text` into commands at `&&`, `||`, `;`, `|` and line ends outside quotes, and each command into words. A
/// comment ends a line. Environment settings before a command are omitted.
pub(crate) fn commands(text: &str) -> Vec<Vec<String>> {
    let mut commands = vec![Vec::new()];
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match (quote, character) {
            (Some(open), _) if character == open => quote = None,
            (Some(_), _) => word.get_or_insert_default().push(character),
            (None, '\'' | '"') => {
                word.get_or_insert_default();
                quote = Some(character);
            }
            (None, '#') if word.is_none() => {
                while characters.next_if(|it| *it != '\n').is_some() {}
            }
            (None, ';' | '\n' | '&') => {
                finish(&mut commands, &mut word);
                commands.push(Vec::new());
            }
            // Alternatives are written `off|mainline`; a pipe has spaces around it.
            (None, '|') if word.is_none() => commands.push(Vec::new()),
            (None, _) if character.is_whitespace() => finish(&mut commands, &mut word),
            (None, _) => word.get_or_insert_default().push(character),
        }
    }
    finish(&mut commands, &mut word);
    for command in &mut commands {
        let settings = command.iter().take_while(|word| is_setting(word)).count();
        command.drain(..settings);
    }
    commands.retain(|command| !command.is_empty());
    commands
}

fn finish(commands: &mut [Vec<String>], word: &mut Option<String>) {
    if let (Some(command), Some(word)) = (commands.last_mut(), word.take()) {
        command.push(word);
    }
}

fn is_setting(word: &str) -> bool {
    let is_name = |name: &str| name.chars().all(|it| it.is_ascii_uppercase() || it == '_');
    word.split_once('=')
        .is_some_and(|(name, _)| !name.is_empty() && is_name(name))
}

#[cfg(test)]
mod tests {
    use super::commands;

    #[test]
    fn text_is_split_as_a_shell_does() {
        assert_eq!(
            commands("A=1 x 'b c' \"d\" e=\"f g\" # h\ny; z && w | v a|b # i"),
            [
                vec!["x", "b c", "d", "e=f g"],
                vec!["y"],
                vec!["z"],
                vec!["w"],
                vec!["v", "a|b"],
            ]
        );
        assert!(commands("  # nothing\n\n").is_empty());
    }
}
