//! Tests the metrics, the alerting rules and the dashboards with a real Prometheus.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fleet::agent::fake_vmm::wait;
use serde_json::Value;
use tempfile::TempDir;

use super::host::{Host, Process, http_get};

/// Expressions of dashboards that may be empty on a healthy host.
const MAY_BE_EMPTY: [&str; 1] = [
    r#"sum by (op, result) (rate(ch_api_request_duration_seconds_count{host=~".*",result!="ok"}[5m]))"#,
];

fn observability() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fleet/observability")
}

#[test]
#[ignore = "needs Prometheus: cargo xtask fleet-page"]
fn alerting_rules_are_valid_and_pass_their_tests() {
    for arguments in [
        ["check", "rules", "alerts.yaml"],
        ["test", "rules", "alerts.test.yaml"],
    ] {
        let output = Command::new("promtool")
            .args(arguments)
            .current_dir(observability())
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }
}

struct Prometheus {
    address: String,
    _process: Process,
    _folder: TempDir,
}

impl Prometheus {
    fn start(target: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let address = TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .unwrap()
            .to_string();
        let rules = observability().join("alerts.yaml");
        fs::write(
            folder.path().join("prometheus.yml"),
            format!(
                "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{}']\n\
                 scrape_configs: [{{job_name: ch-fleet, static_configs: [{{targets: ['{target}']}}]}}]\n",
                rules.display()
            ),
        )
        .unwrap();
        let child = Command::new("prometheus")
            .arg("--config.file=prometheus.yml")
            .arg("--storage.tsdb.path=data")
            .arg(format!("--web.listen-address={address}"))
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(folder.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        Self {
            address,
            _process: Process(child),
            _folder: folder,
        }
    }

    /// The number of series that an expression returns.
    fn query(&self, expression: &str) -> Option<Vec<Value>> {
        let body = http_get(
            &self.address,
            &format!("/api/v1/query?query={}", encoded(expression)),
        )?;
        let answer: Value = serde_json::from_str(&body).unwrap();
        Some(answer["data"]["result"].as_array().unwrap().clone())
    }
}

fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

/// Every expression of a dashboard, with its variables set to "all".
fn expressions(dashboard: &Value) -> Vec<String> {
    let mut found = Vec::new();
    collect(dashboard, &mut found);
    for expression in &mut found {
        *expression = expression
            .replace("$__rate_interval", "10s")
            .replace("$__range", "10s")
            .replace("$host", ".*")
            .replace("$vm", ".*");
    }
    found
}

fn collect(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            if let Some(expression) = fields.get("expr").and_then(Value::as_str) {
                found.push(expression.to_owned());
            }
            fields.values().for_each(|value| collect(value, found));
        }
        Value::Array(values) => values.iter().for_each(|value| collect(value, found)),
        _ => {}
    }
}

#[test]
#[ignore = "needs Prometheus: cargo xtask fleet-page"]
fn prometheus_scrapes_the_agent_and_every_dashboard_has_its_figures() {
    let host = Host::start(["a", "b"].map(str::to_owned));
    host.ask_for_memory();
    let prometheus = Prometheus::start(&host.address);
    wait("a scrape with both VMs", || {
        let up = prometheus.query("up == 1")?;
        let vms = prometheus.query("ch_vm_memory_resident_bytes")?;
        // Rates need a second scrape.
        let plans = prometheus.query("rate(ch_plans_total[10s]) > 0")?;
        let kills = prometheus.query("rate(ch_vm_guest_oom_kills_total[10s])")?;
        let known = (up.len(), vms.len(), plans.len(), kills.len());
        (known == (1, 2, 1, 2)).then_some(())
    });
    let rules = http_get(&prometheus.address, "/api/v1/rules").unwrap();
    assert!(rules.contains("ControllerInert"), "{rules}");
    let (mut count, mut empty) = (0, Vec::new());
    for file in fs::read_dir(observability().join("dashboards")).unwrap() {
        let file = file.unwrap().path();
        let dashboard: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
        for expression in expressions(&dashboard) {
            let series = prometheus
                .query(&expression)
                .unwrap_or_else(|| panic!("{}: {expression} is refused", file.display()));
            if series.is_empty() && !MAY_BE_EMPTY.contains(&expression.as_str()) {
                empty.push(expression);
            }
            count += 1;
        }
    }
    assert!(count > 40, "only {count} expressions found");
    assert!(empty.is_empty(), "nothing comes of {empty:#?}");
    // Prometheus counts failed rules.
    let failures = prometheus
        .query("sum(prometheus_rule_evaluation_failures_total) or vector(0)")
        .unwrap();
    assert_eq!(failures[0]["value"][1], "0", "{failures:?}");
}
