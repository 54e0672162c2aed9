#![allow(clippy::unwrap_used)]
//! Tests reading a host from prepared files.

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

use super::*;
use crate::model::{Bytes, HostFacts, HugePool};

struct Host {
    folder: TempDir,
    reader: HostReader,
}

impl Host {
    fn new(group: Option<&str>) -> Self {
        let folder = TempDir::new().unwrap();
        let root = folder.path().join("cgroup");
        let reader = HostReader::new(HostFiles {
            proc: folder.path().join("proc"),
            cgroup: group.map(|group| root.join(group)),
            cgroup_root: root,
        });
        let host = Self { folder, reader };
        host.write(
            "proc/meminfo",
            "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\nSwapTotal: 1024 kB\nSwapFree: 512 kB\n",
        );
        host.write("proc/vmstat", "nr_free_pages 1\npswpin 7\npswpout 9\n");
        host.write(
            "proc/pressure/memory",
            "some avg10=1.50 avg60=0.02 avg300=0.08 total=885506\nfull avg10=0.25 avg60=0.00 avg300=0.02 total=515067\n",
        );
        host
    }

    fn write(&self, name: &str, text: &str) {
        let path: PathBuf = self.folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn group(&self, name: &str, limit: &str, current: Bytes) {
        self.write(&format!("cgroup/{name}/memory.max"), limit);
        self.write(
            &format!("cgroup/{name}/memory.current"),
            &current.0.to_string(),
        );
        let stat = format!(
            "anon 1\ninactive_file {}\nslab_reclaimable 0\n",
            Bytes::gib(1).0
        );
        self.write(&format!("cgroup/{name}/memory.stat"), &stat);
    }

    fn read(&mut self, at_ms: u64) -> Result<HostFacts, HostError> {
        self.reader.read(at_ms)
    }
}

#[test]
fn host_without_a_group_is_the_machine() {
    let host = Host::new(None).read(5).unwrap();
    assert_eq!(
        (host.at_ms, host.total, host.available),
        (5, Bytes::gib(16), Bytes::gib(8))
    );
    assert_eq!(host.cgroup, None);
    assert_eq!(
        (host.swap_total, host.swap_free),
        (Bytes::mib(1), Bytes(1 << 19))
    );
    assert!((host.pressure.some_avg10 - 1.5).abs() < 1e-9);
    assert_eq!(host.pressure.full_total_us, 515_067);
}

#[test]
fn group_with_a_limit_is_the_host() {
    let mut host = Host::new(Some("vms"));
    host.group("vms", "8589934592\n", Bytes::gib(6));
    let facts = host.read(0).unwrap();
    assert_eq!(facts.limit(), Bytes::gib(8));
    assert_eq!(facts.available(), Bytes::gib(3));
}

#[test]
fn group_below_a_tighter_parent_has_the_limit_of_the_parent() {
    let mut host = Host::new(Some("machine/vms"));
    host.group("machine", "4294967296\n", Bytes::gib(2));
    host.group("machine/vms", "8589934592\n", Bytes::gib(2));
    assert_eq!(host.read(0).unwrap().limit(), Bytes::gib(4));
}

#[test]
fn group_without_a_limit_leaves_the_machine() {
    let mut host = Host::new(Some("vms"));
    host.group("vms", "max\n", Bytes::gib(6));
    assert_eq!(host.read(0).unwrap().cgroup, None);
}

#[test]
fn groups_side_by_side_are_one_host() {
    let mut host = Host::new(None);
    host.group("a", "4294967296\n", Bytes::gib(2));
    host.group("b", "2147483648\n", Bytes::gib(1));
    let root = host.folder.path().join("cgroup");
    host.reader.set_groups(vec![root.join("a"), root.join("b")]);
    let group = host.read(0).unwrap().cgroup.unwrap();
    assert_eq!((group.limit, group.current), (Bytes::gib(6), Bytes::gib(3)));
    host.group("b", "max\n", Bytes::gib(1));
    assert_eq!(host.read(0).unwrap().cgroup, None);
}

#[test]
fn group_that_suffers_more_than_the_machine_gives_the_pressure() {
    let mut host = Host::new(Some("vms"));
    host.group("vms", "8589934592\n", Bytes::gib(6));
    let pressure = "some avg10=40.00 avg60=0.02 avg300=0.08 total=7\nfull avg10=0.00 avg60=0.00 avg300=0.02 total=3\n";
    host.write("cgroup/vms/memory.pressure", pressure);
    let facts = host.read(0).unwrap();
    assert!((facts.pressure.some_avg10 - 40.0).abs() < 1e-9);
    assert!((facts.pressure.full_avg10 - 0.25).abs() < 1e-9);
    assert_eq!(facts.pressure.some_total_us, 7);
    assert!(
        host.reader
            .files()
            .pressure_file()
            .ends_with("memory.pressure")
    );
}

#[test]
fn group_that_is_not_there_is_an_error_with_the_path() {
    let error = Host::new(Some("gone")).read(0).unwrap_err();
    assert!(error.to_string().contains("memory.max"), "{error}");
}

#[test]
fn swap_rates_are_over_the_time_between_two_readings() {
    let mut host = Host::new(None);
    assert_eq!(host.read(0).unwrap().swap_in_per_s, Bytes::ZERO);
    host.write("proc/vmstat", "pswpin 17\npswpout 9\n");
    let facts = host.read(2000).unwrap();
    assert_eq!(facts.swap_in_per_s, Bytes(5 * 4096));
    assert_eq!(facts.swap_out_per_s, Bytes::ZERO);
}

#[test]
fn host_without_pressure_information_is_still_read() {
    let mut host = Host::new(None);
    fs::remove_file(host.folder.path().join("proc/pressure/memory")).unwrap();
    assert!(host.read(0).unwrap().pressure.some_avg10.abs() < 1e-9);
}

#[test]
fn pool_of_huge_pages_is_no_part_of_the_host() {
    let mut host = Host::new(None);
    host.write(
        "proc/meminfo",
        "MemTotal: 16777216 kB\nMemAvailable: 4194304 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\nHugetlb: 8388608 kB\n\
         HugePages_Free: 1536\nHugePages_Rsvd: 512\nHugepagesize: 2048 kB\n",
    );
    let facts = host.read(0).unwrap();
    assert_eq!(facts.total, Bytes::gib(8));
    let pool = HugePool {
        total: Bytes::gib(8),
        free: Bytes::gib(2),
        reserved: Bytes::gib(1),
        page: Bytes::mib(2),
    };
    assert_eq!(facts.pool, pool);
    assert_eq!(host.reader.files().total().unwrap(), Bytes::gib(8));
}
