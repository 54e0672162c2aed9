//! The result of an experiment, and its files.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

/// The outcome of an experiment.
pub(crate) struct Outcome {
    /// File name without extension.
    pub(crate) name: String,
    /// The figures.
    pub(crate) figures: Value,
    /// The curves.
    pub(crate) svg: String,
    /// The closing line.
    pub(crate) sentence: String,
    /// The reason, if it failed.
    pub(crate) fault: Option<String>,
}

impl Outcome {
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let json = serde_json::to_string_pretty(&self.figures)?;
        for (extension, text) in [("json", &json), ("svg", &self.svg)] {
            let path = folder.join(format!("{}.{extension}", self.name));
            fs::write(&path, text).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }
}
