//! The error body, and the conversion of errors to it.
//!
//! The response to a failed request is a JSON array of strings: the chain of causes, outermost first. Programs print
//! the same chain on standard error. [`error_chain`] builds it for both.

use std::error::Error;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// Maximum number of links of a chain that are shown. A longer chain is a cycle or another bug.
const CHAIN_LINKS_MAX: usize = 32;

/// The body of every 4xx and 5xx response: the chain of causes, outermost first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(transparent)]
#[schemars(extend("example" = json!(["Error from API", "The VM could not be resized", "No balloon is configured"])))]
pub struct ErrorBody(pub Vec<String>);

impl ErrorBody {
    /// The body that describes `error`.
    pub fn new(error: &(dyn Error + 'static)) -> Self {
        Self(error_chain(error))
    }

    /// The body that upstream sends for an unknown path.
    pub fn not_found() -> Self {
        Self(vec!["Not Found".to_owned()])
    }
}

/// The texts of `error` and of all its sources, outermost first.
///
/// An error type describes its own layer in `Display` and returns its cause as the source, so no text appears twice.
pub fn error_chain(error: &(dyn Error + 'static)) -> Vec<String> {
    std::iter::successors(Some(error), |&link| link.source())
        .take(CHAIN_LINKS_MAX)
        .map(ToString::to_string)
        .collect()
}

/// The same in one line, for a log, an event or a message.
pub fn error_line(error: &(dyn Error + 'static)) -> String {
    error_chain(error).join(": ")
}

/// The message that a program prints on standard error when it exits because of `error`, without a final line break.
///
/// `program` is the name as upstream spells it there: `Cloud Hypervisor`, `ch-remote`.
pub fn chain_report(program: &str, error: &(dyn Error + 'static)) -> String {
    let mut report = format!("Error: {program} exited with the following chain of errors:");
    for (level, text) in error_chain(error).iter().enumerate() {
        report.push_str(&format!("\n  {level}: {text}"));
    }
    report
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn error_chain_nested_error_lists_outermost_first() {
        let error = Outer(std::io::Error::other("inner"));
        assert_eq!(error_chain(&error), ["outer", "inner"]);
        assert_eq!(
            chain_report("ch-remote", &error),
            "Error: ch-remote exited with the following chain of errors:\n  0: outer\n  1: inner"
        );
        assert_eq!(
            serde_json::to_string(&ErrorBody::new(&error)).unwrap(),
            r#"["outer","inner"]"#
        );
    }
}
