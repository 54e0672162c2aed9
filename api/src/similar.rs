//! "Did you mean": the known word that a misspelt one resembles.

use schemars::JsonSchema;
use serde_json::Value;

/// Minimum similarity of a misspelling to the known word, the same as clap's.
const SIMILARITY_MIN: f64 = 0.7;
/// Maximum length of a compared word. No known word is longer, and the limit bounds the time of a comparison.
const WORD_BYTES_MAX: usize = 64;

/// The known word that resembles `word` most, if one does.
pub(crate) fn similar<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if word.len() > WORD_BYTES_MAX {
        return None;
    }
    let scored = known.into_iter().map(|known| {
        // Swapped letters are one edit. Jaro's measure hardly notices them in short words.
        let edits = strsim::damerau_levenshtein(word, known);
        let (stem, known_stem) = without_common_ending(word, known);
        (edits, strsim::jaro(stem, known_stem), known)
    });
    let resembles = |edits, similarity| edits == 1 || similarity > SIMILARITY_MIN;
    let best = scored
        .filter(|(edits, similarity, _)| resembles(*edits, *similarity))
        .min_by(|(edits, one, _), (other_edits, other, _)| {
            edits.cmp(other_edits).then(other.total_cmp(one))
        });
    best.map(|(_, _, known)| known)
}

/// Two file names without the ending that they share, which would make any two of them similar.
fn without_common_ending<'a>(one: &'a str, other: &'a str) -> (&'a str, &'a str) {
    match (one.rsplit_once('.'), other.rsplit_once('.')) {
        (Some((stem, ending)), Some((other_stem, other_ending))) if ending == other_ending => {
            (stem, other_stem)
        }
        _ => (one, other),
    }
}

/// A suggestion to append to a message, such as ` (did you mean "size"?)`, or an empty string.
pub(crate) fn did_you_mean(similar: Option<&str>) -> String {
    similar
        .map(|known| format!(" (did you mean {known:?}?)"))
        .unwrap_or_default()
}

/// A suggestion to append to a message about a word that is none of `known`.
pub fn suggestion_among<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    did_you_mean(similar(word, known))
}

/// A suggestion to append to serde's message about an unknown key or word, which lists the known ones; empty for other
/// messages.
pub fn suggestion(message: &str) -> String {
    let kinds = ["unknown field `", "unknown variant `"];
    let rest = kinds
        .iter()
        .find_map(|kind| message.split_once(kind))
        .map(|(_, rest)| rest);
    // Each word is enclosed in backticks.
    let mut words = rest.unwrap_or_default().split('`').step_by(2);
    let word = words.next().unwrap_or_default();
    did_you_mean(similar(word, words))
}

/// A suggestion to append to a message about a key that `T` does not have, at any depth.
pub fn suggestion_for<T: JsonSchema>(key: &str) -> String {
    let schema = schemars::schema_for!(T);
    let mut known = Vec::new();
    collect_keys(schema.as_value(), &mut known);
    did_you_mean(similar(key, known))
}

fn collect_keys<'a>(schema: &'a Value, keys: &mut Vec<&'a str>) {
    match schema {
        Value::Object(object) => {
            let properties = object.get("properties").and_then(Value::as_object);
            keys.extend(
                properties
                    .into_iter()
                    .flatten()
                    .map(|(key, _)| key.as_str()),
            );
            object.values().for_each(|part| collect_keys(part, keys));
        }
        Value::Array(parts) => parts.iter().for_each(|part| collect_keys(part, keys)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde::Deserialize;

    use super::*;
    use crate::ReclaimThresholdsChange;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Section {
        #[serde(default, rename = "floor")]
        _floor: u32,
        #[serde(default, rename = "min")]
        _min: Option<Word>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Word {
        Silent,
        Loud,
    }

    #[test]
    fn message_of_serde_about_a_misspelling_gets_a_suggestion() {
        for (text, expected) in [
            (r#"{"flor":1}"#, r#" (did you mean "floor"?)"#),
            (r#"{"min":"lowd"}"#, r#" (did you mean "loud"?)"#),
            (r#"{"min":"xyz"}"#, ""),
            (r#"{"floor":"x"}"#, ""),
            ("{", ""),
        ] {
            let error = serde_json::from_str::<Section>(text).unwrap_err();
            assert_eq!(suggestion(&error.to_string()), expected, "{error}");
        }
        let long = "flor".repeat(1 << 20);
        assert_eq!(
            suggestion(&format!("unknown field `{long}`, expected `floor`")),
            ""
        );
    }

    #[test]
    fn word_with_swapped_letters_resembles_its_original() {
        let known = ["ip", "mask", "mac", "host_mac", "mtu"];
        assert_eq!(similar("mca", known), Some("mac"));
        assert_eq!(similar("hots_mac", known), Some("host_mac"));
        assert_eq!(similar("tmu", known), Some("mtu"));
        assert_eq!(similar("bw_size", known), None);
    }

    #[test]
    fn file_names_with_the_same_ending_resemble_each_other_only_if_their_stems_do() {
        let known = ["Cargo.toml", "density.toml"];
        assert_eq!(similar("nosuch.toml", known), None);
        assert_eq!(similar("dencity.toml", known), Some("density.toml"));
        assert_eq!(similar("densities.toml", known), Some("density.toml"));
    }

    #[test]
    fn key_that_resembles_one_of_a_type_gets_a_suggestion() {
        let suggest = suggestion_for::<ReclaimThresholdsChange>;
        assert_eq!(
            suggest("remove_alert"),
            r#" (did you mean "remove_alerts"?)"#
        );
        assert_eq!(suggest("colour"), "");
    }
}
