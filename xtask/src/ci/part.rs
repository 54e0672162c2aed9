//! The parts of the project, and which part a file belongs to.

/// The part of the project to which a file belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Fleet,
    GuestPatches,
    Fuzz,
    Tests,
    Xtask,
    /// No code; some of it is checked by tests of the crates.
    Text,
    Vmm,
    /// All other folders: what both the VMM and the fleet depend on, and new folders.
    Shared,
    /// Everything depends on it: `Cargo.lock`, `clippy.toml`, …
    Root,
}

const FOLDERS: [(&str, Part); 15] = [
    ("bin/cloud-hypervisor/", Part::Vmm),
    ("hypervisor/", Part::Vmm),
    ("machine/", Part::Vmm),
    ("state/", Part::Vmm),
    ("virtio-devices/", Part::Vmm),
    ("vmm/", Part::Vmm),
    ("fleet/", Part::Fleet),
    ("bin/ch-fleet", Part::Fleet),
    ("guest-patches/", Part::GuestPatches),
    ("fuzz/", Part::Fuzz),
    ("tests/", Part::Tests),
    ("xtask/", Part::Xtask),
    ("docs/", Part::Text),
    ("test-docs/", Part::Text),
    (".ci/", Part::Text),
];

/// The part of `file`, a path from the workspace.
pub(super) fn part_of(file: &str) -> Part {
    let named = FOLDERS.iter().find(|(folder, _)| file.starts_with(folder));
    match named {
        Some((_, part)) => *part,
        None if file.contains('/') && !file.starts_with('.') => Part::Shared,
        None if file.ends_with(".md") || file == ".gitignore" => Part::Text,
        None => Part::Root,
    }
}
