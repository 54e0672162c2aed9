//! Debian's stress-ng for a guest: an initramfs that the kernel unpacks on top of the first one.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::cpio;
use crate::apt::{self, Need};

const PACKAGE: Need = Need {
    package: "stress-ng",
    why: "works on a guest's memory and checks it",
};
const PROGRAM: &str = "/usr/bin/stress-ng";

/// The program and its libraries, at the paths where it expects them.
pub(super) fn archive() -> Result<Vec<u8>> {
    apt::ensure(&[PACKAGE])?;
    let output = Command::new("ldd").arg(PROGRAM).output();
    let output = output.context("starting ldd")?;
    ensure!(
        output.status.success(),
        "ldd {PROGRAM} failed ({})",
        output.status
    );
    let mut archive = cpio::Archive::default();
    let mut folders = BTreeSet::new();
    let said = String::from_utf8_lossy(&output.stdout);
    for path in libraries(&said).chain([PROGRAM]) {
        let contents = fs::read(path).with_context(|| format!("reading {path}"))?;
        // All parent folders, the upper ones first.
        let above: Vec<&Path> = Path::new(path).ancestors().skip(1).collect();
        for folder in above.into_iter().rev() {
            let name = folder.to_string_lossy().trim_matches('/').to_string();
            if !name.is_empty() && folders.insert(name.clone()) {
                archive.directory(&name);
            }
        }
        archive.file(path.trim_matches('/'), 0o755, &contents);
    }
    Ok(archive.finish())
}

/// Paths in the output of ldd: `NAME => PATH (ADDRESS)`, or `PATH (ADDRESS)` of the loader.
fn libraries(said: &str) -> impl Iterator<Item = &str> {
    said.lines()
        .filter_map(|line| line.split_ascii_whitespace().find(|w| w.starts_with('/')))
}

#[cfg(test)]
mod tests {
    use super::libraries;

    #[test]
    fn libraries_are_those_with_a_path() {
        let said = "\tlinux-vdso.so.1 (0x1)\n\tlibm.so.6 => /lib/libm.so.6 (0x2)\n\
            \t/lib64/ld.so (0x3)\n";
        let paths: Vec<&str> = libraries(said).collect();
        assert_eq!(paths, ["/lib/libm.so.6", "/lib64/ld.so"]);
    }
}
