#![allow(clippy::unwrap_used)]
//! Tests the text of a scrape.

use std::time::Duration;

use super::*;
use crate::agent::{MoveStatus, PublishedState, StandbyStatus, Status, StoreStatus, VmStatus};
use crate::cluster::MovePhase;
use crate::model::Bytes;
use crate::standby::Phase;

fn snapshot() -> Arc<Snapshot> {
    let mut snapshot = Snapshot {
        status: Status {
            vms: vec![
                VmStatus {
                    vm: "db\"1".to_owned(),
                    configured: Bytes::gib(4),
                    target: Bytes::gib(1),
                    repopulated: Some(Bytes::mib(3)),
                    sample_age_ms: Some(1500),
                    up: true,
                    ..VmStatus::default()
                },
                VmStatus {
                    vm: "new".to_owned(),
                    ..VmStatus::default()
                },
            ],
            standby: vec![StandbyStatus {
                vm: "idle".to_owned(),
                phase: Some(Phase::Standby),
                disk: Bytes::mib(40),
                ..StandbyStatus::default()
            }],
            moves: vec![MoveStatus {
                vm: "db".to_owned(),
                from: "h1".to_owned(),
                to: "h2".to_owned(),
                phase: MovePhase::Sending,
                sent: Bytes::mib(1),
                why: String::new(),
            }],
            store: Some(StoreStatus {
                registered: true,
                held_bytes: Bytes::gib(2),
                calls: [("commit conflict".to_owned(), 3)].into(),
                ..StoreStatus::default()
            }),
            ..Status::default()
        },
        ..Snapshot::default()
    };
    snapshot.status.host.name = "h1".to_owned();
    snapshot.status.host.state = PublishedState::Orange;
    snapshot
        .decisions
        .actions
        .insert(("inflate", "shortage", "ordered"), 7);
    Arc::new(snapshot)
}

fn text() -> String {
    let published = Published::default();
    published
        .requests
        .record("vm.info", None, Duration::from_millis(3));
    published
        .requests
        .record("vm.info", None, Duration::from_secs(9));
    render(&snapshot(), &published)
}

#[test]
fn scrape_has_values_under_their_names() {
    let text = text();
    for line in [
        r#"ch_host_state{host="h1",state="orange"} 1"#,
        r#"ch_host_state{host="h1",state="green"} 0"#,
        r#"ch_standby_vms{host="h1",phase="standby"} 1"#,
        r#"ch_standby_vms{host="h1",phase="unusable"} 0"#,
        r#"ch_moves{host="h1",phase="sending"} 1"#,
        r#"ch_moves{host="h1",phase="failed"} 0"#,
        r#"ch_standby_disk_bytes{host="h1",vm="idle"} 41943040"#,
        r#"ch_store_registered{host="h1"} 1"#,
        r#"ch_store_held_bytes{host="h1"} 2147483648"#,
        r#"ch_store_calls_total{host="h1",op="commit",result="conflict"} 3"#,
        r#"ch_vm_balloon_target_bytes{host="h1",vm="db\"1"} 1073741824"#,
        r#"ch_vm_memory_target_bytes{host="h1",vm="db\"1"} 3221225472"#,
        r#"ch_vm_reclaim_repopulated_bytes_total{host="h1",vm="db\"1"} 3145728"#,
        r#"ch_decisions_total{host="h1",action="inflate",reason="shortage",result="ordered"} 7"#,
        r#"ch_api_request_duration_seconds_bucket{le="0.005",host="h1",op="vm.info",result="ok"} 1"#,
        r#"ch_api_request_duration_seconds_bucket{le="+Inf",host="h1",op="vm.info",result="ok"} 2"#,
        r#"ch_vm_up{host="h1",vm="new"} 0"#,
        "# EOF",
    ] {
        assert!(
            text.lines().any(|found| found == line),
            "no {line} in\n{text}"
        );
    }
}

#[test]
fn scrape_leaves_out_what_is_unknown() {
    let text = text();
    assert!(!text.contains(r#"ch_vm_memory_configured_bytes{host="h1",vm="new"}"#));
    assert!(!text.contains("ch_vm_guest_free_bytes"));
    assert!(!text.contains("ch_burst_coverage_ratio"));
}

/// Every `ch_…` name in a text.
fn names(text: &str) -> std::collections::BTreeSet<String> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .filter(|word| word.starts_with("ch_"))
        .map(str::to_owned)
        .collect()
}

/// A scrape of a host with a value for every metric.
fn full_text() -> String {
    let mut snapshot = Snapshot::clone(&snapshot());
    snapshot.status.host.burst_coverage = Some(2.0);
    snapshot.admissions.answers.insert(("admitted", "ok"), 1);
    let vm = &mut snapshot.status.vms[0];
    for figure in [
        &mut vm.guest_available,
        &mut vm.guest_free,
        &mut vm.reported,
        &mut vm.discarded,
        &mut vm.skipped,
    ] {
        *figure = Some(Bytes(1));
    }
    for figure in [
        &mut vm.guest_stalls,
        &mut vm.guest_major_faults,
        &mut vm.guest_oom_kills,
        &mut vm.report_p99_us,
    ] {
        *figure = Some(1);
    }
    let published = Published::default();
    published
        .requests
        .record("vm.info", None, Duration::from_millis(3));
    render(&Arc::new(snapshot), &published)
}

#[test]
fn alerts_and_dashboards_name_only_what_is_there() {
    let there = names(&full_text());
    for (file, text) in [
        (
            "alerts.yaml",
            include_str!("../../observability/alerts.yaml"),
        ),
        (
            "fleet.json",
            include_str!("../../observability/dashboards/fleet.json"),
        ),
        (
            "host.json",
            include_str!("../../observability/dashboards/host.json"),
        ),
        (
            "vm.json",
            include_str!("../../observability/dashboards/vm.json"),
        ),
    ] {
        let used = names(text);
        assert!(!used.is_empty(), "{file}");
        let missing: Vec<_> = used.difference(&there).collect();
        assert!(
            missing.is_empty(),
            "{file} names {missing:?}, there is\n{there:?}"
        );
        if file.ends_with(".json") {
            let dashboard: serde_json::Value = serde_json::from_str(text).unwrap();
            assert!(dashboard["panels"].as_array().unwrap().len() > 3, "{file}");
        }
    }
}
