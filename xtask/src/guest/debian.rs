//! Debian's own binary kernels: unpacked from their packages, not installed, shared by every
//! checkout on the machine.
//!
//! ```text
//! cache/debian-PACKAGE                the folder that was newest at the last check
//! cache/debian-PACKAGE_VERSION.part/  the package while it is downloaded and unpacked
//! cache/debian-PACKAGE_VERSION/       appears complete, by a rename
//!   boot/{vmlinuz,config}-RELEASE, [usr/]lib/modules/RELEASE/…, vmlinux if there is a need for it
//! ```
//!
//! Debian's drivers are modules. The modules that a machine needs are in its initramfs, in the order in which its init
//! must load them ([`DebianKernel::modules`]).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};

use super::cache::Lock;
use super::cpio;
use super::modules::{self, Module};
use super::newest;
use super::unpack::{PACKINGS, XZ, pipe_through};
use crate::apt::{self, Offer};
use crate::{disk, paths};

/// Folders of drivers without a device in our virtual machines: half of the files.
const LEFT_OUT: [&str; 6] = [
    "*/kernel/drivers/gpu",
    "*/kernel/drivers/media",
    "*/kernel/drivers/net/wireless",
    "*/kernel/drivers/infiniband",
    "*/kernel/sound",
    "./usr/share",
];

/// The release's kernel for cloud guests: what guests boot.
pub(crate) const CLOUD: &[&str] = &["linux-image-cloud-amd64"];
/// Linux 6.12 for cloud guests, for releases in which it is not [`CLOUD`].
pub(crate) const CLOUD_6_12: &[&str] = &["linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64"];
/// A kernel for any machine: what the emulated host boots. The cloud kernel lacks 9p, and before Linux 6.7, reading
/// page tables is so slow that the VMM does it only rarely.
pub(crate) const GENERIC: &[&str] = &["linux-image-6.12-amd64", "linux-image-amd64"];

/// Modules of a guest: every device that our VMM has, the power button, a file system for disks.
pub(crate) const GUEST_MODULES: [&str; 12] = [
    "virtio_pci",
    "virtio_balloon",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "virtio_mem",
    "virtiofs",
    "vmw_vsock_virtio_transport",
    "evdev",
    "button",
    "ext4",
];

/// Modules of guests that not every kernel has: Debian's 6.1 lacks the driver of the virtual IOMMU. NVMe is for assigned
/// disks.
pub(super) const GUEST_MODULES_OPTIONAL: [&str; 2] = ["virtio_iommu", "nvme"];

/// Modules of guests with a kernel for any machine, which are for devices of the host: a disk, a network interface, and
/// VFIO for programs of the guest.
pub(super) const ASSIGNED_MODULES: [&str; 5] = [
    "virtio_iommu",
    "nvme",
    "igb",
    "vfio_pci",
    "vfio_iommu_type1",
];

/// Modules of the emulated host: its root, its ports, its swap, KVM, networks of guests, devices for guests.
pub(crate) const HOST_MODULES: [&str; 13] = [
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "9pnet_virtio",
    "9p",
    "overlay",
    "kvm_amd",
    "tun",
    "bridge",
    "veth",
    "virtio_net",
    "vfio_pci",
    "vfio_iommu_type1",
];

/// Folder of modules, and of the kernel, in newer packages.
const WITH_MODULES: &str = "usr/lib/modules";

/// An unpacked kernel.
#[derive(Debug, Clone)]
pub(crate) struct DebianKernel {
    dir: PathBuf,
    /// The output of `uname -r`.
    release: String,
}

impl DebianKernel {
    /// The kernel in the first available one of `packages`, or in the package behind a meta-package; downloaded if
    /// necessary. `progress` is called with the downloaded and total bytes.
    pub(crate) fn fetch(packages: &[&str], progress: impl Fn(u64, u64) + Sync) -> Result<Self> {
        let again = || apt::fresh_offer(packages);
        Self::recorded(
            &packages.join("+"),
            || apt::offer(packages),
            again,
            &progress,
        )
    }

