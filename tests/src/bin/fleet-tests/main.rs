//! Tests a real fleet: three members of etcd and five agents as processes, which are killed, stopped and disconnected.
//! `cargo xtask fleet-store` installs etcd and starts this program.
//!
//! If the kernel allows network namespaces, every process gets its own, joined by a bridge, and is disconnected by
//! taking its link down. Otherwise all processes listen on addresses of the loopback device, and the tests that
//! disconnect processes are skipped and counted.

mod cases;
mod fake_vm;
mod fleet;
mod network;
mod node;

use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, anyhow};
use integration_tests::outcome::{self, Outcome, Test};

use fleet::Fleet;
use network::{INSIDE, Network};

type Case = fn(&mut Fleet) -> Result<Outcome>;

const CASES: [(&str, Case); 6] = [
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
    if std::env::var_os(INSIDE).is_none()
        && let Some(code) = run_inside()?
    {
        return Ok(code);
    }
    let shared = Arc::<Mutex<Shared>>::default();
    let test = |(name, case)| {
        let shared = Arc::clone(&shared);
        Test::new(name, move || match shared.lock() {
            Ok(mut shared) => shared.run(case),
            Err(_) => Ok(left_unknown()),
        })
    };
    Ok(outcome::main_in_order(CASES.map(test).into()))
}

/// The fleet of all tests, which the first one starts.
#[derive(Debug, Default)]
enum Shared {
    #[default]
    NotStarted,
    Running(Box<Fleet>),
    /// A test is running or has failed, so the fleet's state is unknown.
    Unknown,
}

fn left_unknown() -> Outcome {
    Outcome::Skipped("a test that failed left the fleet in an unknown state".to_owned())
}

impl Shared {
    /// Runs a test, and passes the fleet to the next one only if this one succeeded.
    fn run(&mut self, case: Case) -> Result<Outcome> {
        let mut fleet = match std::mem::replace(self, Self::Unknown) {
            Self::NotStarted => {
                let network = Network::new();
                let network =
                    network.map_err(|error| format!("no network namespaces here: {error:#}"));
                Box::new(Fleet::start(network)?)
            }
            Self::Running(fleet) => fleet,
            Self::Unknown => return Ok(left_unknown()),
        };
        match fleet.settle().and_then(|()| case(&mut fleet)) {
            Ok(outcome) => {
                *self = Self::Running(fleet);
                Ok(outcome)
            }
            Err(error) => Err(anyhow!("{error:#}\n{}", fleet.tell())),
        }
    }
}

/// Runs this program again in a network namespace, if one can be created.
fn run_inside() -> Result<Option<ExitCode>> {
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
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .status()
        .context("running in a network namespace")?;
    Ok(Some(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }))
}
