//! Runs several API clients that change a machine at random while its guest verifies memory and disks. Once all changes
//! are undone, the state of the VMM is checked. The test itself reboots the machine and starts migrations, because
//! clients would repeat them before the guest has verified anything.
//!
//! Each client begins with each of its actions once, so that a short run has all of them. `CHAOS_SEED=N` repeats their
//! choices, `CHAOS_SECONDS=1800` makes a run longer.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use parking_lot::Mutex;
use serde_json::{Value, json};
use strum::VariantArray as _;

use crate::MIB;
use crate::descriptors::open_tap;
use crate::literal_client::{Answer, request};
use crate::migration::move_in_vain;
use crate::random::Random;
use crate::vmm::Vmm;
use crate::wait::wait_for;

const CLIENTS: u64 = 3;
/// Disks that each client plugs and unplugs.
const DISKS_PER_CLIENT: u64 = 2;
/// Changes that each client makes while the guest makes one round, after the first of each kind.
const ACTIONS_PER_ROUND: u64 = 4;
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// Attempts of a client to save the paused machine.
const SNAPSHOT_ATTEMPTS: u32 = 8;
/// Time for the guest to release devices and processors.
const SETTLE_DEADLINE: Duration = Duration::from_secs(300);
/// Another client may have resumed the machine, and the test may be rebooting or moving it. Upstream's status for that is
/// 500.
const REFUSALS: [&str; 7] = [
    "Invalid VM state transition",
    "VM is not running",
    "pause it before it is saved",
    "The VM is being saved",
    "The snapshot was cancelled because the VM ended or was reset",
    "The VM already has a vsock device",
    REFUSAL_OF_MOVE,
];
const REFUSAL_OF_MOVE: &str = "The VM is being migrated";
/// Time for the guest to release vCPUs, for threads to end and clients' connections to close.
const RELEASE_DEADLINE: Duration = SETTLE_DEADLINE;

/// Data that a migration has sent when it breaks: less than any guest has.
const MOVED_BYTES_MAX: u64 = 1_000_000;

/// The identifier of the disk that the guest verifies. Clients change only its rate limit.
pub const KEPT_DISK: &str = "kept";
/// Size of the clients' disks, at least and at most. The guest may write to the beginning.
const DISK_MIB: (u64, u64) = (1, 32);

/// The limits of the changes.
#[derive(Debug, Clone)]
pub struct Limits {
    /// vCPUs at boot, and at most.
    pub vcpus: (u64, u64),
    /// Memory at boot, and at most, in MiB.
    pub ram_mib: (u64, u64),
    /// The largest balloon, bytes.
    pub balloon_bytes: u64,
    /// Whether the host lets the VMM create taps.
    pub has_taps: bool,
}

impl Limits {
    fn actions(&self) -> Vec<Action> {
        let all = Action::VARIANTS.iter().copied();
        let needs_tap = |action| matches!(action, Action::AddNet | Action::RemoveNet);
        all.filter(|action| self.has_taps || !needs_tap(*action))
            .collect()
    }
}

/// Whether the host lets this process create taps; if not, prints the reason.
#[must_use]
pub fn host_has_taps() -> bool {
    let name = format!("chaos{}", std::process::id());
    match open_tap(&name) {
        Ok(_) => true,
        Err(error) => {
            println!("     no interfaces are plugged: {error:#}");
            false
        }
    }
}

/// One action of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, strum::VariantArray)]
enum Action {
    PauseAndResume,
    Balloon,
    Vcpus,
    Ram,
    AddDisk,
    ResizeDisk,
    RemoveDisk,
    AddNet,
    RemoveNet,
    AddVsock,
    RemoveVsock,
    AddPmem,
    RemovePmem,
    LimitRate,
    CoreDump,
    Snapshot,
    LiveSnapshot,
    Read,
}

/// The requests of all clients.
#[derive(Debug, Default)]
pub struct Done(BTreeMap<Action, (u64, u64)>);

