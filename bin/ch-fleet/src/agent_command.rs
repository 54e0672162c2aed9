//! `ch-fleet agent`.

use std::path::Path;

use anyhow::{Context, Result};
use fleet::agent::{Agent, AgentOptions};
use fleet::agent_config::{DEFAULT_FILE, load_for};
use fleet::host::HostFiles;
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::args::AgentOptions as Options;
use crate::{allocator, logger};

/// Runs until it is told to end.
pub(crate) fn run(options: &Options) -> Result<()> {
    allocator::keep_small();
    logger::install(options.log_format, options.verbose).context("Cannot log")?;
    end_on_panic();
    open_files_as_many_as_allowed();
    // The default file need not be there; one that was named must be.
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

/// Has a panic of any thread end the process by a signal. An agent without one of its threads would look alive and do
/// nothing; one that ended is started again.
pub(crate) fn end_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        std::process::abort();
    }));
}

/// A lock on each VM is an open file: as many as the system allows may be needed.
fn open_files_as_many_as_allowed() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        log::debug!("the limit of open files stays: {error}");
    }
}
