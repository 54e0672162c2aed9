//! An agent as a separate process, with fake VMMs in the process of the test.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use fleet::agent::fake_vmm::{DEADLINE, FakeVm, GIB, World, wait};

/// A program that is killed when its test ends.
pub(crate) struct Process(pub(crate) Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        self.0.wait().unwrap();
    }
}

/// The agent and its VMs. The agent is configured so that this machine appears to have no spare memory.
pub(crate) struct Host {
    pub(crate) world: World,
    agent: Option<Process>,
    /// Address of the page; the same after a restart.
    pub(crate) address: String,
}

impl Host {
    pub(crate) fn start(names: impl IntoIterator<Item = String>) -> Self {
        let world = World::new(64 * GIB, 0);
        for name in names {
            world.add(&name, FakeVm::new(4 * GIB, 3 * GIB));
        }
        let mut host = Self {
            world,
            agent: None,
            address: "127.0.0.1:0".to_owned(),
        };
        host.start_agent();
        host
    }

    pub(crate) fn start_agent(&mut self) {
        let here = self.world.path().display();
        let config = format!(
            "[agent]\nsocket = '{here}/agent.sock'\nstate_dir = '{here}/state'\nlisten = '{}'\n\
             [discovery]\nsockets = ['{here}/vms/*.sock']\nany_program = true\n[host]\nreserve = '{}B'\n[control]\nsample = '1s'\n",
            self.address,
            available_bytes()
        );
        let (file, log) = (
            self.world.path().join("agent.toml"),
            self.world.path().join("log"),
        );
        fs::write(&file, config).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_ch-fleet"))
            .args(["agent", "--config"])
            .arg(file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        self.agent = Some(Process(child));
        self.address = wait("the address of the page", || {
            let log = fs::read_to_string(&log).unwrap();
            let (_, rest) = log.split_once("page and metrics at http://")?;
            Some(rest.split_once('/')?.0.to_owned())
        });
    }

    /// Requests more memory than available, so that a refusal can be counted.
    pub(crate) fn ask_for_memory(&self) {
        let socket = self.world.path().join("agent.sock");
        let output = Command::new(env!("CARGO_BIN_EXE_ch-fleet"))
            .arg("--socket")
            .arg(socket)
            .args(["--timeout", "60", "reserve", "more", "--memory", "100T"])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(3), "{output:?}");
    }

    pub(crate) fn kill_agent(&mut self) {
        self.agent = None;
    }
}

/// `MemAvailable` of this machine.
fn available_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .unwrap();
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
    kib * 1024
}

/// The body of a response with status 200; `None` for any other.
pub(crate) fn http_get(address: &str, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    // HTTP/1.0 excludes a chunked response.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    head.split_once(' ')?
        .1
        .starts_with("200")
        .then(|| body.to_owned())
}
