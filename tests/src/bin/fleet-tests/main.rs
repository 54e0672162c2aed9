//! The fleet for real: three members of etcd and five agents as processes, which are killed, stopped and cut off.
//! `cargo xtask fleet-store` installs etcd and starts this.
//!
//! Where the kernel lets us have network namespaces every process gets one of its own, joined by a bridge, and is cut off by
//! taking its link down. Where it does not, everything listens on addresses of the loopback device, and the tests that cut
//! are skipped and counted.

mod cases;
mod fake_vm;
mod fleet;
mod network;
mod node;

use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context as _, Result};
use integration_tests::outcome::Outcome;

use fleet::Fleet;
use network::Network;

/// Set for the copy of this program that runs in a network namespace of its own.
const INSIDE: &str = "FLEET_TESTS_INSIDE";

type Case = (&'static str, fn(&mut Fleet) -> Result<Outcome>);

const CASES: [Case; 6] = [
    (
        "hundred_placers_for_ten_places_get_exactly_ten",
        cases::hundred_placers_for_ten_places_get_exactly_ten,
    ),
    (
        "placed_vm_that_starts_takes_its_promise_over",
        cases::placed_vm_that_starts_takes_its_promise_over,
    ),
    (
        "members_that_die_and_stall_cost_nothing_but_time",
        cases::members_that_die_and_stall_cost_nothing_but_time,
    ),
    (
        "agents_that_die_and_stall_keep_their_word",
        cases::agents_that_die_and_stall_keep_their_word,
    ),
    (
        "whole_store_away_leaves_every_host_at_work",
        cases::whole_store_away_leaves_every_host_at_work,
    ),
    (
        "what_is_cut_off_comes_back_in_step",
        cases::what_is_cut_off_comes_back_in_step,
    ),
];

fn main() -> Result<ExitCode> {
    let filters: Vec<String> = std::env::args().skip(1).collect();
    if std::env::var_os(INSIDE).is_none()
        && let Some(code) = run_inside(&filters)?
    {
        return Ok(code);
    }
    let network = match Network::new() {
        Ok(network) => Ok(network),
        Err(error) => Err(format!("no network namespaces here: {error:#}")),
    };
    let mut fleet = Fleet::start(network)?;
    let mut counts = [0u32; 3];
    for (name, case) in CASES {
        if !filters.is_empty() && !filters.iter().any(|filter| name.contains(filter.as_str())) {
            continue;
        }
        let start = Instant::now();
        let result = fleet.settle().and_then(|()| case(&mut fleet));
        let seconds = start.elapsed().as_secs_f32();
        match result {
            Ok(Outcome::Passed) => {
                counts[0] += 1;
                println!("PASS {name} ({seconds:.1} s)");
            }
            Ok(Outcome::Skipped(why)) => {
                counts[2] += 1;
                println!("SKIP {name}: {why}");
            }
            Err(error) => {
                counts[1] += 1;
                println!("FAIL {name} ({seconds:.1} s): {error:#}\n{}", fleet.tell());
                // What is left of the fleet is in an unknown state.
                break;
            }
        }
    }
    let [passed, failed, skipped] = counts;
    drop(fleet);
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs this program again where links can be made and cut, if there is such a place.
fn run_inside(filters: &[String]) -> Result<Option<ExitCode>> {
    let places: [&[&str]; 2] = [&["--net"], &["--user", "--map-root-user", "--net"]];
    let place = places.into_iter().find(|place| {
        Command::new("unshare")
            .args(*place)
            .arg("true")
            .stderr(std::process::Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    });
    let Some(place) = place else {
        return Ok(None);
    };
    let own = std::env::current_exe().context("finding this program")?;
    let status = Command::new("unshare")
        .args(place)
        .arg(own)
        .args(filters)
        .env(INSIDE, "1")
        .status()
        .context("running in a network namespace")?;
    Ok(Some(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }))
}
