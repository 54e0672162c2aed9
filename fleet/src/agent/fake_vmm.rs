#![allow(clippy::unwrap_used)]
//! VMMs and a host for tests: real sockets with upstream's wire format and guests that a test controls.
//!
//! One thread serves all of them, so hundreds are cheap. The host's files are rewritten whenever a guest changes, so an
//! order affects the host's free memory.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{getgid, getuid};
use tempfile::TempDir;
use test_server::{Request, response};

use crate::host::HostFiles;

/// 1 MiB.
pub const MIB: u64 = 1 << 20;
/// 1 GiB.
pub const GIB: u64 = 1 << 30;

/// Generous, because test machines are shared; most conditions are met within a second.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Waits until `condition` returns a value.
///
/// # Panics
/// The condition is not met by [`DEADLINE`].
pub fn wait<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    wait_within(DEADLINE, what, condition)
}

/// [`wait`] with another deadline.
///
/// # Panics
/// The condition is not met by then.
pub fn wait_within<T>(
    deadline: Duration,
    what: &str,
    mut condition: impl FnMut() -> Option<T>,
) -> T {
    let until = Instant::now() + deadline;
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < until, "not in time: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// The fault of a VMM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// None.
    #[default]
    None,
    /// Accepts the connection and sends nothing.
    Hang,
    /// Half a response, then the end.
    Half,
    /// 500 to everything.
    Status500,
    /// Not HTTP.
    Garbage,
    /// Executes requests and does not respond.
    Mute,
}

/// A guest.
#[derive(Clone, Debug)]
pub struct FakeVm {
    /// Its memory, bytes.
    pub configured: u64,
    /// Host memory it occupies, bytes.
    pub resident: u64,
    /// Available memory inside, as it reports.
    pub available: u64,
    /// Number of stalls on memory, as it reports.
    pub stalls: u64,
    /// Requested balloon, bytes.
    pub target: u64,
    /// Actual balloon, bytes.
    pub actual: u64,
    /// Level of its VMM's interface: 0, 1 or 2.
    pub level: u8,
    /// Whether the balloon follows its target.
    pub follows: bool,
    /// Whether it reports the requested balloon, whatever its actual one.
    pub lies: bool,
    /// Whether its memory is in huge pages.
    pub huge: bool,
    /// Whether the guest sends statistics.
    pub talks: bool,
    /// Whether it is paused, and how often it refuses to be resumed.
    pub paused: bool,
    /// See `paused`.
    pub refusals: u32,
    /// Whether its VMM rejects balloon requests.
    pub refuses_balloon: bool,
    /// Whether its VMM cannot write snapshots.
    pub refuses_snapshot: bool,
    /// Its disk image.
    pub disk: Option<PathBuf>,
    /// Whether its VMM has ended.
    pub ended: bool,
    /// Bytes that its disk transfers per request for counters, and those so far.
    pub works: u64,
    /// See `works`.
    pub io_bytes: u64,
    /// The fault of its VMM.
    pub fault: Fault,
    /// Every requested size, and when.
    pub resizes: Vec<(u64, Instant)>,
    /// Received requests.
    pub requests: u64,
}

impl FakeVm {
    /// A level 2 VM that follows requests.
    pub fn new(configured: u64, resident: u64) -> Self {
        Self {
            configured,
            resident,
            available: configured - configured / 8,
            stalls: 0,
            target: 0,
            actual: 0,
            level: 2,
            follows: true,
            lies: false,
            huge: false,
            talks: true,
            paused: false,
            refusals: 0,
            refuses_balloon: false,
            refuses_snapshot: false,
            disk: None,
            ended: false,
            works: 0,
            io_bytes: 0,
            fault: Fault::None,
            resizes: Vec::new(),
            requests: 0,
        }
    }

    fn resize(&mut self, target: u64) {
        self.resizes.push((target, Instant::now()));
        self.target = target;
        self.settle();
    }

    /// The balloon's size as reported.
    fn claimed(&self) -> u64 {
        if self.lies { self.target } else { self.actual }
    }

