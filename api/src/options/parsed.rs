//! One option, split into its settings.

use std::collections::BTreeMap;

use super::fault::{OPTION_LENGTH_MAX, OptionError, OptionFault, ValueError};
use super::keys::Keys;
use super::option_value::OptionValue;
use super::split;

/// The settings of one option, by key.
#[derive(Debug)]
pub(crate) struct Options {
    option: &'static str,
    keys: Keys,
    values: BTreeMap<&'static str, String>,
}

impl Options {
    /// Splits `text` into the settings of `--option`.
    pub(crate) fn parse(option: &'static str, text: &str, keys: Keys) -> Result<Self, OptionError> {
        let mut options = Self {
            option,
            keys,
            values: BTreeMap::new(),
        };
        options.fill(text).map_err(|fault| fault.of(option))?;
        Ok(options)
    }

    fn fill(&mut self, text: &str) -> Result<(), OptionFault> {
        if text.len() > OPTION_LENGTH_MAX {
            return Err(OptionFault::TooLong { length: text.len() });
        }
        if text.trim().is_empty() {
            return Ok(());
        }
        for setting in split::settings(text.trim())? {
            let (key, value) = match setting.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (setting.as_str(), None),
            };
            let (key, value) = self.keys.classify(key, value)?;
            self.values.insert(key, value);
        }
        Ok(())
    }

    /// The fault as an error of this option.
    pub(crate) fn refuse(&self, fault: OptionFault) -> OptionError {
        fault.of(self.option)
    }

    /// The error for an absent required `key`.
    pub(crate) fn missing(&self, key: &'static str) -> OptionError {
        self.refuse(OptionFault::MissingKey { key })
    }

    /// The text of `key`; `None` when it is absent or empty.
    pub(crate) fn text(&self, key: &'static str) -> Option<&str> {
        debug_assert!(self.keys.has_key(key), "{key} is not declared");
        self.values
            .get(key)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }

    /// True when the bare word `flag` was given.
    pub(crate) fn flag(&self, flag: &'static str) -> bool {
        debug_assert!(self.keys.has_flag(flag), "{flag} is not declared");
        self.values.contains_key(flag)
    }

    /// The value of `key`, read by `read`.
    pub(crate) fn read<T>(
        &self,
        key: &'static str,
        read: impl FnOnce(&str) -> Result<T, ValueError>,
    ) -> Result<Option<T>, OptionError> {
        let Some(value) = self.text(key) else {
            return Ok(None);
        };
        read(value).map(Some).map_err(|cause| {
            self.refuse(OptionFault::BadValue {
                key,
                value: value.to_owned(),
                cause,
            })
        })
    }

    /// The value of `key`, read by its type.
    pub(crate) fn get<T: OptionValue>(&self, key: &'static str) -> Result<Option<T>, OptionError> {
        self.read(key, T::read)
    }

    /// Rejects `key` if it is set.
    pub(crate) fn unsupported(&self, key: &'static str) -> Result<(), OptionError> {
        match self.text(key) {
            Some(_) => Err(self.refuse(OptionFault::Unsupported { key })),
            None => Ok(()),
        }
    }
}

/// Several keys that form one field of type `T`.
pub(crate) trait KeyGroup<T> {
    /// Adds them to the keys of an option.
    fn declare(&self, keys: &mut Keys);
    /// Meaning of `key` of the group; `None` if the field's documentation describes it.
    #[cfg(test)]
    fn meaning(&self, _key: &str) -> Option<String> {
        None
    }
    /// Creates the field from the keys.
    fn read(&self, options: &Options) -> Result<T, OptionError>;
}
