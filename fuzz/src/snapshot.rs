//! Reads a snapshot chain with arbitrary files, in a temporary folder (fuzz target `snapshot`).

/// Restores and merges the chain. Returns whether it was accepted.
///
/// # Panics
/// There is no folder for temporary files, or restoring and merging differ.
#[must_use]
pub fn run(bytes: &[u8]) -> bool {
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    vmm::snapshot::fuzz::restore(folder.path(), bytes)
}
