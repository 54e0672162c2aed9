#![allow(clippy::unwrap_used)]
//! Tests with a fake service that reports conflicts and loses providers, and with Debian's placement.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::*;
use crate::fake_server::{FakeServer, Reply};

/// Generous, because test machines are shared.
const DEADLINE: Duration = Duration::from_secs(120);
const FOUND: &str = r#"{"resource_providers":[{"uuid":"u"}]}"#;
const CONFLICTED: &str =
    r#"{"errors":[{"code":"placement.concurrent_update","detail":"generation"}]}"#;

fn offer(in_use_mib: u64, free_mib: u64, state: State) -> Offer {
    Offer {
        state,
        in_use_mib,
        free_mib,
        ..Offer::default()
    }
}

fn service(url: String) -> Service {
    Service {
        url,
        token_file: None,
        ca_file: None,
        timeout: Duration::from_secs(60),
    }
}

fn introduced() -> Vec<Reply> {
    vec![Reply::new(204, ""); <State as strum::VariantArray>::VARIANTS.len()]
}

fn publish(replies: Vec<Reply>) -> (Result<(), HttpError>, Vec<(String, Value)>) {
    let server = FakeServer::start([introduced(), replies].concat());
    let mut placement = Placement::new(&service(server.url()), "h1", "MEMORY_MB", false).unwrap();
    let result = placement.publish(&offer(8, 2, State::Green));
    let requests = server
        .requests()
        .split_off(<State as strum::VariantArray>::VARIANTS.len());
    (result, requests)
}

fn there(generation: u64) -> Reply {
    let mut inventory = inventory(&offer(1, 0, State::Green));
    inventory["other"] = json!(1);
    let body = json!({
        "resource_provider_generation": generation, "inventories": {"MEMORY_MB": inventory, "VCPU": {}},
    });
    Reply::new(200, &body.to_string())
}

fn traits(names: &[&str]) -> Reply {
    let body = json!({"resource_provider_generation": 9, "traits": names});
    Reply::new(200, &body.to_string())
}

#[test]
fn generation_that_moved_on_is_read_again() {
    let (result, requests) = publish(vec![
        Reply::new(200, FOUND),
        there(3),
        Reply::new(409, CONFLICTED),
        there(4),
        Reply::new(200, "{}"),
        traits(&["HW_CPU_X86_AVX", "CUSTOM_CH_FLEET_RED"]),
        Reply::new(200, "{}"),
    ]);
    result.unwrap();
    let generations: Vec<_> = [2, 4]
        .map(|at| requests[at].1["resource_provider_generation"].clone())
        .to_vec();
    assert_eq!(generations, [3, 4]);
    assert_eq!(
        requests[4].0,
        "PUT /resource_providers/u/inventories/MEMORY_MB"
    );
    assert_eq!(requests[4].1["total"], 10);
    assert_eq!(
        requests[6].1["traits"],
        json!(["HW_CPU_X86_AVX", "CUSTOM_CH_FLEET_GREEN"])
    );
}

#[test]
fn provider_that_never_rests_is_given_up() {
    let mut replies = vec![Reply::new(200, FOUND)];
    for round in 0..20 {
        replies.extend([there(round), Reply::new(409, CONFLICTED)]);
    }
    let (result, requests) = publish(replies);
    assert!(
        matches!(result, Err(HttpError::Contended { .. })),
        "{result:?}"
    );
    assert_eq!(requests.len(), 1 + 2 * ATTEMPTS as usize);
}

#[test]
fn conflict_of_another_kind_is_an_error() {
    let in_use = r#"{"errors":[{"code":"placement.inventory.inuse","detail":"is in use"}]}"#;
    let (result, _) = publish(vec![
        Reply::new(200, FOUND),
        there(1),
        Reply::new(409, in_use),
    ]);
    assert!(result.unwrap_err().to_string().ends_with("409 is in use"));
}

