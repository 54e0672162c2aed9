//! The command line of `ch-fleet-adapter`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::http::Service;

/// Publish the memory that a ch-fleet agent's host has for VMs to a scheduler.
///
/// The capacity is the size of all VMs present or reserved, plus the memory that the agent could reserve for another VM
/// now. A decrease is published immediately, an increase by a tenth per minute. If the agent is silent for a minute,
/// nothing new is offered; after 15 minutes the capacity is 0.
#[derive(Debug, Parser)]
#[command(
    name = "ch-fleet-adapter",
    version = concat!("v", env!("CARGO_PKG_VERSION")),
    after_help = "Exit status: 0 success (--once, --withdraw), 1 error, 2 usage error; otherwise it runs until a signal \
                  ends it.\n\n\
                  --generate-docs DIR, as the only option, writes manual pages and completions to DIR.\n\nExamples:\n  \
                  ch-fleet-adapter kubernetes --node worker-1\n  \
                  ch-fleet-adapter --withdraw kubernetes --node worker-1"
)]
pub(crate) struct Arguments {
    /// Socket of the agent
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/run/ch-fleet/agent.read.sock"
    )]
    pub(crate) socket: PathBuf,

    /// Seconds between two queries of the agent
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0, value_parser = seconds)]
    interval: f64,

    /// Publish once and exit
    #[arg(long)]
    pub(crate) once: bool,

    /// Withdraw the published capacity, and exit
    #[arg(long, conflicts_with = "once")]
    pub(crate) withdraw: bool,

    #[command(subcommand)]
    pub(crate) target: Target,
}

impl Arguments {
    pub(crate) fn interval(&self) -> Duration {
        Duration::from_secs_f64(self.interval)
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("must be between 0.1 and 3600 seconds".to_owned()),
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Target {
    /// Kubernetes: an extended resource of the node, and a HostMemory object
    Kubernetes {
        /// Name of the node
        #[arg(long, value_name = "NAME", value_parser = segment)]
        node: String,
        /// Address of the API server [default: that of the surrounding cluster]
        #[arg(long, value_name = "URL")]
        server: Option<String>,
        /// Name of the extended resource
        #[arg(long, value_name = "NAME", default_value = "ch-fleet.dev/memory-mib")]
        resource: String,
        #[command(flatten)]
        access: Access,
    },
    /// OpenStack placement: the inventory of a resource provider
    Placement {
        /// Address of placement
        #[arg(long, value_name = "URL")]
        url: String,
        /// Name of the resource provider
        #[arg(long, value_name = "NAME", value_parser = segment)]
        provider: String,
        /// Create the resource provider if it does not exist
        #[arg(long)]
        create: bool,
        /// Resource class; a custom one (CUSTOM_…) does not conflict with what nova reports
        #[arg(long, value_name = "NAME", default_value = "MEMORY_MB", value_parser = segment)]
        resource_class: String,
        #[command(flatten)]
        access: Access,
    },
}

/// Credentials and deadlines.
#[derive(Clone, Debug, Args)]
pub(crate) struct Access {
    /// File with the token; read for every request
    #[arg(long, value_name = "PATH")]
    pub(crate) token_file: Option<PathBuf>,

    /// File with the CA certificates for https
    #[arg(long, value_name = "PATH")]
    pub(crate) ca_file: Option<PathBuf>,

    /// Time limit of one request, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0, value_parser = seconds)]
    request_timeout: f64,
}

impl Access {
    pub(crate) fn service(&self, url: &str) -> Service {
        Service {
            url: url.to_owned(),
            token_file: self.token_file.clone(),
            ca_file: self.ca_file.clone(),
            timeout: Duration::from_secs_f64(self.request_timeout),
        }
    }
}

/// A name that a URL can contain without escaping.
fn segment(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    if text.is_empty() || !text.chars().all(fits) {
        return Err("may contain only letters, digits, '-', '.' and '_'".to_owned());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use clap::CommandFactory;
    use yaml_rust2::YamlLoader;

    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn page_of_the_program_is_that_of_its_command_line() {
        program_docs::expect_reference(Arguments::command());
    }

    #[test]
    fn commands_in_the_documentation_are_understood() {
        for command in test_docs::commands_of("ch-fleet-adapter") {
            if let Err(error) = Arguments::try_parse_from(command.filled_in(&[])) {
                panic!("{}: {error}", command.place);
            }
        }
    }

    #[test]
    fn deployment_uses_a_command_line_that_is_understood() {
        let text = include_str!("../../../fleet/kubernetes/adapter.yaml");
        let documents = YamlLoader::load_from_str(text).unwrap();
        let set = documents
            .iter()
            .find(|document| document["kind"].as_str() == Some("DaemonSet"))
            .unwrap();
        let container = &set["spec"]["template"]["spec"]["containers"][0];
        let words = container["args"].as_vec().unwrap().iter();
        // The kubelet substitutes the variable's value.
        let words = words.map(|word| word.as_str().unwrap().replace("$(NODE_NAME)", "n1"));
        let arguments =
            Arguments::try_parse_from(std::iter::once("adapter".to_owned()).chain(words)).unwrap();
        assert!(matches!(arguments.target, Target::Kubernetes { node, .. } if node == "n1"));
    }

    #[test]
    fn name_that_would_change_the_path_is_refused() {
        for name in ["", "a/b", "a?b", "a b", "a%2e"] {
            assert!(segment(name).is_err(), "{name}");
        }
        assert!(segment("node-1.example").is_ok());
    }
}