    /// The newest kernel for cloud guests that Debian packages, even for a later release.
    pub(crate) fn fetch_newest() -> Result<Self> {
        let again = newest::fresh_cloud_image;
        Self::recorded("newest", newest::cloud_image, again, &|_, _| ())
    }

    /// The kernel found last time, if that was recently, otherwise the one on offer.
    fn recorded(
        name: &str,
        offer: impl Fn() -> Result<Offer>,
        again: impl Fn() -> Result<Offer>,
        progress: &(impl Fn(u64, u64) + Sync),
    ) -> Result<Self> {
        let cache = paths::cache()?;
        // Querying apt takes seconds on a busy machine, and a new kernel is not needed every day.
        let record = cache.join(format!("debian-{name}"));
        if let Some(found) = recorded(&record).and_then(|dir| Self::open(&dir).ok().flatten()) {
            return Ok(found);
        }
        let dir = Self::unpacked(&cache, offer, again, progress)?;
        let found = Self::open(&dir)?;
        let found = found.with_context(|| format!("{} has no kernel", dir.display()))?;
        fs::write(&record, dir.as_os_str().as_encoded_bytes())
            .with_context(|| format!("writing {}", record.display()))?;
        Ok(found)
    }

    /// The folder of the kernel on offer. `again` queries the archive again, which may have replaced the version in the
    /// lists by a newer one.
    fn unpacked(
        cache: &Path,
        offer: impl Fn() -> Result<Offer>,
        again: impl Fn() -> Result<Offer>,
        progress: &(impl Fn(u64, u64) + Sync),
    ) -> Result<PathBuf> {
        let image = Image::of(offer()?)?;
        let dir = image.folder(cache);
        if dir.exists() {
            return Ok(dir);
        }
        apt::ensure(&[XZ])?;
        let _lock = Lock::take_named(cache, "debian-lock", "another download of a kernel")?;
        let error = match image.unpack(cache, progress) {
            Ok(dir) => return Ok(dir),
            Err(error) => error,
        };
        match again().and_then(Image::of) {
            Ok(newer) if newer.version() != image.version() => newer.unpack(cache, progress),
            _ => Err(error),
        }
    }

    fn open(dir: &Path) -> Result<Option<Self>> {
        if !dir.exists() {
            return Ok(None);
        }
        let found = Self::found_in(dir);
        let found = found.with_context(|| format!("no kernel in {}", dir.display()))?;
        Ok(Some(found))
    }

    /// The kernel in an unpacked tree: `boot/vmlinuz-RELEASE`, or since Linux 7.2 with its modules.
    fn found_in(dir: &Path) -> Option<Self> {
        let names = |folder: &Path| {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            let names = entries.map(|entry| entry.file_name().into_string());
            names.flatten().collect::<Vec<String>>()
        };
        let of_boot = names(&dir.join("boot"))
            .iter()
            .find_map(|name| Some(name.strip_prefix("vmlinuz-")?.to_string()));
        let with_modules = || {
            names(&dir.join(WITH_MODULES)).into_iter().find(|release| {
                dir.join(WITH_MODULES)
                    .join(release)
                    .join("vmlinuz")
                    .exists()
            })
        };
        let release = of_boot.or_else(with_modules)?;
        Some(Self {
            dir: dir.to_path_buf(),
            release,
        })
    }

    /// `6.12` of `6.12.117+deb12-cloud-amd64`.
    pub(crate) fn series(&self) -> String {
        let numbers: Vec<&str> = self.release.split('.').take(2).collect();
        numbers.join(".")
    }

    /// The output of `uname -r`.
    pub(super) fn release(&self) -> &str {
        &self.release
    }

    /// The file with the kernel's configuration.
    pub(super) fn config(&self) -> PathBuf {
        self.dir.join(format!("boot/config-{}", self.release))
    }

    /// The kernel as the package has it: a bzImage.
    pub(crate) fn vmlinuz(&self) -> PathBuf {
        let of_boot = self.dir.join(format!("boot/vmlinuz-{}", self.release));
        if of_boot.exists() {
            return of_boot;
        }
        let folder = self.dir.join(WITH_MODULES).join(&self.release);
        folder.join("vmlinuz")
    }

