#![allow(clippy::unwrap_used)]
//! Tests the program with a fake agent and a scheduler that fails intermittently.

#[path = "../src/fake_server.rs"]
mod fake_server;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use fake_server::{FakeServer, Reply};
use fleet::agent::{Status, VmStatus};
use fleet::model::Bytes;
use serde_json::Value;
use tempfile::TempDir;
use test_server::{Request, Server, response};

/// Generous, because test machines are shared.
const DEADLINE: Duration = Duration::from_secs(60);
const PROGRAM: &str = env!("CARGO_BIN_EXE_ch-fleet-adapter");

/// A socket that responds like an agent.
struct FakeAgent {
    folder: TempDir,
    status: Arc<Mutex<Status>>,
    _server: Server,
}

impl FakeAgent {
    fn start() -> Self {
        let folder = TempDir::new().unwrap();
        let mut status = Status {
            vms: vec![VmStatus {
                vm: "a".to_owned(),
                configured: Bytes::gib(4),
                ..VmStatus::default()
            }],
            ..Status::default()
        };
        status.host.ledger.firm_free = Bytes::gib(4);
        let status = Arc::new(Mutex::new(status));
        let shown = Arc::clone(&status);
        let socket = folder.path().join("agent.sock");
        let server = Server::unix(&socket, usize::MAX, move |mut stream| {
            let request = Request::read(&mut stream).unwrap();
            assert_eq!(request.target(), "GET /api/v1/fleet.status");
            let body = serde_json::to_string(&*shown.lock().unwrap()).unwrap();
            stream
                .write_all(response(200, "", &body).as_bytes())
                .unwrap();
        });
        Self {
            folder,
            status,
            _server: server,
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }
}

fn command(socket: &Path, server: &str, more: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .arg("--socket")
        .arg(socket)
        .args(["--interval", "0.1"])
        .args(more)
        .args(["kubernetes", "--node", "n1", "--server", server])
        .stdin(Stdio::null());
    command
}

fn once(agent: &FakeAgent, server: &FakeServer, more: &[&str]) -> Output {
    command(&agent.socket(), &server.url(), more)
        .output()
        .unwrap()
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        self.0.wait().unwrap();
    }
}

fn capacities(server: &FakeServer) -> Vec<String> {
    let of_node = |(line, body): (String, Value)| {
        let value = &body["status"]["capacity"]["ch-fleet.dev/memory-mib"];
        line.starts_with("PATCH /api/v1/nodes/n1/status")
            .then(|| value.as_str().unwrap().to_owned())
    };
    server.requests().into_iter().filter_map(of_node).collect()
}

fn wait(what: &str, condition: impl Fn() -> bool) {
    let until = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < until, "not in time: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn offer_that_failed_is_published_later_and_a_changed_one_anew() {
    let agent = FakeAgent::start();
    let good = Reply::new(200, "{}");
    let replies = [Reply::new(500, "{}"), Reply::new(503, "{}")];
    let server = FakeServer::start(replies.into_iter().chain(vec![good; 20]));
    let mut command = command(&agent.socket(), &server.url(), &[]);
    let _running = Running(command.stderr(Stdio::null()).spawn().unwrap());
    wait("the first capacity", || server.requests().len() == 4);
    assert_eq!(capacities(&server), ["8192"; 3]);
    agent.status.lock().unwrap().host.ledger.firm_free = Bytes::gib(1);
    wait("the fall", || server.requests().len() == 6);
    assert_eq!(capacities(&server)[3], "5120");
}

#[test]
fn once_publishes_or_fails_and_withdraw_takes_it_back() {
    let agent = FakeAgent::start();
    let server = FakeServer::start([
        Reply::new(200, "{}"),
        Reply::new(200, "{}"),
        Reply::new(403, r#"{"message":"forbidden"}"#),
        Reply::new(200, "{}"),
        Reply::new(200, "{}"),
    ]);
    assert!(once(&agent, &server, &["--once"]).status.success());
    let refused = once(&agent, &server, &["--once"]);
    assert_eq!(refused.status.code(), Some(1));
    let message = String::from_utf8(refused.stderr).unwrap();
    assert!(message.contains("403 forbidden"), "{message}");
    assert!(once(&agent, &server, &["--withdraw"]).status.success());
    assert_eq!(capacities(&server), ["8192", "8192", "0"]);
}

#[test]
fn agent_that_is_not_there_is_an_error() {
    let folder = TempDir::new().unwrap();
    let output = command(
        &folder.path().join("none"),
        "http://127.0.0.1:1",
        &["--once"],
    )
    .output()
    .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("There is no API socket"), "{message}");
}

#[test]
fn https_is_checked_against_the_named_certificates_only() {
    let agent = FakeAgent::start();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tls");
    let server = FakeServer::start_tls(
        &folder.join("server.pem"),
        &folder.join("server.key"),
        vec![Reply::new(200, "{}"); 2],
    );
    let url = format!("https://localhost:{}", server.port());
    let with = |ca: &Path| {
        command(&agent.socket(), &url, &["--once"])
            .arg("--ca-file")
            .arg(ca)
            .output()
            .unwrap()
    };
    let strange = with(&folder.join("other.pem"));
    assert_eq!(strange.status.code(), Some(1), "{strange:?}");
    assert!(server.requests().is_empty());
    let known = with(&folder.join("ca.pem"));
    assert!(known.status.success(), "{known:?}");
    assert_eq!(capacities(&server), ["8192"]);
    // The system's certificates are not used.
    let without = command(&agent.socket(), &url, &["--once"])
        .output()
        .unwrap();
    assert_eq!(without.status.code(), Some(1));
    let message = String::from_utf8(without.stderr).unwrap();
    assert!(message.contains("--ca-file"), "{message}");
}

#[test]
fn manual_pages_and_completions_are_written() {
    program_docs::expect_written(
        PROGRAM,
        &[
            ("man/man1/ch-fleet-adapter.1", "withdraw"),
            ("man/man1/ch-fleet-adapter-placement.1", r"resource\-class"),
            (
                "bash-completion/completions/ch-fleet-adapter",
                "--request-timeout",
            ),
            ("zsh/site-functions/_ch-fleet-adapter", "--request-timeout"),
            (
                "fish/vendor_completions.d/ch-fleet-adapter.fish",
                "-l request-timeout",
            ),
        ],
    );
}