impl std::fmt::Display for Done {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (action, (accepted, all)) in &self.0 {
            write!(f, "{action:?} {accepted}/{all} ")?;
        }
        f.write_str("(accepted/all)")
    }
}

impl Done {
    /// # Errors
    /// An action was never accepted, so the run does not test it.
    pub fn expect_all(&self, limits: &Limits) -> Result<()> {
        for action in limits.actions() {
            let accepted = self.0.get(&action).map_or(0, |counts| counts.0);
            ensure!(accepted > 0, "{action:?} was never accepted: {self}");
        }
        Ok(())
    }
}

/// Length and seed of a run, from the environment.
///
/// # Errors
/// A value is not a number.
pub fn length_and_seed(default: Duration) -> Result<(Duration, u64)> {
    let number = |name: &str| match env::var(name) {
        Ok(text) => text
            .parse()
            .map(Some)
            .with_context(|| format!("{name}={text}")),
        Err(_) => Ok(None),
    };
    let seconds = number("CHAOS_SECONDS")?.map_or(default, Duration::from_secs);
    let seed = number("CHAOS_SEED")?.unwrap_or_else(crate::random::fresh_seed);
    println!("     CHAOS_SEED={seed}");
    Ok((seconds, seed))
}

/// The guest's progress, in verified rounds of its work. Clients make a number of changes for each: otherwise they
/// would take the processors of a busy machine from the guest, whose work is the purpose.
#[derive(Debug, Default)]
pub struct Progress {
    rounds: AtomicU64,
    /// One bit for each action that was accepted.
    accepted: AtomicU64,
}

impl Progress {
    /// The guest has made this many rounds.
    pub fn set(&self, rounds: u64) {
        self.rounds.store(rounds, Ordering::Release);
    }

    fn accept(&self, action: Action) {
        self.accepted
            .fetch_or(1 << action as u64, Ordering::Relaxed);
    }

    fn has(&self, action: Action) -> bool {
        self.accepted.load(Ordering::Relaxed) & 1 << action as u64 != 0
    }

    /// Whether each action was accepted once.
    #[must_use]
    pub fn has_all(&self, limits: &Limits) -> bool {
        let accepted = self.accepted.load(Ordering::Relaxed);
        accepted.count_ones() as usize == limits.actions().len()
    }

    fn actions(&self) -> u64 {
        ACTIONS_PER_ROUND * self.rounds.load(Ordering::Acquire)
    }
}

/// Lets clients of a VMM with this socket work, with files in `folder`, until `meanwhile`, which is called repeatedly,
/// returns true.
///
/// # Errors
/// `meanwhile` failed, or a request got no response or a failure of the VMM.
pub fn run_clients(
    (socket, folder): (PathBuf, PathBuf),
    limits: &Limits,
    seed: u64,
    progress: &Progress,
    mut meanwhile: impl FnMut() -> Result<bool>,
) -> Result<Done> {
    let stop = AtomicBool::new(false);
    let large_file = Mutex::new(());
    let actions = limits.actions();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let mut client = Client {
                    socket: &socket,
                    folder: &folder,
                    limits,
                    actions: &actions,
                    large_file: &large_file,
                    number,
                    progress,
                    random: Random(seed.wrapping_add(number)),
                    done: Done::default(),
                };
                let stop = &stop;
                scope.spawn(move || {
                    let worked = client.work(stop);
                    // The others need not continue after a failure.
                    stop.store(
                        worked.is_err() || stop.load(Ordering::Acquire),
                        Ordering::Release,
                    );
                    worked.map(|()| client.done)
                })
            })
            .collect();
        let watched = loop {
            match meanwhile() {
                Ok(false) if !stop.load(Ordering::Acquire) => {}
                Ok(_) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        stop.store(true, Ordering::Release);
        let mut all = Done::default();
        let mut failed = watched;
        for thread in threads {
            match thread.join().expect("clients do not panic") {
                Ok(done) => {
                    for (action, counts) in done.0 {
                        let sum = all.0.entry(action).or_default();
                        *sum = (sum.0 + counts.0, sum.1 + counts.1);
                    }
                }
                Err(error) => failed = failed.and(Err(error)),
            }
        }
        failed.with_context(|| all.to_string()).map(|()| all)
    })
}

