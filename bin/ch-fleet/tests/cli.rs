#![allow(clippy::unwrap_used)]
//! Tests the program as processes on this machine.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use fleet::agent::fake_vmm::wait;
use serde_json::Value;
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_ch-fleet");

struct Agent {
    folder: TempDir,
    child: Child,
}

#[test]
fn agent_listens_where_the_command_line_says() {
    let folder = TempDir::new().unwrap();
    fs::write(
        folder.path().join("agent.toml"),
        config(folder.path(), "").replace("agent.sock", "settings.sock"),
    )
    .unwrap();
    let socket = folder.path().join("agent.sock");
    let child = spawn_with(folder.path(), &["--socket", socket.to_str().unwrap()]);
    let agent = Agent { folder, child };
    agent.wait_up();
    assert!(!agent.folder.path().join("settings.sock").exists());
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
}

fn config(folder: &Path, more: &str) -> String {
    let here = folder.display();
    format!(
        "[agent]\nsocket = '{here}/agent.sock'\nstate_dir = '{here}/state'\n\
         [discovery]\nsockets = ['{here}/*.vm']\nany_program = true\n[host]\nreserve = '0B'\n{more}"
    )
}

fn spawn(folder: &Path) -> Child {
    spawn_with(folder, &[])
}

fn spawn_with(folder: &Path, more: &[&str]) -> Child {
    Command::new(PROGRAM)
        .args(more)
        .args(["agent", "--config"])
        .arg(folder.join("agent.toml"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(folder.join("log")).unwrap())
        .spawn()
        .unwrap()
}

impl Agent {
    fn start() -> Self {
        let folder = TempDir::new().unwrap();
        let text = config(folder.path(), "");
        Self::start_in(folder, &text)
    }

    fn start_in(folder: TempDir, config: &str) -> Self {
        fs::write(folder.path().join("agent.toml"), config).unwrap();
        let child = spawn(folder.path());
        let agent = Self { folder, child };
        agent.wait_up();
        agent
    }

    fn wait_up(&self) {
        wait("the agent", || {
            self.ask(&["status"]).status.success().then_some(())
        });
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command
            .arg("--socket")
            .arg(self.socket())
            .args(["--timeout", "60"])
            .args(arguments);
        command
    }

    fn ask(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.ask(&[arguments, &["-o", "json"]].concat());
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal)
            .unwrap();
    }

    /// Runs a shell script in place of a VMM with `memory`.
    fn run(&self, memory: &str, script: &str) -> Output {
        self.run_command(memory, script, "0").output().unwrap()
    }

    fn run_command(&self, memory: &str, script: &str, wait: &str) -> Command {
        let socket = self.folder.path().join("new.vm");
        let socket = socket.to_str().unwrap();
        let size = format!("size={memory}");
        self.command(&[
            "run",
            "--wait",
            wait,
            "--",
            "sh",
            "-c",
            script,
            "--api-socket",
            socket,
            "--memory",
            &size,
        ])
    }
}

#[test]
fn run_reserves_while_the_vmm_runs_and_ends_as_it_does() {
    let agent = Agent::start();
    let held = agent.folder.path().join("held");
    let script = format!(
        "'{PROGRAM}' --socket '{}' -o json reservations > '{}'; exit 7",
        agent.socket().display(),
        held.display()
    );
    let output = agent.run("64M", &script);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    let held: Value = serde_json::from_slice(&fs::read(held).unwrap()).unwrap();
    assert_eq!(held[0]["vm"], "new.vm");
    assert_eq!(agent.json(&["reservations"]), serde_json::json!([]));
}

#[test]
fn program_that_is_no_vmm_is_asked_nothing() {
    let folder = TempDir::new().unwrap();
    let back_end = UnixListener::bind(folder.path().join("back-end.vm")).unwrap();
    back_end.set_nonblocking(true).unwrap();
    let text = config(folder.path(), "").replace("any_program = true\n", "");
    let agent = Agent::start_in(folder, &text);
    let log = agent.folder.path().join("log");
    wait("a word about it", || {
        let log = fs::read_to_string(&log).unwrap();
        (log.contains("back-end") && log.contains("which is not a VMM")).then_some(())
    });
    // No connection is made, because a back end that serves only one connection would end after it.
    let error = back_end.accept().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    assert_eq!(agent.json(&["status"])["vms"], serde_json::json!([]));
}

