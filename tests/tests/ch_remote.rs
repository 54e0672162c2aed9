//! Tests `ch-remote` with the VMM: output and exit status of each command.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use integration_tests::bare_metal::{self, expect_all_passed, kvm_opens};
use integration_tests::ended::Ended;
use integration_tests::paths;
use integration_tests::vmm::{PROCESS_DEADLINE, Vmm};
use serde_json::{Value, json};

/// One VMM and the program that controls it.
struct Remote<'a> {
    socket: &'a Path,
}

impl Remote<'_> {
    fn run(&self, words: &str) -> Result<Ended> {
        Ended::run(
            Command::new(paths::program("ch-remote")?)
                .arg("--api-socket")
                .arg(self.socket)
                .args(words.split_whitespace()),
        )
    }

    /// A command that prints nothing.
    fn quiet(&self, words: &str) -> Result<()> {
        let ended = self.run(words)?;
        ensure!(ended.output()?.is_empty(), "{words}: {ended:?}");
        Ok(())
    }

    /// A command that prints one line of JSON.
    fn json(&self, words: &str) -> Result<Value> {
        let ended = self.run(words)?;
        let output = ended.output().with_context(|| words.to_owned())?;
        ensure!(output.lines().count() == 1, "{words}: {output}");
        Ok(serde_json::from_str(output)?)
    }

    /// A command that the VMM rejects with this status and, at the end of its chain, this text.
    fn refused(&self, words: &str, status: &str, why: &str) -> Result<()> {
        let chain = self.run(words)?.chain("ch-remote")?;
        ensure!(
            chain[0] == format!("Server responded with {status}"),
            "{words}: {chain:?}"
        );
        ensure!(
            chain.last().is_some_and(|link| link.contains(why)),
            "{words}: {chain:?}"
        );
        Ok(())
    }

    fn state(&self) -> Result<Value> {
        Ok(self.json("info")?["state"].clone())
    }
}

fn keys(value: &Value) -> Vec<&str> {
    value
        .as_object()
        .map(|object| object.keys().map(String::as_str).collect())
        .unwrap_or_default()
}

/// A guest with a responsive balloon, as JSON for `create`.
fn write_config(vmm: &Vmm, command_line: &str) -> Result<String> {
    let config = json!({
        "payload": { "kernel": bare_metal::image()?, "cmdline": command_line },
        "memory": { "size": 256 << 20 },
        "balloon": { "size": 0, "free_page_reporting": true },
        "serial": { "mode": "File", "file": vmm.folder().join("serial") },
        "console": { "mode": "Off" },
    });
    let path = vmm.folder().join("config.json");
    fs::write(&path, config.to_string())?;
    Ok(path.display().to_string())
}

#[test]
fn every_command_steers_a_whole_life() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let mut vmm = Vmm::start(&[])?;
    let socket = vmm.socket();
    let remote = Remote { socket: &socket };

    let ping = remote.json("ping")?;
    ensure!(ping["pid"] == vmm.pid(), "{ping}");
    ensure!(
        keys(&ping) == ["build_version", "features", "pid", "version"],
        "{ping}"
    );
    remote.refused("info", "NotFound", "not created")?;
    remote.refused("boot", "NotFound", "")?;
    remote.refused("reboot", "NotFound", "not created")?;
    for command in [
        "pause",
        "resume",
        "shutdown",
        "power-button",
        "nmi",
        "counters",
        "balloon-stats",
    ] {
        remote.refused(command, "InternalServerError", "not running")?;
    }

    let config = write_config(&vmm, "scenario=balloon stay")?;
    remote.quiet(&format!("create {config}"))?;
    remote.refused(
        &format!("create {config}"),
        "InternalServerError",
        "already",
    )?;
    ensure!(remote.state()? == "Created");
    remote.quiet("boot")?;
    ensure!(remote.state()? == "Running");
    expect_all_passed(&mut vmm)?;
    look_at_figures(&remote)?;
    remote.quiet("resize --balloon 64M")?;
    let info = remote.json("info")?;
    ensure!(info["config"]["balloon"]["size"] == 64 << 20, "{info}");
    remote.quiet("resize --balloon 0")?;
    remote.refused("resize --memory 1G", "BadRequest", "hotplug_size is")?;
    remote.refused("resize --cpus 2", "InternalServerError", "")?;

    remote.refused(
        "resize-zone --id a --size 1G",
        "NotFound",
        "no memory zone a",
    )?;
    remote.refused(
        "resize-disk --disk data --size 1G",
        "NotFound",
        "no device data",
    )?;

    remote.quiet("pause")?;
    ensure!(remote.state()? == "Paused");
    remote.refused("pause", "InternalServerError", "")?;
    remote.quiet("resume")?;
    remote.quiet("power-button")?;
    remote.quiet("reboot")?;
    ensure!(remote.state()? == "Running");
    remote.quiet("shutdown")?;
    ensure!(remote.state()? == "Created");
    remote.quiet("delete")?;
    remote.quiet("delete")?;
    remote.refused("info", "NotFound", "not created")?;
    remote.quiet("shutdown-vmm")?;
    vmm.expect_clean_exit(PROCESS_DEADLINE)
}

