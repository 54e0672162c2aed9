//! Throughput of a raw and a qcow2 disk: direct I/O of the guest on images in TMPDIR, which is in memory in an emulated
//! host.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use integration_tests::MIB;
use integration_tests::linux::Machine;
use serde_json::{Value, json};

use crate::cases::Cases;
use crate::subject::Subject;
use crate::timed_work::TimedWork;
use integration_tests::overhead::{DISK_BYTES, disk_image};

/// Number of turns per VMM when two are compared.
pub(crate) const TURNS: usize = 3;

/// A name, `read` or `write`, bytes per request, number of requests, and further arguments of `guest-mem disk-bench`.
type Workload = (&'static str, &'static str, u64, u64, &'static str);

/// The first one writes the whole disk, so that no later one reads a hole.
const WORKLOADS: [Workload; 6] = [
    ("write_1m", "write", MIB, 64, ""),
    ("read_1m", "read", MIB, 64, ""),
    ("random_write_4k", "write", 4096, 1024, "--random 1"),
    ("random_read_4k", "read", 4096, 1024, "--random 1"),
    (
        "random_write_4k_depth_8",
        "write",
        4096,
        2048,
        "--random 1 --threads 8",
    ),
    (
        "random_read_4k_depth_8",
        "read",
        4096,
        2048,
        "--random 1 --threads 8",
    ),
];

/// Prefixes of the cases, and the disk of each in the guest.
const DISKS: [(&str, &str); 2] = [("", "/dev/vda"), ("qcow2_", "/dev/vdb")];

/// Runs all workloads with a guest of one VMM.
pub(crate) fn measure(subject: &Subject) -> Result<Value> {
    let (folder, raw) = disk_image()?;
    let qcow2 = qcow2_image(folder.path())?;
    let boot = || {
        Machine {
            vmm: Some(&subject.program),
            arguments: &["--disk", &raw, &qcow2],
            ..Machine::default()
        }
        .serve()
    };
    let mut cases = Cases::new("block", subject, &boot);
    for (prefix, disk) in DISKS {
        for (name, kind, bytes, requests, more) in WORKLOADS {
            cases.run(&format!("{prefix}{name}"), |guest| {
                let mut run = |requests: u64| {
                    let words = format!(
                        "disk-bench {kind} {disk} --block {bytes} --requests {requests} {more}"
                    );
                    TimedWork::by(guest, words.trim_end())
                };
                let nothing = run(0)?;
                let taken = run(requests)?.beyond(&nothing);
                Ok(json!({
                    "mib_per_s": taken.per_second(requests * bytes / MIB),
                    "requests_per_s": taken.per_second(requests),
                    "each_request": taken.each(requests),
                }))
            })?;
        }
    }
    cases.finish()
}

/// An empty qcow2 image of the size of the raw one, and its option.
fn qcow2_image(folder: &Path) -> Result<String> {
    let path = folder.join("disk.qcow2");
    let created = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&path)
        .arg(DISK_BYTES.to_string())
        .status()
        .context("qemu-img, which `cargo xtask test-tools` installs")?;
    ensure!(created.success(), "qemu-img: {created}");
    Ok(format!("path={},image_type=qcow2", path.display()))
}