/// Reboots the machine, or begins to move it to another process over a connection that breaks: in turn, the first time a
/// reboot.
#[derive(Debug)]
pub struct Upheavals {
    random: Random,
    reboots: u64,
    moves: u64,
}

impl std::fmt::Display for Upheavals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} reboots, {} moves in vain", self.reboots, self.moves)
    }
}

impl Upheavals {
    /// None so far.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self {
            random: Random(seed),
            reboots: 0,
            moves: 0,
        }
    }

    /// Makes the next one; returns whether it was a reboot.
    ///
    /// # Errors
    /// The VMM refuses it or does not complete it.
    pub fn next(&mut self, vmm: &Vmm) -> Result<bool> {
        let reboots = self.reboots == self.moves;
        if reboots {
            vmm.put("vm.reboot", None)?;
            self.reboots += 1;
        } else {
            let bytes = 1 + self.random.below(MOVED_BYTES_MAX);
            move_in_vain(vmm, bytes as usize).with_context(|| format!("{bytes} bytes"))?;
            self.moves += 1;
        }
        Ok(reboots)
    }

    /// Whether there was at least one of each kind.
    #[must_use]
    pub const fn are_of_each_kind(&self) -> bool {
        self.reboots > 0 && self.moves > 0
    }
}

struct Client<'a> {
    socket: &'a Path,
    folder: &'a Path,
    limits: &'a Limits,
    actions: &'a [Action],
    /// Files as large as the guest's memory exist one at a time.
    large_file: &'a Mutex<()>,
    number: u64,
    progress: &'a Progress,
    random: Random,
    done: Done,
}

