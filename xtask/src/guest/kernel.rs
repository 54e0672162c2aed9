//! The test kernels: Debian's kernel source with our configuration alone, with our patch series and its unit tests, or
//! with the rival of the series. Tests need only the second one; benchmarks compare them.
//!
//! ```text
//! cache/build-tree-SOURCE/main/   objects of both, kept: the second kernel builds from the first
//! cache/kernel-KEY/             vmlinux and bzImage; appears complete, by a rename
//! ```
//!
//! KEY is a hash over all inputs of the result, so a cached kernel is never out of date.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::build_tree::BuildTree;
use super::cache::{compiler, key};
use super::series::{self, Contents, Series};
use super::source::Source;
use crate::paths;

/// Our configuration fragment.
pub(super) const FRAGMENT: &str = include_str!("../../guest/stock.config");

/// Incremented when the build procedure changes the result.
const BUILDER_VERSION: u32 = 1;

/// Steps of a full build, for the progress display.
const EXPECTED_STEPS: usize = 2270;
const SMALL_STEPS: usize = 1700;

/// A kernel to be built.
#[derive(Debug)]
pub(super) struct Kernel {
    what: &'static str,
    source: Source,
    /// Empty for the stock kernel.
    series: Series,
    fragment: String,
    /// Name of a separate tree of objects; `None` for the shared tree of stock and patched kernel.
    objects: Option<&'static str>,
    expected_steps: usize,
    key: String,
}

impl Kernel {
    /// Debian's unmodified source.
    pub(super) fn stock() -> Result<Self> {
        let source = Source::base()?;
        let key = key(&[
            &source.key,
            FRAGMENT,
            &BUILDER_VERSION.to_string(),
            &compiler()?,
        ]);
        Ok(Self {
            what: "Test kernel",
            source,
            series: Series {
                patches: Vec::new(),
            },
            fragment: FRAGMENT.into(),
            objects: None,
            expected_steps: EXPECTED_STEPS,
            key,
        })
    }

    /// Debian's source with the patch series, its options and its unit tests, which the kernel's command line can
    /// enable.
    pub(super) fn patched() -> Result<Self> {
        let ours = fragments(&["patched", "kunit"])?;
        let fragment = format!("{FRAGMENT}\n{ours}");
        Self::with_series("Patched test kernel", Series::read()?, fragment, None)
    }

    /// With the smallest series that might do as well as ours, in its place.
    pub(super) fn rival() -> Result<Self> {
        Self::with_series("Rival test kernel", Series::rival()?, FRAGMENT.into(), None)
    }

    /// A small patched kernel with one kind of checking compiled in (`config/KIND.config` over
    /// `config/sanitize.config`).
    pub(super) fn sanitized(kind: &'static str) -> Result<Self> {
        let fragment = fragments(&["sanitize", "patched", kind])?;
        let series = Series::read()?;
        let mut kernel = Self::with_series("Checking kernel", series, fragment, Some(kind))?;
        kernel.expected_steps = SMALL_STEPS;
        Ok(kernel)
    }

    fn with_series(
        what: &'static str,
        series: Series,
        fragment: String,
        objects: Option<&'static str>,
    ) -> Result<Self> {
        let source = Source::base()?;
        let key = key(&[
            &source.key,
            &fragment,
            &series.prefix_key(series.patches.len()),
            &BUILDER_VERSION.to_string(),
            &compiler()?,
        ]);
        Ok(Self {
            what,
            source,
            series,
            fragment,
            objects,
            expected_steps: EXPECTED_STEPS,
            key,
        })
    }

    /// Makes `dir/{vmlinux,bzImage}` exist and be up to date.
    pub(super) fn build(&self, dir: &Path) -> Result<()> {
        if self.is_published(dir) {
            return Ok(());
        }
        let done = paths::cache()?.join(format!("kernel-{}", self.key));
        if !done.exists() {
            let tree = BuildTree::open(&self.source)?;
            // Another run may have finished it while this one waited.
            if !done.exists() {
                self.compile(&tree, &done)?;
            }
        }
        self.publish(&done, dir)
    }

    /// The cache from which [`Kernel::build`] would take the kernel, if it need not be compiled.
    pub(super) fn cached(&self, dir: &Path) -> Result<Option<PathBuf>> {
        if self.is_published(dir) {
            return Ok(Some(dir.to_path_buf()));
        }
        let done = paths::cache()?.join(format!("kernel-{}", self.key));
        Ok(done.exists().then_some(done))
    }

    /// Its name, for messages.
    pub(super) fn what(&self) -> &'static str {
        self.what
    }

    fn is_published(&self, dir: &Path) -> bool {
        fs::read_to_string(dir.join("key")).is_ok_and(|old| old == self.key)
            && ["vmlinux", "bzImage"]
                .iter()
                .all(|name| dir.join(name).exists())
    }

    fn publish(&self, done: &Path, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        for name in ["vmlinux", "bzImage"] {
            paths::link_or_copy(&done.join(name), &dir.join(name))?;
        }
        let stamp = dir.join("key");
        fs::write(&stamp, &self.key).with_context(|| format!("writing {}", stamp.display()))
    }

    fn compile(&self, tree: &BuildTree, done: &Path) -> Result<()> {
        let contents = if self.series.is_empty() {
            Contents::new()
        } else {
            self.series.applied(&tree.pristine)?
        };
        tree.put(&contents)?;
        let objects = match self.objects {
            None => tree.main_objects(),
            Some(name) => tree.separate_objects(name),
        };
        objects.configure(&self.fragment)?;
        let targets = ["vmlinux", "bzImage"];
        objects.build(self.what, &targets, Some(self.expected_steps))?;

        let beside = done.with_extension("new");
        fs::create_dir_all(&beside).with_context(|| format!("creating {}", beside.display()))?;
        for (from, to) in [
            ("vmlinux", "vmlinux"),
            ("arch/x86/boot/bzImage", "bzImage"),
            (".config", "config"),
        ] {
            // Copied, because the next build overwrites these files.
            fs::copy(objects.dir.join(from), beside.join(to))
                .with_context(|| format!("copying {from}"))?;
        }
        fs::rename(&beside, done).with_context(|| format!("creating {}", done.display()))
    }
}

/// Parts of a configuration, from `guest-patches/config`.
fn fragments(names: &[&str]) -> Result<String> {
    let parts = names.iter().map(|name| series::config(name));
    Ok(parts.collect::<Result<Vec<_>>>()?.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fragment_of_the_test_kernel_asks_for_both_of_its_parts() {
        for option in [
            "CONFIG_KVM_AMD=y",
            "CONFIG_PVH=y",
            "CONFIG_PAGE_REPORTING=y",
            "CONFIG_MODULES=n",
        ] {
            assert!(FRAGMENT.lines().any(|line| line == option), "{option}");
        }
    }
}
