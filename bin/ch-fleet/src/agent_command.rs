//! Implements `ch-fleet agent`.

use std::path::Path;

use anyhow::{Context, Result};
use fleet::agent::{Agent, AgentOptions};
use fleet::agent_config::{DEFAULT_FILE, load_for};
use fleet::host::HostFiles;
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::args::AgentOptions as Options;
use crate::{allocator, logger};

/// Runs the agent until a signal ends it. `socket` overrides the one in the settings.
pub(crate) fn run(options: &Options, socket: Option<&Path>) -> Result<()> {
    allocator::keep_small();
    logger::install(options.log_format, options.verbose).context("Cannot set up logging")?;
    end_on_panic();
    open_files_as_many_as_allowed();
    // The default file is optional; a file named on the command line must exist.
    let required = options.config != Path::new(DEFAULT_FILE);
    let host = HostFiles {
        proc: options.proc.clone(),
        cgroup_root: options.cgroup_root.clone(),
        ..HostFiles::default()
    };
    let mut loaded = load_for(&options.config, required, &host)?;
    for file in &loaded.files {
        log::info!("settings from {}", file.display());
    }
    loaded.config.agent.dry_run |= options.dry_run;
    if let Some(socket) = socket {
        loaded.config.agent.socket = socket.to_owned();
    }
    let agent = Agent::start_with_signals(AgentOptions {
        config: loaded.config,
        file: Some((options.config.clone(), required)),
        host,
        store: None,
    })?;
    if let Some(address) = agent.page() {
        log::info!("page and metrics at http://{address}/");
    }
    Ok(agent.wait()?)
}

/// Makes a panic of any thread end the process by a signal. An agent that lost a thread would appear to run but do
/// nothing, whereas the service manager restarts an agent that ended.
pub(crate) fn end_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        std::process::abort();
    }));
}

/// Raises the limit of open files to the maximum, because the lock on each VM is an open file.
fn open_files_as_many_as_allowed() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        log::debug!("the limit of open files stays: {error}");
    }
}
