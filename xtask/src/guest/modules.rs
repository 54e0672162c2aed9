//! Kernel modules of an unpacked package: files and dependencies.
//!
//! `depmod` has not run for a package that is not installed, so the dependencies are read from the modules. Each has a
//! section of strings `name=value`, including `depends=a,b,c`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::unpack::{ensure_tools, unxz};

/// A module, unpacked.
#[derive(Debug)]
pub(super) struct Module {
    pub(super) name: String,
    pub(super) bytes: Vec<u8>,
}

/// `names` and all their dependencies, each after its own dependencies; then those of `optional` that the kernel has.
/// Names that are built into the kernel are left out.
pub(super) fn in_order(tree: &Path, names: &[&str], optional: &[&str]) -> Result<Vec<Module>> {
    let mut search = Search {
        files: files(tree)?,
        builtin: builtin(tree)?,
        seen: BTreeSet::new(),
        found: Vec::new(),
    };
    let optional: Vec<&str> = optional
        .iter()
        .copied()
        .filter(|name| search.files.contains_key(&plain(name)))
        .collect();
    for name in names.iter().chain(&optional) {
        search
            .add(&plain(name))
            .with_context(|| format!("module {name} of {}", tree.display()))?;
    }
    Ok(search.found)
}

struct Search {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
    seen: BTreeSet<String>,
    found: Vec<Module>,
}

impl Search {
    fn add(&mut self, name: &str) -> Result<()> {
        // Inserted before its dependencies, so that a cycle ends.
        if !self.seen.insert(name.into()) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else {
            if self.builtin.contains(name) {
                return Ok(());
            }
            bail!("neither a module nor built in: {name}");
        };
        let bytes = read(path)?;
        for dependency in depends(&bytes) {
            self.add(&dependency)?;
        }
        self.found.push(Module {
            name: name.into(),
            bytes,
        });
        Ok(())
    }
}

/// The name as modules carry it; files and users mix `-` and `_`.
fn plain(name: &str) -> String {
    name.replace('-', "_")
}

/// The name of a module's file: `kernel/a/b-c.ko.xz` is `b_c`.
fn name_of(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let name = file
        .strip_suffix(".ko")
        .or_else(|| file.strip_suffix(".ko.xz"))?;
    Some(plain(name))
}

fn files(tree: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![tree.join("kernel")];
    while let Some(folder) = folders.pop() {
        let entries =
            fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("reading {}", folder.display()))?;
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if let Some(name) = path.to_str().and_then(name_of) {
                files.insert(name, path);
            }
        }
    }
    Ok(files)
}

fn builtin(tree: &Path) -> Result<BTreeSet<String>> {
    let path = tree.join("modules.builtin");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    Ok(text.lines().filter_map(name_of).collect())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    if path.extension().is_some_and(|extension| extension == "xz") {
        ensure_tools()?;
        return unxz(&bytes);
    }
    Ok(bytes)
}

/// The modules in the string `depends=` of a module.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = &module[at + KEY.len()..];
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(0);
    String::from_utf8_lossy(&value[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(plain)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_of_a_module_are_read_from_its_strings() {
        let module = b"\x7fELF\0license=GPL\0depends=virtio,virtio-ring\0name=x\0";
        assert_eq!(depends(module), ["virtio", "virtio_ring"]);
        assert!(depends(b"\0depends=\0name=x\0").is_empty());
        assert!(depends(b"none").is_empty());
    }

    #[test]
    fn modules_come_after_what_they_depend_on_and_without_what_is_built_in() {
        let tree = std::env::temp_dir().join(format!("xtask-modules-{}", std::process::id()));
        let folder = tree.join("kernel/drivers");
        fs::create_dir_all(&folder).unwrap();
        for (file, strings) in [
            ("a-top.ko", "\0depends=b_middle,c_in\0"),
            ("b_middle.ko", "\0depends=d_base,a-top\0"),
            ("d_base.ko", "\0depends=\0"),
        ] {
            fs::write(folder.join(file), strings).unwrap();
        }
        fs::write(tree.join("modules.builtin"), "kernel/x/c-in.ko\n").unwrap();
        let found = in_order(&tree, &["a_top", "d-base", "c_in"], &["nowhere"]).unwrap();
        let names: Vec<&str> = found.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["d_base", "b_middle", "a_top"]);
        let missing = format!("{:#}", in_order(&tree, &["nowhere"], &[]).unwrap_err());
        assert!(missing.contains("nowhere"), "{missing}");
        fs::remove_dir_all(&tree).unwrap();
    }
}
