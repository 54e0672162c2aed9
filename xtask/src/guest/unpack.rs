//! Unpacks kernels and their modules with the tools of their compression formats.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::apt::{self, Need};

pub(super) const XZ: Need = Need {
    package: "xz-utils",
    why: "unpacks Debian's kernels and their modules",
};

/// Compression formats of a kernel: first bytes, package of the tool, tool.
pub(super) const PACKINGS: [(&[u8], Need, &str); 3] = [
    (&[0xfd, b'7', b'z', b'X', b'Z', 0], XZ, "xz"),
    (
        &[0x28, 0xb5, 0x2f, 0xfd],
        Need {
            package: "zstd",
            why: "unpacks Debian's kernels",
        },
        "zstd",
    ),
    // The legacy form, which the kernel's build uses.
    (
        &[0x02, 0x21, 0x4c, 0x18],
        Need {
            package: "lz4",
            why: "unpacks Debian's kernels",
        },
        "lz4",
    ),
];

/// Unpacks with xz(1).
pub(super) fn unxz(packed: &[u8]) -> Result<Vec<u8>> {
    pipe_through("xz", packed)
}

/// Unpacks with a tool that has the options of gzip(1), as all of them do.
pub(super) fn pipe_through(tool: &str, packed: &[u8]) -> Result<Vec<u8>> {
    let mut child = Command::new(tool)
        .args(["-d", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {tool}"))?;
    let mut stdin = child.stdin.take().context("the tool's input is piped")?;
    let output = std::thread::scope(|scope| {
        // If the tool stops reading, its status gives the reason.
        scope.spawn(move || std::io::Write::write_all(&mut stdin, packed).ok());
        child.wait_with_output()
    });
    let output = output.with_context(|| format!("waiting for {tool}"))?;
    if !output.status.success() {
        bail!("{tool} failed ({})", output.status);
    }
    Ok(output.stdout)
}

/// Checks that kernels packed with xz can be unpacked.
pub(super) fn ensure_tools() -> Result<()> {
    apt::ensure(&[XZ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_text_comes_back_from_each_tool() {
        for (magic, _, tool) in PACKINGS {
            // Not every machine has all tools.
            let Ok(mut child) = Command::new(tool)
                .args(["-c", if tool == "lz4" { "-l" } else { "-k" }])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
            else {
                continue;
            };
            let mut stdin = child.stdin.take().unwrap();
            std::io::Write::write_all(&mut stdin, b"a kernel").unwrap();
            drop(stdin);
            let packed = child.wait_with_output().unwrap().stdout;
            assert!(packed.starts_with(magic), "{tool}");
            assert_eq!(pipe_through(tool, &packed).unwrap(), b"a kernel", "{tool}");
        }
    }
}
