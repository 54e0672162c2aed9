//! The command line of `vm-bench`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// The figures that can be taken from any VMM with our command line and API.
pub(crate) const GROUP: &str = "vmm";

/// What is asked for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// The VMM to compare with.
    pub(crate) vmm: Option<PathBuf>,
    /// Folder for one file a figure.
    pub(crate) out: Option<PathBuf>,
    /// Which figures; none means those that are quick.
    pub(crate) names: Vec<String>,
}

impl Options {
    /// Reads the words of the command line; a name must be that of the group or in `known`.
    ///
    /// # Errors
    /// A word is none of these, or its value is missing.
    pub(crate) fn parse(words: impl IntoIterator<Item = String>, known: &[&str]) -> Result<Self> {
        let mut options = Self::default();
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let mut path = || words.next().map(PathBuf::from);
            match word.as_str() {
                "--vmm" => options.vmm = Some(path().context("--vmm needs a path")?),
                "--out" => options.out = Some(path().context("--out needs a folder")?),
                name if name == GROUP || known.contains(&name) => options.names.push(word),
                _ => bail!("{word:?} is none of {GROUP}, {}", known.join(", ")),
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options> {
        Options::parse(
            line.split_whitespace().map(str::to_owned),
            &["start", "api"],
        )
    }

    #[test]
    fn options_with_names_and_paths_are_read() {
        let options = parse("vmm --vmm /other start --out /share").unwrap();
        assert_eq!(options.vmm, Some("/other".into()));
        assert_eq!(options.out, Some("/share".into()));
        assert_eq!(options.names, ["vmm", "start"]);
        assert_eq!(parse("").unwrap(), Options::default());
    }

    #[test]
    fn options_with_an_unknown_word_are_refused() {
        for line in ["stop", "--vmm", "--fast", "start --out"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
