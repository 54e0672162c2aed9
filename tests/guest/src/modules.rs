//! Kernel modules in the initramfs; a distribution's kernel has its drivers as modules.
//!
//! The creator of the initramfs has put them under `/modules`, named so that the order of their names is the order of
//! their dependencies.

use std::fs::{self, File};

use crate::sys;

const FOLDER: &str = "/modules";

/// Loads all of them; one that cannot be loaded is named on the console and skipped.
pub(crate) fn load() {
    // Our own kernels have all drivers built in, and their initramfs has no such folder.
    let Ok(entries) = fs::read_dir(FOLDER) else {
        return;
    };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        if let Err(error) = File::open(&path).and_then(|file| sys::load_module(&file)) {
            println!("guest: module {}: {error}", path.display());
        }
    }
}
