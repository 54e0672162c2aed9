//! Sends requests to the agent.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use api::options::OptionError;
use api::{Client, ClientError};
use fleet::agent::Status;
use fleet::cluster::PlaceError;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Not found: the agent does not know the object.
const UNKNOWN: u16 = 404;
/// Conflict: memory was refused.
pub(crate) const CONFLICT: u16 = 409;
/// Unprocessable: the request exceeds the host's memory.
const NEVER: u16 = 422;
/// Unavailable: the agent is too busy to respond.
const BUSY: u16 = 503;

/// A client of a running agent.
#[derive(Debug)]
pub(crate) struct Agent {
    client: Client,
}

/// A host or VM on the command line that does not exist.
#[derive(Debug)]
pub(crate) struct Unknown(String);

impl Unknown {
    pub(crate) fn host(host: &str) -> Self {
        Self(format!("the store contains no host {host:?}"))
    }

    pub(crate) fn vm(vm: &str) -> Self {
        Self(format!("the last plan contains no VM {vm:?}"))
    }

    pub(crate) fn not_in_standby(vm: &str) -> Self {
        Self(format!("There is no VM {vm:?} in standby"))
    }
}

/// Another process wakes or removes the VM.
#[derive(Debug)]
pub(crate) struct Locked(pub(crate) String);

impl std::fmt::Display for Locked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Another process wakes {:?}, or has woken it", self.0)
    }
}

impl std::error::Error for Locked {}

impl std::fmt::Display for Unknown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unknown {}

impl Agent {
    pub(crate) fn new(socket: &Path, timeout: Duration) -> Self {
        Self {
            client: Client::new(socket).with_timeout(Some(timeout)),
        }
    }

    pub(crate) fn status(&self) -> Result<Status> {
        self.get("fleet.status")
    }

    pub(crate) fn get<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let text = self.text(name)?;
        serde_json::from_str(&text).context("Cannot parse the agent's response")
    }

    pub(crate) fn text(&self, name: &str) -> Result<String> {
        let answer = self.client.get(name).map_err(unreachable_agent)?;
        answer.context("The agent's response is empty")
    }

    pub(crate) fn put<T: DeserializeOwned>(&self, name: &str, body: &impl Serialize) -> Result<T> {
        let body = api::to_ascii_json(body)?;
        let answer = self.client.put(name, Some(&body)).map_err(failed_request)?;
        let text = answer.context("The agent's response is empty")?;
        serde_json::from_str(&text).context("Cannot parse the agent's response")
    }

    pub(crate) fn order(&self, name: &str, body: Option<&str>) -> Result<()> {
        let answer = self.client.put(name, body);
        answer.map(drop).map_err(failed_request)
    }
}

fn failed_request(error: ClientError) -> anyhow::Error {
    let is_refusal = matches!(error, ClientError::Server(_));
    if is_refusal {
        return anyhow::Error::new(error).context("The agent did not perform the request");
    }
    unreachable_agent(error)
}

/// Says what to check if no agent listens.
fn unreachable_agent(error: ClientError) -> anyhow::Error {
    let hint = match error {
        ClientError::NoSocket { .. }
        | ClientError::Refused { .. }
        | ClientError::Connect { .. } => {
            ": is ch-fleet-agent.service running, and may this user open its socket?"
        }
        _ => "",
    };
    anyhow::Error::new(error).context(format!("The agent did not respond{hint}"))
}

/// Exit status for a failure.
pub(crate) fn exit_code(error: &anyhow::Error) -> ExitCode {
    if let Some(error) = error.downcast_ref::<PlaceError>() {
        return ExitCode::from(match error {
            PlaceError::Refused(_) | PlaceError::Starting(_) => 3,
            PlaceError::Late | PlaceError::Unanswered { .. } => 5,
            PlaceError::Store(_) | PlaceError::NoReservation(_) => 1,
        });
    }
    if error.is::<Locked>() {
        return ExitCode::from(3);
    }
    // `run` reads the VMM's options.
    if error.chain().any(|cause| cause.is::<OptionError>()) {
        return ExitCode::from(2);
    }
    let cause = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<ClientError>());
    ExitCode::from(match cause {
        Some(ClientError::Server(error)) if [CONFLICT, NEVER].contains(&error.status) => 3,
        Some(ClientError::TimedOut { .. }) => 5,
        _ => 1,
    })
}

/// The status of the agent's response, if it responded with an error.
pub(crate) fn status_of(error: &anyhow::Error) -> Option<u16> {
    let cause = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<ClientError>());
    match cause {
        Some(ClientError::Server(error)) => Some(error.status),
        _ => None,
    }
}

/// Whether the agent does not know what the request names.
pub(crate) fn is_unknown(error: &anyhow::Error) -> bool {
    status_of(error) == Some(UNKNOWN)
}

/// Whether a retry may succeed: memory was refused for now, or no agent responded, for example during a restart.
pub(crate) fn may_change(error: &anyhow::Error) -> bool {
    let cause = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<ClientError>());
    match cause {
        Some(ClientError::Server(error)) => [CONFLICT, BUSY].contains(&error.status),
        Some(_) => true,
        None => false,
    }
}
