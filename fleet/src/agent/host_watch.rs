//! The agent's host: its last readings and its pressure trigger.

use crate::agent_config::AgentConfig;
use crate::host::{
    HostError, HostFiles, HostReader, PressureTrigger, TriggerLevel, limiting_groups,
    watch_pressure,
};
use crate::model::HostFacts;

/// Interval after which a new limit on the VMs' control groups is detected.
const SEARCH_MS: u64 = 30_000;

/// The host as the control loop sees it.
#[derive(Debug)]
pub(super) struct HostWatch {
    name: String,
    reader: HostReader,
    facts: HostFacts,
    /// Whether the configuration names the group that is the host.
    named: bool,
    /// The VMMs whose groups' limits apply to the host otherwise.
    pids: Vec<i32>,
    /// When their groups were last searched for.
    searched_ms: u64,
    trigger: Option<PressureTrigger>,
}

impl HostWatch {
    /// Reads the host for the first time and arms the trigger, which calls `pressed`.
    pub(super) fn start(
        config: &AgentConfig,
        files: &HostFiles,
        now_ms: u64,
        pressed: impl Fn() + Send + 'static,
    ) -> Result<Self, HostError> {
        let mut files = files.clone();
        let group = config.planning.host.cgroup.as_ref();
        files.cgroup = group.map(|group| files.cgroup_root.join(group.trim_start_matches('/')));
        let name = std::fs::read_to_string(files.proc.join("sys/kernel/hostname"))
            .map_or_else(|_| "localhost".to_owned(), |name| name.trim().to_owned());
        let mut reader = HostReader::new(files);
        let facts = reader.read(now_ms)?;
        Ok(Self {
            name,
            trigger: arm_trigger(config, reader.files(), pressed),
            reader,
            facts,
            named: group.is_some(),
            pids: Vec::new(),
            searched_ms: now_ms,
        })
    }

    /// Reads the host again. `pids` are the VMMs: if all of them are in groups with limits, the sum of those limits
    /// applies to the host, even if the groups are not configured.
    pub(super) fn read(&mut self, now_ms: u64, pids: Vec<i32>) {
        let due = self.pids != pids || now_ms >= self.searched_ms + SEARCH_MS;
        if !self.named && due {
            let files = self.reader.files();
            let groups = limiting_groups(&files.proc, &files.cgroup_root, &pids);
            if groups != self.reader.groups() {
                log::info!("control groups that limit the VMs: {groups:?}");
                self.reader.set_groups(groups);
            }
            self.pids = pids;
            self.searched_ms = now_ms;
        }
        match self.reader.read(now_ms) {
            Ok(facts) => self.facts = facts,
            // The old facts stay, and everything that requires recent facts stops.
            Err(error) => {
                log::error!("{}", api::chain_report("the host cannot be read", &error));
                // The group may no longer exist.
                self.pids.clear();
            }
        }
    }

    /// Name of the machine.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn files(&self) -> &HostFiles {
        self.reader.files()
    }

    pub(super) fn facts(&self) -> &HostFacts {
        &self.facts
    }

    pub(super) fn has_trigger(&self) -> bool {
        self.trigger.is_some()
    }
}

fn arm_trigger(
    config: &AgentConfig,
    files: &HostFiles,
    pressed: impl Fn() + Send + 'static,
) -> Option<PressureTrigger> {
    let level = TriggerLevel {
        stall_us: config.agent.trigger_stall.0.saturating_mul(1000),
        window_us: config.agent.trigger_window.0.saturating_mul(1000),
    };
    match watch_pressure(&files.pressure_file(), level, pressed) {
        Ok(trigger) => Some(trigger),
        Err(error) => {
            let chain = api::error_line(&error);
            log::warn!("no pressure trigger; the host is read only once per second: {chain}");
            None
        }
    }
}
