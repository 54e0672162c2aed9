//! Tests with real Linux guests, for a host whose KVM boots Linux.
//!
//! `cargo xtask testbed run -- …/vm-tests [FILTER…]` runs them anywhere; without
//! a filter all of them. Each boots its own guest, so they run one after another.

mod api;
mod balloon;
mod boot;
mod devices;
mod network;
mod power;

use std::process::ExitCode;

use integration_tests::outcome::run;

fn main() -> ExitCode {
    let filters: Vec<String> = std::env::args().skip(1).collect();
    let all = [
        boot::tests(),
        power::tests(),
        devices::tests(),
        network::tests(),
        balloon::tests(),
        api::tests(),
    ]
    .concat();
    if run(&all, &filters) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
