//! `ch-fleet run -- cloud-hypervisor …`: reserves memory, starts a VMM, confirms the reservation, and releases it when
//! the VMM ends.
//!
//! The wrapper is not a supervisor: if it is killed, the VMM continues, and the agent releases the reservation when the
//! VM ends. Termination signals are forwarded to the VMM.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use api::VmConfig;
use api::config::{HotplugMethod, MemoryConfig, RestoreConfig};
use fleet::agent::{ConfirmRequest, ReleaseRequest, ReserveAnswer, ReserveRequest};
use fleet::model::Bytes;
use fleet::reservations::Reservation;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::args::RunOptions;
use crate::ask::{Agent, is_unknown, may_change};

/// Time between two attempts with `--wait`.
const TRY_AGAIN: Duration = Duration::from_secs(2);
/// Maximum length of the configuration in a snapshot, as in the VMM.
const CONFIG_BYTES_MAX: u64 = 4 << 20;

pub(crate) fn run(agent: &Agent, options: &RunOptions) -> Result<ExitCode> {
    let (program, arguments) = options
        .command
        .split_first()
        .context("No command is given")?;
    let wanted = Wanted::of(arguments)?;
    let reservation = reserve(agent, &wanted, options)?;
    let mut command = Command::new(program);
    let mut child = match start(command.args(arguments)) {
        Ok(child) => child,
        Err(error) => {
            release(agent, &reservation);
            return Err(error);
        }
    };
    confirm(agent, &reservation);
    let status = wait(&mut child);
    release(agent, &reservation);
    Ok(code_of(status?))
}

/// Starts a VMM, and forwards signals to it from then on.
pub(crate) fn start(command: &mut Command) -> Result<Child> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("Cannot follow signals")?;
    let child = command
        .spawn()
        .with_context(|| format!("Cannot start {}", command.get_program().display()))?;
    let handle = handle_of(&child);
    thread::spawn(move || {
        for signal in signals.forever() {
            let signal = Signal::from_named_raw(signal).unwrap_or(Signal::TERM);
            if let Ok(handle) = &handle {
                // It may have ended already.
                let _ = pidfd_send_signal(handle, signal);
            }
        }
    });
    Ok(child)
}

/// Confirms a reservation. Without that it is also valid, but expires earlier.
pub(crate) fn confirm(agent: &Agent, reservation: &Reservation) {
    let request = ConfirmRequest {
        reservation: reservation.id.clone(),
    };
    let confirmed: Result<Reservation> = agent.put("fleet.confirm", &request);
    if let Err(error) = confirmed {
        eprintln!("{}", api::chain_report("ch-fleet", error.as_ref()));
    }
}

/// Releases a reservation, unless the agent has already: for example, because the VM is in standby.
pub(crate) fn release(agent: &Agent, reservation: &Reservation) {
    let request = ReleaseRequest {
        reservation: reservation.id.clone(),
    };
    let released: Result<Reservation> = agent.put("fleet.release", &request);
    if let Err(error) = released
        && !is_unknown(&error)
    {
        eprintln!("{}", api::chain_report("ch-fleet", error.as_ref()));
    }
}

/// A descriptor of a child that has not been waited for. Signals through it reach the child or no process, whereas
/// after the wait the child's id may belong to another process.
fn handle_of(child: &Child) -> io::Result<OwnedFd> {
    Ok(pidfd_open(Pid::from_child(child), PidfdFlags::empty())?)
}

pub(crate) fn wait(child: &mut Child) -> Result<ExitStatus> {
    child.wait().context("Cannot wait for the VMM")
}