    /// The form of the kernel that starts fastest under emulation: unpacking takes emulated processors seconds, so it
    /// is unpacked here, once.
    pub(crate) fn quickest(&self) -> Result<PathBuf> {
        let unpacked = self.dir.join("vmlinux");
        if unpacked.exists() {
            return Ok(unpacked);
        }
        let vmlinuz = self.vmlinuz();
        let image = fs::read(&vmlinuz).with_context(|| format!("reading {}", vmlinuz.display()))?;
        let unpacking = payload(&image).and_then(|packed| {
            let packing = PACKINGS
                .iter()
                .find(|(magic, ..)| packed.starts_with(magic));
            packing.map(|(_, need, tool)| (packed, *need, *tool))
        });
        let Some((packed, need, tool)) = unpacking else {
            return Ok(vmlinuz);
        };
        if Command::new(tool).arg("-V").output().is_err() {
            apt::ensure(&[need])?;
        }
        let beside = self.dir.join(format!("vmlinux-{}", std::process::id()));
        fs::write(&beside, pipe_through(tool, packed)?)
            .with_context(|| format!("writing {}", beside.display()))?;
        fs::rename(&beside, &unpacked)
            .with_context(|| format!("creating {}", unpacked.display()))?;
        Ok(unpacked)
    }

    /// `names`, those of `optional` that the kernel has, and what they depend on, as files under `modules/` of an initramfs. Their order by
    /// name is the order in which init loads them.
    pub(crate) fn modules(&self, names: &[&str], optional: &[&str]) -> Result<cpio::Archive> {
        self.modules_with(names, optional, None)
    }

    /// As [`DebianKernel::modules`], with `other` in place of the module of the same name.
    fn modules_with(
        &self,
        names: &[&str],
        optional: &[&str],
        other: Option<&Module>,
    ) -> Result<cpio::Archive> {
        let tree = ["lib/modules", WITH_MODULES]
            .map(|folder| self.dir.join(folder).join(&self.release))
            .into_iter()
            .find(|tree| tree.exists())
            .with_context(|| format!("no modules in {}", self.dir.display()))?;
        let mut archive = cpio::Archive::default();
        archive.directory("modules");
        for (index, module) in modules::in_order(&tree, names, optional)?
            .iter()
            .enumerate()
        {
            let name = format!("modules/{index:03}-{}.ko", module.name);
            let other = other.filter(|other| other.name == module.name);
            archive.file(&name, 0o644, &other.unwrap_or(module).bytes);
        }
        Ok(archive)
    }
}

/// How long a kernel is used before the archive is checked for a newer one.
const RECORD_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// The folder that a record names, if the record is young.
fn recorded(record: &Path) -> Option<PathBuf> {
    let written = fs::metadata(record).ok()?.modified().ok()?;
    let age = SystemTime::now()
        .duration_since(written)
        .unwrap_or_default();
    let dir = PathBuf::from(fs::read_to_string(record).ok()?);
    (age < RECORD_MAX && dir.exists()).then_some(dir)
}

/// The packages that a kernel comes in: one, or since Linux 7.2 several.
struct Image {
    packages: Vec<Offer>,
}

/// Dependencies of an image that are parts of it.
const PARTS: [&str; 3] = ["linux-base-", "linux-binary-", "linux-modules-"];

impl Image {
    /// The image of `offer`, or of the package behind it.
    fn of(offer: Offer) -> Result<Self> {
        let named = |offer: &Offer, prefix| {
            let name = offer.dependency(prefix)?;
            Some(offer.lists.newest(name))
        };
        let image = named(&offer, "linux-image-").unwrap_or(Ok(offer))?;
        let parts = PARTS.iter().filter_map(|prefix| named(&image, prefix));
        let mut packages = parts.collect::<Result<Vec<Offer>>>()?;
        packages.insert(0, image);
        Ok(Self { packages })
    }

    fn version(&self) -> &str {
        &self.packages[0].version
    }

