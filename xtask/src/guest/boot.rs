//! Links every prefix of the series with the options on, and boots it under emulation with a
//! balloon.
//!
//! Two headers of the series are included nearly everywhere, so that two thirds of the
//! prefixes would be builds of the whole kernel. What the series appends to them (words of a
//! structure that is private to mm/, numbers at the end of an enumeration) concerns mm/ alone:
//! all other objects come from the kernel of the whole series. So a prefix has its own mm/,
//! drivers/virtio/ and whatever else it changes, and it is linked and booted as a whole.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail, ensure};

use super::cache::compiler;
use super::check::{Stamp, Variant};
use super::complaints::complaints;
use super::emulator::Machine;
use super::initramfs;
use super::make::{Objects, Options};
use super::report::Report;
use super::series::{Contents, Series};
use super::source::Source;
use super::workshop::Workshop;
use crate::paths;

/// Steps of a full build, for the progress display.
const EXPECTED_STEPS: usize = 2270;
/// From power on to off, on a busy machine.
const DEADLINE: Duration = Duration::from_secs(300);

/// Headers whose changes concern the folders below alone, and what kbuild notes the series'
/// option in.
const PINNED: [&str; 2] = ["include/linux/mmzone.h", "include/linux/vm_event_item.h"];
const PINNED_OPTION: &str = "include/config/PAGE_REPORTING_BITMAP";
const THEIR_FOLDERS: [&str; 2] = ["mm", "drivers/virtio"];

/// How the whole series is booted; a prefix, by its default.
const WAYS: [&str; 3] = ["off", "mainline", "bitmap"];

/// What the guest's init runs, in base64: a balloon was found and nothing more.
const SCRIPT: &str = "bHMgL3N5cy9idXMvdmlydGlvL2RyaXZlcnMvdmlydGlvX2JhbGxvb24vdmlydGlvMA==";

/// Boots whatever is not known to boot, the whole series first.
pub(super) fn every_prefix(series: &Series, source: &Source, report: &mut Report) -> Result<()> {
    let fragment = Variant::On.fragment()?;
    let compiler = compiler()?;
    let count = series.patches.len();
    let mut missing = Vec::new();
    for index in (1..=count).rev() {
        let prefix = series.prefix_key(index);
        let stamp = Stamp::new(&[
            "links and boots",
            &source.key,
            &prefix,
            &fragment,
            &compiler,
        ])?;
        if !stamp.is_set() {
            missing.push((index, stamp));
        }
    }
    if missing.is_empty() {
        report.check(format!("all {count} prefixes boot"), Ok(()));
        return Ok(());
    }
    let image = paths::guest().join("initramfs.cpio.gz");
    initramfs::build(&image)?;
    // Held for the boots as well: the kernel lies in the workshop.
    let workshop = Workshop::open(source)?;
    let prefixes = series.prefixes(&workshop.pristine)?;
    let mut linker = Linker::new(&workshop, &prefixes[count], &fragment)?;
    for (index, stamp) in missing {
        let title = format!("{index}/{count} {} boots", series.patches[index - 1].name);
        let vmlinux = match linker.link(&prefixes[index]) {
            Ok(vmlinux) => vmlinux,
            Err(error) => {
                report.check(format!("{title}: the build"), Err(error));
                continue;
            }
        };
        let ways: &[&str] = if index == count { &WAYS } else { &[] };
        let mut good = report.check(&title, boot(&vmlinux, &image, ""));
        for way in ways {
            let words = format!("page_reporting.tracker={way}");
            good &= report.check(
                format!("{title}, tracker {way}"),
                boot(&vmlinux, &image, &words),
            );
        }
        if good {
            stamp.set()?;
        }
    }
    Ok(())
}

/// Links prefixes one after the other in one tree of objects.
struct Linker<'a> {
    workshop: &'a Workshop,
    objects: Objects,
    fragment: &'a str,
    /// Pinned headers as of the last link.
    pinned: Vec<Option<Vec<u8>>>,
}

impl<'a> Linker<'a> {
    /// Builds the whole series, from which the others take what they do not change.
    fn new(workshop: &'a Workshop, whole: &Contents, fragment: &'a str) -> Result<Self> {
        workshop.put(whole)?;
        // What an earlier run has left is of several prefixes.
        let objects = workshop.fresh_objects("linked")?;
        objects.configure(fragment, Options::AllHonoured)?;
        objects.build("Whole series", &["vmlinux"], Some(EXPECTED_STEPS))?;
        Ok(Self {
            workshop,
            objects,
            fragment,
            pinned: pinned(whole),
        })
    }

    fn link(&mut self, contents: &Contents) -> Result<PathBuf> {
        self.workshop.put(contents)?;
        self.objects.configure(self.fragment, Options::KnownOnly)?;
        self.objects.build("Configuration", &["syncconfig"], None)?;
        for header in PINNED {
            make_old(&self.objects.source.join(header))?;
        }
        make_old(&self.objects.dir.join(PINNED_OPTION))?;
        let pinned = pinned(contents);
        if pinned != self.pinned {
            for folder in THEIR_FOLDERS {
                remove_objects(&self.objects.dir.join(folder))?;
            }
            self.pinned = pinned;
        }
        self.objects
            .build("Kernel of the prefix", &["vmlinux"], None)?;
        Ok(self.objects.dir.join("vmlinux"))
    }
}

fn pinned(contents: &Contents) -> Vec<Option<Vec<u8>>> {
    PINNED
        .iter()
        .map(|header| contents.get(*header).cloned().flatten())
        .collect()
}

/// Gives a file a time before that of any object; one that is not there needs none.
fn make_old(path: &Path) -> Result<()> {
    let Ok(file) = fs::File::options().write(true).open(path) else {
        return Ok(());
    };
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1))
        .with_context(|| format!("the time of {}", path.display()))
}

fn remove_objects(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry
            .with_context(|| format!("reading {}", folder.display()))?
            .path();
        if path.is_dir() {
            remove_objects(&path)?;
        } else if path.extension().is_some_and(|extension| extension == "o") {
            fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

fn boot(vmlinux: &Path, initramfs: &Path, words: &str) -> Result<()> {
    let command_line = format!("console=ttyS0 panic=-1 no_timer_check {words} guest.run={SCRIPT}");
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
