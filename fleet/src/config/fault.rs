//! Reasons why a configuration is rejected.

use std::error::Error;
use std::fmt;

use crate::model::HostState;

/// A contradiction between keys.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigFault {
    /// The `leave` value of a state is not above its `enter` value.
    #[error("thresholds.{0}: leave must be above enter")]
    BandReversed(HostState),
    /// A worse state begins at more free memory than a better one.
    #[error("thresholds.{0}: must be below the values of the preceding state")]
    BandOrder(HostState),
    /// The pressures are not ascending.
    #[error("thresholds.pressure: the three values must increase")]
    PressureOrder,
    /// A value is out of range.
    #[error("{key} must be {range}")]
    Range {
        /// The key.
        key: String,
        /// The valid range.
        range: String,
    },
    /// A policy's minimum exceeds its maximum.
    #[error("policy.{0}: max must not be below min or floor")]
    PolicyOrder(String),
    /// The VMM rejects this reporting policy, so guests would never follow it.
    #[error("reporting.{policy}: {low} must not be above {high}")]
    ReportingOrder {
        /// The policy.
        policy: &'static str,
        /// The setting that is above the other.
        low: &'static str,
        /// The other one.
        high: &'static str,
    },
    /// Giving and taking would alternate forever.
    #[error("control.give_above must be between thresholds.orange.leave and control.relax_above")]
    GiveOrder,
    /// Idle guests would receive memory that is then taken from them.
    #[error("control.relax_above must be above thresholds.yellow.leave")]
    RelaxOrder,
    /// A guest would keep less memory than the threshold of suffering.
    #[error(
        "control.suffer must be below control.keep, and control.suffer_min below control.keep_min"
    )]
    KeepOrder,
    /// The kernel rejects the trigger.
    #[error("agent.trigger_stall must be shorter than agent.trigger_window")]
    TriggerOrder,
    /// The interval between samples exceeds the maximum age of a sample.
    #[error("control.sample must be shorter than control.sample_age_max")]
    SampleAge,
}

/// The TOML parser's error, with a suggestion for a misspelt word.
#[derive(Clone, Debug)]
pub struct SyntaxFault {
    /// Section that was parsed separately; the parser does not know its name.
    section: Option<&'static str>,
    error: Box<toml::de::Error>,
}

impl SyntaxFault {
    /// An error in the section `name`.
    pub(crate) fn in_section(name: &'static str, error: toml::de::Error) -> Self {
        Self {
            section: Some(name),
            error: Box::new(error),
        }
    }

    /// The path of the key, as far as it is known; `text` is the parser's.
    fn key(&self, text: &str) -> Option<String> {
        let key = text
            .trim_end()
            .rsplit_once("\nin `")
            .and_then(|(_, key)| key.strip_suffix('`'));
        let parts: Vec<&str> = self.section.into_iter().chain(key).collect();
        (!parts.is_empty()).then(|| parts.join("."))
    }
}

impl From<toml::de::Error> for SyntaxFault {
    fn from(error: toml::de::Error) -> Self {
        Self {
            section: None,
            error: Box::new(error),
        }
    }
}

impl fmt::Display for SyntaxFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let message = self.error.message();
        let suggestion = api::suggestion(message);
        let text = self.error.to_string();
        match self.key(&text) {
            // The parser shows the line of the file, and the message below it.
            _ if self.error.span().is_some() => write!(f, "{}{suggestion}", text.trim_end()),
            Some(key) => write!(f, "`{key}`: {message}{suggestion}"),
            None => write!(f, "{message}{suggestion}"),
        }
    }
}

impl Error for SyntaxFault {}

/// Reasons why a configuration is rejected.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It is not TOML, or has unknown keys or invalid values.
    #[error("cannot read the configuration")]
    Syntax(#[from] SyntaxFault),
    /// Its values contradict each other.
    #[error("configuration is invalid: {}", list(.0))]
    Faults(Vec<ConfigFault>),
}

fn list(faults: &[ConfigFault]) -> String {
    let texts: Vec<String> = faults.iter().map(ToString::to_string).collect();
    texts.join("; ")
}
