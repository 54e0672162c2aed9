//! Tests with real Linux guests, for a host whose KVM boots Linux.
//!
//! `cargo xtask vm-tests [FILTER…]` runs them anywhere; without a filter all of
//! them. Each boots guests of its own; a few run side by side.

mod api;
mod balloon;
mod boot;
mod consoles;
mod debian;
mod devices;
mod fleet;
mod hotplug;
mod life;
mod network;
mod patched;
mod power;
mod promises;
mod stress;
mod zones;

use std::process::ExitCode;

use integration_tests::outcome;

/// Every test, in the order in which they are started.
fn main() -> ExitCode {
    let all = [
        boot::tests(),
        power::tests(),
        life::tests(),
        consoles::tests(),
        devices::tests(),
        hotplug::tests(),
        network::tests(),
        balloon::tests(),
        stress::tests(),
        zones::tests(),
        api::tests(),
        promises::tests(),
        fleet::tests(),
        patched::tests(),
        debian::tests(),
    ];
    outcome::main(all.into_iter().flatten().collect())
}