    /// Makes the balloon reach its target.
    pub fn settle(&mut self) {
        let target = self.target;
        if self.follows && !self.lies {
            let taken = target.saturating_sub(self.actual);
            let given = self.actual.saturating_sub(target);
            self.resident = self.resident.saturating_sub(taken);
            self.available = self.available.saturating_sub(taken) + given;
            self.actual = target;
        }
    }
}

#[derive(Debug, Default)]
struct Inner {
    vms: BTreeMap<String, FakeVm>,
    total: u64,
    others: u64,
    /// Size of the pool of huge pages, and its free part.
    pool: (u64, u64),
}

/// A VM's name and its listener.
type Listening = (String, Arc<UnixListener>);

/// A host with its VMs.
#[derive(Debug)]
pub struct World {
    folder: TempDir,
    inner: Arc<Mutex<Inner>>,
    listeners: Arc<Mutex<Vec<Listening>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl World {
    /// A host with `total` bytes, of which `others` are used otherwise.
    pub fn new(total: u64, others: u64) -> Self {
        let folder = TempDir::new().unwrap();
        for name in ["vms", "proc/pressure", "proc/sys/kernel", "state", "run"] {
            fs::create_dir_all(folder.path().join(name)).unwrap();
        }
        fs::write(folder.path().join("proc/vmstat"), "pswpin 0\npswpout 0\n").unwrap();
        fs::write(folder.path().join("proc/sys/kernel/hostname"), "fake\n").unwrap();
        let mut world = Self {
            folder,
            inner: Arc::new(Mutex::new(Inner {
                total,
                others,
                ..Inner::default()
            })),
            listeners: Arc::default(),
            stop: Arc::default(),
            thread: None,
        };
        world.write_host();
        let (inner, listeners) = (Arc::clone(&world.inner), Arc::clone(&world.listeners));
        let (stop, path) = (Arc::clone(&world.stop), world.folder.path().to_owned());
        world.thread = Some(thread::spawn(move || {
            serve(&inner, &listeners, &stop, &path);
        }));
        world
    }

    /// Its folder: `vms` holds the sockets, `proc` the kernel's files.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The location of the kernel's files for an agent.
    pub fn files(&self) -> HostFiles {
        HostFiles {
            proc: self.path().join("proc"),
            cgroup_root: self.path().join("cgroup"),
            cgroup: None,
        }
    }

    /// The socket of a VM.
    pub fn socket_of(&self, name: &str) -> PathBuf {
        self.path().join(format!("vms/{name}.sock"))
    }

    /// Adds a VM, or replaces the one with that name by another machine.
    pub fn add(&self, name: &str, vm: FakeVm) {
        let socket = self.socket_of(name);
        let mut listeners = self.listeners.lock().unwrap();
        listeners.retain(|(known, _)| known != name);
        // The file exists only if the VM is replaced.
        let _ = fs::remove_file(&socket);
        self.inner.lock().unwrap().vms.insert(name.to_owned(), vm);
        let listener = UnixListener::bind(&socket).unwrap();
        listeners.push((name.to_owned(), Arc::new(listener)));
        drop(listeners);
        self.write_host();
    }

    /// Removes a VM.
    pub fn remove(&self, name: &str) {
        self.listeners
            .lock()
            .unwrap()
            .retain(|(known, _)| known != name);
        fs::remove_file(self.socket_of(name)).unwrap();
        self.inner.lock().unwrap().vms.remove(name);
        self.write_host();
    }

    /// The current state of a VM.
    pub fn vm(&self, name: &str) -> FakeVm {
        self.inner.lock().unwrap().vms[name].clone()
    }

    /// Changes a VM.
    pub fn change(&self, name: &str, change: impl FnOnce(&mut FakeVm)) {
        change(self.inner.lock().unwrap().vms.get_mut(name).unwrap());
        self.write_host();
    }

    /// Changes the memory that the rest of the host uses, bytes.
    pub fn set_others(&self, others: u64) {
        self.inner.lock().unwrap().others = others;
        self.write_host();
    }

    /// Makes `pool` bytes of the host a pool of huge pages, of which `free` are free.
    pub fn set_pool(&self, pool: u64, free: u64) {
        self.inner.lock().unwrap().pool = (pool, free);
        self.write_host();
    }

    fn write_host(&self) {
        write_host(&self.inner.lock().unwrap(), self.folder.path());
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn write_host(inner: &MutexGuard<'_, Inner>, folder: &Path) {
    let used: u64 = inner.vms.values().map(|vm| vm.resident).sum::<u64>() + inner.others;
    let available = inner.total.saturating_sub(used);
    let text = format!(
        "MemTotal: {} kB\nMemAvailable: {} kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n\
         HugePages_Free: {}\nHugePages_Rsvd: 0\nHugepagesize: 2048 kB\nHugetlb: {} kB\n",
        inner.total >> 10,
        available >> 10,
        inner.pool.1 >> 21,
        inner.pool.0 >> 10
    );
    let beside = folder.join("proc/meminfo.new");
    fs::write(&beside, text).unwrap();
    fs::rename(beside, folder.join("proc/meminfo")).unwrap();
    // This process runs all fake VMMs, so they share one figure.
    let process = folder.join(format!("proc/{}", std::process::id()));
    if process.exists() {
        // The file is not rewritten, because it would be empty for a moment, and a reader would see another process.
        return;
    }
    fs::create_dir_all(process.join("fd")).unwrap();
    std::os::unix::fs::symlink("anon_inode:kvm-vm", process.join("fd/3")).unwrap();
    write_stat(folder, 77);
    let (uid, gid) = (getuid().as_raw(), getgid().as_raw());
    let ids = format!("Uid:\t{uid}\t{uid}\t{uid}\t{uid}\nGid:\t{gid}\t{gid}\t{gid}\t{gid}\n");
    fs::write(process.join("status"), ids + "RssAnon: 524288 kB\n").unwrap();
}

fn write_stat(folder: &Path, start_ticks: u64) {
    let fields = vec!["0"; 18].join(" ");
    let stat = folder.join(format!("proc/{}/stat", std::process::id()));
    let beside = folder.join("proc/stat.new");
    fs::write(&beside, format!("1 (vmm) S {fields} {start_ticks} 0")).unwrap();
    fs::rename(beside, stat).unwrap();
}

/// From now on, another process has the id.
fn end_process(folder: &Path) {
    write_stat(folder, 78);
}

fn serve(
    inner: &Mutex<Inner>,
    listeners: &Mutex<Vec<Listening>>,
    stop: &AtomicBool,
    folder: &Path,
) {
    let mut held: Vec<UnixStream> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let all: Vec<Listening> = listeners.lock().unwrap().clone();
        let mut polled: Vec<PollFd<'_>> = all
            .iter()
            .map(|(_, listener)| PollFd::new(listener.as_ref(), PollFlags::IN))
            .collect();
        let short = Timespec {
            tv_sec: 0,
            tv_nsec: 20_000_000,
        };
        poll(&mut polled, Some(&short)).unwrap();
        let ready: Vec<bool> = polled
            .iter()
            .map(|polled| polled.revents().contains(PollFlags::IN))
            .collect();
        drop(polled);
        for ((name, listener), _) in all.iter().zip(ready).filter(|(_, ready)| *ready) {
            let (stream, _) = listener.accept().unwrap();
            let mut inner = inner.lock().unwrap();
            let hangs = inner
                .vms
                .get(name)
                .is_some_and(|vm| vm.fault == Fault::Hang);
            if hangs {
                held.push(stream);
                continue;
            }
            if let Some(vm) = inner.vms.get_mut(name) {
                let resident = vm.resident;
                held.extend(answer(vm, stream));
                if vm.ended {
                    inner.vms.remove(name);
                    fs::remove_file(folder.join(format!("vms/{name}.sock"))).unwrap();
                    listeners.lock().unwrap().retain(|(known, _)| known != name);
                    end_process(folder);
                    write_host(&inner, folder);
                } else if vm.resident != resident {
                    write_host(&inner, folder);
                }
            }
        }
    }
}

/// Responds to a request. A returned stream stays open without a response.
fn answer(vm: &mut FakeVm, mut stream: UnixStream) -> Option<UnixStream> {
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    let Some(request) = Request::read(&mut stream) else {
        // The client only checked which process listens.
        return None;
    };
    vm.requests += 1;
    let bytes = match vm.fault {
        Fault::None => respond(vm, &request),
        Fault::Half => "HTTP/1.1 200 \r\nContent-Length: 999\r\n\r\n{\"config".to_owned(),
        Fault::Status500 => response(500, "", r#"["broken"]"#),
        Fault::Mute => {
            respond(vm, &request);
            return Some(stream);
        }
        Fault::Garbage | Fault::Hang => "lorem ipsum\r\n\r\n".to_owned(),
    };
    // The client may have given up.
    let _ = stream.write_all(bytes.as_bytes());
    None
}

fn respond(vm: &mut FakeVm, request: &Request) -> String {
    let (_, path) = request.target().split_once(' ').unwrap();
    let name = path.strip_prefix("/api/v1/").unwrap();
    match (name, vm.level) {
        ("vm.info", _) => ok(&format!(
            r#"{{"config":{{"memory":{{"size":{},"hugepages":{}}},"balloon":{{"size":{}}},"new":"field"}},"state":"{}","memory_actual_size":{}}}"#,
            vm.configured,
            vm.huge,
            vm.target,
            if vm.paused { "Paused" } else { "Running" },
            vm.configured - vm.claimed()
        )),
        ("vm.resize", _) if vm.refuses_balloon => refused(),
        ("vm.snapshot", _) if vm.refuses_snapshot || !vm.paused => refused(),
        ("vm.snapshot", _) => {
            let body: serde_json::Value = serde_json::from_str(&request.body).unwrap();
            let url = body["destination_url"].as_str().unwrap();
            let folder = Path::new(url.strip_prefix("file://").unwrap());
            for name in ["memory-0", "state.json"] {
                fs::write(folder.join(name), "{}").unwrap();
            }
            let config = serde_json::json!({"disks": [{"path": vm.disk}]});
            fs::write(folder.join("config.json"), config.to_string()).unwrap();
            done()
        }
        ("vm.counters", _) => {
            vm.io_bytes += vm.works;
            ok(&format!(
                r#"{{"_disk0":{{"read_bytes":{},"read_ops":77}}}}"#,
                vm.io_bytes
            ))
        }
        ("vmm.shutdown", _) => {
            vm.ended = true;
            done()
        }
        ("vm.pause", _) => {
            vm.paused = true;
            done()
        }
        ("vm.resume", _) if vm.refusals > 0 => {
            vm.refusals -= 1;
            refused()
        }
        ("vm.resume", _) => {
            vm.paused = false;
            done()
        }
        ("vm.resize", _) => {
            let resize: api::VmResize = serde_json::from_str(&request.body).unwrap();
            vm.resize(resize.desired_balloon.unwrap());
            done()
        }
        ("vm.balloon-stats", 1..) if !vm.talks => refused(),
        ("vm.balloon-stats", 1..) => ok(&format!(
            r#"{{"balloon_actual":{},"stats":{}}}"#,
            vm.claimed(),
            stats(vm)
        )),
        ("vm.reclaim-stats", 2..) => ok(&format!(
            r#"{{"configured_bytes":{},"resident_bytes":{},"reclaimed_bytes":{},"ballooned_bytes":{},"balloon_target_bytes":{},"guest":{{"age_ms":0,"stats":{}}}}}"#,
            vm.configured,
            vm.resident,
            vm.configured.saturating_sub(vm.resident),
            vm.claimed(),
            vm.target,
            stats(vm)
        )),
        ("vm.reclaim-thresholds", 2..) => {
            ok(&api::to_ascii_json(&api::ReclaimThresholds::default()).unwrap())
        }
        _ => response(404, "", r#"["Not Found"]"#),
    }
}

fn stats(vm: &FakeVm) -> String {
    format!(
        r#"{{"free_memory":{},"available_memory":{},"total_memory":{},"alloc_stalls":{},"major_faults":0,"oom_kills":0}}"#,
        vm.available, vm.available, vm.configured, vm.stalls
    )
}

fn done() -> String {
    response(204, "", "")
}

fn refused() -> String {
    response(500, "", r#"["refused"]"#)
}

fn ok(body: &str) -> String {
    response(200, "Connection: keep-alive\r\n", body)
}
