//! One round of queries to a VMM, at the level that it supports.
//!
//! Level 0 is `vm.info`, which every Cloud Hypervisor has, with the resident memory taken from the VMM's process. Level
//! 1 adds `vm.balloon-stats`, level 2 `vm.reclaim-stats`. If a VMM returns 404, it lacks the endpoint. Any other error
//! is inconclusive, because plain Cloud Hypervisor returns 500 for a guest without a driver.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use api::{Client, ClientError, Endpoint, Peer, ReclaimStats};
use serde::Deserialize;
use thiserror::Error;

use super::RequestCounters;
use crate::host::{Process, ProcessMemory, cpu_ms};
use crate::model::{
    Bytes, FeatureLevel, GuestClaims, HugePool, Interlock, ReclaimFigures, VmSample,
};
use crate::moves::Devices;

/// Counters of `vm.counters` that count transferred bytes: of disks, and of networks.
const TRANSFERS: [&str; 4] = ["read_bytes", "write_bytes", "rx_bytes", "tx_bytes"];
/// HTTP status of a VMM that does not know an endpoint or has no VM.
const NOT_FOUND: u16 = 404;

/// The result of one round.
#[derive(Clone, Debug, PartialEq)]
pub struct VmReading {
    /// The VMM's process, by its id in this process's pid namespace.
    pub pid: i32,
    /// An unambiguous handle of the process; absent if it cannot be looked up.
    pub process: Option<Process>,
    /// Whether its memory is in the host's pool of huge pages, which is not managed.
    pub huge_pages: bool,
    /// Its use of that pool.
    pub pool: PoolUse,
    /// The level of its interface.
    pub level: FeatureLevel,
    /// Memory of the VM with everything plugged in.
    pub configured: Bytes,
    /// Whether it has a balloon device.
    pub has_balloon: bool,
    /// The reason why it must not be changed, if any.
    pub interlock: Option<Interlock>,
    /// The figures.
    pub sample: VmSample,
    /// Bytes that the guest named on the reporting and inflate queues since its boot.
    pub requested: Bytes,
    /// Its activity since its start; absent if not requested, or if its VMM does not report it.
    pub activity: Option<Activity>,
    /// The device that keeps it on this host, if any.
    pub fixed_by: Option<&'static str>,
}

/// Work of a VM since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// Processor time of the VMM, with that of the vCPUs, ms.
    pub cpu_ms: u64,
    /// Bytes that its disks and networks have transferred.
    pub io_bytes: u64,
}

/// A VM's use of the host's pool of huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolUse {
    /// Memory that it holds.
    pub held: Bytes,
    /// Memory that it can hold, as reported by its VMM.
    pub configured: Bytes,
    /// The size of its pages, if not the host's default.
    pub page: Option<Bytes>,
}

impl PoolUse {
    /// Memory that it may still take of the free pages of `pool`. A claim beyond the pool's size does not reduce the
    /// memory of others.
    pub(crate) fn callable(&self, pool: &HugePool) -> Bytes {
        let counts =
            self.page.is_none_or(|page| page == pool.page) && self.configured <= pool.total;
        if counts {
            self.configured - self.held
        } else {
            Bytes::ZERO
        }
    }
}

/// A generous maximum of a VMM's own memory: a process with more contains guest memory.
const OWN_MEMORY_MAX: Bytes = Bytes::mib(256);

