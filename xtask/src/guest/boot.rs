//! Boots every prefix of the series with each tracker, under emulation and with a balloon.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::cache::compiler;
use super::check::{Stamp, Variant};
use super::emulator::{Machine, complaints};
use super::initramfs;
use super::make::Options;
use super::report::Report;
use super::series::{Contents, Series};
use super::source::Source;
use super::workshop::Workshop;
use crate::paths;

/// Steps of a full build, for the progress display.
const EXPECTED_STEPS: usize = 2270;
/// From power on to off, on a busy machine.
const DEADLINE: Duration = Duration::from_secs(300);

/// How a prefix is booted: what is built in, and what the command line says.
const WAYS: [(&str, Variant, &str); 4] = [
    ("options off", Variant::Off, ""),
    ("tracker off", Variant::On, "page_reporting.tracker=off"),
    (
        "tracker mainline",
        Variant::On,
        "page_reporting.tracker=mainline",
    ),
    (
        "tracker bitmap",
        Variant::On,
        "page_reporting.tracker=bitmap",
    ),
];

/// What the guest's init runs, in base64: a balloon was found and nothing more.
const SCRIPT: &str = "bHMgL3N5cy9idXMvdmlydGlvL2RyaXZlcnMvdmlydGlvX2JhbGxvb24vdmlydGlvMA==";

/// Boots whatever is not known to boot.
pub(super) fn every_prefix(series: &Series, source: &Source, report: &mut Report) -> Result<()> {
    let image = paths::guest().join("initramfs.cpio.gz");
    initramfs::build(&image)?;
    for variant in [Variant::On, Variant::Off] {
        for index in 1..=series.patches.len() {
            let prefix = Prefix {
                series,
                index,
                source,
                variant,
            };
            prefix.check(&image, report)?;
        }
    }
    Ok(())
}

struct Prefix<'a> {
    series: &'a Series,
    index: usize,
    source: &'a Source,
    variant: Variant,
}

impl Prefix<'_> {
    fn check(&self, initramfs: &Path, report: &mut Report) -> Result<()> {
        let name = &self.series.patches[self.index - 1].name;
        let fragment = self.variant.fragment()?;
        let prefix = self.series.prefix_key(self.index);
        let stamp = Stamp::new(&["boots", &self.source.key, &prefix, &fragment, &compiler()?])?;
        let title = format!("{}/{} {name} boots", self.index, self.series.patches.len());
        if stamp.is_set() {
            report.check(format!("{title}, options {}", self.variant.name()), Ok(()));
            return Ok(());
        }
        // Held for the boots as well: the kernel lies in the workshop.
        let workshop = Workshop::open(self.source)?;
        let mut prefixes = self.series.prefixes(&workshop.pristine)?;
        let vmlinux = match self.build(&workshop, &prefixes.swap_remove(self.index), &fragment) {
            Ok(vmlinux) => vmlinux,
            Err(error) => {
                report.check(format!("{title}: the build"), Err(error));
                return Ok(());
            }
        };
        let mut good = true;
        for (way, _, words) in WAYS
            .iter()
            .filter(|(_, variant, _)| *variant == self.variant)
        {
            good &= report.check(format!("{title}, {way}"), boot(&vmlinux, initramfs, words));
        }
        if good {
            stamp.set()?;
        }
        Ok(())
    }

    fn build(&self, workshop: &Workshop, contents: &Contents, fragment: &str) -> Result<PathBuf> {
        workshop.put(contents)?;
        let objects = workshop.objects(self.variant.name())?;
        objects.configure(fragment, Options::KnownOnly)?;
        objects.build("Kernel of the prefix", &["vmlinux"], Some(EXPECTED_STEPS))?;
        Ok(objects.dir.join("vmlinux"))
    }
}

fn boot(vmlinux: &Path, initramfs: &Path, words: &str) -> Result<()> {
    let command_line = format!("console=ttyS0 panic=-1 {words} guest.run={SCRIPT}");
    let ended = Machine {
        kernel: vmlinux,
        initramfs: Some(initramfs),
        command_line: &command_line,
        cpus: 2,
        arguments: &[
            "-m",
            "512M",
            "-device",
            "virtio-balloon-pci,free-page-reporting=on",
        ],
        deadline: DEADLINE,
    }
    .run(|_| ())?;
    let tail = || {
        let lines: Vec<&str> = ended.console.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n  | ")
    };
    ensure!(
        ended.status.is_some(),
        "it did not end in time:\n  | {}",
        tail()
    );
    let bad = complaints(&ended.console);
    ensure!(
        bad.is_empty(),
        "the kernel complains:\n  {}",
        bad.join("\n  ")
    );
    let said = ended
        .console
        .lines()
        .find(|line| line.starts_with("guest: exit"))
        .with_context(|| format!("the guest's init did not end:\n  | {}", tail()))?;
    if said != "guest: exit 0" {
        bail!("it has no balloon ({said}):\n  | {}", tail());
    }
    Ok(())
}
