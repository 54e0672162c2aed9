//! `cargo xtask guest package`: builds the patched kernel as Debian packages, with the kernel's own `bindeb-pkg`.
//!
//! ```text
//! cache/package-SOURCE/CONFIG/objects/   objects, kept for the next build
//! cache/package-SOURCE/CONFIG/*.deb      where dpkg-buildpackage leaves its packages
//! target/guest/package/                  those that an operator installs
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::build_tree::BuildTree;
use super::cache::{compiler, key};
use super::config;
use super::debian::{CLOUD_6_12, DebianKernel, GUEST_MODULES};
use super::kernel::FRAGMENT;
use super::make::{Objects, output};
use super::series::{self, Series};
use super::source::Source;
use crate::apt::{self, Need};
use crate::package::build;
use crate::package::clean_root::{self, Root};
use crate::{disk, paths};

const TOOLS: &[Need] = &[
    Need {
        package: "debhelper",
        why: "makes kernel packages",
    },
    Need {
        package: "dpkg-dev",
        why: "makes kernel packages",
    },
    Need {
        package: "kmod",
        why: "lists dependencies between kernel modules",
    },
    Need {
        package: "cpio",
        why: "copies kernel headers into packages",
    },
    Need {
        package: "rsync",
        why: "copies kernel headers into packages",
    },
    Need {
        package: "libssl-dev",
        why: "kernel build: certificates",
    },
    Need {
        package: "zstd",
        why: "compresses the kernel",
    },
];

/// Set apart from Debian's kernels by its release, so that both can be installed.
const SUFFIX: &str = "-balloon";
/// The source package that the binary packages name as their origin.
const SOURCE_NAME: &str = "linux-balloon";

/// Options of every packaged kernel.
const PACKAGED: &str = include_str!("../../guest/package.config");
/// Options of a kernel with Debian's configuration for cloud guests.
const PACKAGED_CLOUD: &str = include_str!("../../guest/package-cloud.config");

/// Objects and packages of a kernel with Debian's modules, without debug information, rounded up.
const CLOUD_BYTES: u64 = 4 << 30;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// `cloud`: Debian's configuration for cloud guests; `small`: that of the test kernels, without modules;
    /// or a complete kernel configuration file
    #[arg(long, value_name = "cloud|small|FILE", default_value = "cloud")]
    config: Config,
    /// Also install the kernel's package in a clean Debian root, check it there, and remove it
    #[arg(long)]
    check: bool,
}

/// The configuration to which the series' own options are added.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Config {
    Cloud,
    Small,
    File(PathBuf),
}

impl From<&str> for Config {
    fn from(text: &str) -> Self {
        match text {
            "cloud" => Self::Cloud,
            "small" => Self::Small,
            path => Self::File(path.into()),
        }
    }
}

impl Config {
    /// Names the objects, and the kernel unless it is the usual one.
    fn name(&self) -> &'static str {
        match self {
            Self::Cloud => "cloud",
            Self::Small => "small",
            Self::File(_) => "own",
        }
    }

    fn text(&self) -> Result<String> {
        let path = match self {
            Self::Small => return Ok(FRAGMENT.into()),
            Self::Cloud => DebianKernel::fetch(CLOUD_6_12, |_, _| ())?.config(),
            Self::File(path) => path.clone(),
        };
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }
}

/// The build plan: names, version and options.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    /// As `uname -r` prints it.
    release: String,
    /// The version of the packages.
    version: String,
    /// Options in addition to those of the configuration.
    options: String,
}

impl Plan {
    /// `source` is the version of Debian's source package, `date` the day of the last change of the series.
    fn new(config: &Config, source: &str, date: &str, series_options: &str) -> Result<Self> {
        let upstream = source.rsplit_once('-').map(|(upstream, _)| upstream);
        let upstream = upstream
            .with_context(|| format!("{source:?} is not the version of a Debian package"))?;
        let suffix = match config {
            Config::Cloud => SUFFIX.to_owned(),
            other => format!("{SUFFIX}-{}", other.name()),
        };
        let own = match config {
            Config::Cloud => PACKAGED_CLOUD,
            Config::Small | Config::File(_) => "",
        };
        Ok(Self {
            release: format!("{upstream}{suffix}"),
            version: format!("{source}+balloon{date}"),
            options: format!("{series_options}\n{PACKAGED}{own}CONFIG_LOCALVERSION=\"{suffix}\"\n"),
        })
    }

