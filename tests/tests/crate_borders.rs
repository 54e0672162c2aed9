//! Checks which crates of the workspace may depend on which others, as described in ARCHITECTURE.md.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

use anyhow::{Context, Result, ensure};
use integration_tests::paths::workspace;
use serde_json::Value;

/// Start of the names of published crates, because their short names are taken on the public registry.
const PUBLISHED_AS: &str = "cloud-hypervisor-balloon-";
/// Every crate of the workspace with its allowed dependencies. A crate does not use any crate listed above it.
const MAY_USE: &[(&str, &[&str])] = &[
    ("api-macros", &[]),
    ("api", &["api-macros", "byte-size", "device-facts"]),
    ("device-facts", &[]),
    ("byte-size", &[]),
    ("state", &[]),
    ("hypervisor", &["state"]),
    ("virtio-devices", &["device-facts", "state"]),
    ("machine", &["api", "hypervisor", "state", "virtio-devices"]),
    (
        "vmm",
        &[
            "api",
            "device-facts",
            "hypervisor",
            "machine",
            "state",
            "virtio-devices",
        ],
    ),
    // The test server is for its fake VMMs, which only tests use.
    (
        "fleet",
        &["api", "byte-size", "chart", "device-facts", "test-server"],
    ),
    ("cloud-hypervisor", &["api", "program-docs", "vmm"]),
    ("ch-remote", &["api", "program-docs"]),
    ("ch-fleet", &["api", "fleet", "program-docs"]),
    ("ch-fleet-adapter", &["api", "program-docs"]),
    (
        "integration-tests",
        &[
            "api",
            "chart",
            "generated-client",
            "test-docs",
            "test-server",
            "test-skip",
            "virtio-devices",
        ],
    ),
    ("generated-client", &[]),
    ("chart", &[]),
    ("program-docs", &["test-docs"]),
    ("test-alloc", &[]),
    ("test-docs", &[]),
    ("test-server", &[]),
    ("test-skip", &[]),
    ("guest-programs", &["byte-size"]),
    ("xtask", &["byte-size", "test-skip"]),
];
/// The modules of `vmm`, bottom-up: each uses only modules listed before it.
const VMM_MODULES: &[&str] = &[
    "device_ids",
    "inherited_fd",
    "threads",
    "signals",
    "seccomp",
    "events",
    "event_monitor",
    "config",
    "jail",
    "own_memory",
    "landlock",
    "reporting_policy",
    "alerts",
    "thresholds",
    "snapshot",
    "vm",
    "migration",
    "view",
    "balloon_events",
    "figures_thread",
    "control",
    "api",
];
/// Crates that would bypass the border: HTTP, JSON, command lines and confinement are the responsibility of the program
/// that runs the machine.
const NOT_IN_THE_MACHINE: &[&str] = &["dbs-uhttp", "clap", "seccompiler", "landlock", "serde_json"];

/// Cargo's description of the workspace.
pub(crate) fn metadata() -> Result<Value> {
    let output = Command::new("cargo")
        .args(["metadata", "--no-deps", "--offline", "--format-version=1"])
        .current_dir(workspace())
        .output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The short name of a package.
pub(crate) fn package_name(package: &Value) -> String {
    let name = package["name"].as_str().unwrap_or_default();
    name.strip_prefix(PUBLISHED_AS).unwrap_or(name).to_owned()
}

/// Dependencies of each crate of the workspace, without dev-dependencies.
fn dependencies() -> Result<BTreeMap<String, BTreeSet<String>>> {
    let metadata = metadata()?;
    let packages = metadata["packages"].as_array().context("packages")?;
    let uses = |package: &Value| {
        let all = package["dependencies"].as_array();
        let all = all.into_iter().flatten();
        all.filter(|it| it["kind"].is_null())
            .map(package_name)
            .collect()
    };
    Ok(packages
        .iter()
        .map(|it| (package_name(it), uses(it)))
        .collect())
}

#[test]
fn crates_use_only_what_stands_below_them() -> Result<()> {
    let dependencies = dependencies()?;
    for (package, used) in &dependencies {
        let (_, may_use) = MAY_USE
            .iter()
            .find(|(name, _)| name == package)
            .with_context(|| format!("{package} is not in the table"))?;
        for used in used.iter().filter(|name| dependencies.contains_key(*name)) {
            ensure!(may_use.contains(&used.as_str()), "{package} uses {used}");
        }
    }
    Ok(())
}

#[test]
fn machine_knows_no_http_no_json_no_command_line_and_no_filters() -> Result<()> {
    let dependencies = dependencies()?;
    let machine = dependencies.get("machine").context("machine")?;
    for unwanted in NOT_IN_THE_MACHINE {
        ensure!(!machine.contains(*unwanted), "machine uses {unwanted}");
    }
    Ok(())
}

/// The Rust files of a module, without those of its tests.
pub(crate) fn sources(place: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    if place.is_file() {
        files.push(place.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(place)? {
        let path = entry?.path();
        if path.file_stem().is_none_or(|name| name != "tests") {
            sources(&path, files)?;
        }
    }
    Ok(())
}

/// The modules of the crate that a source file names, outside comments and unit tests.
fn modules_used(source: &str) -> BTreeSet<&str> {
    let product = source.split("\n#[cfg(test)]\nmod tests {").next();
    product
        .unwrap_or_default()
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(|line| line.split("crate::").skip(1))
        .filter_map(|rest| {
            rest.split(|c: char| !(c.is_alphanumeric() || c == '_'))
                .next()
        })
        .collect()
}

#[test]
fn modules_of_the_vmm_use_only_what_stands_below_them() -> Result<()> {
    let folder = workspace().join("vmm/src");
    let mut imports = 0;
    for (place, module) in VMM_MODULES.iter().enumerate() {
        let file = folder.join(format!("{module}.rs"));
        let module_place = if file.is_file() {
            file
        } else {
            folder.join(module)
        };
        let mut files = Vec::new();
        sources(&module_place, &mut files).with_context(|| module_place.display().to_string())?;
        for file in files {
            let source = fs::read_to_string(&file)?;
            for used in modules_used(&source) {
                let below = VMM_MODULES[..=place].contains(&used);
                ensure!(
                    below,
                    "{} uses {used}, which is above {module}",
                    file.display()
                );
                imports += 1;
            }
        }
    }
    ensure!(imports > 20, "only {imports} imports were seen");
    let lib = fs::read_to_string(folder.join("lib.rs"))?;
    let declared = lib.lines().filter_map(|line| line.split("mod ").nth(1));
    let declared: BTreeSet<_> = declared.map(|it| it.trim_end_matches(';')).collect();
    ensure!(
        declared == VMM_MODULES.iter().copied().collect(),
        "{declared:?}"
    );
    Ok(())
}