/// Converts an exit status to a code as a shell does.
pub(crate) fn code_of(status: ExitStatus) -> ExitCode {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

fn reserve(agent: &Agent, wanted: &Wanted, options: &RunOptions) -> Result<Reservation> {
    let request = ReserveRequest {
        vm: wanted.socket.clone(),
        memory: wanted.memory,
        min: options.min.map(Bytes),
        huge_pages: wanted.huge_pages,
        dry_run: false,
    };
    let answer: ReserveAnswer = retry(options.wait, || agent.put("fleet.reserve", &request))?;
    answer
        .reservation
        .context("The agent's response contains no reservation")
}

/// Repeats a request that may succeed later, for at most this many seconds.
pub(crate) fn retry<T>(seconds: u64, mut request: impl FnMut() -> Result<T>) -> Result<T> {
    let until = Instant::now().checked_add(Duration::from_secs(seconds));
    loop {
        match request() {
            Err(error)
                if may_change(&error)
                    && until.is_none_or(|until| Instant::now() + TRY_AGAIN < until) =>
            {
                thread::sleep(TRY_AGAIN);
            }
            result => return result,
        }
    }
}

/// Properties of the VM, from the VMM's command line or the snapshot that it names.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    socket: String,
    memory: Bytes,
    huge_pages: bool,
}

impl Wanted {
    fn of(arguments: &[OsString]) -> Result<Self> {
        let socket = values(arguments, "--api-socket")?
            .pop()
            .context("The command has no --api-socket, which the agent needs to manage the VM")?;
        let socket = socket.strip_prefix("path=").unwrap_or(&socket).to_owned();
        let memory = match values(arguments, "--restore")?.pop() {
            Some(restore) => saved_memory(&restore)?,
            None => {
                let memory = values(arguments, "--memory")?.pop();
                let zones = values(arguments, "--memory-zone")?;
                // The VMM's own default.
                let memory = memory.as_deref().unwrap_or("size=512M");
                MemoryConfig::parse(memory, &zones)?
            }
        };
        let in_region = memory.hotplug_method == HotplugMethod::VirtioMem;
        // Before it runs, it is unknown whether this VMM keeps the region of virtio-mem from its guest.
        let plugged = |plugged: Option<u64>, room: Option<u64>| {
            let room = room.filter(|_| in_region);
            Bytes(plugged.max(room).unwrap_or(0))
        };
        let zones = memory.zones.iter().flatten();
        let in_zones: Bytes = zones
            .map(|zone| Bytes(zone.size) + plugged(zone.hotplugged_size, zone.hotplug_size))
            .sum();
        let own = Bytes(memory.size) + plugged(memory.hotplugged_size, memory.hotplug_size);
        // The agent cannot distinguish zones, so if one zone uses huge pages, all are assumed to.
        let huge_pages =
            memory.hugepages || memory.zones.iter().flatten().any(|zone| zone.hugepages);
        Ok(Self {
            socket,
            huge_pages,
            memory: own + in_zones,
        })
    }
}

/// The memory of the snapshot that the VMM restores.
fn saved_memory(restore: &str) -> Result<MemoryConfig> {
    let url = RestoreConfig::parse(restore)?.source_url;
    let folder = url.strip_prefix("file://").map(Path::new);
    let folder = folder
        .filter(|folder| folder.is_absolute())
        .with_context(|| format!("source_url must be file:// and an absolute path; got {url}"))?;
    let path = folder.join("config.json");
    let config = read_config(&path)
        .with_context(|| format!("Cannot read the memory of the VM from {}", path.display()))?;
    Ok(config.memory)
}

/// The configuration in a snapshot, which another user may have written.
pub(crate) fn read_config(path: &Path) -> Result<VmConfig> {
    // Opening a FIFO, for example, may not return.
    if !fs::metadata(path)?.is_file() {
        bail!("it is not a file");
    }
    let mut text = String::new();
    let file = File::open(path)?;
    file.take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > CONFIG_BYTES_MAX {
        bail!("it is longer than {CONFIG_BYTES_MAX} bytes");
    }
    Ok(serde_json::from_str(&text)?)
}

/// The values of an option, as `--name value…` or `--name=value`.
fn values(arguments: &[OsString], name: &str) -> Result<Vec<String>> {
    let mut values = Vec::new();
    let mut rest = arguments.iter().map(OsString::as_os_str).peekable();
    while let Some(argument) = rest.next() {
        let text = text(argument)?;
        if let Some(value) = text
            .strip_prefix(name)
            .and_then(|rest| rest.strip_prefix('='))
        {
            values.push(value.to_owned());
        } else if text == name {
            while let Some(value) =
                rest.next_if(|value| !value.as_encoded_bytes().starts_with(b"--"))
            {
                values.push(self::text(value)?.to_owned());
            }
        }
    }
    Ok(values)
}