    /// File names of the packages that an operator installs. `bindeb-pkg` makes one more, with the C library's
    /// headers, which would replace the distribution's.
    fn packages(&self, has_modules: bool) -> Vec<String> {
        let mut names = vec!["linux-image"];
        if has_modules {
            names.push("linux-headers");
        }
        let file = |name| format!("{name}-{}_{}_amd64.deb", self.release, self.version);
        names.into_iter().map(file).collect()
    }

    /// Target and variables of `make`; `epoch` is the time of every file in a package.
    fn make_words(&self, epoch: &str) -> Vec<String> {
        vec![
            "bindeb-pkg".into(),
            format!("KDEB_PKGVERSION={}", self.version),
            format!("KDEB_SOURCENAME={SOURCE_NAME}"),
            "KDEB_CHANGELOG_DIST=unstable".into(),
            // One line for each step, which is counted.
            "DEB_BUILD_OPTIONS=terse".into(),
            format!("SOURCE_DATE_EPOCH={epoch}"),
        ]
    }
}

/// Builds the packages and prints their paths.
pub(crate) fn run(options: &Options) -> Result<()> {
    apt::ensure(TOOLS)?;
    let config = &options.config;
    let series = Series::read()?;
    let source = Source::base()?;
    let epoch = build::source_date(Some("guest-patches"))?;
    let plan = Plan::new(
        config,
        &source.package_version,
        &day(&epoch)?,
        &series::config("patched")?,
    )?;
    let base = config.text()?;
    let tree = BuildTree::open_for("package", &source)?;
    let objects = tree.separate_objects(&format!("{}/objects", config.name()));
    if *config != Config::Small {
        disk::require_in_all(&objects.dir, CLOUD_BYTES, "building a kernel with modules")?;
    }
    tree.put(&series.applied(&tree.pristine)?)?;
    let fragment = format!("{base}\n{}", plan.options);
    match config {
        Config::Small => objects.configure(&fragment)?,
        _ => {
            let patches = series.prefix_key(series.patches.len());
            let state = key(&[&source.key, &patches, &fragment, &compiler()?]);
            objects.configure_only(&fragment, &plan.options, &state)?;
        }
    }
    let beside = objects.dir.parent().context("objects are in a folder")?;
    remove_packages(beside)?;
    let words = plan.make_words(&epoch);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    objects.build("Kernel packages", &words, None)?;
    let packages = publish(&plan, &objects, beside)?;
    let image = packages.first().context("the kernel is packaged")?;
    if options.check {
        check(image, &plan)?;
    }
    Ok(())
}

/// Installs the kernel's package in a new root, checks its files there, and removes it again.
fn check(image: &Path, plan: &Plan) -> Result<()> {
    let root = Root::unpack(&clean_root::archive()?)?;
    let before = root.files()?;
    let name = root.install(image)?;
    let release = &plan.release;
    let configuration = root.read(&format!("boot/config-{release}"))?;
    config::check(&plan.options, &configuration)?;
    for file in ["vmlinuz", "System.map"] {
        root.run(&["test", "-s", &format!("/boot/{file}-{release}")])?;
    }
    if has_modules(&configuration) {
        let modules = root.read(&format!("lib/modules/{release}/modules.dep"))?;
        let builtin = root.read(&format!("lib/modules/{release}/modules.builtin"))?;
        for module in GUEST_MODULES {
            let found = has_module(&modules, module) || has_module(&builtin, module);
            ensure!(found, "{name} lacks the module {module}");
        }
        println!("{name}: {} modules", modules.lines().count());
    }
    root.run(&["dpkg", "--purge", &name])?;
    let after = root.files()?;
    let left: Vec<_> = after.symmetric_difference(&before).collect();
    ensure!(
        left.is_empty(),
        "removing {name} left a difference: {left:?}"
    );
    println!("{name}: installed in a clean root of Debian, checked, and removed without a trace");
    Ok(())
}

/// Whether a list of modules, one path a line, has this one. Files spell an underscore as a dash or not.
fn has_module(list: &str, module: &str) -> bool {
    let plain = |name: &str| name.replace('-', "_");
    list.lines().any(|line| {
        let path = line.split(':').next().unwrap_or(line);
        let file = path.rsplit('/').next().unwrap_or(path);
        file.split_once(".ko")
            .is_some_and(|(name, _)| plain(name) == plain(module))
    })
}

