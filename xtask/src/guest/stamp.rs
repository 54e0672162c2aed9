//! Records which checks have passed.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

use super::cache::key;
use crate::paths;

/// Records that a check has passed, until one of its inputs changes.
#[derive(Debug)]
pub(super) struct Stamp {
    path: PathBuf,
}

impl Stamp {
    pub(super) fn new(parts: &[&str]) -> Result<Self> {
        let dir = paths::cache()?.join("checked");
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        Ok(Self {
            path: dir.join(key(parts)),
        })
    }

    pub(super) fn is_set(&self) -> bool {
        self.path.exists()
    }

    pub(super) fn set(&self) -> Result<()> {
        fs::write(&self.path, "").with_context(|| format!("writing {}", self.path.display()))
    }
}
