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
mod overhead;
mod patched;
mod power;
mod stress;
mod zones;

use std::process::ExitCode;

use integration_tests::outcome::{Test, run};

/// Every test, in the order in which they are started.
fn all() -> Vec<Test> {
    [
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
        overhead::tests(),
        fleet::tests(),
        patched::tests(),
        debian::tests(),
    ]
    .concat()
}

/// `vm-tests [--list | --exactly] [FILTER…]`: runs or lists the tests whose name contains one
/// of the filters, or is one of them.
fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut taken = |flag: &str| {
        let before = arguments.len();
        arguments.retain(|argument| argument != flag);
        arguments.len() < before
    };
    let (listed, exactly) = (taken("--list"), taken("--exactly"));
    let mut chosen = all();
    chosen.retain(|test| {
        arguments.is_empty()
            || arguments.iter().any(|filter| {
                if exactly {
                    test.name == filter
                } else {
                    test.name.contains(filter.as_str())
                }
            })
    });
    if listed {
        for test in &chosen {
            println!("{}", test.name);
        }
        return ExitCode::SUCCESS;
    }
    if chosen.is_empty() {
        println!("no test matches {arguments:?}");
        return ExitCode::FAILURE;
    }
    if run(&chosen) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
