//! `ch-fleet agent`.

use std::path::Path;

use anyhow::{Context, Result};
use fleet::agent::{Agent, AgentOptions};
use fleet::agent_config::{DEFAULT_FILE, load_for};
use fleet::host::HostFiles;

use crate::args::AgentOptions as Options;
use crate::{allocator, logger};

/// Runs until it is told to end.
pub(crate) fn run(options: &Options) -> Result<()> {
    allocator::keep_small();
    logger::install(options.log_format, options.verbose).context("Cannot log")?;
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
    agent.wait();
    Ok(())
}