impl VmReading {
    /// Merges the kernel's figures of the VMM's process.
    fn fill_from_process(&mut self, memory: ProcessMemory) {
        // The configuration does not show that a file is in a file system of huge pages. A few huge pages, or the mere
        // claim of a VMM whose memory is elsewhere, do not remove a VM from the accounts of other memory: it would then
        // be in no account, and neither ballooned nor limited.
        self.huge_pages =
            memory.huge > memory.resident || self.huge_pages && memory.resident <= OWN_MEMORY_MAX;
        if self.huge_pages && self.pool.configured == Bytes::ZERO {
            self.pool.configured = self.configured;
        }
        let resident = if self.level < FeatureLevel::L2 {
            memory.resident + memory.huge
        } else {
            // The VMM's figure is more exact, but cannot hide memory that the kernel counts. It may be higher, because
            // of a shared file that the process has not mapped, but at most the memory that the VM may take anyway.
            self.sample.resident.max(memory.resident - OWN_MEMORY_MAX)
        };
        self.sample.resident = resident.min(self.configured);
        // Memory cannot be both resident and swapped.
        let rest = self.configured - self.sample.resident;
        self.sample.swapped = self.sample.swapped.min(rest);
        self.pool.held = memory.huge;
    }
}

#[cfg(test)]
impl VmReading {
    /// A reading of a VM of 4 GiB with a balloon and otherwise defaults.
    pub(crate) fn of_4_gib(sample: VmSample) -> Self {
        Self {
            pid: 1,
            process: None,
            huge_pages: false,
            pool: PoolUse::default(),
            level: FeatureLevel::L2,
            configured: Bytes::gib(4),
            has_balloon: true,
            interlock: None,
            sample,
            requested: Bytes::ZERO,
            activity: None,
            fixed_by: None,
        }
    }
}

/// Reasons why a round failed.
#[derive(Debug, Error, strum::IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum SampleFailure {
    /// A request failed.
    #[error("{} failed", op.name())]
    Request {
        /// The endpoint.
        op: Endpoint,
        /// The reason.
        #[source]
        source: ClientError,
    },
    /// The response has an unexpected format.
    #[error("unexpected response to {}", op.name())]
    Form {
        /// The endpoint.
        op: Endpoint,
        /// The parser's error.
        #[source]
        source: serde_json::Error,
    },
    /// Its resident memory cannot be read. It is unknown, not 0.
    #[error("the memory of process {pid} cannot be read")]
    Resident {
        /// The process.
        pid: i32,
        /// The error from the system.
        #[source]
        source: std::io::Error,
    },
    /// The listener is not the owner of the socket.
    #[error("the socket belongs to user {owner}, and a process of user {listener} listens there")]
    Owner {
        /// The owner of the file.
        owner: u32,
        /// The user who listens.
        listener: u32,
    },
    /// The VMM runs, but has no VM.
    #[error("the VMM has no VM")]
    NoVm,
}

impl SampleFailure {
    /// A short word for metrics and tables.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Request { source, .. } => failure_kind(source),
            other => other.into(),
        }
    }
}

/// A short word for a failed request.
pub(crate) fn failure_kind(error: &ClientError) -> &'static str {
    match error {
        ClientError::NoSocket { .. } => "no-socket",
        ClientError::Refused { .. } => "refused",
        ClientError::TimedOut { .. } => "timeout",
        ClientError::Server(_) => "status",
        ClientError::Decode { .. } | ClientError::MissingBody { .. } => "form",
        ClientError::Response(_) => "wire",
        ClientError::OtherPeer { .. } => "replaced",
        _ => "io",
    }
}

/// The relevant part of `vm.info`. It is parsed separately, because a newer VMM's configuration may contain irrelevant
/// values that this version does not know.
#[derive(Debug, Deserialize)]
pub(crate) struct Info {
    config: InfoConfig,
    state: String,
    #[serde(default)]
    memory_actual_size: u64,
    #[serde(skip)]
    fixed_by: Option<&'static str>,
}

/// The part of it that shows whether the VM could move to another host.
#[derive(Debug, Deserialize)]
struct InfoDevices {
    config: Devices,
}

impl Info {
    /// Reads a response.
    fn read(body: &str) -> Result<Self, serde_json::Error> {
        let info = serde_json::from_str(body)?;
        // A device in an unknown form is no reason to have no sample.
        let devices = serde_json::from_str::<InfoDevices>(body);
        let fixed_by = devices.map_or(None, |devices| devices.config.fixed_by());
        Ok(Self { fixed_by, ..info })
    }
}