    fn folder(&self, cache: &Path) -> PathBuf {
        let Offer {
            package, version, ..
        } = &self.packages[0];
        cache.join(format!("debian-{package}_{version}"))
    }

    /// Downloads and unpacks; leftovers of an interrupted run are used or removed. The caller holds the lock.
    fn unpack(&self, cache: &Path, progress: &(impl Fn(u64, u64) + Sync)) -> Result<PathBuf> {
        let dir = self.folder(cache);
        if dir.exists() {
            return Ok(dir);
        }
        let mut part = dir.clone().into_os_string();
        part.push(".part");
        let part = PathBuf::from(part);
        let tree = part.join("tree");
        if tree.exists() {
            fs::remove_dir_all(&tree).with_context(|| format!("removing {}", tree.display()))?;
        }
        fs::create_dir_all(&tree).with_context(|| format!("creating {}", tree.display()))?;
        let sum = |bytes: fn(&Offer) -> u64| self.packages.iter().map(bytes).sum::<u64>();
        let all = sum(|offer| offer.download_bytes);
        disk::require(
            cache,
            all + sum(|offer| offer.unpacked_bytes),
            &format!("downloading and unpacking {}", self.packages[0].package),
        )?;
        let mut before = 0;
        for offer in &self.packages {
            let folder = part.join(&offer.package);
            fs::create_dir_all(&folder)
                .with_context(|| format!("creating {}", folder.display()))?;
            let at = |done: u64, _: u64| progress(before + done, all);
            let package = watched(&folder, offer.download_bytes, &at, || {
                offer.download(&folder)
            })?;
            before += offer.download_bytes;
            if let Err(error) = extract(&package, &tree) {
                // The next run must not find it.
                fs::remove_file(&package)
                    .with_context(|| format!("removing {}", package.display()))?;
                return Err(error.context(format!(
                    "{} is damaged and was removed: run this command again",
                    package.display()
                )));
            }
        }
        ensure!(
            DebianKernel::found_in(&tree).is_some(),
            "no kernel in {}",
            self.packages[0].package
        );
        fs::rename(&tree, &dir).with_context(|| format!("creating {}", dir.display()))?;
        fs::remove_dir_all(&part).with_context(|| format!("removing {}", part.display()))?;
        Ok(dir)
    }
}

/// Runs `work`, and reports the size of the files in `dir` until it ends.
fn watched<T>(
    dir: &Path,
    all: u64,
    progress: &(impl Fn(u64, u64) + Sync),
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let (done, ended) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let interval = Duration::from_millis(200);
            // Ends when the sender is dropped.
            while ended.recv_timeout(interval) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                progress(bytes_in(dir).min(all), all);
            }
        });
        let result = work();
        drop(done);
        result
    })
}

fn bytes_in(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else {
        return 0;
    };
    entries
        .flatten()
        .filter_map(|entry| entry.metadata().ok())
        .filter(fs::Metadata::is_file)
        .map(|metadata| metadata.len())
        .sum()
}

/// `dpkg-deb -x` without [`LEFT_OUT`].
fn extract(package: &Path, to: &Path) -> Result<()> {
    let mut dpkg = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("starting dpkg-deb")?;
    let tarfile = dpkg.stdout.take().context("dpkg-deb's output is piped")?;
    let mut tar = Command::new("tar");
    tar.args(["-x", "--no-same-owner", "--wildcards"]);
    for folder in LEFT_OUT {
        tar.arg(format!("--exclude={folder}"));
    }
    let extracted = tar
        .arg("-C")
        .arg(to)
        .stdin(tarfile)
        .status()
        .context("starting tar")?;
    let read = dpkg.wait().context("waiting for dpkg-deb")?;
    ensure!(
        read.success() && extracted.success(),
        "unpacking {} failed (dpkg-deb: {read}, tar: {extracted})",
        package.display()
    );
    Ok(())
}