/// Checks all figures of a guest that has reported and inflated.
fn look_at_figures(remote: &Remote<'_>) -> Result<()> {
    let info = remote.json("info")?;
    // 256 pages are in the balloon.
    ensure!(
        info["memory_actual_size"] == (256 << 20) - (256 << 12),
        "{info}"
    );
    let counters = remote.json("counters")?;
    ensure!(
        counters["__balloon"]["actual_bytes"] == 256 << 12,
        "{counters}"
    );
    let stats = remote.json("balloon-stats")?;
    ensure!(stats["balloon_actual"] == 256 << 12, "{stats}");
    ensure!(stats["stats"]["total_memory"] == 987_654_321, "{stats}");
    let reclaim = remote.json("reclaim-stats")?;
    ensure!(
        reclaim["report"]["discarded_bytes"] == 16 << 20,
        "{reclaim}"
    );
    let watched = remote.run("reclaim-stats --watch --interval 0.05 --count 3")?;
    let lines: Vec<&str> = watched.output()?.lines().collect();
    ensure!(lines.len() == 3, "{watched:?}");
    ensure!(
        lines.iter().all(|line| line.contains("resident_bytes=")),
        "{watched:?}"
    );
    Ok(())
}

#[test]
fn configuration_comes_from_standard_input_as_well() -> Result<()> {
    let vmm = Vmm::start(&[])?;
    let socket = vmm.socket();
    let remote = Remote { socket: &socket };
    let config = write_config(&vmm, "")?;
    for words in ["create", "create -"] {
        let mut shell = Command::new("sh");
        shell
            .args(["-c", "exec \"$0\" --api-socket \"$1\" $2 < \"$3\""])
            .arg(paths::program("ch-remote")?)
            .arg(&socket)
            .arg(words)
            .arg(&config);
        ensure!(Ended::run(&mut shell)?.output()?.is_empty(), "{words}");
        ensure!(remote.state()? == "Created");
        remote.quiet("delete")?;
    }
    for (content, why) in [
        ("{", "EOF"),
        ("", "Bad Request"),
        ("{\"memory\":7}", "invalid type"),
    ] {
        fs::write(&config, content)?;
        remote.refused(&format!("create {config}"), "BadRequest", why)?;
    }
    Ok(())
}

#[test]
fn no_vmm_or_no_sense_is_told_as_such() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("nobody.sock");
    let remote = Remote { socket: &socket };
    let chain = remote.run("ping")?.chain("ch-remote")?;
    ensure!(chain[0].contains("no API socket"), "{chain:?}");
    drop(std::os::unix::net::UnixListener::bind(&socket)?);
    let chain = remote.run("ping")?.chain("ch-remote")?;
    ensure!(chain[0].contains("No VMM listens"), "{chain:?}");
    for words in [
        "",
        "dance",
        "resize",
        "resize --balloon much",
        "ping twice",
        "create a b",
    ] {
        let ended = remote.run(words)?;
        ensure!(ended.code == Some(2), "{words}: {ended:?}");
        ensure!(ended.stdout.is_empty(), "{words}: {ended:?}");
    }
    let missing = remote.run("create /nonexistent/config")?;
    let chain = missing.chain("ch-remote")?;
    ensure!(chain[0].contains("/nonexistent/config"), "{chain:?}");
    Ok(())
}

/// A stopped VMM, as seen by a client: it accepts a connection, but never responds.
#[test]
fn timeout_ends_the_wait_for_a_vmm_that_does_not_answer() -> Result<()> {
    let vmm = Vmm::start(&[])?;
    let socket = vmm.socket();
    let remote = Remote { socket: &socket };
    vmm.stop()?;
    let chain = remote.run("--timeout 1 ping")?.chain("ch-remote")?;
    ensure!(
        chain[0].contains("did not respond within 1000 ms"),
        "{chain:?}"
    );
    vmm.signal("CONT")?;
    remote.json("ping")?;
    Ok(())
}