#[derive(Debug, Deserialize)]
struct InfoConfig {
    memory: InfoMemory,
    #[serde(default)]
    balloon: Option<InfoBalloon>,
}

#[derive(Debug, Deserialize)]
struct InfoMemory {
    size: u64,
    #[serde(default)]
    hotplugged_size: Option<u64>,
    #[serde(default)]
    hotplug_size: Option<u64>,
    #[serde(default)]
    hotplug_method: Option<String>,
    #[serde(default)]
    zones: Option<Vec<InfoZone>>,
    #[serde(default)]
    hugepages: bool,
    #[serde(default)]
    hugepage_size: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct InfoZone {
    size: u64,
    #[serde(default)]
    hotplugged_size: Option<u64>,
    #[serde(default)]
    hotplug_size: Option<u64>,
    #[serde(default)]
    hugepages: bool,
    #[serde(default)]
    hugepage_size: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct InfoBalloon {
    size: u64,
}

impl InfoMemory {
    /// A VM with some of its memory in huge pages counts as having all of it there, because its zones cannot be
    /// distinguished from outside.
    fn is_huge(&self) -> bool {
        self.hugepages || self.zones.iter().flatten().any(|zone| zone.hugepages)
    }

    fn configured(&self) -> Bytes {
        let zones = self.zones.iter().flatten();
        self.own() + zones.map(InfoZone::configured).sum::<Bytes>()
    }

    /// Memory that a guest can take beyond that if its VMM does not report it. With virtio-mem it is all of the region:
    /// plain Cloud Hypervisor shows it to the guest from the start.
    fn obtainable(&self) -> Bytes {
        if self.hotplug_method.as_deref() != Some("VirtioMem") {
            return Bytes::ZERO;
        }
        let beyond = |size: Option<u64>, plugged: Option<u64>| {
            Bytes(size.unwrap_or(0)) - Bytes(plugged.unwrap_or(0))
        };
        let zones = self.zones.iter().flatten();
        let in_zones = zones.map(|zone| beyond(zone.hotplug_size, zone.hotplugged_size));
        beyond(self.hotplug_size, self.hotplugged_size) + in_zones.sum::<Bytes>()
    }

    /// RAM that belongs to no zone.
    fn own(&self) -> Bytes {
        Bytes(self.size) + Bytes(self.hotplugged_size.unwrap_or(0))
    }

    /// The part of it in huge pages.
    fn pool(&self) -> PoolUse {
        let zones = || self.zones.iter().flatten().filter(|zone| zone.hugepages);
        let own = if self.hugepages {
            self.own()
        } else {
            Bytes::ZERO
        };
        let own_page = self.hugepage_size.filter(|_| self.hugepages);
        let page = own_page.or_else(|| zones().find_map(|zone| zone.hugepage_size));
        PoolUse {
            held: Bytes::ZERO,
            configured: own + zones().map(InfoZone::configured).sum::<Bytes>(),
            page: page.map(Bytes),
        }
    }
}

impl InfoZone {
    fn configured(&self) -> Bytes {
        Bytes(self.size) + Bytes(self.hotplugged_size.unwrap_or(0))
    }
}

/// Paths of the kernel's files about the VMM's process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProcessFiles<'a> {
    pub(crate) proc: &'a Path,
    pub(crate) pid: i32,
}

/// The parameters of a round.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Round<'a> {
    pub(crate) client: &'a Client,
    pub(crate) process: ProcessFiles<'a>,
    pub(crate) counters: &'a RequestCounters,
    /// The planner's clock at the start.
    pub(crate) at_ms: u64,
    /// Whether the guest follows a reporting policy, if that is known.
    pub(crate) policy_in_effect: Option<bool>,
    /// If a guest's figures are older than this, new ones are requested.
    pub(crate) guest_age_ms_max: u64,
    /// Whether to find out what the VM has done.
    pub(crate) wants_activity: bool,
    /// The guest's last claims. If a guest stops responding, its claims become outdated, but remain known.
    pub(crate) claims_before: Option<GuestClaims>,
}

