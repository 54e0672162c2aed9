//! The kernel configuration fragment, and the check that the kernel honours all of it.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

/// The content of a line of the fragment or of a `.config`.
fn parse(text: &str) -> BTreeMap<&str, &str> {
    text.lines()
        .filter_map(|line| {
            let line = line.trim();
            if let Some(rest) = line.strip_prefix("# CONFIG_") {
                return rest.strip_suffix(" is not set").map(|name| (name, "n"));
            }
            let (name, value) = line.strip_prefix("CONFIG_")?.split_once('=')?;
            // An empty text is the same as no option.
            Some((name, if value == "\"\"" { "n" } else { value }))
        })
        .collect()
}

/// Compares the requested options with the result of the kernel's own configuration tool. An option vanishes silently
/// if a dependency of it is off; here it is an error.
pub(crate) fn check(fragment: &str, config: &str) -> Result<()> {
    let got = parse(config);
    let wrong: Vec<String> = parse(fragment)
        .into_iter()
        .filter_map(|(name, want)| {
            let have = got.get(name).copied().unwrap_or("n");
            (have != want).then(|| format!("CONFIG_{name}: wanted {want}, got {have}"))
        })
        .collect();
    if !wrong.is_empty() {
        bail!(
            "the kernel rejects parts of the configuration:\n  {}",
            wrong.join("\n  ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn config_with_all_options_passes() {
        let fragment =
            "# a comment\nCONFIG_A=y\nCONFIG_B=n\nCONFIG_C=64\nCONFIG_D=n\nCONFIG_F=\"\"\n";
        check(
            fragment,
            "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=64\nCONFIG_E=y\n",
        )
        .unwrap();
    }

    #[test]
    fn config_with_option_lost_or_changed_fails_and_names_it() {
        let fragment = "CONFIG_A=y\nCONFIG_B=n\nCONFIG_C=64\n";
        let error = check(fragment, "CONFIG_B=y\nCONFIG_C=8\n")
            .unwrap_err()
            .to_string();
        for part in [
            "CONFIG_A: wanted y, got n",
            "CONFIG_B: wanted n, got y",
            "CONFIG_C: wanted 64, got 8",
        ] {
            assert!(error.contains(part), "{error}");
        }
    }
}
