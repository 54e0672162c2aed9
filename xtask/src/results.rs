//! `cargo xtask results`: measures the figures of `docs/results` again.
//!
//! Each file there names its command, commit, date and kernel. `cargo xtask results` runs the named command again, and
//! replaces the file and its plot. It also updates the table in `docs/results/README.md` that shows which figures are
//! older than the measured code. The text around the figures must be adapted manually: the tests of the documentation
//! compare it with the files.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::paths;

/// Paths that affect every figure: the VMM, and the programs that measure it.
const VMM: [&str; 7] = [
    "bin/cloud-hypervisor",
    "device-facts",
    "hypervisor",
    "machine",
    "tests/src",
    "virtio-devices",
    "vmm",
];
/// Additional paths if guests run the patched kernel.
const SERIES: [&str; 4] = [
    "guest-patches/config",
    "guest-patches/patches",
    "guest-patches/series",
    "xtask/src/guest",
];
const BEGIN: &str = "<!-- written by `cargo xtask results`: begin -->\n";
const END: &str = "<!-- end -->\n";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Measure nothing: only show and write which figures are older than the code
    #[arg(long)]
    list: bool,
    /// Files to measure again, without extension [default: all that are older than the code]
    names: Vec<String>,
}

/// A committed file of figures.
struct Figures {
    /// File name without extension.
    name: String,
    command: String,
    commit: String,
    date: String,
    kernel: String,
}

/// Measures the named figures, or those older than the code, and marks the remaining outdated ones.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let committed = committed()?;
    for name in &options.names {
        let known = committed.iter().any(|it| it.name == *name);
        ensure!(known, "docs/results has no {name}.json");
    }
    let mut failed = 0;
    for figures in &committed {
        let chosen = match options.names.as_slice() {
            [] => figures.changes_since()? != Some(0),
            names => names.contains(&figures.name),
        };
        if options.list || !chosen {
            continue;
        }
        println!("{}: {}", figures.name, figures.command);
        if let Err(error) = figures.measure() {
            eprintln!("error: {}: {error:#}", figures.name);
            failed += 1;
        }
    }
    let table = table(&self::committed()?)?;
    print!("{table}");
    let page = folder().join("README.md");
    let text = fs::read_to_string(&page).context("reading docs/results/README.md")?;
    fs::write(&page, with_table(&text, &table)?).context("writing docs/results/README.md")?;
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn folder() -> PathBuf {
    paths::workspace().join("docs/results")
}

fn committed() -> Result<Vec<Figures>> {
    let mut found = Vec::new();
    for path in json_files(&folder())? {
        let name = path.file_stem().and_then(OsStr::to_str);
        let name = name.context("a file's name is not UTF-8")?.to_owned();
        let value = read(&path)?;
        let word = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        found.push(Figures {
            name,
            command: word("command"),
            commit: word("commit"),
            date: word("date"),
            kernel: word("kernel"),
        });
    }
    Ok(found)
}

fn json_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension() == Some(OsStr::new("json")) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn read(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("parsing {}", path.display()))
}

