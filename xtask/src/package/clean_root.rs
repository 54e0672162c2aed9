//! Installs the package in a clean Debian root, checks its programs and units, and removes the package again.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::apt::{self, Need};
use crate::guest::cache::{Lock, key};
use crate::guest::make::{output, quiet};
use crate::{disk, paths};

const TASK: &str = "checking the package in a clean Debian root";
const NEEDS: [Need; 1] = [Need {
    package: "mmdebstrap",
    why: "makes the Debian root that the package is installed in",
}];
/// Packages besides the essential ones: the tool that checks the units, and the package's dependencies.
const PACKAGES: &str = "systemd,procps";
/// The archive and one unpacked root.
const SPACE_BYTES: u64 = 1 << 30;

/// Units, with the maximum exposure that `systemd-analyze security` may report, in tenths: 0 (best) to 100.
const UNITS: [(&str, u32); 2] = [
    ("ch-fleet-agent.service", 50),
    ("cloud-hypervisor@web.service", 20),
];

/// Starts the programs of both units and waits until they respond. `$AGENT` and `$VMM` are the units' commands, and
/// `$FOLDERS` their folders in /run.
const START: &str = r#"
for folder in $FOLDERS; do mkdir -p /run/$folder; done
$AGENT >/tmp/agent.log 2>&1 & agent=$!
$VMM >/tmp/vmm.log 2>&1 & vmm=$!
fail() { cat /tmp/agent.log /tmp/vmm.log >&2; exit 1; }
until ch-fleet status >/tmp/status 2>&1; do kill -0 $agent || fail; sleep 0.1; done
until ch-remote --api-socket /run/ch/web/api.sock ping >/tmp/ping 2>&1; do kill -0 $vmm || fail; sleep 0.1; done
ch-remote --api-socket /run/ch/web/api.sock shutdown-vmm || fail
wait $vmm || fail
kill $agent
wait $agent || fail
"#;

/// Installs `package` in a new root, checks it there with its `programs`, and removes it again.
pub(super) fn check(package: &Path, programs: &[&str]) -> Result<()> {
    let root = Root::unpack(&archive()?)?;
    let before = root.files()?;
    let name = root.install(package)?;
    println!("{name}: installed in a clean root of Debian");
    let installed = root.files()?;
    for program in programs {
        let version = root.run(&[program, "--version"])?;
        let version = version.lines().next().unwrap_or_default();
        ensure!(
            version.contains(env!("CARGO_PKG_VERSION")),
            "{program} --version prints {version:?}"
        );
        println!("{version}");
        for file in docs_of(program) {
            ensure!(
                installed.contains(Path::new(&file)),
                "{file} is not installed"
            );
        }
    }
    root.run(&[
        "ch-fleet",
        "config",
        "check",
        "--config",
        "/etc/ch-fleet/agent.toml",
    ])?;
    let [agent, vmm] = ["ch-fleet-agent.service", "cloud-hypervisor@.service"].map(|unit| {
        Ok::<_, anyhow::Error>(InstalledUnit(
            root.read(&format!("usr/lib/systemd/system/{unit}"))?,
        ))
    });
    let (agent, vmm) = (agent?, vmm?);
    let start = [
        format!("AGENT={}", agent.value("ExecStart")?),
        format!("VMM={}", vmm.value("ExecStart")?),
        format!(
            "FOLDERS={} {}",
            agent.value("RuntimeDirectory")?,
            vmm.value("RuntimeDirectory")?
        ),
    ];
    let mut words = vec!["env"];
    words.extend(start.iter().map(String::as_str));
    words.extend(["timeout", "60", "sh", "-c", START]);
    root.run(&words)?;
    println!("ch-fleet agent and cloud-hypervisor: started, responded and ended");
    for (unit, most) in UNITS {
        // Manual pages are not checked, because man is not installed there.
        root.run(&["systemd-analyze", "verify", "--man=no", unit])?;
        let threshold = format!("--threshold={most}");
        let report = root.run(&[
            "systemd-analyze",
            "security",
            "--offline=yes",
            "--no-pager",
            &threshold,
            unit,
        ])?;
        let score = report.lines().rev().find(|line| line.contains("exposure"));
        println!("{}", score.context("systemd-analyze shows no score")?);
    }
    root.run(&["dpkg", "--purge", &name])?;
    let after = root.files()?;
    let left: Vec<_> = after.symmetric_difference(&before).collect();
    ensure!(
        left.is_empty(),
        "{name}: installing and removing it left a difference: {left:?}"
    );
    println!("{name}: removed, and no file is left");
    Ok(())
}

/// The text of an installed unit.
struct InstalledUnit(String);