/// The packed kernel in a bzImage (Documentation/arch/x86/boot.rst), without the four bytes after it that contain its
/// unpacked size.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?) as usize)
    };
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = match image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(*sectors),
    };
    let (offset, length) = (word(0x248)?, word(0x24c)?);
    let begin = (setup_sectors + 1) * 512 + offset;
    let packed = image.get(begin..begin.checked_add(length)?)?;
    packed.get(..length.checked_sub(4)?)
}

/// Makes `dir/{vmlinux,vmlinuz,initramfs.cpio.gz}` from a kernel and the common initramfs.
pub(super) fn publish(kernel: &DebianKernel, common: &Path, dir: &Path) -> Result<()> {
    publish_packed(kernel, common, &GUEST_MODULES_OPTIONAL, dir)?;
    publish_file(&kernel.quickest()?, &dir.join("vmlinux"))
}

/// As [`publish`], with `module` in place of the kernel's own.
pub(super) fn publish_with(
    kernel: &DebianKernel,
    common: &Path,
    dir: &Path,
    module: &Module,
) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    publish_file(&kernel.quickest()?, &dir.join("vmlinux"))?;
    let modules = kernel.modules_with(&GUEST_MODULES, &GUEST_MODULES_OPTIONAL, Some(module))?;
    super::initramfs::extend(common, modules, &dir.join("initramfs.cpio.gz"))
}

fn publish_file(file: &Path, published: &Path) -> Result<()> {
    if fs::read(published).ok() == fs::read(file).ok() {
        return Ok(());
    }
    paths::link_or_copy(file, published)
}

/// As [`publish`], without `vmlinux`, and with these modules if the kernel has them.
pub(super) fn publish_packed(
    kernel: &DebianKernel,
    common: &Path,
    optional: &[&str],
    dir: &Path,
) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    publish_file(&kernel.vmlinuz(), &dir.join("vmlinuz"))?;
    let modules = kernel.modules(&GUEST_MODULES, optional)?;
    super::initramfs::extend(common, modules, &dir.join("initramfs.cpio.gz"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(sectors: u8, offset: u32, length: u32, body: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 3 * 512];
        image[0x1f1] = sectors;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&offset.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
        image.extend(body);
        image
    }

    #[test]
    fn payload_lies_behind_setup_and_offset_and_ends_before_its_size() {
        let image = image(2, 3, 8, b"...kern\x01\x02\x03\x04");
        assert_eq!(payload(&image), Some(&b"kern"[..]));
    }

    #[test]
    fn payload_that_is_not_there_is_none() {
        for image in [
            Vec::new(),
            vec![0; 600],
            image(2, 0, 9, b"short"),
            image(2, 0, 2, b"short"),
            image(2, u32::MAX, u32::MAX, b"short"),
        ] {
            assert_eq!(payload(&image), None);
        }
    }

    #[test]
    fn kernel_is_found_in_the_old_layout_and_in_the_new() {
        let dir = std::env::temp_dir().join(format!("xtask-layouts-{}", std::process::id()));
        for (release, file) in [
            (
                "6.1.0-1-cloud-amd64",
                "old/boot/vmlinuz-6.1.0-1-cloud-amd64",
            ),
            (
                "7.3.4+deb13-cloud-amd64",
                "new/usr/lib/modules/7.3.4+deb13-cloud-amd64/vmlinuz",
            ),
        ] {
            let file = dir.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, "kernel").unwrap();
            let tree = dir.join(if release.starts_with('6') {
                "old"
            } else {
                "new"
            });
            let found = DebianKernel::found_in(&tree).unwrap();
            assert_eq!((found.release.as_str(), found.vmlinuz()), (release, file));
            assert_eq!(found.series(), release[..3]);
        }
        assert!(DebianKernel::found_in(&dir).is_none());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn damaged_package_is_not_unpacked() {
        let dir = std::env::temp_dir().join(format!("xtask-damaged-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let package = dir.join("half.deb");
        fs::write(&package, b"!<arch>\ndebian-binary   ").unwrap();
        let error = extract(&package, &dir).unwrap_err().to_string();
        assert!(error.contains("half.deb"), "{error}");
        fs::remove_dir_all(&dir).unwrap();
    }
}