impl Client<'_> {
    fn work(&mut self, stop: &AtomicBool) -> Result<()> {
        let first = self.actions.len() as u64;
        let mut steps = 0;
        let at_start = self.progress.actions();
        while !stop.load(Ordering::Acquire) {
            if steps >= first + self.progress.actions() - at_start {
                std::thread::park_timeout(POLL_INTERVAL);
                continue;
            }
            let action = if steps < first {
                let choice = (steps + self.number * first / CLIENTS) % first;
                self.actions[choice as usize]
            } else {
                self.choose()
            };
            steps += 1;
            let accepted = self.act(action).with_context(|| format!("{action:?}"))?;
            if accepted {
                self.progress.accept(action);
            }
            let counts = self.done.0.entry(action).or_default();
            *counts = (counts.0 + u64::from(accepted), counts.1 + 1);
        }
        Ok(())
    }

    /// Any action, but often one that has not been accepted yet, without which the run does not end.
    fn choose(&mut self) -> Action {
        let missing = self.actions.iter().copied();
        let missing: Vec<_> = missing.filter(|it| !self.progress.has(*it)).collect();
        let from = match self.random.below(2) {
            0 if !missing.is_empty() => &missing,
            _ => self.actions,
        };
        from[self.random.below(from.len() as u64) as usize]
    }

    fn act(&mut self, action: Action) -> Result<bool> {
        match action {
            Action::PauseAndResume => {
                let paused = self.pause()?;
                self.get("vm.reclaim-stats")?;
                self.resume()?;
                Ok(paused)
            }
            Action::Balloon => {
                let pages = self.random.below(self.limits.balloon_bytes / 4096 + 1);
                self.resize("desired_balloon", pages * 4096)
            }
            Action::Vcpus => {
                let (_, max) = self.limits.vcpus;
                let count = 1 + self.random.below(max);
                self.resize("desired_vcpus", count)
            }
            Action::Ram => {
                let (min, max) = self.limits.ram_mib;
                let mib = min + self.random.below((max - min) / 2 + 1) * 2;
                self.resize("desired_ram", mib * MIB)
            }
            Action::AddDisk => {
                let id = self.disk();
                let path = self.file(&id, 16 * MIB)?;
                let body = json!({"id": id, "path": path, "image_type": "Raw"});
                self.put("vm.add-disk", Some(&body))
            }
            Action::ResizeDisk => {
                let id = self.disk();
                let (min, max) = DISK_MIB;
                let bytes = (min + self.random.below(max - min + 1)) * MIB;
                let body = json!({"id": id, "desired_size": bytes});
                self.put("vm.resize-disk", Some(&body))
            }
            Action::RemoveDisk => {
                let id = self.disk();
                self.remove(&id)
            }
            Action::AddNet => self.put("vm.add-net", Some(&json!({"id": self.own("net")}))),
            Action::RemoveNet => self.remove(&self.own("net")),
            Action::AddVsock => {
                let id = self.own("vsock");
                let socket = self.folder.join(&id);
                let body = json!({"id": id, "cid": 3 + self.number, "socket": socket});
                self.put("vm.add-vsock", Some(&body))
            }
            Action::RemoveVsock => self.remove(&self.own("vsock")),
            Action::AddPmem => {
                let id = self.own("pmem");
                let path = self.file(&id, 2 * MIB)?;
                self.put("vm.add-pmem", Some(&json!({"id": id, "file": path})))
            }
            Action::RemovePmem => self.remove(&self.own("pmem")),
            Action::LimitRate => self.limit_rate(),
            Action::CoreDump => self.dump_core(),
            Action::Snapshot => self.save_paused(),
            Action::LiveSnapshot => {
                let saved = self.save(json!({"live": true, "keep_paused": true}));
                self.resume()?;
                saved
            }
            Action::Read => {
                for endpoint in ["vm.info", "vm.counters", "vm.reclaim-stats"] {
                    self.get(endpoint)?;
                }
                Ok(true)
            }
        }
    }

    /// A host that does not run the vCPUs for seconds cannot stop them either, which is an error but not a fault.
    fn pause(&self) -> Result<bool> {
        let answer = request(self.socket, "PUT", "vm.pause", None)?;
        Ok(is_accepted(&answer))
    }

    /// A machine that stays paused makes no rounds, for which all clients would wait.
    fn resume(&self) -> Result<()> {
        while is_of_move(&self.answer("PUT", "vm.resume", None)?) {
            std::thread::park_timeout(POLL_INTERVAL);
        }
        Ok(())
    }

    /// Sets or removes a limit of the guest's disk or of a client's.
    fn limit_rate(&mut self) -> Result<bool> {
        let id = match self.random.below(2) {
            0 => KEPT_DISK.to_owned(),
            _ => self.disk(),
        };
        let mut body = json!({ "id": id });
        let bucket = |size: u64| json!({"size": size, "refill_time": 10});
        match self.random.below(3) {
            0 => {}
            1 => body["rate_limiter_config"] = json!({"ops": bucket(1 + self.random.below(16))}),
            _ => body["rate_limiter_config"] = json!({"bandwidth": bucket(64 << 10)}),
        }
        self.put("vm.update-rate-limiter", Some(&body))
    }

    fn dump_core(&self) -> Result<bool> {
        let _one = self.large_file.lock();
        let path = self.folder.join(self.own("core"));
        let url = format!("file://{}", path.display());
        let written = self.put("vm.coredump", Some(&json!({"destination_url": url})))?;
        ensure!(
            written == path.exists(),
            "{url} must exist: {written}; it exists: {}",
            path.exists()
        );
        if written {
            fs::remove_file(path)?;
        }
        Ok(written)
    }

    /// Pauses the machine and saves it. The guest must release what it is about to lose first, so there are several
    /// attempts.
    fn save_paused(&self) -> Result<bool> {
        for _ in 0..SNAPSHOT_ATTEMPTS {
            self.pause()?;
            let saved = self.save(json!({}));
            self.resume()?;
            if saved? {
                return Ok(true);
            }
            std::thread::park_timeout(POLL_INTERVAL);
        }
        Ok(false)
    }

    /// Saves the machine in a folder, which is removed.
    fn save(&self, mut body: Value) -> Result<bool> {
        let _one = self.large_file.lock();
        let folder = self.folder.join(self.own("snapshot"));
        fs::create_dir(&folder)?;
        body["destination_url"] = format!("file://{}", folder.display()).into();
        let saved = self.put("vm.snapshot", Some(&body))?;
        if saved {
            ensure!(folder.join("state.json").exists(), "the snapshot is absent");
            fs::remove_dir_all(&folder)?;
        } else {
            fs::remove_dir(&folder).context("a snapshot that failed left files")?;
        }
        Ok(saved)
    }

    fn disk(&mut self) -> String {
        format!(
            "disk-{}-{}",
            self.number,
            self.random.below(DISKS_PER_CLIENT)
        )
    }

    /// The name of the client's only thing of this kind.
    fn own(&self, kind: &str) -> String {
        format!("{kind}-{}", self.number)
    }

    /// The file behind a device, which is kept while the device is plugged, resized and unplugged.
    fn file(&self, id: &str, bytes: u64) -> Result<PathBuf> {
        let path = self.folder.join(id);
        if !path.exists() {
            fs::File::create(&path)?.set_len(bytes)?;
        }
        Ok(path)
    }

    fn resize(&self, what: &str, to: u64) -> Result<bool> {
        self.put("vm.resize", Some(&json!({ what: to })))
    }

    fn remove(&self, id: &str) -> Result<bool> {
        self.put("vm.remove-device", Some(&json!({ "id": id })))
    }

    fn get(&self, endpoint: &str) -> Result<bool> {
        let answer = self.answer("GET", endpoint, None)?;
        Ok(is_accepted(&answer))
    }

    fn put(&self, endpoint: &str, body: Option<&Value>) -> Result<bool> {
        let answer = self.answer("PUT", endpoint, body)?;
        Ok(is_accepted(&answer))
    }

    /// Others may have made the request impossible, but the VMM must not fail.
    fn answer(&self, method: &str, endpoint: &str, body: Option<&Value>) -> Result<Answer> {
        let text = body.map(Value::to_string);
        let answer = request(self.socket, method, endpoint, text.as_deref())?;
        let body = answer.body.as_deref().unwrap_or_default();
        let is_refusal =
            answer.status < 500 || REFUSALS.into_iter().any(|text| body.contains(text));
        ensure!(
            is_refusal,
            "{endpoint} {}: {answer:?}",
            text.unwrap_or_default()
        );
        Ok(answer)
    }
}

