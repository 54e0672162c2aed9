//! Tests with real Linux guests, for a host whose KVM boots Linux.
//!
//! `cargo xtask testbed run -- …/vm-tests [FILTER…]` runs them anywhere; without
//! a filter all of them. Each boots guests of its own; a few run side by side.

mod api;
mod balloon;
mod boot;
mod consoles;
mod devices;
mod life;
mod network;
mod overhead;
mod power;

use std::process::ExitCode;

use integration_tests::outcome::run;

fn main() -> ExitCode {
    let filters: Vec<String> = std::env::args().skip(1).collect();
    let all = [
        boot::tests(),
        power::tests(),
        life::tests(),
        consoles::tests(),
        devices::tests(),
        network::tests(),
        balloon::tests(),
        api::tests(),
        overhead::tests(),
    ]
    .concat();
    if run(&all, &filters) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
