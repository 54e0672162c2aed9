//! The committed inputs: a file for each target, with one input per line in base64.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::paths;

/// Size limit of all files together, which a test checks.
const BYTES_MAX: usize = 1 << 20;
/// Size limit of one file. Most need much less.
const FILE_BYTES_MAX: usize = BYTES_MAX / 8;

fn file(target: &str) -> PathBuf {
    paths::workspace()
        .join("fuzz/seeds")
        .join(format!("{target}.txt"))
}

/// An empty folder under the target directory.
fn fresh(kind: &str, target: &str) -> Result<PathBuf> {
    let folder = paths::target().join("fuzz").join(kind).join(target);
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("emptying {}", folder.display()))?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    Ok(folder)
}

/// Writes each input of a target into a file; returns their folder.
pub(super) fn unpack(target: &str) -> Result<PathBuf> {
    let folder = fresh("seeds", target)?;
    let file = file(target);
    if !file.exists() {
        return Ok(folder);
    }
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    for (number, line) in text.lines().enumerate() {
        let input = STANDARD
            .decode(line)
            .with_context(|| format!("{}, line {}", file.display(), number + 1))?;
        fs::write(folder.join(format!("{number:04}")), input).context("writing an input")?;
    }
    Ok(folder)
}

/// Commits the fewest inputs of `folders` that reach what all of them reach, the shortest first.
pub(super) fn minimize(program: &Path, target: &str, folders: &[PathBuf]) -> Result<()> {
    let smallest = fresh("smallest", target)?;
    let status = Command::new(program)
        // Edges only: with counters, each number of iterations would be a feature.
        .args(["-set_cover_merge=1", "-use_counters=0", "-verbosity=0"])
        .arg(&smallest)
        .args(folders)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .with_context(|| format!("starting {}", program.display()))?;
    ensure!(status.success(), "{target}: the inputs cannot be merged");
    let mut inputs = Vec::new();
    for entry in fs::read_dir(&smallest)? {
        inputs.push(fs::read(entry?.path())?);
    }
    let found = inputs.len();
    let (text, kept) = packed(inputs, FILE_BYTES_MAX);
    println!("{target}: {kept} of {found} inputs, {} bytes", text.len());
    let file = file(target);
    fs::create_dir_all(file.parent().context("a folder")?)?;
    fs::write(&file, text).with_context(|| format!("writing {}", file.display()))
}

/// Lines of the shortest inputs, at most `bytes_max` in all, and their number.
fn packed(mut inputs: Vec<Vec<u8>>, bytes_max: usize) -> (String, usize) {
    // The order is that of length, then content: the same inputs give the same file.
    inputs.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
    let (mut text, mut kept) = (String::new(), 0);
    for input in inputs.iter().filter(|input| !input.is_empty()) {
        let line = STANDARD.encode(input);
        if text.len() + line.len() + 1 > bytes_max {
            break;
        }
        text.push_str(&line);
        text.push('\n');
        kept += 1;
    }
    (text, kept)
}

#[cfg(test)]
mod tests {
    use super::super::targets::TARGETS;
    use super::*;

    #[test]
    fn shortest_inputs_are_kept_up_to_the_limit() {
        let inputs = vec![vec![7; 30], vec![2], Vec::new(), vec![1]];
        assert_eq!(
            packed(inputs.clone(), 100),
            (format!("AQ==\nAg==\n{}\n", STANDARD.encode([7; 30])), 3)
        );
        assert_eq!(packed(inputs, 12), ("AQ==\nAg==\n".into(), 2));
    }

    #[test]
    fn committed_inputs_are_small_and_can_be_read() {
        let mut bytes = 0;
        for target in TARGETS {
            let text = fs::read_to_string(file(target.name)).expect(target.name);
            bytes += text.len();
            assert!(!text.is_empty(), "{}", target.name);
            for line in text.lines() {
                let input = STANDARD.decode(line).expect(target.name);
                assert!(input.len() <= super::super::INPUT_BYTES_MAX as usize);
            }
        }
        assert!(bytes <= BYTES_MAX, "{bytes}");
    }
}
