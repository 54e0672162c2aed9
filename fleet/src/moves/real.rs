//! The VMMs of this host.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use api::{Client, ClientError, Endpoint};
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::json;

use super::needs::{Devices, missing};
use super::step::ReceiveOrder;
use super::vmms::{Seen, SeenVm, SendRequest, Sent, Vmms};
use crate::cluster::Needs;
use crate::host::ProcessIdentity;
use crate::model::Bytes;
use crate::sample::{Discovery, means_no_vm};
use crate::standby::check_name;

/// Time limit of a request, except to receive a VM.
const DEADLINE: Duration = Duration::from_secs(3);
/// The VMM's response while a request to receive a VM is in progress.
const BUSY: &str = "is being migrated";
/// The state of a listening socket in the kernel's table.
const LISTENS: &str = "0A";
/// The kernel's folder of network interfaces.
const INTERFACES: &str = "/sys/class/net";

/// Settings of moves, and where to find the kernel's files.
#[derive(Clone, Debug)]
pub(crate) struct MoveSettings {
    pub(crate) address: IpAddr,
    /// The first port, and the number of ports.
    pub(crate) ports: (u16, u16),
    /// The VMM to start.
    pub(crate) command: Vec<String>,
    pub(crate) tls_dir: Option<PathBuf>,
    /// Patterns of API sockets.
    pub(crate) sockets: Vec<String>,
    pub(crate) proc: PathBuf,
}

/// A request to receive a VM.
#[derive(Debug)]
struct Receiving {
    address: Option<SocketAddr>,
    url: String,
    /// The VMM, if it is known.
    pid: Option<i32>,
    result: Arc<Mutex<Option<ReceiveOrder>>>,
}

/// The VMMs of this host.
#[derive(Debug)]
pub(crate) struct RealVmms {
    settings: MoveSettings,
    discovery: Discovery,
    /// Requests of this agent by socket.
    receiving: BTreeMap<PathBuf, Receiving>,
    /// Started VMMs, which are waited for when they end.
    children: Vec<Child>,
    /// Where the search for a free port continues.
    next_port: u16,
}

/// The relevant part of `vm.info`.
#[derive(Debug, Deserialize)]
struct Info {
    state: String,
    #[serde(default)]
    migration_progress: Option<Progress>,
}

/// Another part of it.
#[derive(Debug, Deserialize)]
struct ConfigInfo {
    config: Devices,
}

#[derive(Debug, Deserialize)]
struct Progress {
    #[serde(default)]
    wire_bytes: u64,
}

impl RealVmms {
    pub(crate) fn new(settings: MoveSettings) -> Self {
        Self {
            // The agent does not start with patterns that are invalid.
            discovery: Discovery::new(&settings.sockets).unwrap_or_default(),
            settings,
            receiving: BTreeMap::new(),
            children: Vec::new(),
            next_port: 0,
        }
    }

    /// Waits for the VMMs that have ended, so that none stays as a zombie.
    pub(crate) fn reap(&mut self) {
        self.children
            .retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
    }

    fn client(socket: &Path) -> Client {
        Client::new(socket).with_timeout(Some(DEADLINE))
    }

    /// The next port at which nobody listens.
    fn free_port(&mut self, pid: Option<i32>) -> Option<u16> {
        let (first, count) = self.settings.ports;
        let used = self.listening(pid);
        for _ in 0..count {
            let port = first.saturating_add(self.next_port % count);
            self.next_port = self.next_port.wrapping_add(1);
            if !used.contains(&port) {
                return Some(port);
            }
        }
        None
    }

    /// The TCP ports at which a process of this network namespace listens.
    fn listening(&self, pid: Option<i32>) -> Vec<u16> {
        let of = pid.map_or_else(|| "self".to_owned(), |pid| pid.to_string());
        let tables = ["tcp", "tcp6"].map(|table| {
            let path = self.settings.proc.join(&of).join("net").join(table);
            fs::read_to_string(path).unwrap_or_default()
        });
        let lines = tables.iter().flat_map(|table| table.lines());
        lines.filter_map(listening_port).collect()
    }
}

/// The port of a line of `/proc/net/tcp`, if a socket listens there.
fn listening_port(line: &str) -> Option<u16> {
    let mut words = line.split_ascii_whitespace();
    let local = words.nth(1)?;
    (words.nth(1)? == LISTENS).then_some(())?;
    u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok()
}

