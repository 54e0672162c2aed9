//! Saves a VM to a folder, and ends the VMM of a saved VM.

use std::path::Path;
use std::time::Duration;

use api::{Client, ClientError};
use serde::Deserialize;
use serde_json::json;
use thiserror::Error;

use crate::standby::{self, StandbyError};

/// Maximum number of characters that are quoted from a response.
const QUOTED_CHARS_MAX: usize = 32;

/// Reasons why a VM was not saved, or its VMM not ended.
#[derive(Debug, Error)]
pub enum SaveError {
    /// The VMM rejected a request, or did not respond in time.
    #[error(transparent)]
    Vmm(#[from] ClientError),
    /// The VM is paused, but its VMM rejected the request to end, or did not respond in time.
    #[error("the VMM of the paused VM does not end")]
    NotEnded(#[source] ClientError),
    /// The VM is in a state in which the order would do harm.
    #[error("the VM is in state {state:?}, not {needed}")]
    State {
        /// Its state.
        state: String,
        /// The state that the order needs.
        needed: &'static str,
    },
    /// A network interface was created from descriptors, which another process cannot open again.
    #[error("network interface {id:?} uses descriptors, so the VM could not be woken")]
    Descriptors {
        /// The interface.
        id: String,
    },
    /// The VMM reports success, but the snapshot is not complete or cannot be synced.
    #[error("The snapshot cannot be used")]
    Snapshot(#[source] StandbyError),
}

/// The relevant part of `vm.info`. A newer VMM's configuration may contain irrelevant values that this version does not
/// know.
#[derive(Debug, Deserialize)]
struct Info {
    state: String,
    config: InfoConfig,
}

#[derive(Debug, Deserialize)]
struct InfoConfig {
    #[serde(default)]
    net: Option<Vec<InfoNet>>,
}

#[derive(Debug, Deserialize)]
struct InfoNet {
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    fds: Option<Vec<i64>>,
}

impl Info {
    fn read(client: &Client) -> Result<Self, SaveError> {
        let endpoint = "vm.info";
        let body = client.get(endpoint)?;
        let body = body.ok_or(ClientError::MissingBody { endpoint })?;
        let info = serde_json::from_str(&body);
        Ok(info.map_err(|source| ClientError::Decode { endpoint, source })?)
    }

    fn require(&self, needed: &'static str) -> Result<(), SaveError> {
        if self.state == needed {
            return Ok(());
        }
        let state = quoted(&self.state);
        Err(SaveError::State { state, needed })
    }
}

fn quoted(text: &str) -> String {
    text.chars().take(QUOTED_CHARS_MAX).collect()
}

/// Pauses a running VM and saves it. Afterwards the snapshot is complete and synced, also if the VMM does not sync it
/// itself, as upstream's.
pub(super) fn save(client: &Client, folder: &Path, deadline: Duration) -> Result<(), SaveError> {
    let client = client.clone().with_timeout(Some(deadline));
    let info = Info::read(&client)?;
    info.require("Running")?;
    let nets = info.config.net.iter().flatten();
    let mut inherited = nets.filter(|net| net.fds.as_ref().is_some_and(|fds| !fds.is_empty()));
    if let Some(net) = inherited.next() {
        let id = quoted(net.id.as_deref().unwrap_or_default());
        return Err(SaveError::Descriptors { id });
    }
    client.put("vm.pause", None)?;
    let body = json!({"destination_url": format!("file://{}", folder.display())});
    client.put("vm.snapshot", Some(&body.to_string()))?;
    standby::sync_snapshot(folder).map_err(SaveError::Snapshot)
}

/// Ends the VMM. The VM must still be paused: if another client has resumed it, the snapshot is outdated.
pub(super) fn end(client: &Client) -> Result<(), SaveError> {
    Info::read(client)?.require("Paused")?;
    let ended = client.put("vmm.shutdown", None);
    ended.map(drop).map_err(SaveError::NotEnded)
}
