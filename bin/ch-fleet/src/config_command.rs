//! Implements `ch-fleet config`.

use std::io::Write;

use anyhow::{Context, Result};
use fleet::agent_config::{load, load_for};
use fleet::host::HostFiles;

use crate::args::ConfigCommand;
use crate::ask::Agent;

pub(crate) fn run(agent: &Agent, command: &ConfigCommand, out: &mut dyn Write) -> Result<()> {
    let text = match command {
        ConfigCommand::Check { config } => {
            let loaded = load_for(config, true, &HostFiles::default())?;
            let files = loaded
                .files
                .iter()
                .map(|file| format!("{}\n", file.display()));
            format!("{}settings are valid\n", files.collect::<String>())
        }
        ConfigCommand::Show {
            config: Some(config),
        } => load(config, true)?.config.to_toml(),
        ConfigCommand::Show { config: None } => agent.text("fleet.config")?,
    };
    write!(out, "{text}").context("Cannot write the output")
}