#[test]
fn refused_memory_is_exit_status_3_and_starts_nothing() {
    let agent = Agent::start();
    let output = agent.run("100T", "echo started");
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(output.stdout.is_empty());
    let output = agent.ask(&["reserve", "a", "--memory", "100T", "--dry-run"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
}

#[test]
fn waiting_ends_at_once_for_what_can_never_fit() {
    let agent = Agent::start();
    // Longer than any test takes.
    let mut waits = agent
        .run_command("100T", "echo started", "86400")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let status = wait("the end", || waits.try_wait().unwrap());
    assert_eq!(status.code(), Some(3));
}

#[test]
fn waiting_goes_on_while_the_agent_is_started_again() {
    let mut agent = Agent::start();
    agent.child.kill().unwrap();
    agent.child.wait().unwrap();
    let log = agent.folder.path().join("told");
    let mut waits = agent
        .run_command("64M", "exit 7", "86400")
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    agent.child = spawn(agent.folder.path());
    let status = wait("the end", || waits.try_wait().unwrap());
    let told = fs::read_to_string(log).unwrap();
    assert_eq!(status.code(), Some(7), "{told}");
}

#[test]
fn agent_that_was_killed_starts_again_with_its_reservations() {
    let mut agent = Agent::start();
    let made = agent.json(&["reserve", "a", "--memory", "64M", "--min", "32M"]);
    agent.child.kill().unwrap();
    agent.child.wait().unwrap();
    assert!(agent.socket().exists(), "killed, so it could not tidy up");
    agent.child = spawn(agent.folder.path());
    agent.wait_up();
    let held = agent.json(&["reservations"]);
    assert_eq!(held[0]["id"], made["reservation"]["id"]);
    let id = held[0]["id"].as_str().unwrap();
    agent.json(&["release", id]);
    assert_eq!(agent.json(&["reservations"]), serde_json::json!([]));
}

#[test]
fn sighup_reloads_and_sigterm_ends() {
    let mut agent = Agent::start();
    let file = agent.folder.path().join("agent.toml");
    fs::write(
        &file,
        config(agent.folder.path(), "[control]\nplam = '1s'\n"),
    )
    .unwrap();
    agent.signal(rustix::process::Signal::HUP);
    wait("the refusal", || {
        (agent.json(&["status"])["reload_ok"] == false).then_some(())
    });
    assert!(!agent.ask(&["reload"]).status.success());
    fs::write(
        &file,
        config(agent.folder.path(), "[control]\nplan = '3s'\n"),
    )
    .unwrap();
    agent.signal(rustix::process::Signal::HUP);
    wait("the new settings", || {
        let shown = agent.ask(&["config", "show"]).stdout;
        String::from_utf8(shown)
            .unwrap()
            .contains("plan = \"3s\"")
            .then_some(())
    });
    agent.signal(rustix::process::Signal::TERM);
    let status = wait("the end", || agent.child.try_wait().unwrap());
    assert!(status.success());
    assert!(!agent.socket().exists());
}

#[test]
fn commands_without_an_agent_say_so() {
    let folder = TempDir::new().unwrap();
    let output = Command::new(PROGRAM)
        .arg("--socket")
        .arg(folder.path().join("none.sock"))
        .arg("status")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("There is no API socket"), "{told}");
    assert!(told.contains("is ch-fleet-agent.service running"), "{told}");
}

#[test]
fn exit_statuses_are_the_documented_ones() {
    let agent = Agent::start();
    let scenario = agent.folder.path().join("scenario");
    let text = "name = 'a'\nlasts = '10min'\nsettle = '1min'\n[hosts]\nmemory = '8GiB'\n\
                [[guests]]\ncount = 1\nmemory = '4GiB'\n\
                load = { shape = 'burst', low = '15%', high = '65%', period = '15min', lasts = '5min' }\n[check]\nstalled_max = '100%'\n";
    fs::write(&scenario, text).unwrap();
    let unmet = agent.folder.path().join("unmet");
    fs::write(&unmet, format!("{text}ballooned_peak_min = '100%'\n")).unwrap();
    let (scenario, unmet) = (scenario.to_str().unwrap(), unmet.to_str().unwrap());
    let socket = "--api-socket=/a";
    for (arguments, code) in [
        (&["doctor"][..], 0),
        (&["simulate", scenario], 0),
        (&["simulate", unmet], 1),
        (&["simulate", "/nonexistent"], 1),
        (&["explain", "nobody"], 1),
        (&["top", "-n", "1", "--delay", "0"], 2),
        (&["stauts"], 2),
        (&["run", "--", "sh", socket, "--memory", "sise=1G"], 2),
    ] {
        let output = agent.ask(arguments);
        assert_eq!(
            output.status.code(),
            Some(code),
            "{arguments:?}: {output:?}"
        );
    }
    let killed = agent.run("64M", "kill -KILL $$");
    assert_eq!(killed.status.code(), Some(128 + 9), "{killed:?}");
    let absent = Command::new(PROGRAM)
        .args(["--socket", "/nonexistent/agent.sock", "doctor"])
        .output()
        .unwrap();
    assert_eq!(absent.status.code(), Some(1), "{absent:?}");
}

#[test]
fn fleet_commands_without_a_store_say_so() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("agent.toml");
    let status = |text: &str| {
        fs::write(&file, text).unwrap();
        let output = Command::new(PROGRAM)
            .args(["fleet", "--config"])
            .arg(&file)
            .args(["--timeout", "1", "status"])
            .output()
            .unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), told)
    };
    let (code, told) = status("");
    assert_eq!(code, Some(1));
    assert!(told.contains("No store is configured"), "{told}");
    // A port without a listener: it was just bound and closed.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let (code, told) = status(&format!("[store]\nendpoints = ['http://{address}']\n"));
    assert_eq!(code, Some(1));
    assert!(told.contains("cannot be reached"), "{told}");
}

#[test]
fn top_prints_rounds_where_there_is_no_terminal() {
    let agent = Agent::start();
    let output = agent.ask(&["top", "-n", "2", "-d", "0.1"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.matches("DECISION").count(), 2, "{text}");
}

#[test]
fn manual_pages_and_completions_are_written() {
    program_docs::expect_written(
        PROGRAM,
        &[
            ("man/man1/ch-fleet.1", r"ch\-fleet\-reserve(1)"),
            ("man/man1/ch-fleet-fleet-place.1", "reserve"),
            ("bash-completion/completions/ch-fleet", "--huge-pages"),
            ("zsh/site-functions/_ch-fleet", "--huge-pages"),
            ("fish/vendor_completions.d/ch-fleet.fish", "-l huge-pages"),
        ],
    );
}
