//! Tests clients that two generators create from our OpenAPI file, each with a VMM: progenitor in Rust,
//! openapi-python-client in Python.

use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use generated_client::{Client, Error, types};
use integration_tests::bare_metal::{self, kvm_opens};
use integration_tests::paths::workspace;
use integration_tests::vmm::{PROCESS_DEADLINE, Vmm};
use test_skip::skip;

const RAM_BYTES: i64 = 256 << 20;
/// Time for a VM's whole life cycle, of which the boot is the longest part.
const LIFE_DEADLINE: Duration = Duration::from_secs(300);
/// Generates Python without ruff, which would only format it.
const PYTHON_SETTINGS: &str = "post_hooks: []\n";

/// A guest that never ends.
fn config(kernel: &str) -> Result<types::VmConfig> {
    let config = serde_json::json!({
        "payload": { "kernel": kernel, "cmdline": "scenario=spin" },
        "memory": { "size": RAM_BYTES },
        "balloon": { "size": 0, "free_page_reporting": true },
        "serial": { "mode": "Null" },
        "console": { "mode": "Off" },
    });
    Ok(serde_json::from_value(config)?)
}

async fn life(client: &Client, kernel: &str) -> Result<()> {
    let ping = client.ping_vmm().await?.into_inner();
    ensure!(!ping.version.is_empty(), "{ping:?}");

    client.create_vm(&config(kernel)?).await?;
    let info = client.info_vm().await?.into_inner();
    ensure!(info.state == types::VmState::Created, "{info:?}");
    ensure!(info.config.payload.context("no payload")?.kernel.as_deref() == Some(kernel));
    match client.reclaim_stats_vm().await {
        Err(Error::ErrorResponse(response)) => {
            ensure!(!response.into_inner().is_empty(), "an error without text");
        }
        other => anyhow::bail!("reclaim-stats of a VM that does not run: {other:?}"),
    }

    client.boot_vm().await?;
    let info = client.info_vm().await?.into_inner();
    ensure!(info.state == types::VmState::Running, "{info:?}");
    ensure!(info.memory_actual_size == RAM_BYTES, "{info:?}");
    let stats = client.reclaim_stats_vm().await?.into_inner();
    ensure!(stats.configured_bytes == RAM_BYTES, "{stats:?}");
    ensure!(
        stats.resident_bytes > 0 && stats.resident_bytes < RAM_BYTES,
        "{stats:?}"
    );
    let counters = client.counters_vm().await?.into_inner();
    ensure!(counters.contains_key("__balloon"), "{counters:?}");
    let resize = types::VmResize {
        desired_balloon: Some(64 << 20),
        ..Default::default()
    };
    client.resize_vm(&resize).await?;
    client.delete_vm().await?;
    client.shutdown_vmm().await?;
    Ok(())
}

#[test]
fn client_that_progenitor_generates_steers_a_whole_life() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let kernel = bare_metal::image()?;
    let kernel = kernel.to_str().context("path is not UTF-8")?;
    let mut vmm = Vmm::start(&[])?;
    let http = reqwest::Client::builder()
        .unix_socket(vmm.socket())
        .build()?;
    let client = Client::new_with_client("http://localhost/api/v1", http);
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(async { tokio::time::timeout(LIFE_DEADLINE, life(&client, kernel)).await })
        .context("the client hangs")?
        .with_context(|| vmm.stderr())?;
    vmm.expect_clean_exit(PROCESS_DEADLINE)
}

#[test]
fn client_that_openapi_python_client_generates_steers_a_whole_life() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    // A virtual environment, which also has the client's dependencies.
    let programs = workspace().join("target/openapi-python-client/bin");
    if !programs.join("openapi-python-client").is_file() {
        skip("openapi-python-client is not installed: run `cargo xtask test-tools`");
        return Ok(());
    }
    let kernel = bare_metal::image()?;
    let mut vmm = Vmm::start(&[])?;
    let settings = vmm.folder().join("settings.yaml");
    std::fs::write(&settings, PYTHON_SETTINGS)?;
    let generated = Command::new(programs.join("openapi-python-client"))
        .args(["generate", "--meta", "none", "--fail-on-warning", "--path"])
        .arg(workspace().join("api/openapi/cloud-hypervisor.yaml"))
        .arg("--config")
        .arg(settings)
        .arg("--output-path")
        .arg(vmm.folder().join("generated"))
        .output()
        .context("run openapi-python-client")?;
    expect_success("openapi-python-client", &generated)?;
    let life = Command::new("timeout")
        .arg(LIFE_DEADLINE.as_secs().to_string())
        .arg(programs.join("python"))
        .arg(workspace().join("tests/tests/generated_client.py"))
        .arg(vmm.socket())
        .arg(kernel)
        .env("PYTHONPATH", vmm.folder())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .context("run Python")?;
    expect_success("the generated client", &life).with_context(|| vmm.stderr())?;
    vmm.expect_clean_exit(PROCESS_DEADLINE)
}

fn expect_success(what: &str, output: &Output) -> Result<()> {
    ensure!(
        output.status.success(),
        "{what} failed ({}):\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