impl Vmms for RealVmms {
    fn look(&mut self, socket: &Path) -> Seen {
        let process = |pid| ProcessIdentity::of(&self.settings.proc, pid);
        let (body, peer) = match Self::client(socket).get_with_peer(Endpoint::VmInfo) {
            Ok(answer) => answer,
            Err(ClientError::NoSocket { .. } | ClientError::Refused { .. }) => return Seen::Nobody,
            Err(error) if means_no_vm(&error) => {
                let answer = Self::client(socket).get_with_peer(Endpoint::VmmPing);
                return Seen::Empty(answer.ok().and_then(|(_, peer)| process(peer.pid)));
            }
            Err(_) => return Seen::Silent,
        };
        let Some(body) = body else {
            return Seen::Empty(process(peer.pid));
        };
        let Ok(info) = serde_json::from_str::<Info>(&body) else {
            return Seen::Silent;
        };
        match info.state.as_str() {
            "Running" | "Paused" => Seen::Vm(SeenVm {
                process: process(peer.pid),
                is_paused: info.state == "Paused",
                sending: info.migration_progress.map(|it| Bytes(it.wire_bytes)),
            }),
            _ => Seen::Silent,
        }
    }

    fn has_ended(&mut self, process: ProcessIdentity) -> bool {
        self.reap();
        process.has_ended(&self.settings.proc)
    }

    fn needs(&mut self, socket: &Path) -> Result<Needs, String> {
        let endpoint = Endpoint::VmInfo.name();
        let body = Self::client(socket).get(endpoint);
        let body = body.map_err(|error| api::error_line(&error))?;
        let info: ConfigInfo = serde_json::from_str(&body.unwrap_or_default())
            .map_err(|error| format!("its configuration cannot be read: {error}"))?;
        match info.config.fixed_by() {
            Some(why) => Err(why.to_owned()),
            None => info.config.needs(),
        }
    }

    fn missing(&mut self, needs: &Needs) -> Option<String> {
        missing(needs, Path::new(INTERFACES))
    }

    fn socket_of(&mut self, vm: &str) -> Result<PathBuf, String> {
        check_name(vm).map_err(|error| api::error_line(&error))?;
        let paths = self.settings.sockets.iter().filter_map(|pattern| {
            let (before, after) = pattern.split_once('*')?;
            Some(PathBuf::from(format!("{before}{vm}{after}")))
        });
        let mut usable = paths.filter(|path| {
            self.discovery.name(path).as_deref() == Some(vm)
                && path.parent().is_some_and(Path::is_dir)
        });
        usable.next().ok_or_else(|| {
            format!("no pattern of discovery.sockets there has an existing folder for {vm:?}")
        })
    }

