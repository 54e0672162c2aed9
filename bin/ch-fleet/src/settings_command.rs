//! `ch-fleet config`.

use std::io::Write;

use anyhow::{Context, Result};
use fleet::host::HostFiles;
use fleet::settings::{load, load_for};

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
            format!("{}the settings hold\n", files.collect::<String>())
        }
        ConfigCommand::Show {
            config: Some(config),
        } => load(config, true)?.settings.to_toml(),
        ConfigCommand::Show { config: None } => agent.text("fleet.config")?,
    };
    write!(out, "{text}").context("Cannot write the answer")
}