impl Figures {
    /// The files whose changes make the figures outdated.
    fn subject(&self) -> Vec<&'static str> {
        let patched = ["patched", "bitmap", "inflation"]
            .iter()
            .any(|it| self.command.contains(it));
        let series: &[_] = if patched { &SERIES } else { &[] };
        VMM.iter().chain(series).copied().collect()
    }

    /// Number of commits since the measurement that change the measured code; `None` if the commit of the figures is
    /// unknown.
    fn changes_since(&self) -> Result<Option<u64>> {
        let commit = self.commit.split(' ').next().unwrap_or_default();
        if commit.is_empty() || commit.starts_with('-') || commit.ends_with("-dirty") {
            return Ok(None);
        }
        let output = Command::new("git")
            .args(["rev-list", "--count", &format!("{commit}..HEAD"), "--"])
            .args(self.subject())
            .current_dir(paths::workspace())
            .output()
            .context("starting git")?;
        if !output.status.success() {
            return Ok(None);
        }
        let count = String::from_utf8_lossy(&output.stdout);
        let count = count.trim().parse().context("git printed no number")?;
        Ok(Some(count))
    }

    /// Runs the command again and replaces the file, and the plot if there is one.
    fn measure(&self) -> Result<()> {
        let out = paths::target().join("results").join(&self.name);
        if out.exists() {
            fs::remove_dir_all(&out).with_context(|| format!("removing {}", out.display()))?;
        }
        fs::create_dir_all(&out).with_context(|| format!("creating {}", out.display()))?;
        let program = std::env::current_exe().context("finding this program")?;
        let status = Command::new(program)
            .args(arguments(&self.command, &out.to_string_lossy())?)
            .current_dir(paths::workspace())
            .status()
            .context("starting the command")?;
        ensure!(status.success(), "the command failed ({status})");
        self.replace(&out, &folder())
    }

    /// Replaces the file of figures in `committed`, and its plot, by those in `out`.
    fn replace(&self, out: &Path, committed: &Path) -> Result<()> {
        let [made] = &json_files(out)?[..] else {
            bail!(
                "the command must write exactly one file to {}",
                out.display()
            );
        };
        let mut figures = read(made)?;
        // Without the folder option added by us.
        figures["command"] = self.command.as_str().into();
        let text = serde_json::to_string_pretty(&without_samples(figures))? + "\n";
        let path = committed.join(format!("{}.json", self.name));
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        let plot = path.with_extension("svg");
        if plot.exists() {
            fs::copy(made.with_extension("svg"), &plot)
                .with_context(|| format!("replacing {}", plot.display()))?;
        }
        Ok(())
    }
}

/// The arguments after `cargo xtask`, with the folder for the figures.
fn arguments(command: &str, out: &str) -> Result<Vec<String>> {
    let words = command.strip_prefix("cargo xtask ");
    let words = words.with_context(|| format!("{command:?} is not a command of this program"))?;
    let mut words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
    // Later arguments belong to the measuring program.
    let end = words.iter().position(|word| word == "--");
    let end = end.unwrap_or(words.len());
    words.splice(end..end, ["--out".to_owned(), out.to_owned()]);
    Ok(words)
}

/// Removes the individual samples, which are in the plots.
fn without_samples(value: Value) -> Value {
    match value {
        Value::Object(fields) => fields
            .into_iter()
            .filter(|(key, _)| key != "samples")
            .map(|(key, value)| (key, without_samples(value)))
            .collect(),
        Value::Array(items) => items.into_iter().map(without_samples).collect(),
        other => other,
    }
}

fn table(committed: &[Figures]) -> Result<String> {
    let mut text = String::from(
        "| Figures | Date | Commit | Kernel | Changes to the measured code since then |\n\
         | --- | --- | --- | --- | --- |\n",
    );
    for it in committed {
        let age = match it.changes_since()? {
            Some(0) => "none".to_owned(),
            Some(count) => format!("**older**: {count}"),
            None => "**older**: the commit is not in this history".to_owned(),
        };
        let Figures {
            name,
            commit,
            date,
            kernel,
            ..
        } = it;
        text += &format!("| [{name}]({name}.json) | {date} | {commit} | {kernel} | {age} |\n");
    }
    Ok(text)
}

