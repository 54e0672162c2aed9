//! Tests a shared folder with mock back ends: well-behaved, disconnected, silent and misbehaving.

mod back_end;
mod by_hand;
mod disk;
mod generic;
mod hostile;
mod net;
mod process;
mod serving;
mod storage_daemon;
mod testpmd;
mod virtiofsd;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tempfile::TempDir;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::device::{GuestRam, VirtioDevice};
use crate::fs::{Fs, FsParams};
use crate::testing::{MockPciDriver, TestRam, wait_until};

const RAM_BYTES: usize = 16 << 20;
/// The priority queue and one request queue.
const QUEUES: usize = 2;
const REQUESTS: u16 = 1;

/// Memory that another process can map.
fn region(start: GuestAddress) -> Arc<GuestRegionMmap> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(RAM_BYTES as u64).unwrap();
    let mapping = MmapRegion::from_file(FileOffset::new(file, 0), RAM_BYTES).unwrap();
    Arc::new(GuestRegionMmap::new(mapping, start).unwrap())
}

/// Guest RAM that another process can map.
fn shared_ram() -> TestRam {
    let map = GuestMemoryMmap::from_arc_regions(vec![region(GuestAddress(0))]).unwrap();
    TestRam::around(GuestRam::new(map), 0, RAM_BYTES as u64)
}

fn device(socket: &Path) -> Arc<Mutex<dyn VirtioDevice>> {
    let fs = Fs::new(FsParams {
        id: "_fs0".to_owned(),
        tag: "folder".to_owned(),
        socket: socket.to_owned(),
        num_queues: 1,
        queue_size: 64,
    });
    Arc::new(Mutex::new(fs.unwrap()))
}

struct Rig {
    folder: TempDir,
    driver: MockPciDriver,
}

impl Rig {
    /// A device with its driver, without a back end.
    fn new() -> Self {
        let mut rig = Self::idle(device);
        rig.driver.start(u64::MAX);
        rig
    }

    /// A device that no driver has reset yet.
    fn idle(make: impl FnOnce(&Path) -> Arc<Mutex<dyn VirtioDevice>>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ram = shared_ram();
        let driver = MockPciDriver::new(make(&folder.path().join("socket")), &ram);
        Self { folder, driver }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    fn count(&self, name: &str) -> u64 {
        let device = self.driver.function.device().lock().unwrap();
        device.counters()[name]
    }

    fn wait_for(&self, name: &str, least: u64) {
        wait_until(name, || self.count(name) >= least);
    }

    fn wait_until_served(&self) {
        self.wait_for("serving", 1);
    }
}
