//! The keys of an option: what its parser accepts and what its help shows.

use super::fault::OptionFault;

/// The keys of one option, in the order in which they were declared.
#[derive(Clone, Debug, Default)]
pub(crate) struct Keys {
    keys: Vec<&'static str>,
    /// Those of `keys` that error messages list.
    shown: Vec<&'static str>,
    /// Bare words.
    flags: Vec<&'static str>,
    /// The help text of each key.
    help: Vec<String>,
}

impl Keys {
    /// Adds a key whose help is `key=values`.
    pub(crate) fn shown(&mut self, key: &'static str, values: &str) {
        self.keys.push(key);
        self.shown.push(key);
        self.help.push(format!("{key}={values}"));
    }

    /// Adds a key that is accepted, but neither in the help nor in error messages.
    pub(crate) fn hidden(&mut self, key: &'static str) {
        self.keys.push(key);
    }

    /// Adds alternatives: bare words become flags; those with a value are keys declared elsewhere.
    pub(crate) fn alternatives(&mut self, alternatives: &[&'static str]) {
        for alternative in alternatives {
            match alternative.split_once('=') {
                Some((key, _)) => self.shown.push(key),
                None => self.flags.push(alternative),
            }
        }
        self.help.push(alternatives.join("|"));
    }

    /// The help of the option, which begins with `about`.
    pub(crate) fn help(&self, about: &str) -> String {
        format!("{about} \"{}\"", self.help.join(","))
    }

    /// The help text of each key.
    #[cfg(test)]
    pub(crate) fn shown_keys(&self) -> &[String] {
        &self.help
    }

    /// The names of all keys.
    pub(crate) fn names(&self) -> &[&'static str] {
        &self.keys
    }

    /// Adds keys whose help is elsewhere.
    pub(crate) fn and(mut self, keys: &[&'static str]) -> Self {
        self.keys.extend(keys);
        self.shown.extend(keys);
        self
    }

    pub(super) fn has_key(&self, key: &str) -> bool {
        self.keys.contains(&key)
    }

    pub(super) fn has_flag(&self, flag: &str) -> bool {
        self.flags.contains(&flag)
    }

    /// The key or flag that a setting names, with its value.
    pub(super) fn classify(
        &self,
        key: &str,
        value: Option<&str>,
    ) -> Result<(&'static str, String), OptionFault> {
        let find = |names: &[&'static str]| names.iter().copied().find(|name| *name == key);
        match (find(&self.keys), find(&self.flags), value) {
            (Some(key), _, Some(value)) => Ok((key, value.trim().to_owned())),
            (Some(_), _, None) => Err(OptionFault::MissingValue {
                key: key.to_owned(),
            }),
            (None, Some(flag), None) => Ok((flag, String::new())),
            (None, Some(_), Some(value)) => Err(OptionFault::UnexpectedValue {
                key: key.to_owned(),
                value: value.to_owned(),
            }),
            (None, None, _) => {
                let known: Vec<_> = self.shown.iter().chain(&self.flags).copied().collect();
                Err(OptionFault::unknown_key(key, &known))
            }
        }
    }
}