/// Sends all other queries once. If an endpoint is missing, `level_max` is reduced.
pub(crate) fn read_vm(
    round: Round<'_>,
    info: &Info,
    level_max: &mut FeatureLevel,
) -> Result<VmReading, SampleFailure> {
    let mut reading = from_info(info, round.process.pid, round.at_ms);
    let reclaim = match *level_max {
        FeatureLevel::L2 => optional(round, Endpoint::VmReclaimStats)?,
        _ => Answer::Absent,
    };
    match reclaim {
        Answer::Body(body) => {
            let stats: ReclaimStats = parse(Endpoint::VmReclaimStats, &body)?;
            fill_from_reclaim(&mut reading, &stats, round.at_ms);
            reading.sample.reclaim = reading.sample.reclaim.map(|figures| ReclaimFigures {
                policy_in_effect: round
                    .policy_in_effect
                    .unwrap_or_else(|| policy_in_effect(round)),
                ..figures
            });
        }
        Answer::Absent => *level_max = FeatureLevel::L1.min(*level_max),
        Answer::Nothing => {}
    }
    let process = round.process;
    match ProcessMemory::read(process.proc, process.pid) {
        Ok(memory) => reading.fill_from_process(memory),
        // In this case, only the VMM's own data is known.
        Err(_) if reading.level == FeatureLevel::L2 => {}
        Err(source) => {
            let pid = process.pid;
            return Err(SampleFailure::Resident { pid, source });
        }
    }
    let fresh = round.at_ms.saturating_sub(round.guest_age_ms_max);
    let known = reading
        .sample
        .guest
        .is_some_and(|guest| guest.at_ms >= fresh);
    if *level_max >= FeatureLevel::L1 && !known && reading.has_balloon {
        ask_guest(round, &mut reading, level_max)?;
    }
    if round.wants_activity {
        reading.activity = activity(round);
    }
    if reading.sample.guest.is_none() && round.claims_before.is_some() {
        reading.sample.guest = round.claims_before;
        reading.level = reading.level.max(FeatureLevel::L1);
    }
    Ok(reading)
}

/// Requests the guest's figures. If it does not respond, the host's measurements remain valid.
fn ask_guest(
    round: Round<'_>,
    reading: &mut VmReading,
    level_max: &mut FeatureLevel,
) -> Result<(), SampleFailure> {
    let op = Endpoint::VmBalloonStats;
    match optional(round, op)? {
        Answer::Body(body) => {
            let stats: api::BalloonStatsResponse = parse(op, &body)?;
            if reading.level == FeatureLevel::L0 {
                reading.level = FeatureLevel::L1;
                reading.sample.ballooned = Bytes(stats.balloon_actual).min(reading.configured);
            }
            let said_ms = round.at_ms.saturating_sub(stats.age_ms.unwrap_or(0));
            reading.sample.guest = claims(&stats.stats, said_ms).or(reading.sample.guest);
        }
        Answer::Absent if *level_max == FeatureLevel::L1 => *level_max = FeatureLevel::L0,
        Answer::Absent | Answer::Nothing => {}
    }
    Ok(())
}

/// The activity of the VM. A VM whose VMM does not report it is never idle.
fn activity(round: Round<'_>) -> Option<Activity> {
    let ProcessFiles { proc, pid } = round.process;
    let cpu_ms = cpu_ms(proc, pid).ok()?;
    let Ok(Answer::Body(body)) = optional(round, Endpoint::VmCounters) else {
        return None;
    };
    let devices: BTreeMap<String, BTreeMap<String, u64>> = serde_json::from_str(&body).ok()?;
    let counters = devices.values().flatten();
    let transfers = counters.filter(|(name, _)| TRANSFERS.contains(&name.as_str()));
    let io_bytes = transfers.fold(0_u64, |sum, (_, bytes)| sum.saturating_add(*bytes));
    Some(Activity { cpu_ms, io_bytes })
}