    fn start(&mut self, socket: &Path) -> Result<(), String> {
        // The result of a request to an earlier VMM at this socket says nothing about this one.
        self.receiving.remove(socket);
        let (program, arguments) = self.settings.command.split_first().ok_or("no command")?;
        let child = Command::new(program)
            .args(arguments)
            .arg("--api-socket")
            .arg(socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // Ctrl-C in the agent's terminal must not end VMs.
            .process_group(0)
            .spawn()
            .map_err(|error| format!("{program} cannot be started there: {error}"))?;
        self.children.push(child);
        Ok(())
    }

    fn receive(&mut self, socket: &Path, url: Option<&str>) {
        let client = Self::client(socket);
        let peer = client.get_with_peer(Endpoint::VmmPing);
        let pid = peer.ok().map(|(_, peer)| peer.pid);
        let (address, url) = match url {
            Some(url) => (None, url.to_owned()),
            None => {
                // There may be a request of an agent before this one, at an address that this one does not know.
                let _ = client.call(Endpoint::VmCancelMigration, None);
                let Some(port) = self.free_port(pid) else {
                    let why = "all ports of agent.move_ports there are in use".to_owned();
                    let receiving = Receiving {
                        address: None,
                        url: String::new(),
                        pid,
                        result: Arc::new(Mutex::new(Some(ReceiveOrder::Failed(why)))),
                    };
                    self.receiving.insert(socket.to_owned(), receiving);
                    return;
                };
                let address = SocketAddr::new(self.settings.address, port);
                (Some(address), format!("tcp:{address}"))
            }
        };
        let mut body = json!({ "receiver_url": url });
        if let Some(folder) = &self.settings.tls_dir {
            body["tls_dir"] = folder.display().to_string().into();
        }
        let result = Arc::new(Mutex::new(None));
        let shared = Arc::clone(&result);
        let client = client.with_timeout(None);
        let thread = thread::Builder::new().name("receive-vm".to_owned());
        // It ends with the request, or with the agent.
        let spawned = thread.spawn(move || {
            let response = client.call(Endpoint::VmReceiveMigration, Some(&body.to_string()));
            *shared.lock() = Some(match response {
                Ok(_) => ReceiveOrder::Done,
                Err(error) => {
                    let why = api::error_line(&error);
                    match matches!(error, ClientError::Server(_)) && why.contains(BUSY) {
                        true => ReceiveOrder::Busy,
                        false => ReceiveOrder::Failed(why),
                    }
                }
            });
        });
        if let Err(error) = spawned {
            *result.lock() = Some(ReceiveOrder::Failed(error.to_string()));
        }
        let receiving = Receiving {
            address,
            url,
            pid,
            result,
        };
        self.receiving.insert(socket.to_owned(), receiving);
    }

    fn received(&mut self, socket: &Path) -> ReceiveOrder {
        let Some(receiving) = self.receiving.get(socket) else {
            return ReceiveOrder::None;
        };
        if let Some(result) = receiving.result.lock().clone() {
            return result;
        }
        let listens = receiving
            .address
            .is_some_and(|address| self.listening(receiving.pid).contains(&address.port()));
        ReceiveOrder::Waits(listens.then(|| receiving.url.clone()))
    }

    fn send(&mut self, socket: &Path, process: ProcessIdentity, request: &SendRequest<'_>) -> Sent {
        let url = request.url;
        // Other forms would reach this host's own sockets.
        if !url.starts_with("tcp:") {
            return Sent::Refused(format!("{url:?} is not an address"));
        }
        let mut body = json!({ "destination_url": url, "auto_converge": true });
        if let Some(rate) = request.bytes_per_second_max {
            body["bytes_per_second_max"] = rate.0.into();
        }
        if let Some(folder) = &self.settings.tls_dir {
            body["tls_dir"] = folder.display().to_string().into();
        }
        let client = Self::client(socket).to_peer(process.pid);
        match client.call(Endpoint::VmSendMigration, Some(&body.to_string())) {
            Ok(_) => Sent::Accepted,
            Err(error @ ClientError::Server(_)) => Sent::Refused(api::error_line(&error)),
            Err(_) => Sent::Unknown,
        }
    }

    fn end(&mut self, socket: &Path) {
        let client = Self::client(socket);
        // Whatever comes of these, the next look at the socket shows it.
        let _ = client.call(Endpoint::VmCancelMigration, None);
        let Ok((_, peer)) = client.get_with_peer(Endpoint::VmmPing) else {
            return;
        };
        if matches!(self.look(socket), Seen::Empty(_)) {
            let _ = client.to_peer(peer.pid).call(Endpoint::VmmShutdown, None);
        }
        self.receiving.remove(socket);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_ports_are_told_from_others() {
        let table = "  sl  local_address rem_address   st tx_queue\n   \
             0: 0100007F:115C 00000000:0000 0A 00000000:00000000\n   \
             1: 0100007F:115D 0100007F:0016 01 00000000:00000000\n   \
             2: 00000000000000000000000001000000:115E 00:0000 0A 0";
        let ports: Vec<u16> = table.lines().filter_map(listening_port).collect();
        assert_eq!(ports, [0x115c, 0x115e]);
    }

    #[test]
    fn socket_of_a_vm_is_where_discovery_finds_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let here = folder.path().display();
        let mut vmms = RealVmms::new(MoveSettings {
            address: IpAddr::from([127, 0, 0, 1]),
            ports: (1, 1),
            command: Vec::new(),
            tls_dir: None,
            sockets: vec![format!("{here}/vms/*/api.sock"), format!("{here}/*.sock")],
            proc: "/proc".into(),
        });
        let found = vmms.socket_of("db");
        assert_eq!(found, Ok(folder.path().join("db.sock")));
        for name in ["", "../db", "a/b", "a\"b"] {
            assert!(vmms.socket_of(name).is_err(), "{name}");
        }
        vmms.settings.sockets.truncate(1);
        assert!(vmms.socket_of("db").is_err());
    }
}
