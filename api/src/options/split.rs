//! Splits a text at its commas, outside quotes and brackets.

use super::fault::OptionFault;

/// The settings in `text`, without their outer quotes.
///
/// Inside quotes every character is literal, including brackets: a kernel command line may contain an unmatched one.
pub(super) fn settings(text: &str) -> Result<Vec<String>, OptionFault> {
    let unbalanced = || OptionFault::Unbalanced {
        text: text.to_owned(),
    };
    let mut settings = Vec::new();
    let mut current = String::new();
    let mut depth = 0_u32;
    let mut quoted = false;
    for character in text.chars() {
        match character {
            '"' => {
                quoted = !quoted;
                // Inside brackets, quotes are kept for the later split of the list.
                if depth == 0 {
                    continue;
                }
            }
            ',' if !quoted && depth == 0 => {
                settings.push(std::mem::take(&mut current));
                continue;
            }
            '[' if !quoted => depth += 1,
            ']' if !quoted => depth = depth.checked_sub(1).ok_or_else(unbalanced)?,
            _ => {}
        }
        current.push(character);
    }
    if quoted || depth != 0 {
        return Err(unbalanced());
    }
    settings.push(current);
    Ok(settings)
}

/// The items of a bracketed list. The brackets are optional, as in upstream.
pub(super) fn list(text: &str) -> Result<Vec<String>, OptionFault> {
    let inner = text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(text);
    settings(inner)
}