fn policy_in_effect(round: Round<'_>) -> bool {
    let Ok(Answer::Body(body)) = optional(round, Endpoint::VmReclaimThresholds) else {
        return false;
    };
    serde_json::from_str::<api::ReclaimThresholds>(&body)
        .is_ok_and(|thresholds| thresholds.reporting_policy.in_effect)
}

/// The first query, and the process that responded.
pub(crate) fn read_info(
    client: &Client,
    counters: &RequestCounters,
) -> Result<(Info, Peer), SampleFailure> {
    let op = Endpoint::VmInfo;
    let answer = counted(counters, op, || client.get_with_peer(op));
    match answer {
        Ok((Some(body), peer)) => {
            let info = Info::read(&body);
            Ok((
                info.map_err(|source| SampleFailure::Form { op, source })?,
                peer,
            ))
        }
        Ok((None, _)) => Err(SampleFailure::NoVm),
        Err(source) if means_no_vm(&source) => Err(SampleFailure::NoVm),
        Err(source) => Err(SampleFailure::Request { op, source }),
    }
}

/// A VMM without a VM returns 404; older versions of upstream return 500 with this reason in the chain.
pub(crate) fn means_no_vm(error: &ClientError) -> bool {
    match error {
        ClientError::Server(error) if error.status == NOT_FOUND => true,
        ClientError::Server(error) => error
            .chain()
            .any(|text| text.contains("VM is not created") || text.contains("VmNotCreated")),
        _ => false,
    }
}

fn from_info(info: &Info, pid: i32, at_ms: u64) -> VmReading {
    // A guest that was given less memory keeps what it has until it is rebooted.
    let configured = info.config.memory.configured();
    let configured = configured.max(Bytes(info.memory_actual_size));
    let balloon = info.config.balloon.as_ref();
    let actual = Bytes(info.memory_actual_size).min(configured);
    VmReading {
        pid,
        process: None,
        huge_pages: info.config.memory.is_huge(),
        pool: info.config.memory.pool(),
        level: FeatureLevel::L0,
        configured,
        has_balloon: balloon.is_some(),
        interlock: match info.state.as_str() {
            "Running" => None,
            "Paused" | "BreakPoint" => Some(Interlock::Paused),
            _ => Some(Interlock::Transition),
        },
        sample: VmSample {
            at_ms,
            balloon_target: balloon.map_or(Bytes::ZERO, |balloon| Bytes(balloon.size)),
            // Before boot there is no actual size.
            ballooned: if info.memory_actual_size == 0 {
                Bytes::ZERO
            } else {
                configured - actual
            },
            obtainable: info.config.memory.obtainable(),
            ..VmSample::default()
        },
        requested: Bytes::ZERO,
        activity: None,
        fixed_by: info.fixed_by,
    }
}

