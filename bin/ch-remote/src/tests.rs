//! Tests the program with a mock VMM.

use std::collections::{BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use api::{Endpoint, Method, error_chain};
use clap::CommandFactory;
use tempfile::TempDir;
use test_server::{Request, Server, response};

use super::*;

fn parse(socket: &Path, words: &str) -> Arguments {
    let head = [
        "ch-remote".to_owned(),
        "--api-socket".to_owned(),
        socket.display().to_string(),
    ];
    Arguments::try_parse_from(
        head.into_iter()
            .chain(words.split_whitespace().map(str::to_owned)),
    )
    .unwrap()
}

fn refused(words: &str) -> clap::Error {
    Arguments::try_parse_from(["ch-remote"].into_iter().chain(words.split_whitespace()))
        .unwrap_err()
}

#[test]
fn page_of_the_program_is_that_of_its_command_line() {
    program_docs::expect_reference(Arguments::command());
}

#[test]
fn commands_in_the_documentation_are_understood() {
    for command in test_docs::commands_of("ch-remote") {
        if let Err(error) = Arguments::try_parse_from(command.filled_in(&["--api-socket", "/s"])) {
            panic!("{}: {error}", command.place);
        }
    }
}

/// A VMM that responds to successive connections with the given bytes.
struct MockServer {
    _dir: TempDir,
    socket: PathBuf,
    server: Server,
    requests: Arc<Mutex<Vec<String>>>,
}

impl MockServer {
    fn answering(answers: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        let socket = dir.path().join("api.sock");
        let requests = Arc::<Mutex<Vec<String>>>::default();
        let noted = Arc::clone(&requests);
        let mut answers: VecDeque<String> = answers.iter().map(|it| (*it).to_owned()).collect();
        let server = Server::unix(&socket, answers.len(), move |mut stream| {
            let Request { head, body } = Request::read(&mut stream).unwrap();
            noted.lock().unwrap().push(head + &body);
            let answer = answers.pop_front().unwrap();
            // Sent in two writes, like a server with separate buffers for head and body.
            let (first, second) = answer.split_at(answer.len() / 2);
            stream.write_all(first.as_bytes()).unwrap();
            stream.write_all(second.as_bytes()).unwrap();
        });
        Self {
            _dir: dir,
            socket,
            server,
            requests,
        }
    }

    /// The requests, after all responses have been sent.
    fn requests(self) -> Vec<String> {
        self.server.join();
        self.requests.lock().unwrap().clone()
    }
}

fn answer(status: u16, body: &str) -> String {
    response(status, "Connection: keep-alive\r\n", body)
}

/// Runs `words` with `answers`; returns the output and the requests.
fn exchange(words: &str, input: &str, answers: &[&str]) -> (Result<String>, Vec<String>) {
    let server = MockServer::answering(answers);
    let mut output = Vec::new();
    let result = run(
        &parse(&server.socket, words),
        &mut input.as_bytes(),
        &mut output,
        false,
    );
    (
        result.map(|()| String::from_utf8(output).unwrap()),
        server.requests(),
    )
}

#[test]
fn arguments_are_well_formed() {
    Arguments::command().debug_assert();
}

#[test]
fn commands_are_those_of_the_endpoint_table() {
    let table: BTreeSet<_> = Endpoint::ALL
        .iter()
        .map(|endpoint| endpoint.command().to_owned())
        .collect();
    let commands: BTreeSet<_> = Arguments::command()
        .get_subcommands()
        .map(|command| command.get_name().to_owned())
        .collect();
    assert_eq!(commands, table);
    // A command may read with one method and change with the other; in this case both have the same path.
    let paths: BTreeSet<_> = Endpoint::ALL
        .iter()
        .map(|endpoint| endpoint.name())
        .collect();
    assert_eq!(table.len(), paths.len());
}

#[test]
fn every_command_calls_its_endpoint() {
    for &endpoint in Endpoint::ALL {
        let arguments = match endpoint {
            Endpoint::VmResize => " --balloon 0",
            Endpoint::VmResizeZone => " --id mem0 --size 1G",
            Endpoint::VmResizeDisk => " --disk _disk0 --size 1G",
            Endpoint::VmUpdateRateLimiter => " id=_disk0,ops_size=10,ops_refill_time=1000",
            Endpoint::VmSetReclaimThresholds => " --remove a",
            Endpoint::VmBalloonHinting => " start",
            Endpoint::VmAddDisk => " path=/d",
            Endpoint::VmAddNet => " tap=t",
            Endpoint::VmAddFs => " tag=t,socket=/s",
            Endpoint::VmAddDevice => " path=/sys/x",
            Endpoint::VmAddPmem => " file=/m",
            Endpoint::VmAddGenericVhostUser => " device_type=rng,socket=/s,queue_sizes=[64]",
            Endpoint::VmAddVsock => " cid=3,socket=/s",
            Endpoint::VmAddBalloon => " size=0",
            Endpoint::VmRemoveDevice => " _disk0",
            Endpoint::VmSnapshot => " file:///d",
            Endpoint::VmSnapshotMerge => " file:///d file:///m",
            Endpoint::VmCoredump => " file:///core",
            Endpoint::VmRestore => " source_url=file:///d",
            Endpoint::VmSendMigration => " destination_url=unix:/s",
            Endpoint::VmReceiveMigration => " unix:/s",
            Endpoint::VmBalloonReporting => " pause",
            _ => "",
        };
        let words = format!("{}{arguments}", endpoint.command());
        let body = if endpoint.response().is_some() {
            "{}"
        } else {
            ""
        };
        let (result, requests) =
            exchange(&words, "{}", &[&answer(endpoint.success_status(), body)]);
        assert_eq!(result.unwrap(), if body.is_empty() { "" } else { "{}\n" });
        let method = if endpoint.method() == Method::Get {
            "GET"
        } else {
            "PUT"
        };
        assert!(
            requests[0].starts_with(&format!("{method} {} HTTP/1.1\r\n", endpoint.path())),
            "{}",
            requests[0]
        );
        assert_eq!(
            requests[0].contains("Content-Length"),
            endpoint.request().is_some(),
            "{}",
            requests[0]
        );
    }
}

#[test]
fn resize_sizes_take_suffixes() {
    let (result, requests) = exchange(
        "resize --balloon 512M --memory 2G --cpus 4",
        "",
        &[&answer(204, "")],
    );
    assert_eq!(result.unwrap(), "");
    let body = r#"{"desired_vcpus":4,"desired_ram":2147483648,"desired_balloon":536870912}"#;
    assert!(requests[0].ends_with(body), "{}", requests[0]);
    let (_, requests) = exchange("resize --balloon 0", "", &[&answer(204, "")]);
    assert!(
        requests[0].ends_with("\r\n\r\n{\"desired_balloon\":0}"),
        "{}",
        requests[0]
    );
}

#[test]
fn devices_are_described_as_on_the_command_line_of_the_vmm() {
    let info = r#"{"id":"d","bdf":"0000:00:05.0"}"#;
    let (result, requests) = exchange("add-disk path=/d,id=d", "", &[&answer(200, info)]);
    assert_eq!(result.unwrap(), format!("{info}\n"));
    for part in [r#""path":"/d""#, r#""id":"d""#] {
        assert!(requests[0].contains(part), "{}", requests[0]);
    }
    let (result, requests) = exchange("add-balloon size=1M", "", &[&answer(204, "")]);
    assert_eq!(result.unwrap(), "");
    assert!(requests[0].contains(r#""size":1048576"#), "{}", requests[0]);
    let (_, requests) = exchange("remove-device d", "", &[&answer(204, "")]);
    assert!(
        requests[0].ends_with("\r\n\r\n{\"id\":\"d\"}"),
        "{}",
        requests[0]
    );
    for wrong in [
        "add-disk",
        "add-disk paht=/d",
        "remove-device",
        "add-net fd=x",
    ] {
        refused(&format!("--api-socket s {wrong}"));
    }
}

#[test]
fn reporting_status_is_taken_from_the_reclaim_statistics() {
    let words = "balloon-reporting report-now --again";
    let (_, requests) = exchange(words, "", &[&answer(200, "{}")]);
    let body = "\r\n\r\n{\"action\":\"report-now\",\"again\":true}";
    assert!(requests[0].ends_with(body), "{}", requests[0]);
    let stats = r#"{"configured_bytes":1,"resident_bytes":1,"reclaimed_bytes":0,"ballooned_bytes":0,
        "balloon_target_bytes":0,"reporting":{"active":false,"state":"pausing"}}"#;
    let (result, requests) = exchange("balloon-reporting status", "", &[&answer(200, stats)]);
    assert!(requests[0].starts_with("GET /api/v1/vm.reclaim-stats "));
    assert!(result.unwrap().contains("\"state\":\"pausing\""));
}

#[test]
fn hinting_status_is_taken_from_the_reclaim_statistics() {
    let (result, requests) = exchange("balloon-hinting stop", "", &[&answer(204, "")]);
    assert_eq!(result.unwrap(), "");
    assert!(
        requests[0].ends_with("\r\n\r\n{\"action\":\"stop\"}"),
        "{}",
        requests[0]
    );
    let stats = api::ReclaimStats {
        hinting: api::HintingStatus {
            state: "running".to_owned(),
            command_id: 7,
            ..Default::default()
        },
        ..Default::default()
    };
    let whole = api::to_ascii_json(&stats).unwrap();
    let report = api::HintingReport {
        hinting: stats.hinting,
        hint: stats.hint,
    };
    let part = api::to_ascii_json(&report).unwrap();
    let (result, requests) = exchange("balloon-hinting status", "", &[&answer(200, &whole)]);
    assert_eq!(result.unwrap(), format!("{part}\n"));
    assert!(requests[0].starts_with("GET /api/v1/vm.reclaim-stats "));
}

#[test]
fn bad_arguments_are_refused_before_anything_is_sent() {
    for words in [
        "ping",
        "--api-socket /x",
        "--api-socket /x resize",
        "--api-socket /x resize --balloon 1gb",
        "--api-socket /x resize --balloon -1",
        "--api-socket /x resize --cpus 0",
        "--api-socket /x info extra",
        "--api-socket /x balloon-hinting",
        "--api-socket /x balloon-hinting begin",
        "--api-socket /x no-such-command",
        "--api-socket /x reclaim-stats --interval 2",
        "--api-socket /x reclaim-stats --watch --interval 0",
        "--api-socket /x reclaim-stats --watch --interval nan",
        "--api-socket /x reclaim-stats --watch --count 0",
        "--api-socket /x reclaim-stats --watch -o json",
        "--api-socket /x --timeout 0 ping",
        "--api-socket /x reclaim-thresholds --set",
        "--api-socket /x reclaim-thresholds --set enter=1",
        "--api-socket /x reclaim-thresholds --set name=a,order_min=1",
        "--api-socket /x reclaim-thresholds --watch",
    ] {
        assert!(refused(words).use_stderr(), "{words}");
    }
}

#[test]
fn reclaim_thresholds_are_changed_by_one_request() {
    let (result, requests) = exchange(
        "reclaim-thresholds --set name=a,enter=1K --set delay_ms_max=100 --remove b --set name=c,leave=2",
        "",
        &[&answer(200, "{}")],
    );
    assert_eq!(result.unwrap(), "{}\n");
    let body = r#"{"remove_alerts":["b"],"alerts":[{"name":"a","enter":1024},{"name":"c","leave":2}],"reporting_policy":{"delay_ms_max":100}}"#;
    assert!(requests[0].ends_with(body), "{}", requests[0]);
}

#[test]
fn create_sends_the_configuration_as_it_stands() {
    let config = "{ \"payload\": {\"kernel\": \"/k\"},\n \"new_section\": 1 }";
    for words in ["create", "create -"] {
        let (result, requests) = exchange(words, config, &[&answer(204, "")]);
        assert_eq!(result.unwrap(), "");
        assert!(requests[0].ends_with(config), "{}", requests[0]);
    }
    let dir = tempfile::TempDir::new().unwrap();
    let path = dir.path().join("config.json");
    std::fs::write(&path, config).unwrap();
    let (result, requests) = exchange(
        &format!("create {}", path.display()),
        "",
        &[&answer(204, "")],
    );
    assert_eq!(result.unwrap(), "");
    assert!(requests[0].ends_with(config), "{}", requests[0]);
}

#[test]
fn create_unreadable_configuration_is_an_error_of_its_own() {
    let run = |words: &str, input: &mut dyn Read| {
        run(
            &parse(Path::new("/nonexistent"), words),
            input,
            &mut Vec::new(),
            false,
        )
        .unwrap_err()
    };
    let error = run("create /nonexistent/config.json", &mut io::empty());
    assert_eq!(error.to_string(), "Cannot read /nonexistent/config.json");
    let error = run("create", &mut io::repeat(b' '));
    assert_eq!(
        error.to_string(),
        "The configuration is longer than 4194304 bytes"
    );
}

#[test]
fn server_errors_are_printed_as_one_chain() {
    let body = r#"["Error from API","The VM could not be resized","No balloon"]"#;
    let (result, _) = exchange("resize --balloon 1G", "", &[&answer(500, body)]);
    let error = result.unwrap_err();
    assert_eq!(
        api::chain_report("ch-remote", error.as_ref()),
        "Error: ch-remote exited with the following chain of errors:\n  \
         0: Server responded with InternalServerError\n  \
         1: Error from API\n  2: The VM could not be resized\n  3: No balloon"
    );
    assert!(!is_broken_pipe(&error));
}

#[test]
fn missing_socket_is_named() {
    let arguments = parse(Path::new("/nonexistent/api.sock"), "ping");
    let error = run(&arguments, &mut io::empty(), &mut Vec::new(), false).unwrap_err();
    assert_eq!(
        error_chain(error.as_ref())[0],
        "There is no API socket at /nonexistent/api.sock"
    );
}

#[test]
fn silent_server_ends_at_the_timeout() {
    let dir = tempfile::TempDir::new().unwrap();
    let socket = dir.path().join("api.sock");
    // Connections enter the backlog and never get a response.
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let error = run(
        &parse(&socket, "--timeout 1 ping"),
        &mut io::empty(),
        &mut Vec::new(),
        false,
    )
    .unwrap_err();
    assert_eq!(error.to_string(), "The VMM did not respond within 1000 ms");
}

#[test]
fn closed_output_is_no_failure() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let server = MockServer::answering(&[&answer(200, "{}")]);
    let error = run(
        &parse(&server.socket, "info"),
        &mut io::empty(),
        &mut Closed,
        false,
    )
    .unwrap_err();
    assert!(is_broken_pipe(&error));
    server.requests();
}

const STATS: &str = r#"{"configured_bytes":1024,"resident_bytes":512,"reclaimed_bytes":512,"ballooned_bytes":0,"balloon_target_bytes":0,"reporting":{"active":true}}"#;

/// The output of `words` for [`STATS`].
fn reclaim_stats(words: &str, terminal: bool) -> String {
    let server = MockServer::answering(&[&answer(200, STATS)]);
    let mut output = Vec::new();
    let arguments = parse(&server.socket, words);
    run(&arguments, &mut io::empty(), &mut output, terminal).unwrap();
    server.requests();
    String::from_utf8(output).unwrap()
}

#[test]
fn reclaim_statistics_are_a_table_on_a_terminal_and_json_elsewhere() {
    let json = format!("{STATS}\n");
    for (words, terminal) in [
        ("reclaim-stats", false),
        ("reclaim-stats -o json", false),
        ("reclaim-stats -o json", true),
    ] {
        assert_eq!(reclaim_stats(words, terminal), json, "{words}");
    }
    for (words, terminal) in [
        ("reclaim-stats", true),
        ("reclaim-stats -o table", true),
        ("reclaim-stats --output table", false),
    ] {
        let table = reclaim_stats(words, terminal);
        assert!(table.contains("50.0 %"), "{table}");
        assert!(
            table.ends_with('\n') && !table.ends_with("\n\n"),
            "{table:?}"
        );
        // A single sample has no rate, and the screen is not redrawn.
        assert!(
            !table.contains("Discard rate") && !table.contains('\x1b'),
            "{table:?}"
        );
    }
}

#[test]
fn watch_prints_a_line_for_every_sample() {
    let stats = answer(200, STATS);
    let (result, requests) = exchange(
        "reclaim-stats --watch --interval 0.05 --count 3",
        "",
        &[&stats, &stats, &stats],
    );
    let output = result.unwrap();
    assert_eq!((output.lines().count(), requests.len()), (3, 3));
    assert!(
        output
            .lines()
            .all(|line| line.contains(" resident_bytes=512 ")),
        "{output}"
    );
}

#[test]
fn watch_on_a_terminal_redraws_the_table() {
    let server = MockServer::answering(&[&answer(200, STATS)]);
    let mut output = Vec::new();
    let arguments = parse(&server.socket, "reclaim-stats --watch --count 1");
    run(&arguments, &mut io::empty(), &mut output, true).unwrap();
    server.requests();
    let output = String::from_utf8(output).unwrap();
    assert!(output.starts_with("\x1b[H\x1b[J"), "{output:?}");
    assert!(output.contains("50.0 %"), "{output}");
}

#[test]
fn watch_goes_on_over_a_refusal_and_ends_without_a_vmm() {
    let refusal = answer(500, r#"["VM is not running"]"#);
    let (result, _) = exchange(
        "reclaim-stats --watch --interval 0.05 --count 2",
        "",
        &[&refusal, &answer(200, STATS)],
    );
    let output = result.unwrap();
    assert!(
        output.lines().next().unwrap().contains("VM is not running"),
        "{output}"
    );
    assert!(
        output
            .lines()
            .nth(1)
            .unwrap()
            .contains("resident_bytes=512"),
        "{output}"
    );

    let not_found = answer(404, r#"["Not Found"]"#);
    let (result, _) = exchange("reclaim-stats --watch", "", &[&not_found]);
    assert_eq!(
        result.unwrap_err().to_string(),
        "Server responded with NotFound"
    );
}
