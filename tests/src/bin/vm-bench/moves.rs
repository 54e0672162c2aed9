//! Downtime of a guest that moves to another process, and the bytes that are sent.
//!
//! `cargo xtask bench --icount --memory 6G move`
//!
//! `-- 512M` makes the idle guest return less than 3.5 GiB, which takes less time.
//!
//! The hosts are namespaces of one machine with one processor, which source and target share.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use integration_tests::MIB;
use integration_tests::linux::{Guest, Machine};
use integration_tests::two_hosts::TwoHosts;
use integration_tests::wait::wait_for;
use serde_json::{Map, Value, json};
use tempfile::NamedTempFile;

use crate::options::Asked;
use crate::restore::resident_bytes;

/// Its name on the command line.
pub(crate) const NAME: &str = "move";

/// The idle guest has touched and returned this much of its 4 GiB.
const RETURNED: &str = "3584M";
/// It still uses this much.
const USED: &str = "48M";
/// The busy guest writes the pages of this region in turn.
const WRITTEN: &str = "256M";
const WRITTEN_PER_S: &str = "50000000";
/// Moves of each guest.
const TURNS: usize = 3;
const RETURN_DEADLINE: Duration = Duration::from_secs(600);

/// Moves an idle guest, and one that writes its memory at a steady rate.
pub(crate) fn run(asked: &Asked<'_>) -> Result<Value> {
    let returned = match asked.by_name.unwrap_or_default() {
        [] => RETURNED,
        [returned] => returned.as_str(),
        words => bail!("there is no option {:?}", words.join(" ")),
    };
    let mut figures = Map::new();
    for (name, prepare, settings) in [
        (
            "idle",
            prepare_idle as fn(&mut Guest, &str) -> Result<()>,
            json!({"downtime_ms": 50}),
        ),
        (
            "writes_50_mb_per_s",
            prepare_busy,
            json!({"downtime_ms": 300}),
        ),
    ] {
        let step = |step: &str| eprintln!("{NAME}/{name}: {step}");
        let measured = measure(|guest| prepare(guest, returned), &settings, step);
        let measured = measured.with_context(|| name.to_owned())?;
        figures.insert(name.to_owned(), measured);
    }
    Ok(figures.into())
}

/// `step` reports progress: a busy machine needs minutes for each step.
fn measure(
    prepare: impl Fn(&mut Guest) -> Result<()>,
    settings: &Value,
    step: impl Fn(&str),
) -> Result<Value> {
    let hosts = TwoHosts::new("vmbench", "192.168.244")?;
    let image = NamedTempFile::new()?;
    image.as_file().set_len(16 * MIB)?;
    let machine = Machine {
        memory: "size=4G",
        ..Machine::default()
    };
    let mut guest = hosts.boot(&machine, image.path())?;
    step("booted");
    prepare(&mut guest)?;
    step("prepared");
    let mut moves = Vec::new();
    for turn in 1..=TURNS {
        let resident = resident_bytes(&guest.vmm)?;
        let (moved, report) = hosts.move_to(turn % 2, guest, settings)?;
        guest = moved;
        guest.wait_serving()?;
        step(&format!("moved, {report}"));
        let figure = |name: &str| -> Result<u64> {
            let text = report[name].as_str();
            let text = text.with_context(|| format!("no {name} in {report}"))?;
            Ok(text.parse()?)
        };
        moves.push(json!({
            "downtime_ms": figure("downtime_ms")?,
            "passes": figure("passes")?,
            "wire_bytes": figure("wire_bytes")?,
            "resident_bytes_before": resident,
            "resident_bytes_after": resident_bytes(&guest.vmm)?,
        }));
    }
    guest.command("verify")?;
    Ok(json!({ "moves": moves }))
}

fn prepare_idle(guest: &mut Guest, returned: &str) -> Result<()> {
    // In huge pages: blocks that are free only in part are not reported.
    guest.command(&format!("alloc {USED} seed=5 huge=always"))?;
    let idle = resident_bytes(&guest.vmm)?;
    guest.command_within(&format!("alloc {returned}"), RETURN_DEADLINE)?;
    guest.command("free 1")?;
    wait_for("the returned memory", RETURN_DEADLINE, || {
        Ok((resident_bytes(&guest.vmm)? < idle + 64 * MIB).then_some(()))
    })
}

fn prepare_busy(guest: &mut Guest, _returned: &str) -> Result<()> {
    guest.command(&format!("alloc {USED} seed=5"))?;
    let output = "/tmp/dirty";
    guest.shell(&format!(
        "mkdir -p /tmp && guest-mem dirty --bytes {WRITTEN} --per-second {WRITTEN_PER_S} > {output} 2>&1 &"
    ))?;
    let text = wait_for("the writer", RETURN_DEADLINE, || {
        let text = guest.shell(&format!("cat {output}"))?;
        Ok(text.contains("dirty").then_some(text))
    })?;
    ensure!(text.contains("ok dirty"), "{text}");
    Ok(())
}