fn fill_from_reclaim(reading: &mut VmReading, stats: &ReclaimStats, at_ms: u64) {
    let paths = [&stats.report, &stats.inflate, &stats.hint];
    let sum = |figure: fn(&api::ReclaimPath) -> u64| -> Bytes {
        paths.iter().map(|path| Bytes(figure(path))).sum()
    };
    reading.level = FeatureLevel::L2;
    reading.configured = Bytes(stats.configured_bytes);
    reading.requested = sum(|path| path.requested_bytes);
    let sample = &mut reading.sample;
    sample.balloon_target = Bytes(stats.balloon_target_bytes);
    sample.ballooned = Bytes(stats.ballooned_bytes);
    // Memory that the kernel keeps because it belongs to a huge page in use is not available to others. Without a
    // control separate group, the VMM cannot determine it.
    let charged = match stats.charged_method.as_str() {
        "cgroup" => Bytes(stats.charged_bytes) - OWN_MEMORY_MAX,
        _ => Bytes::ZERO,
    };
    sample.resident = Bytes(stats.resident_bytes).max(charged);
    sample.swapped = Bytes(stats.swapped_bytes.unwrap_or(0));
    if let Some(obtainable) = stats.obtainable_bytes {
        sample.obtainable = Bytes(obtainable);
    }
    sample.guest = stats
        .guest
        .as_ref()
        .and_then(|guest| claims(&guest.stats, at_ms.saturating_sub(guest.age_ms)));
    sample.reclaim = Some(ReclaimFigures {
        reporting_active: stats.reporting.active,
        inhibited: stats.inhibited.is_some(),
        policy_in_effect: false,
        reported: Bytes(stats.report.requested_bytes),
        discarded: sum(|path| path.discarded_bytes),
        repopulated: Bytes(stats.repopulated_bytes),
        skipped: sum(api::ReclaimPath::skipped_bytes_total),
        report_p99_us: stats.report.latency_us.p99,
    });
}

/// The guest's figures; `None` unless it sent both that decisions need.
fn claims(stats: &api::BalloonStats, at_ms: u64) -> Option<GuestClaims> {
    Some(GuestClaims {
        at_ms,
        free: Bytes(stats.free_memory?),
        available: Bytes(stats.available_memory?),
        alloc_stalls: stats.alloc_stalls,
        major_faults: stats.major_faults,
        swap_in: stats.swap_in.map(Bytes),
        oom_kills: stats.oom_kills,
    })
}

/// The result of a query to an endpoint that a VMM may lack.
enum Answer {
    /// A body.
    Body(String),
    /// The VMM lacks it.
    Absent,
    /// The VMM has no data now.
    Nothing,
}

/// Queries an endpoint that a VMM may lack. Only a broken connection fails the round.
fn optional(round: Round<'_>, op: Endpoint) -> Result<Answer, SampleFailure> {
    match request(round, op) {
        Ok(Some(body)) => Ok(Answer::Body(body)),
        Ok(None) => Ok(Answer::Nothing),
        Err(SampleFailure::Request {
            source: ClientError::Server(error),
            ..
        }) if error.status == NOT_FOUND => Ok(Answer::Absent),
        Err(SampleFailure::Request {
            source: ClientError::Server(_) | ClientError::TimedOut { .. },
            ..
        }) => Ok(Answer::Nothing),
        Err(failure) => Err(failure),
    }
}

fn request(round: Round<'_>, op: Endpoint) -> Result<Option<String>, SampleFailure> {
    counted(round.counters, op, || round.client.call(op, None))
        .map_err(|source| SampleFailure::Request { op, source })
}

fn counted<T>(
    counters: &RequestCounters,
    op: Endpoint,
    ask: impl FnOnce() -> Result<T, ClientError>,
) -> Result<T, ClientError> {
    let begin = Instant::now();
    let answer = ask();
    let failure = answer.as_ref().err().map(failure_kind);
    counters.record(op.name(), failure, begin.elapsed());
    answer
}

fn parse<T: serde::de::DeserializeOwned>(op: Endpoint, body: &str) -> Result<T, SampleFailure> {
    serde_json::from_str(body).map_err(|source| SampleFailure::Form { op, source })
}

