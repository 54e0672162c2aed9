//! Builds every prefix of the series as a small complete kernel without warnings, and boots it under emulation.
//! Prefixes are built one after another, in one tree of objects per variant of the configuration.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use super::boot;
use super::build_tree::BuildTree;
use super::cache::{compiler, file_key, key};
use super::initramfs;
use super::make::Objects;
use super::report::Report;
use super::series::{Contents, Series};
use super::source::Source;
use super::stamp::Stamp;
use super::variant::{Files, Variant, kconfig_key};
use crate::paths;

/// Incremented when the check becomes stricter.
const CHECK_VERSION: &str = "3";
/// Steps of a full build, for the progress display.
const EXPECTED_STEPS: usize = 800;

/// The options of the configuration that a source must accept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Honoured {
    All,
    /// Options of the series.
    Ours,
}

/// The prefixes to check, with common data for all options.
#[derive(Debug)]
pub(super) struct Prefixes<'a> {
    series: &'a Series,
    source: &'a Source,
    files: Files,
    compiler: String,
    options: Honoured,
}

/// Resources that are opened only if a prefix must be checked.
#[derive(Debug)]
struct Bench {
    tree: BuildTree,
    contents: Vec<Contents>,
    objects: Objects,
    initramfs: PathBuf,
}

impl<'a> Prefixes<'a> {
    pub(super) fn new(series: &'a Series, source: &'a Source, options: Honoured) -> Result<Self> {
        Ok(Self {
            series,
            source,
            files: Files::read()?,
            compiler: compiler()?,
            options,
        })
    }

    /// Builds and boots the prefixes in `range` (1 is the first patch alone) that have not passed before.
    pub(super) fn check(
        &self,
        variant: Variant,
        range: RangeInclusive<usize>,
        report: &mut Report,
    ) -> Result<()> {
        let count = self.series.patches.len();
        let (source, options) = (&self.source.name, variant.name());
        let missing = self.missing(variant, range.clone())?;
        let mut bad = false;
        if !missing.is_empty() {
            let bench = self.bench(variant)?;
            for (index, stamp) in missing {
                let patch = &self.series.patches[index - 1].name;
                let title = format!("{index}/{count} {patch} links and boots, options {options}");
                let result = self.one(&bench, variant, index);
                if report.check(&title, result) {
                    stamp.set()?;
                } else {
                    bad = true;
                }
            }
        }
        if !bad {
            let which = if range == (count..=count) {
                "the whole series links and boots".to_string()
            } else {
                format!("all {count} prefixes link and boot")
            };
            report.check(format!("{which} on {source}, options {options}"), Ok(()));
        }
        Ok(())
    }

    fn missing(
        &self,
        variant: Variant,
        range: RangeInclusive<usize>,
    ) -> Result<Vec<(usize, Stamp)>> {
        let configuration = self.files.of(variant).key();
        let mut missing = Vec::new();
        for index in range {
            let parts = [
                "links and boots",
                CHECK_VERSION,
                &self.source.key,
                &self.series.prefix_key(index),
                &configuration,
                &self.compiler,
            ];
            let stamp = Stamp::new(&parts)?;
            if !stamp.is_set() {
                missing.push((index, stamp));
            }
        }
        Ok(missing)
    }

    fn bench(&self, variant: Variant) -> Result<Bench> {
        let image = paths::guest().join("initramfs.cpio.gz");
        initramfs::build(&image)?;
        let tree = BuildTree::open_for("check", self.source)?;
        Ok(Bench {
            contents: self.series.prefixes(&tree.pristine)?,
            objects: tree.cached_objects(variant.name())?,
            tree,
            initramfs: image,
        })
    }

    fn one(&self, bench: &Bench, variant: Variant, index: usize) -> Result<()> {
        let vmlinux = self.link(bench, variant, &bench.contents[index])?;
        // Prefixes that do not differ in built files yield the same kernel.
        let kernel = file_key(&vmlinux)?;
        boots(&vmlinux, &kernel, &bench.initramfs, None)?;
        if index == self.series.patches.len() {
            for tracker in variant.trackers() {
                boots(&vmlinux, &kernel, &bench.initramfs, Some(tracker))?;
            }
        }
        Ok(())
    }

    fn link(&self, bench: &Bench, variant: Variant, contents: &Contents) -> Result<PathBuf> {
        bench.tree.put(contents)?;
        let configuration = self.files.of(variant);
        let fragment = configuration.fragment(contents);
        // Newer kernels have renamed or removed some options.
        let honoured = match self.options {
            Honoured::All => fragment.clone(),
            Honoured::Ours => configuration.ours(contents),
        };
        let state = key(&[&fragment, &kconfig_key(contents)]);
        let objects = &bench.objects;
        objects.configure_only(&fragment, &honoured, &state)?;
        let warnings = objects.build("Prefix", &["vmlinux"], Some(EXPECTED_STEPS))?;
        ensure!(
            warnings.is_empty(),
            "the build warns:\n  {}",
            warnings.join("\n  ")
        );
        Ok(objects.dir.join("vmlinux"))
    }
}

fn boots(vmlinux: &Path, kernel: &str, initramfs: &Path, tracker: Option<&str>) -> Result<()> {
    let stamp = Stamp::new(&["boots", CHECK_VERSION, kernel, tracker.unwrap_or_default()])?;
    if stamp.is_set() {
        return Ok(());
    }
    boot::with_balloon(vmlinux, initramfs, tracker)?;
    stamp.set()
}
