//! Measures the time from the start of the VMM's process to the guest's init.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use integration_tests::linux::{BOOT_DEADLINE, Machine};
use integration_tests::wait::wait_for;
use serde_json::{Value, json};

use crate::subject::Subject;
use integration_tests::overhead::disk_image;

/// Number of starts per VMM, to show the repeatability.
pub(crate) const TURNS: usize = 3;

/// Kills the VMM when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Measures one start of a VMM.
pub(crate) fn measure(subject: &Subject) -> Result<Value> {
    let (folder, disk) = disk_image()?;
    let machine = Machine {
        serial: "tty",
        script: "true",
        end: "stay",
        arguments: &[
            "--balloon",
            "size=0,free_page_reporting=on",
            "--disk",
            &disk,
        ],
        ..Machine::default()
    };
    let begin = Instant::now();
    let mut child = Running(
        Command::new(&subject.program)
            .arg("--api-socket")
            .arg(folder.path().join("api.sock"))
            .args(machine.vmm_arguments()?)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", subject.program.display()))?,
    );
    let output = child.0.stdout.take().context("no pipe")?;
    // The thread ends with the VMM, which ends with `child`.
    let reader = std::thread::spawn(move || {
        BufReader::new(output)
            .lines()
            .map_while(Result::ok)
            .find(|line| line.contains("guest: init"))
            .map(|_| Instant::now())
    });
    wait_for("the guest's init", BOOT_DEADLINE, || {
        Ok(reader.is_finished().then_some(()))
    })?;
    let seen = reader.join().ok().flatten();
    ensure!(seen.is_some(), "the VMM ended before the guest's init ran");
    let took = seen.map(|at| at.duration_since(begin));
    Ok(json!({ "to_init_ms": took.map(|took| took.as_secs_f64() * 1000.0) }))
}
