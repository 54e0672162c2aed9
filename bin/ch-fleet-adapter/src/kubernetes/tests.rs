#![allow(clippy::unwrap_used)]
use std::time::Duration;

use super::*;
use crate::fake_server::{FakeServer, Reply};
use crate::offer::State;

const NODE: &str = "/api/v1/nodes/n1/status";
const OBJECT: &str = "/apis/ch-fleet.dev/v1alpha1/hostmemories/n1/status";

fn offer() -> Offer {
    Offer {
        state: State::Green,
        in_use_mib: 8192,
        free_mib: 1024,
        vms: 2,
        agent_version: "1".to_owned(),
        unix_ms: 1_000,
        ..Offer::default()
    }
}

fn kubernetes(server: &FakeServer, timeout: Duration) -> Kubernetes {
    let service = Service {
        url: server.url(),
        token_file: None,
        ca_file: None,
        timeout,
    };
    Kubernetes::new(&service, "n1", "ch-fleet.dev/memory-mib").unwrap()
}

fn publish(
    replies: impl IntoIterator<Item = Reply>,
) -> (Result<(), HttpError>, Vec<(String, Value)>) {
    let server = FakeServer::start(replies);
    let result = kubernetes(&server, Duration::from_secs(30)).publish(&offer());
    (result, server.requests())
}

fn lines(requests: &[(String, Value)]) -> Vec<&str> {
    requests.iter().map(|(line, _)| line.as_str()).collect()
}

#[test]
fn node_and_object_are_patched_with_what_is_offered() {
    let (result, requests) =
        publish([Reply::new(200, r#"{"kind":"Node"}"#), Reply::new(200, "{}")]);
    result.unwrap();
    assert_eq!(
        lines(&requests),
        [format!("PATCH {NODE}"), format!("PATCH {OBJECT}")]
    );
    assert_eq!(
        requests[0].1,
        json!({"status": {"capacity": {"ch-fleet.dev/memory-mib": "9216"}}})
    );
    assert_eq!(requests[1].1["status"]["freeMiB"], 1024);
    assert_eq!(
        requests[1].1["status"]["observedAt"],
        "1970-01-01T00:00:01Z"
    );
}

#[test]
fn object_that_is_not_there_is_made_and_owned_by_its_node() {
    for (absent, made) in [(404, 201), (410, 201), (404, 409)] {
        let (result, requests) = publish([
            Reply::new(200, r#"{"metadata":{"uid":"u-1"}}"#),
            Reply::new(absent, "{}"),
            Reply::new(made, "{}"),
            Reply::new(200, "{}"),
        ]);
        result.unwrap();
        assert_eq!(requests[2].0, format!("POST {HOST_MEMORIES}"));
        assert_eq!(
            requests[2].1["metadata"]["ownerReferences"][0]["uid"],
            "u-1"
        );
        assert_eq!(requests[3].0, format!("PATCH {OBJECT}"));
    }
}

#[test]
fn conflict_is_tried_again_and_not_for_ever() {
    let conflict = || Reply::new(409, r#"{"message":"the object has been modified"}"#);
    let (result, requests) = publish([
        conflict(),
        conflict(),
        Reply::new(200, "{}"),
        Reply::new(200, "{}"),
    ]);
    result.unwrap();
    assert_eq!(requests.len(), 4);
    let (result, requests) = publish((0..20).map(|_| conflict()));
    assert!(
        matches!(result, Err(HttpError::Contended { .. })),
        "{result:?}"
    );
    assert_eq!(requests.len(), ATTEMPTS as usize);
}

#[test]
fn failure_is_reported_with_what_the_server_says() {
    let (result, requests) = publish([Reply::new(
        500,
        r#"{"message":"etcdserver: leader changed"}"#,
    )]);
    let error = result.unwrap_err().to_string();
    assert_eq!(
        error,
        format!("PATCH {NODE}: 500 etcdserver: leader changed")
    );
    assert_eq!(requests.len(), 1);
    // A deleted node is not recreated.
    let (result, requests) = publish([Reply::new(410, r#"{"message":"gone"}"#)]);
    assert!(matches!(
        result,
        Err(HttpError::Refused { status: 410, .. })
    ));
    assert_eq!(requests.len(), 1);
    let (result, _) = publish([Reply::new(429, "busy").header("Retry-After", "7")]);
    assert_eq!(
        result.unwrap_err().retry_after(),
        Some(Duration::from_secs(7))
    );
}

#[test]
fn missing_definition_is_reported_as_such() {
    let (result, _) = publish([
        Reply::new(200, "{}"),
        Reply::new(404, "404 page not found"),
        Reply::new(404, "404 page not found"),
    ]);
    let error = result.unwrap_err().to_string();
    assert!(error.contains("apply crd.yaml"), "{error}");
}

#[test]
fn server_that_is_slow_is_given_up() {
    let server = FakeServer::start([Reply::new(200, "{}").hanging()]);
    let result = kubernetes(&server, Duration::from_millis(200)).publish(&offer());
    assert!(
        matches!(result, Err(HttpError::Request { .. })),
        "{result:?}"
    );
}

#[test]
fn token_is_read_anew_for_each_request() {
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, "first\n").unwrap();
    let server = FakeServer::start((0..4).map(|_| Reply::new(200, "{}")));
    let mut service = Service {
        url: server.url(),
        token_file: Some(file.clone()),
        ca_file: None,
        timeout: Duration::from_secs(30),
    };
    let kubernetes = Kubernetes::new(&service, "n1", "r").unwrap();
    kubernetes.publish(&offer()).unwrap();
    std::fs::write(&file, "second\n").unwrap();
    kubernetes.publish(&offer()).unwrap();
    let tokens = server.headers("authorization");
    assert_eq!(
        tokens,
        [
            "Bearer first",
            "Bearer first",
            "Bearer second",
            "Bearer second"
        ]
    );
    service.ca_file = Some(file);
    let refused = Kubernetes::new(&service, "n1", "r");
    assert!(matches!(refused, Err(HttpError::NoCertificate { .. })));
}

/// The published status has exactly the fields of the definition, with their types.
#[test]
fn status_is_what_the_definition_says() {
    let text = include_str!("../../../../fleet/kubernetes/crd.yaml");
    let documents = yaml_rust2::YamlLoader::load_from_str(text).unwrap();
    let version = &documents[0]["spec"]["versions"][0];
    assert_eq!(version["name"].as_str(), Some("v1alpha1"));
    assert!(!version["subresources"]["status"].is_badvalue());
    let schema = &version["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"];
    let defined = schema.as_hash().unwrap();
    let published = status(&offer());
    let published = published.as_object().unwrap();
    assert_eq!(defined.len(), published.len());
    for (name, value) in published {
        let kind = schema[name.as_str()]["type"].as_str();
        let expected = if value.is_string() {
            "string"
        } else {
            "integer"
        };
        assert_eq!(kind, Some(expected), "{name}");
    }
    let states: Vec<_> = schema["state"]["enum"]
        .as_vec()
        .unwrap()
        .iter()
        .map(|state| state.as_str().unwrap())
        .collect();
    let known: Vec<&str> = <State as strum::VariantArray>::VARIANTS
        .iter()
        .map(|state| state.name())
        .collect();
    assert_eq!(states, known);
}
