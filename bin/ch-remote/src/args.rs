//! The command line of `ch-remote`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use crate::command::Command;

/// Control a running cloud-hypervisor over its API socket.
#[derive(Debug, Parser)]
#[command(
    name = "ch-remote",
    version = concat!("v", env!("CARGO_PKG_VERSION")),
    about = "Control a running cloud-hypervisor over its API socket",
    after_help = "Responses are printed as JSON on standard output; on a terminal, reclaim-stats prints a table.\n\n\
                  Exit status: 0 success, 1 error, with the chain of causes on standard error, 2 usage error.\n\n\
                  --generate-docs DIR, as the only option, writes manual pages and completions to DIR.\n\nExamples:\n  \
                  ch-remote --api-socket /run/vm.sock info\n  \
                  ch-remote --api-socket /run/vm.sock resize --balloon 1G\n  \
                  ch-remote --api-socket /run/vm.sock reclaim-stats --watch\n  \
                  ch-remote --api-socket /run/vm.sock reclaim-thresholds \\\n    \
                  --set name=big,figure=resident_bytes,direction=above,enter=2G,leave=1G"
)]
pub(crate) struct Arguments {
    /// UNIX socket of the VMM, as given to its --api-socket
    #[arg(long, value_name = "PATH")]
    pub(crate) api_socket: PathBuf,

    /// Give up after this many seconds [default: wait without limit]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: Option<u64>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Arguments {
    /// Time limit of a request.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        self.timeout.map(Duration::from_secs)
    }
}
