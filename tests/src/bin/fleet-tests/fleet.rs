//! Three members and five agents, and requests to them.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use integration_tests::wait::wait_for;
use serde_json::Value;
use tempfile::TempDir;

use super::network::Network;
use super::node::{DEADLINE, Node};

/// Members of the store.
pub(crate) const MEMBERS: usize = 3;
/// Hosts.
pub(crate) const HOSTS: usize = 5;
/// Number of VMs of [`Fleet::size`] that fit on each host by its settings.
pub(crate) const PLACES: usize = 2;
/// The hosts' lease.
const LEASE: &str = "10s";
/// Lifetime of a reservation whose VM does not start: longer than any case needs it, shorter than [`DEADLINE`].
const HOLD: &str = "120s";

/// The fleet.
#[derive(Debug)]
pub(crate) struct Fleet {
    folder: TempDir,
    program: PathBuf,
    /// The network, or the reason why there is none.
    pub(crate) network: Result<Network, String>,
    pub(crate) members: Vec<Node>,
    pub(crate) agents: Vec<Node>,
    /// Memory of a VM: more than a third of the memory that a host may reserve.
    pub(crate) size: u64,
}

/// The result of a `ch-fleet` command.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) code: i32,
    pub(crate) value: Value,
    pub(crate) told: String,
}

impl Fleet {
    pub(crate) fn start(network: Result<Network, String>) -> Result<Self> {
        let program = std::env::var_os("CH_FLEET").context("CH_FLEET names no ch-fleet")?;
        let program = PathBuf::from(program);
        ensure!(program.exists(), "{} is not built", program.display());
        if let Err(why) = &network {
            println!("note: {why}");
        }
        let folder = TempDir::with_prefix("fleet-tests-").context("making a folder")?;
        let mut fleet = Self {
            folder,
            program,
            network,
            members: Vec::new(),
            agents: Vec::new(),
            size: vm_size()?,
        };
        for index in 0..MEMBERS {
            let node = fleet.member(index);
            fleet.members.push(node);
            fleet.start_member(index)?;
        }
        for index in 0..HOSTS {
            let node = fleet.agent(index)?;
            fleet.agents.push(node);
            fleet.start_agent(index)?;
        }
        Ok(fleet)
    }

    /// Members have numbers from 11 on, agents from 21 on.
    fn address(&self, number: usize) -> String {
        let net = if self.network.is_ok() {
            "10.77.0"
        } else {
            "127.77.0"
        };
        format!("{net}.{number}")
    }

    fn endpoints(&self) -> Vec<String> {
        (0..MEMBERS)
            .map(|index| format!("http://{}:2379", self.address(11 + index)))
            .collect()
    }

    fn member(&self, index: usize) -> Node {
        let name = format!("m{index}");
        let peer = |index: usize| format!("http://{}:2380", self.address(11 + index));
        let all: Vec<String> = (0..MEMBERS)
            .map(|index| format!("m{index}={}", peer(index)))
            .collect();
        let client = &self.endpoints()[index];
        let folder = self.folder.path().join(&name);
        let command = [
            "etcd",
            "--name",
            &name,
            "--data-dir",
            &folder.display().to_string(),
            "--listen-client-urls",
            client,
            "--advertise-client-urls",
            client,
            "--listen-peer-urls",
            &peer(index),
            "--initial-advertise-peer-urls",
            &peer(index),
            "--initial-cluster",
            &all.join(","),
            "--logger",
            "zap",
            "--log-level",
            "error",
        ];
        let log = self.folder.path().join(format!("{name}.log"));
        let command = command.into_iter().map(str::to_owned).collect();
        Node::new(&name, self.address(11 + index), log, command)
    }

    fn agent(&self, index: usize) -> Result<Node> {
        let name = format!("h{index}");
        let folder = self.folder_of(index);
        fs::create_dir_all(&folder).context("making a folder")?;
        let here = folder.display();
        let file = folder.join("agent.toml");
        // A host may refuse only because of its reservations. Its state, its free memory and its guests' bursts must
        // not matter, because they are those of this machine, on which other programs run.
        let text = format!(
            "[agent]\nsocket = '{here}/agent.sock'\nstate_dir = '{here}/state'\ndry_run = true\nscan = '500ms'\n\
             [discovery]\nsockets = ['{here}/*.sock']\nany_program = true\n\
             [host]\nreserve = '0B'\n\
             [admission]\novercommit_max = 1.2\nreservation = '{HOLD}'\nfacts_age_max = '30s'\n\
             [thresholds]\nyellow = {{ enter = '0.3%', leave = '0.4%' }}\norange = {{ enter = '0.2%', leave = '0.3%' }}\n\
             red = {{ enter = '0.1%', leave = '0.2%' }}\npressure_below = '0%'\n\
             [control]\nsample = '500ms'\nburst_prior = '0%'\n\
             [policy.default]\nmin = '0%'\nfloor = '1MiB'\n\
             [store]\nendpoints = {:?}\nhost = '{name}'\nlease = '{LEASE}'\ndeadline = '2s'\n",
            self.endpoints()
        );
        fs::write(&file, text).context("writing settings")?;
        let command = vec![
            self.program.display().to_string(),
            "agent".to_owned(),
            "--config".to_owned(),
            file.display().to_string(),
        ];
        let log = self.folder.path().join(format!("{name}.log"));
        Ok(Node::new(&name, self.address(21 + index), log, command))
    }

    pub(crate) fn folder_of(&self, host: usize) -> PathBuf {
        self.folder.path().join(format!("h{host}"))
    }