fn is_accepted(answer: &Answer) -> bool {
    matches!(answer.status, 200 | 204)
}

/// Whether the request was refused because the machine is being moved.
fn is_of_move(answer: &Answer) -> bool {
    let body = answer.body.as_deref();
    !is_accepted(answer) && body.is_some_and(|body| body.contains(REFUSAL_OF_MOVE))
}

/// Undoes the changes: the machine runs with the devices, vCPUs and memory that it had at boot.
///
/// # Errors
/// The guest does not release something.
pub fn settle(vmm: &Vmm, limits: &Limits) -> Result<()> {
    let put = |endpoint: &str, body: Value| {
        let answer = vmm.request("PUT", endpoint, Some(&body.to_string()))?;
        ensure!(answer.status < 500, "{endpoint} {body}: {answer:?}");
        Ok(matches!(answer.status, 200 | 204))
    };
    wait_for("a running machine", SETTLE_DEADLINE, || {
        if vmm.get("vm.info")?["state"] == "Running" {
            return Ok(Some(()));
        }
        vmm.request("PUT", "vm.resume", None)?;
        Ok(None)
    })?;
    for (what, to) in [
        ("desired_balloon", 0),
        ("desired_vcpus", limits.vcpus.0),
        ("desired_ram", limits.ram_mib.0 * MIB),
    ] {
        // A removal that is under way must end first.
        wait_for(what, SETTLE_DEADLINE, || {
            Ok(put("vm.resize", json!({ what: to }))?.then_some(()))
        })?;
    }
    put("vm.update-rate-limiter", json!({ "id": KEPT_DISK }))?;
    let mut ids = Vec::new();
    for client in 0..CLIENTS {
        ids.extend(["net", "vsock", "pmem"].map(|kind| format!("{kind}-{client}")));
        ids.extend((0..DISKS_PER_CLIENT).map(|disk| format!("disk-{client}-{disk}")));
    }
    for id in ids {
        wait_for(&id, SETTLE_DEADLINE, || {
            let info = vmm.get("vm.info")?;
            if info["device_tree"][&id].is_null() {
                return Ok(Some(()));
            }
            put("vm.remove-device", json!({ "id": id }))?;
            Ok(None)
        })?;
    }
    Ok(())
}

