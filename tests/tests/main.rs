//! Tests with the real programs, compiled as one test program.

mod api_life;
mod bad_input;
mod bare_metal;
mod ch_remote;
mod chaos;
mod crate_borders;
mod drain;
mod generated_clients;
mod host_view;
mod hotplug;
mod import_circles;
mod jail;
mod landlock;
mod migration;
mod reporting_policy;
mod shared_folder;
mod snapshot;
mod standby;
mod unit_tests;
mod vsock;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Cargo does not search for other files here, so a file that is missing above would never run.
#[test]
fn every_file_of_tests_is_a_module_of_this_program() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let files: BTreeSet<String> = fs::read_dir(folder)
        .expect("the folder of this file")
        .map(|entry| entry.expect("an entry").file_name())
        .filter_map(|name| Some(name.to_str()?.strip_suffix(".rs")?.to_owned()))
        .filter(|name| name != "main")
        .collect();
    let modules: BTreeSet<String> = include_str!("main.rs")
        .lines()
        .filter_map(|line| Some(line.strip_prefix("mod ")?.strip_suffix(';')?.to_owned()))
        .collect();
    assert_eq!(files, modules);
}