fn text(argument: &OsStr) -> Result<&str> {
    match argument.to_str() {
        Some(text) => Ok(text),
        None => bail!("{} is not UTF-8", argument.display()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn wanted(line: &str) -> Result<Wanted> {
        let arguments: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        Wanted::of(&arguments)
    }

    #[test]
    fn command_line_tells_socket_and_memory() {
        for (line, mib) in [
            (
                "--api-socket /run/ch/a.sock --memory size=4G --cpus boot=2",
                4096,
            ),
            (
                "--memory=size=1G,hotplug_size=8G,hotplugged_size=512M --api-socket=path=/run/ch/a.sock",
                1536,
            ),
            (
                "--memory size=1G,hotplug_method=virtio-mem,hotplug_size=8G,hotplugged_size=512M --api-socket /run/ch/a.sock",
                9216,
            ),
            (
                "--memory size=0 --memory-zone id=a,size=1G id=b,size=2G --api-socket path=/run/ch/a.sock",
                3072,
            ),
            ("--api-socket /run/ch/a.sock", 512),
        ] {
            let wanted = wanted(line).unwrap();
            assert_eq!(wanted.memory, Bytes::mib(mib), "{line}");
            assert_eq!(wanted.socket, "/run/ch/a.sock", "{line}");
        }
    }

    #[test]
    fn command_line_tells_huge_pages() {
        for (line, huge_pages) in [
            ("--api-socket /a --memory size=4G,hugepages=on", true),
            (
                "--api-socket /a --memory size=0 --memory-zone id=a,size=1G id=b,size=1G,hugepages=on",
                true,
            ),
            ("--api-socket /a --memory size=4G", false),
        ] {
            assert_eq!(wanted(line).unwrap().huge_pages, huge_pages, "{line}");
        }
    }

    #[test]
    fn memory_of_a_restored_vm_is_that_of_its_snapshot() {
        let folder = tempfile::tempdir().unwrap();
        let line = format!(
            "--api-socket /run/ch/a.sock --restore source_url=file://{},resume=on",
            folder.path().display()
        );
        let path = folder.path().join("config.json");
        let config = r#"{"payload": {"kernel": "/k"},
            "memory": {"size": 3221225472, "hotplugged_size": 1073741824, "hugepages": true}}"#;
        fs::write(&path, config).unwrap();
        let found = wanted(&line).unwrap();
        assert_eq!((found.memory, found.huge_pages), (Bytes::mib(4096), true));
        let refused = || api::error_line(wanted(&line).unwrap_err().as_ref());
        fs::write(&path, r#"{"memory": {"size": "much"}}"#).unwrap();
        let named = format!(
            "Cannot read the memory of the VM from {}: invalid type: string",
            path.display()
        );
        assert!(refused().starts_with(&named), "{}", refused());
        fs::write(&path, vec![b' '; CONFIG_BYTES_MAX as usize + 1]).unwrap();
        assert!(refused().ends_with("it is longer than 4194304 bytes"));
        fs::remove_file(&path).unwrap();
        assert!(refused().contains("No such file"), "{}", refused());
        fs::create_dir(&path).unwrap();
        assert!(refused().ends_with("it is not a file"));
        let relative = "--api-socket /a --restore source_url=folder";
        assert!(wanted(relative).is_err());
    }

    #[test]
    fn signal_reaches_the_child_and_nobody_after_it() {
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let handle = handle_of(&child).unwrap();
        pidfd_send_signal(&handle, Signal::TERM).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(SIGTERM));
        let errno = pidfd_send_signal(&handle, Signal::TERM).unwrap_err();
        assert_eq!(errno, rustix::io::Errno::SRCH);
    }

    #[test]
    fn command_line_without_a_socket_or_with_nonsense_is_refused() {
        assert!(wanted("--memory size=4G").is_err());
        assert!(wanted("--api-socket /a --memory size=lots").is_err());
    }
}