/// The page with a new table between its two marks.
fn with_table(page: &str, table: &str) -> Result<String> {
    let parts = page.split_once(BEGIN).and_then(|(before, rest)| {
        let (_, after) = rest.split_once(END)?;
        Some((before, after))
    });
    let (before, after) = parts.context("docs/results/README.md has no place for the table")?;
    Ok(format!("{before}{BEGIN}{table}{END}{after}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use clap::Parser as _;
    use serde_json::json;

    use super::*;
    use crate::Cli;

    #[test]
    fn every_committed_figure_names_a_command_that_is_understood() {
        let committed = committed().unwrap();
        assert!(committed.len() > 10);
        for figures in committed {
            let words = arguments(&figures.command, "DIR").unwrap();
            let words = ["xtask".to_owned()].into_iter().chain(words);
            let parsed = Cli::try_parse_from(words);
            assert!(parsed.is_ok(), "{}: {:?}", figures.name, parsed.err());
        }
    }

    #[test]
    fn everything_that_figures_speak_of_exists() {
        for path in VMM.iter().chain(&SERIES) {
            assert!(paths::workspace().join(path).exists(), "{path}");
        }
    }

    #[test]
    fn page_lists_every_committed_file() {
        let page = fs::read_to_string(folder().join("README.md")).unwrap();
        let (_, rest) = page.split_once(BEGIN).unwrap();
        let (table, _) = rest.split_once(END).unwrap();
        for Figures {
            name, date, commit, ..
        } in committed().unwrap()
        {
            let row = format!("| [{name}]({name}.json) | {date} | {commit} |");
            assert!(
                table.contains(&row),
                "{row}: run cargo xtask results --list"
            );
        }
    }

    #[test]
    fn folder_goes_before_the_options_of_the_measuring_program() {
        let words = arguments("cargo xtask bench reclaim -- --rounds 2", "DIR").unwrap();
        assert_eq!(words.join(" "), "bench reclaim --out DIR -- --rounds 2");
        let words = arguments("cargo xtask experiment burst", "DIR").unwrap();
        assert_eq!(words.join(" "), "experiment burst --out DIR");
        assert!(arguments("rm -rf x", "DIR").is_err());
    }

    #[test]
    fn figures_of_no_known_commit_are_older() {
        let of = |commit: &str, command: &str| Figures {
            name: "x".into(),
            command: command.into(),
            commit: commit.into(),
            date: String::new(),
            kernel: String::new(),
        };
        let plain = "cargo xtask bench net";
        for commit in ["", "0000000", "HEAD-dirty", "--all"] {
            assert_eq!(
                of(commit, plain).changes_since().unwrap(),
                None,
                "{commit:?}"
            );
        }
        assert_eq!(of("HEAD", plain).changes_since().unwrap(), Some(0));
        assert_eq!(
            of("HEAD with this", plain).changes_since().unwrap(),
            Some(0)
        );
        let series = |it: Figures| it.subject().contains(&"guest-patches/patches");
        assert!(series(of(
            "HEAD",
            "cargo xtask bench --kernel patched kicks"
        )));
        assert!(!series(of("HEAD", plain)));
    }

    #[test]
    fn figures_and_plot_take_the_place_of_the_committed_ones() {
        let dir = tempfile::tempdir().unwrap();
        let (out, committed) = (dir.path().join("out"), dir.path().join("committed"));
        for folder in [&out, &committed] {
            fs::create_dir(folder).unwrap();
        }
        let old = Figures {
            name: "small".into(),
            command: "cargo xtask experiment burst".into(),
            commit: "1".into(),
            date: String::new(),
            kernel: String::new(),
        };
        assert!(old.replace(&out, &committed).is_err(), "nothing was made");
        let made = json!({"command": "… --out DIR", "commit": "2", "samples": [1]});
        fs::write(out.join("burst.json"), made.to_string()).unwrap();
        fs::write(out.join("burst.svg"), "new").unwrap();
        // Not every file has its plot on the page.
        old.replace(&out, &committed).unwrap();
        assert!(!committed.join("small.svg").exists());
        fs::write(committed.join("small.svg"), "old").unwrap();
        old.replace(&out, &committed).unwrap();
        let expected = json!({"command": old.command, "commit": "2"});
        assert_eq!(read(&committed.join("small.json")).unwrap(), expected);
        assert_eq!(
            fs::read_to_string(committed.join("small.svg")).unwrap(),
            "new"
        );
    }

    #[test]
    fn samples_are_left_out_at_any_depth() {
        let value =
            json!({"samples": [1], "best": {"ms": 2, "samples": []}, "rows": [{"samples": 1}]});
        assert_eq!(
            without_samples(value),
            json!({"best": {"ms": 2}, "rows": [{}]})
        );
    }

    #[test]
    fn table_replaces_the_one_between_the_marks() {
        let page = format!("a\n{BEGIN}old\n{END}b\n");
        let expected = format!("a\n{BEGIN}new\n{END}b\n");
        assert_eq!(with_table(&page, "new\n").unwrap(), expected);
        assert!(with_table("a\n", "new\n").is_err());
    }
}