fn has_modules(configuration: &str) -> bool {
    configuration.lines().any(|line| line == "CONFIG_MODULES=y")
}

fn publish(plan: &Plan, objects: &Objects, from: &Path) -> Result<Vec<PathBuf>> {
    let folder = paths::guest().join("package");
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    // Two versions of one package would both match the pattern that the documentation installs.
    remove_packages(&folder)?;
    let mut packages = Vec::new();
    for name in plan.packages(has_modules(&objects.config()?)) {
        let made = from.join(&name);
        ensure!(made.exists(), "bindeb-pkg did not make {}", made.display());
        let package = folder.join(&name);
        paths::link_or_copy(&made, &package)?;
        println!("{}", package.display());
        packages.push(package);
    }
    Ok(packages)
}

/// Removes packages of an earlier build, which must not be taken for those of this one.
fn remove_packages(folder: &Path) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    for entry in entries {
        let path = entry
            .with_context(|| format!("reading {}", folder.display()))?
            .path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

/// `20261123` of the seconds since 1970.
fn day(epoch: &str) -> Result<String> {
    let date = output(Command::new("date").args(["-u", "+%Y%m%d", "-d", &format!("@{epoch}")]))?;
    Ok(date.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "6.12.117-1~deb12u1";
    const OURS: &str = "CONFIG_PAGE_REPORTING_BITMAP=y";

    fn plan(config: &str) -> Plan {
        Plan::new(&config.into(), SOURCE, "20261123", OURS).unwrap()
    }

    #[test]
    fn packages_are_named_by_release_and_sort_behind_the_source_that_they_are_made_from() {
        let plan = plan("cloud");
        assert_eq!(plan.release, "6.12.117-balloon");
        assert_eq!(plan.version, "6.12.117-1~deb12u1+balloon20261123");
        assert_eq!(
            plan.packages(true),
            [
                "linux-image-6.12.117-balloon_6.12.117-1~deb12u1+balloon20261123_amd64.deb",
                "linux-headers-6.12.117-balloon_6.12.117-1~deb12u1+balloon20261123_amd64.deb",
            ]
        );
        assert_eq!(plan.packages(false), plan.packages(true)[..1]);
    }

    #[test]
    fn kernels_of_other_configurations_can_be_installed_side_by_side() {
        assert_eq!(plan("small").release, "6.12.117-balloon-small");
        assert_eq!(plan("./my.config").release, "6.12.117-balloon-own");
    }

    #[test]
    fn options_have_those_of_the_series_and_the_name_of_the_release() {
        let options = plan("cloud").options;
        for line in [
            OURS,
            "CONFIG_LOCALVERSION=\"-balloon\"",
            "CONFIG_DEBUG_INFO_NONE=y",
            "CONFIG_MODULE_SIG_KEY=\"\"",
            "CONFIG_PVH=y",
            "CONFIG_XEN=n",
        ] {
            assert!(options.lines().any(|other| other == line), "{options}");
        }
        // A user who provides a configuration wants its drivers.
        assert!(!plan("./my.config").options.contains("CONFIG_XEN"));
    }

    #[test]
    fn make_is_told_the_version_and_the_time_of_the_packages() {
        let words = plan("cloud").make_words("1763856000");
        assert_eq!(words[0], "bindeb-pkg");
        for word in [
            "KDEB_PKGVERSION=6.12.117-1~deb12u1+balloon20261123",
            "SOURCE_DATE_EPOCH=1763856000",
        ] {
            assert!(words.iter().any(|other| other == word), "{words:?}");
        }
    }

    #[test]
    fn version_that_names_no_debian_revision_is_refused_with_the_version() {
        let error = Plan::new(&Config::Cloud, "6.12", "20261123", OURS).unwrap_err();
        assert!(error.to_string().contains("\"6.12\""), "{error}");
    }

    #[test]
    fn module_is_found_by_its_name_in_both_spellings() {
        let list = "kernel/drivers/char/hw_random/virtio-rng.ko.xz: kernel/x/a.ko\nkernel/fs/ext4/ext4.ko\n";
        for module in ["virtio_rng", "ext4"] {
            assert!(has_module(list, module), "{module}");
        }
        for module in ["a", "ext", "virtio"] {
            assert!(!has_module(list, module), "{module}");
        }
    }

    #[test]
    fn day_is_that_of_the_epoch_in_utc() {
        assert_eq!(day("1763856000").unwrap(), "20251123");
    }
}