    pub(crate) fn start_member(&mut self, index: usize) -> Result<()> {
        self.members[index].start(self.network.as_mut().ok())
    }

    pub(crate) fn start_agent(&mut self, index: usize) -> Result<()> {
        self.agents[index].start(self.network.as_mut().ok())
    }

    /// Waits until all hosts are registered and nothing is reserved.
    pub(crate) fn settle(&mut self) -> Result<()> {
        wait_for("the fleet at rest", DEADLINE, || {
            let Ok(hosts) = self.hosts() else {
                return Ok(None);
            };
            let there = hosts.iter().filter(|host| host["there"] == true).count();
            let lines = hosts.iter().any(|host| {
                host["lines"]
                    .as_object()
                    .is_some_and(|lines| !lines.is_empty())
            });
            if there != HOSTS || lines {
                return Ok(None);
            }
            for host in 0..HOSTS {
                if self.held(host)? != Some(0) {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })
    }

    /// `ch-fleet fleet …` on a machine of the fleet.
    pub(crate) fn fleet_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["fleet", "-o", "json", "--config"])
            .arg(self.folder_of(0).join("agent.toml"))
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn ask(&self, arguments: &[&str]) -> Result<Answer> {
        answer(&mut self.fleet_command(arguments))
    }

    /// Runs all of them at the same time.
    pub(crate) fn ask_many(&self, all: &[Vec<String>]) -> Result<Vec<Answer>> {
        let children: Vec<_> = all
            .iter()
            .map(|arguments| {
                let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
                self.fleet_command(&arguments)
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped())
                    .spawn()
                    .context("starting ch-fleet")
            })
            .collect();
        let wait = |child: Result<std::process::Child>| -> Result<Answer> {
            read(&child?.wait_with_output().context("waiting for ch-fleet")?)
        };
        children.into_iter().map(wait).collect()
    }

    /// Arguments that request a place.
    pub(crate) fn place(&self, name: &str, seconds: u64) -> Vec<String> {
        let size = self.size.to_string();
        let timeout = seconds.to_string();
        [
            "place",
            "--reserve",
            "--min",
            "1M",
            "--memory",
            &size,
            "--name",
            name,
            "--timeout",
            &timeout,
        ]
        .map(str::to_owned)
        .to_vec()
    }

    pub(crate) fn place_one(&self, name: &str, seconds: u64) -> Result<Answer> {
        Ok(self.ask_many(&[self.place(name, seconds)])?.remove(0))
    }

    pub(crate) fn hosts(&self) -> Result<Vec<Value>> {
        let answer = self.ask(&["status", "--timeout", "10"])?;
        ensure!(answer.code == 0, "fleet status: {}", answer.told);
        Ok(answer.value.as_array().cloned().unwrap_or_default())
    }

    /// An agent's response on its socket; `None` if there is none.
    pub(crate) fn local(&self, host: usize, arguments: &[&str]) -> Result<Option<Value>> {
        let answer = self.local_answer(host, arguments)?;
        Ok((answer.code == 0).then_some(answer.value))
    }

    pub(crate) fn local_answer(&self, host: usize, arguments: &[&str]) -> Result<Answer> {
        answer(
            Command::new(&self.program)
                .args(["-o", "json", "--timeout", "5", "--socket"])
                .arg(self.folder_of(host).join("agent.sock"))
                .args(arguments)
                .stdin(Stdio::null()),
        )
    }

    /// Number of reservations on a host; `None` if it does not respond. More than its places is the failure that these
    /// tests look for.
    pub(crate) fn held(&self, host: usize) -> Result<Option<usize>> {
        let Some(held) = self.local(host, &["reservations"])? else {
            return Ok(None);
        };
        let count = held.as_array().map_or(0, Vec::len);
        ensure!(
            count <= PLACES,
            "h{host} has sold {count} places and has {PLACES}: {held}"
        );
        Ok(Some(count))
    }

    /// Checks that no host has reserved too much.
    pub(crate) fn check_nothing_oversold(&self) -> Result<()> {
        for host in 0..HOSTS {
            self.held(host)?;
        }
        Ok(())
    }

    pub(crate) fn wait_status(
        &self,
        what: &str,
        host: usize,
        is: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        wait_for(&format!("h{host}: {what}"), DEADLINE, || {
            Ok(self.local(host, &["status"])?.filter(&is))
        })
    }

    /// The ends of all logs.
    pub(crate) fn tell(&self) -> String {
        let mut text = String::new();
        for node in self.members.iter().chain(&self.agents) {
            let log = fs::read_to_string(&node.log).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let end = &lines[lines.len().saturating_sub(8)..];
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "--- {} ({})\n{}",
                node.name,
                node.address,
                end.join("\n")
            );
        }
        text
    }
}

/// A little more than half of this machine's memory: 1.2 times the memory may be reserved, so two VMs fit and three do
/// not.
fn vm_size() -> Result<u64> {
    let text = fs::read_to_string(Path::new("/proc/meminfo")).context("reading meminfo")?;
    let total = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .context("meminfo has no MemTotal")?;
    Ok(((total << 10) * 11 / 20) >> 20 << 20)
}

fn answer(command: &mut Command) -> Result<Answer> {
    read(&command.output().context("starting ch-fleet")?)
}

fn read(output: &std::process::Output) -> Result<Answer> {
    let told = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let Some(code) = output.status.code() else {
        bail!("ch-fleet ended by a signal: {told}");
    };
    Ok(Answer {
        code,
        value: serde_json::from_slice(&output.stdout).unwrap_or_default(),
        told,
    })
}
