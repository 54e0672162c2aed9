//! `[[vm]]` rules: each must be able to match a VM, and name a policy.

use std::collections::BTreeMap;

use super::VmRule;
use crate::config::PolicyConfig;

/// Reasons why a rule has no effect.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuleFault {
    /// The pattern is invalid.
    #[error("vm.name {name:?} is not a pattern: {reason}")]
    Pattern {
        /// The pattern.
        name: String,
        /// The reason.
        reason: &'static str,
    },
    /// An earlier rule matches everything that this one matches.
    #[error(
        "the rule for {name:?} never applies: the rule for {by:?} before it matches the same names"
    )]
    Shadowed {
        /// The rule's pattern.
        name: String,
        /// The pattern of the earlier rule.
        by: String,
    },
    /// The policy does not exist.
    #[error("the rule for {name:?} names undefined policy {policy:?}{suggestion}")]
    NoPolicy {
        /// The rule's pattern.
        name: String,
        /// The policy.
        policy: String,
        /// A policy with a similar name, as part of the message.
        suggestion: String,
    },
}

pub(super) fn check(
    rules: &[VmRule],
    policies: &BTreeMap<String, PolicyConfig>,
) -> Result<(), RuleFault> {
    let mut before: Vec<(&str, glob::Pattern)> = Vec::new();
    for VmRule { name, policy } in rules {
        let fault = |reason| RuleFault::Pattern {
            name: name.clone(),
            reason,
        };
        if name.is_empty() {
            return Err(fault("it is empty"));
        }
        let pattern = glob::Pattern::new(name).map_err(|error| fault(error.msg))?;
        // A name without wildcards is matched literally. Of two patterns, only equality and `*` are checked.
        let plain = glob::Pattern::escape(name) == *name;
        let shadow = before
            .iter()
            .find(|(by, earlier)| *by == name || *by == "*" || plain && earlier.matches(name));
        if let Some((by, _)) = shadow {
            return Err(RuleFault::Shadowed {
                name: name.clone(),
                by: (*by).to_owned(),
            });
        }
        if policy != "default" && !policies.contains_key(policy) {
            return Err(RuleFault::NoPolicy {
                name: name.clone(),
                policy: policy.clone(),
                suggestion: api::suggestion_among(
                    policy,
                    policies.keys().map(String::as_str).chain(["default"]),
                ),
            });
        }
        before.push((name, pattern));
    }
    Ok(())
}