impl InstalledUnit {
    /// The value of a key, for the VM `web` without options.
    fn value(&self, key: &str) -> Result<String> {
        let line = self.0.lines().find_map(|line| {
            let (name, value) = line.split_once('=')?;
            (name == key).then_some(value)
        });
        let value = line.with_context(|| format!("a unit has no {key}"))?;
        Ok(value.replace("%i", "web").replace("$VM_OPTIONS", ""))
    }
}

/// Files of a program that the package must install.
fn docs_of(program: &str) -> [String; 4] {
    [
        format!("usr/share/man/man1/{program}.1"),
        format!("usr/share/bash-completion/completions/{program}"),
        format!("usr/share/zsh/vendor-completions/_{program}"),
        format!("usr/share/fish/vendor_completions.d/{program}.fish"),
    ]
}

/// The root as an archive, created once for all checkouts.
pub(crate) fn archive() -> Result<PathBuf> {
    let suite = apt::release_codename()?;
    let cache = paths::cache()?;
    let archive = cache.join(format!("package-root-{}.tar", key(&[&suite, PACKAGES])));
    if archive.exists() {
        println!("cache: a root of Debian: {}", archive.display());
        return Ok(archive);
    }
    apt::ensure(&NEEDS)?;
    let _lock = Lock::take_named(&cache, "debian-lock", "another download from Debian")?;
    if !archive.exists() {
        disk::require(&cache, SPACE_BYTES, "making a root of Debian")?;
        eprintln!("Making a root of Debian {suite}, which takes a minute the first time");
        let part = archive.with_extension("part.tar");
        let mut bootstrap = apt::as_root("mmdebstrap", TASK)?;
        bootstrap.args(["--quiet", "--mode=root", "--variant=minbase"]);
        bootstrap.arg(format!("--include={PACKAGES}"));
        bootstrap.arg(&suite).arg(&part);
        bootstrap.arg(apt::archive_line(&suite)?);
        quiet(&mut bootstrap)?;
        fs::rename(&part, &archive).with_context(|| format!("creating {}", archive.display()))?;
    }
    Ok(archive)
}

/// An unpacked root, removed when dropped.
pub(crate) struct Root {
    path: PathBuf,
}

impl Root {
    pub(crate) fn unpack(archive: &Path) -> Result<Self> {
        let folder = paths::target().join("package");
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        disk::require(&folder, SPACE_BYTES, TASK)?;
        let path = folder.join(format!("root-{}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
        let root = Self { path };
        let mut tar = apt::as_root("tar", TASK)?;
        tar.arg("--extract").arg("--file").arg(archive);
        quiet(tar.arg("--directory").arg(&root.path))?;
        Ok(root)
    }

    /// Installs a package and returns its name.
    pub(crate) fn install(&self, package: &Path) -> Result<String> {
        let mut field = Command::new("dpkg-deb");
        let name = output(field.arg("--field").arg(package).arg("Package"))?;
        let mut copy = apt::as_root("cp", TASK)?;
        quiet(copy.arg(package).arg(self.path.join("tmp/package.deb")))?;
        self.run(&["dpkg", "--install", "/tmp/package.deb"])?;
        Ok(name.trim().to_owned())
    }

    /// Runs a command in the root with a separate /proc, and returns its output. Its child processes end with it.
    pub(crate) fn run(&self, words: &[&str]) -> Result<String> {
        let mut command = apt::as_root("unshare", TASK)?;
        command
            .args(["--mount", "--pid", "--fork", "--kill-child=KILL"])
            .arg(format!("--mount-proc={}/proc", self.path.display()))
            .arg("chroot")
            .arg(&self.path)
            .args(words)
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C.UTF-8")
            .env("DEBIAN_FRONTEND", "noninteractive");
        output(&mut command).with_context(|| format!("in a clean root: {}", words.join(" ")))
    }

    /// The text of a file.
    pub(crate) fn read(&self, name: &str) -> Result<String> {
        self.run(&["cat", &format!("/{name}")])
    }

    /// All files and folders, except those that every package changes.
    pub(crate) fn files(&self) -> Result<BTreeSet<PathBuf>> {
        let mut find = apt::as_root("find", TASK)?;
        find.arg(&self.path)
            .args(["-xdev", "-mindepth", "1", "-printf", "%P\\n"]);
        let all = output(&mut find)?;
        let passing = ["proc/", "run/", "tmp/", "var/lib/dpkg/", "var/log/"];
        Ok(all
            .lines()
            .filter(|path| !passing.iter().any(|folder| path.starts_with(folder)))
            .map(PathBuf::from)
            .collect())
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let removed = apt::as_root("rm", TASK).and_then(|mut remove| {
            quiet(remove.args(["-rf", "--one-file-system"]).arg(&self.path))
        });
        if let Err(error) = removed {
            eprintln!("warning: cannot remove {}: {error:#}", self.path.display());
        }
    }
}
