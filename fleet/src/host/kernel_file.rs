//! Reads the kernel's small text files of names and numbers: `meminfo`, `vmstat`, `memory.stat`, `memory.max`.

use std::fs;
use std::path::{Path, PathBuf};

use super::HostError;

/// One file of lines `name[:] number [kB]`, kept as text, because only a few figures are looked up once.
#[derive(Debug)]
pub(crate) struct KernelFile {
    path: PathBuf,
    text: String,
}

impl KernelFile {
    pub(crate) fn read(path: PathBuf) -> Result<Self, HostError> {
        let text = read_text(&path)?;
        Ok(Self { path, text })
    }

    /// The figure called `name`; bytes where the file has `kB`.
    pub(crate) fn figure(&self, name: &'static str) -> Result<u64, HostError> {
        let missing = || HostError::Missing {
            path: self.path.clone(),
            name,
        };
        let line = self
            .text
            .lines()
            .find_map(|line| {
                let rest = line.strip_prefix(name)?;
                rest.strip_prefix(':').or_else(|| rest.strip_prefix(' '))
            })
            .ok_or_else(missing)?;
        let mut words = line.split_ascii_whitespace();
        let number: u64 = words
            .next()
            .and_then(|word| word.parse().ok())
            .ok_or_else(missing)?;
        Ok(if words.next() == Some("kB") {
            number.saturating_mul(1024)
        } else {
            number
        })
    }
}

/// A file that holds one number or `max`; `None` is `max`.
pub(crate) fn read_limit(path: &Path) -> Result<Option<u64>, HostError> {
    let text = read_text(path)?;
    match text.trim() {
        "max" => Ok(None),
        number => number.parse().map(Some).map_err(|_| HostError::Form {
            path: path.to_owned(),
            text: text.clone(),
        }),
    }
}

pub(crate) fn read_text(path: &Path) -> Result<String, HostError> {
    fs::read_to_string(path).map_err(|source| HostError::Read {
        path: path.to_owned(),
        source,
    })
}