/// Resources of a VMM at one moment: descriptors, threads, mapped files and sockets in its folder, each with their
/// number.
#[derive(Debug)]
pub struct Belongings(BTreeMap<String, usize>);

impl Belongings {
    /// Those of a running VMM, without the vCPUs' descriptors: KVM keeps the vCPUs that have been removed.
    ///
    /// # Errors
    /// It has ended.
    pub fn of(vmm: &Vmm) -> Result<Self> {
        let proc = PathBuf::from(format!("/proc/{}", vmm.pid()));
        let mut all = BTreeMap::new();
        let mut add =
            |kind: &str, name: &str| *all.entry(format!("{kind} {name}")).or_default() += 1;
        // Files that disappear in the meantime are skipped.
        for fd in fs::read_dir(proc.join("fd"))?.flatten() {
            if let Ok(link) = fs::read_link(fd.path()) {
                let text = link.to_string_lossy();
                // Without the number of an inode.
                let name = text.split_once(":[").map_or(&*text, |(kind, _)| kind);
                if !name.starts_with("anon_inode:kvm-vcpu") {
                    add("descriptor", name);
                }
            }
        }
        for task in fs::read_dir(proc.join("task"))?.flatten() {
            if let Ok(name) = fs::read_to_string(task.path().join("comm"))
                // The kernel creates these in a process.
                && !name.starts_with("kvm-")
                && !name.starts_with("iou-wrk-")
            {
                add("thread", name.trim());
            }
        }
        for line in fs::read_to_string(proc.join("maps"))?.lines() {
            if let Some(path) = line.split_whitespace().nth(5)
                && path.starts_with('/')
            {
                add("mapping", path);
            }
        }
        for entry in fs::read_dir(vmm.folder())?.flatten() {
            if entry.file_type()?.is_socket() {
                add("socket", &entry.file_name().to_string_lossy());
            }
        }
        Ok(Self(all))
    }

    /// Waits until the VMM has nothing more than this.
    ///
    /// # Errors
    /// It keeps something.
    pub fn expect_no_more(&self, vmm: &Vmm) -> Result<()> {
        let mut left = Vec::new();
        let released = wait_for("the release of everything", RELEASE_DEADLINE, || {
            let mut now = Self::of(vmm)?.0;
            now.retain(|name, count| *count > self.0.get(name).copied().unwrap_or(0));
            left = now.into_iter().collect();
            Ok(left.is_empty().then_some(()))
        });
        released.with_context(|| format!("the VMM keeps {left:?} of {:?}", self.0))
    }
}