#[test]
fn provider_that_is_missing_is_reported() {
    let (result, _) = publish(vec![Reply::new(200, r#"{"resource_providers":[]}"#)]);
    let error = result.unwrap_err().to_string();
    assert!(error.contains("--create"), "{error}");
}

/// Debian's placement with a separate database.
struct RealPlacement {
    child: Child,
    url: String,
    folder: TempDir,
}

impl Drop for RealPlacement {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
}

impl RealPlacement {
    fn start() -> Self {
        let folder = TempDir::new().unwrap();
        let here = folder.path();
        let config = format!(
            "[api]\nauth_strategy = noauth2\n[placement_database]\nconnection = sqlite:///{0}/db\n[DEFAULT]\nlog_file = {0}/log\n",
            here.display()
        );
        let file = here.join("placement.conf");
        fs::write(&file, config).unwrap();
        let status = Command::new("placement-manage")
            .arg("--config-file")
            .arg(&file)
            .args(["db", "sync"])
            .status()
            .unwrap();
        assert!(status.success());
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let log = fs::File::create(here.join("out")).unwrap();
        let child = Command::new("placement-api")
            .env("OS_PLACEMENT_CONFIG_DIR", here)
            .args(["--host", "127.0.0.1", "--port", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let until = Instant::now() + DEADLINE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < until, "placement does not listen");
            thread::sleep(Duration::from_millis(50));
        }
        fs::write(here.join("token"), "admin").unwrap();
        Self {
            child,
            url: format!("http://127.0.0.1:{port}"),
            folder,
        }
    }

    fn placement(&self, class: &str) -> Placement {
        let mut service = service(self.url.clone());
        service.token_file = Some(self.folder.path().join("token"));
        Placement::new(&service, "h1", class, true).unwrap()
    }
}

fn read(placement: &mut Placement, what: &str) -> Value {
    let path = format!("/resource_providers/{}/{what}", placement.uuid().unwrap());
    placement.send("GET", &path, None).unwrap().good().unwrap()
}

/// Allocates memory of the provider; returns the status of the response.
fn allocate(placement: &mut Placement, consumer: &str, mib: u64) -> u16 {
    let uuid = placement.uuid().unwrap();
    let body = json!({
        "allocations": {uuid: {"resources": {"MEMORY_MB": mib}}},
        "project_id": "p", "user_id": "u",
    });
    let path = format!("/allocations/{consumer}");
    // Since 1.28, consumers have generations, which this test does not need.
    placement.send("PUT", &path, Some(&body)).unwrap().status
}

#[test]
#[ignore = "needs placement: cargo xtask fleet-page"]
fn real_placement_takes_inventory_and_state_and_places_by_them() {
    let real = RealPlacement::start();
    let mut placement = real.placement("MEMORY_MB");
    placement.publish(&offer(0, 4096, State::Green)).unwrap();
    assert_eq!(
        allocate(&mut placement, "11111111-1111-4111-8111-111111111111", 3072),
        204
    );
    assert_eq!(
        allocate(&mut placement, "22222222-2222-4222-8222-222222222222", 2048),
        409
    );
    // More memory was reclaimed, so the allocation fits now.
    placement
        .publish(&offer(3072, 2048, State::Yellow))
        .unwrap();
    assert_eq!(
        allocate(&mut placement, "22222222-2222-4222-8222-222222222222", 2048),
        204
    );
    // Another client writes as well: the generation changes, and its trait is kept.
    let mut other = real.placement("CUSTOM_OTHER_MB");
    other.publish(&offer(0, 7, State::Yellow)).unwrap();
    let generation = generation_of(&read(&mut placement, "traits"));
    let uuid = placement.uuid().unwrap();
    let foreign = json!({
        "traits": ["CUSTOM_CH_FLEET_YELLOW", "HW_CPU_X86_AVX"], "resource_provider_generation": generation,
    });
    let path = format!("/resource_providers/{uuid}/traits");
    placement
        .send("PUT", &path, Some(&foreign))
        .unwrap()
        .good()
        .unwrap();
    placement.publish(&offer(5120, 0, State::Red)).unwrap();
    let traits = read(&mut placement, "traits");
    let mut names: Vec<_> = traits["traits"].as_array().unwrap().clone();
    names.sort_by_key(Value::to_string);
    assert_eq!(
        json!(names),
        json!(["CUSTOM_CH_FLEET_RED", "HW_CPU_X86_AVX"])
    );
    let inventories = read(&mut placement, "inventories");
    assert_eq!(inventories["inventories"]["MEMORY_MB"]["total"], 5120);
    assert_eq!(inventories["inventories"]["CUSTOM_OTHER_MB"]["total"], 7);
    // Without a change, nothing is written.
    placement.publish(&offer(5120, 0, State::Red)).unwrap();
    assert_eq!(
        generation_of(&read(&mut placement, "traits")),
        generation_of(&inventories)
    );
    // The capacity can be withdrawn although VMs are present.
    placement.publish(&Offer::default()).unwrap();
    assert_eq!(
        allocate(&mut placement, "33333333-3333-4333-8333-333333333333", 1),
        409
    );
}

#[test]
#[ignore = "needs placement: cargo xtask fleet-page"]
fn real_placement_tells_two_writers_apart_and_neither_is_lost() {
    let real = RealPlacement::start();
    real.placement("MEMORY_MB")
        .publish(&offer(0, 1, State::Green))
        .unwrap();
    thread::scope(|scope| {
        for class in ["CUSTOM_A", "CUSTOM_B"] {
            let mut placement = real.placement(class);
            scope.spawn(move || {
                for round in 1..=10 {
                    // Both clients change the provider continuously. If all five attempts of a call conflict, the next
                    // call may succeed.
                    while let Err(error) = placement.publish(&offer(0, round, State::Green)) {
                        assert!(matches!(error, HttpError::Contended { .. }), "{error}");
                    }
                }
            });
        }
    });
    let inventories = read(&mut real.placement("MEMORY_MB"), "inventories");
    for class in ["CUSTOM_A", "CUSTOM_B"] {
        assert_eq!(inventories["inventories"][class]["total"], 10, "{class}");
    }
}
