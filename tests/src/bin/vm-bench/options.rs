//! The command line of `vm-bench`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

/// The group of figures that can be measured for any VMM with our command line and API.
pub(crate) const GROUP: &str = "vmm";

/// The options.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// The VMM to compare with.
    pub(crate) vmm: Option<PathBuf>,
    /// Folder for one file per figure.
    pub(crate) out: Option<PathBuf>,
    /// The first figure to measure; those before it are skipped.
    pub(crate) from: Option<String>,
    /// Cases that are reported as not measured.
    pub(crate) left_out: Vec<String>,
    /// Selected figures; if empty, the fast ones.
    pub(crate) names: Vec<String>,
    /// Arguments after `--`, for the only selected figure.
    pub(crate) rest: Vec<String>,
}

/// How a figure of our VMM was selected.
#[derive(Debug)]
pub(crate) struct Asked<'a> {
    /// Arguments after `--`; `None` if the figure was selected as one of the fast ones.
    pub(crate) by_name: Option<&'a [String]>,
}

impl Asked<'_> {
    /// Rejects arguments, for a figure without options.
    ///
    /// # Errors
    /// There are arguments.
    pub(crate) fn refuse_options(&self) -> Result<()> {
        let options = self.by_name.unwrap_or_default();
        ensure!(
            options.is_empty(),
            "there is no option {:?}",
            options.join(" ")
        );
        Ok(())
    }
}

impl Options {
    /// Parses the command line; a name must be that of the group or in `known`.
    ///
    /// # Errors
    /// A word is unknown, or its value is missing.
    pub(crate) fn parse(words: impl IntoIterator<Item = String>, known: &[&str]) -> Result<Self> {
        let mut options = Self::default();
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let mut path = || words.next().map(PathBuf::from);
            match word.as_str() {
                "--vmm" => options.vmm = Some(path().context("--vmm needs a path")?),
                "--out" => options.out = Some(path().context("--out needs a folder")?),
                "--from" => {
                    let name = words.next().filter(|name| known.contains(&name.as_str()));
                    options.from = Some(name.context("--from needs the name of a figure")?);
                }
                "--leave-out" => {
                    let name = words
                        .next()
                        .context("--leave-out needs the name of a case")?;
                    options.left_out.push(name);
                }
                "--" => options.rest = words.by_ref().collect(),
                name if name == GROUP || known.contains(&name) => options.names.push(word),
                _ => bail!("{word:?} is none of {GROUP}, {}", known.join(", ")),
            }
        }
        ensure!(
            options.rest.is_empty() || options.names.len() == 1,
            "{:?} behind -- is for one figure, which must be named",
            options.rest.join(" ")
        );
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
        let again = parse("--from api --leave-out api/a/ours --leave-out api/b/other").unwrap();
        assert_eq!(again.from.as_deref(), Some("api"));
        assert_eq!(again.left_out, ["api/a/ours", "api/b/other"]);
        assert_eq!(parse("").unwrap(), Options::default());
        assert_eq!(parse("api -- --vmm x").unwrap().rest, ["--vmm", "x"]);
    }

    #[test]
    fn options_with_an_unknown_word_are_refused() {
        for line in [
            "stop",
            "--vmm",
            "--fast",
            "start --out",
            "-- --fast",
            "--from",
            "--from stop",
            "--leave-out",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