/// The reading from these two responses of a VMM: its memory and the sample.
#[cfg(any(test, fuzzing))]
pub(crate) fn figures(info: &str, stats: &str) -> Option<(Bytes, VmSample)> {
    let info: Info = parse(Endpoint::VmInfo, info).ok()?;
    let mut reading = from_info(&info, 1, 0);
    if let Ok(stats) = parse(Endpoint::VmReclaimStats, stats) {
        fill_from_reclaim(&mut reading, &stats, 0);
    }
    reading.fill_from_process(ProcessMemory::default());
    Some((reading.configured, reading.sample))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn reading(level: FeatureLevel, hugepages: bool) -> VmReading {
        let info = format!(
            r#"{{"config":{{"memory":{{"size":4294967296,"hugepages":{hugepages}}}}},"state":"Running"}}"#
        );
        let info: Info = serde_json::from_str(&info).unwrap();
        VmReading {
            level,
            ..from_info(&info, 1, 0)
        }
    }

    fn memory(resident_gib: u64, huge_gib: u64) -> ProcessMemory {
        ProcessMemory {
            resident: Bytes::gib(resident_gib),
            huge: Bytes::gib(huge_gib),
        }
    }

    #[test]
    fn resident_memory_is_the_vmms_word_at_level_2_only_within_reason_and_swap_is_what_is_left() {
        let claims = |level, resident_gib| {
            let mut reading = reading(level, false);
            reading.sample.resident = Bytes::gib(resident_gib);
            reading.sample.swapped = Bytes::gib(9);
            reading.fill_from_process(memory(2, 0));
            (reading.sample.resident, reading.sample.swapped)
        };
        assert_eq!(claims(FeatureLevel::L2, 3), (Bytes::gib(3), Bytes::gib(1)));
        assert_eq!(claims(FeatureLevel::L2, 5), (Bytes::gib(4), Bytes::ZERO));
        let proven = Bytes::gib(2) - OWN_MEMORY_MAX;
        assert_eq!(
            claims(FeatureLevel::L2, 1),
            (proven, Bytes::gib(4) - proven)
        );
        assert_eq!(claims(FeatureLevel::L0, 1), (Bytes::gib(2), Bytes::gib(2)));
    }

    #[test]
    fn memory_that_the_kernel_keeps_counts_as_resident() {
        let resident = |method: &str, charged: Bytes| {
            let mut reading = reading(FeatureLevel::L2, false);
            let stats = ReclaimStats {
                configured_bytes: Bytes::gib(4).0,
                resident_bytes: Bytes::gib(1).0,
                charged_bytes: charged.0,
                charged_method: method.to_owned(),
                ..ReclaimStats::default()
            };
            fill_from_reclaim(&mut reading, &stats, 0);
            reading.fill_from_process(memory(1, 0));
            reading.sample.resident
        };
        let kept = Bytes::gib(2) + OWN_MEMORY_MAX;
        assert_eq!(resident("cgroup", kept), Bytes::gib(2));
        // The agent reads the resident set of the process itself.
        assert_eq!(resident("process", kept), Bytes::gib(1));
        assert_eq!(resident("", kept), Bytes::gib(1));
        // The VMM's own memory does not count, and no VM has more than its configuration.
        assert_eq!(
            resident("cgroup", Bytes::gib(1) + Bytes::mib(50)),
            Bytes::gib(1)
        );
        assert_eq!(resident("cgroup", Bytes::gib(9)), Bytes::gib(4));
    }

    #[test]
    fn vm_in_huge_pages_is_known_by_its_process_as_well() {
        for (told, huge_gib, huge) in [(true, 0, true), (false, 3, true), (false, 0, false)] {
            let mut reading = reading(FeatureLevel::L0, told);
            reading.fill_from_process(memory(0, huge_gib));
            assert_eq!(reading.huge_pages, huge);
            assert_eq!(reading.pool.held, Bytes::gib(huge_gib));
        }
        let mut reading = reading(FeatureLevel::L0, false);
        reading.fill_from_process(memory(2, 1));
        assert!(!reading.huge_pages);
    }

    #[test]
    fn word_of_huge_pages_takes_nobody_out_of_the_books_whose_memory_is_elsewhere() {
        let mut reading = reading(FeatureLevel::L2, true);
        reading.fill_from_process(memory(2, 1));
        assert!(!reading.huge_pages);
        // The VMM's own memory does not count.
        let mut reading = self::reading(FeatureLevel::L2, true);
        reading.fill_from_process(ProcessMemory {
            resident: OWN_MEMORY_MAX,
            huge: Bytes::ZERO,
        });
        assert!(reading.huge_pages);
    }

    #[test]
    fn hot_pluggable_memory_is_booked_unless_the_vmm_keeps_it_from_the_guest() {
        const GIB: u64 = 1 << 30;
        let obtainable = |memory_config: &str, stats: &str| {
            let info = format!(r#"{{"config":{{"memory":{memory_config}}},"state":"Running"}}"#);
            figures(&info, stats).unwrap().1.obtainable
        };
        let region = format!(
            r#"{{"size":{GIB},"hotplug_size":{},"hotplugged_size":{GIB},"hotplug_method":"VirtioMem"}}"#,
            8 * GIB
        );
        let stats = |tail: &str| {
            format!(
                r#"{{"configured_bytes":{GIB},"resident_bytes":0,"reclaimed_bytes":0,"ballooned_bytes":0,"balloon_target_bytes":0{tail}}}"#
            )
        };
        // Level 0, and a VMM of level 2 that does not report it.
        assert_eq!(obtainable(&region, "none"), Bytes::gib(7));
        assert_eq!(obtainable(&region, &stats("")), Bytes::gib(7));
        let promised = stats(&format!(r#","obtainable_bytes":{GIB}"#));
        assert_eq!(obtainable(&region, &promised), Bytes::gib(1));
        // Memory of ACPI is not there before it is plugged.
        let acpi = region.replace("VirtioMem", "Acpi");
        assert_eq!(obtainable(&acpi, "none"), Bytes::ZERO);
        let zones = format!(
            r#"{{"size":0,"hotplug_method":"VirtioMem","zones":[{{"size":{GIB},"hotplug_size":{}}}]}}"#,
            2 * GIB
        );
        assert_eq!(obtainable(&zones, "none"), Bytes::gib(2));
    }

    #[test]
    fn vm_may_still_take_of_the_pool_what_it_has_there_and_does_not_hold() {
        let pool = HugePool {
            total: Bytes::gib(16),
            page: Bytes::mib(2),
            ..HugePool::default()
        };
        let callable = |memory_config: &str, held_gib| {
            let info = format!(r#"{{"config":{{"memory":{memory_config}}},"state":"Running"}}"#);
            let mut reading = from_info(&serde_json::from_str(&info).unwrap(), 1, 0);
            reading.fill_from_process(memory(0, held_gib));
            reading.pool.callable(&pool)
        };
        let size = 4_u64 << 30;
        let plain = format!(r#"{{"size":{size}}}"#);
        assert_eq!(callable(&plain, 0), Bytes::ZERO);
        // All of its memory is in a file that its configuration does not mention.
        assert_eq!(callable(&plain, 1), Bytes::gib(3));
        let huge = format!(r#"{{"size":{size},"hugepages":true}}"#);
        assert_eq!(callable(&huge, 0), Bytes::gib(4));
        assert_eq!(callable(&huge, 5), Bytes::ZERO);
        let zones = format!(
            r#"{{"size":0,"zones":[{{"size":{size}}},{{"size":{size},"hugepages":true,"hugepage_size":2097152}}]}}"#
        );
        assert_eq!(callable(&zones, 1), Bytes::gib(3));
        // The free pages are of the default size, so pages of another size do not reduce them, and no VM can take more
        // than the pool has.
        let large = format!(r#"{{"size":{size},"hugepages":true,"hugepage_size":1073741824}}"#);
        assert_eq!(callable(&large, 0), Bytes::ZERO);
        let impossible = format!(r#"{{"size":{},"hugepages":true}}"#, size * 5);
        assert_eq!(callable(&impossible, 0), Bytes::ZERO);
    }
}
