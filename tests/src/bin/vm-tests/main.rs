//! Tests with real Linux guests, for a host whose KVM boots Linux.
//!
//! `cargo xtask vm-tests [FILTER…]` runs them anywhere; without a filter, it runs all of them. A few run concurrently.
//! Most tests boot their own guests. Tests that leave a guest unchanged share one, and form a group.

mod adopters;
mod api;
mod assigned;
mod assigned_dma;
mod assigned_group;
mod assigned_load;
mod back_end;
mod balloon;
mod boot;
mod chaos;
mod churn;
mod clones;
mod consoles;
mod debian;
mod devices;
mod fleet;
mod hotplug;
mod iommu;
mod jail;
mod life;
mod migration;
mod network;
mod operator;
mod patched;
mod pmem;
mod power;
mod promises;
mod readme;
mod shared_folder;
mod snapshot;
mod snapshot_cycles;
mod stress;
mod vhost_user_devices;
mod vhost_user_disk;
mod vsock;
mod zones;

use std::process::ExitCode;

use integration_tests::outcome::{self, group};

/// Every test, in the order in which they are started.
fn main() -> ExitCode {
    let all = [
        group(
            "plain",
            [
                boot::sharing(),
                devices::sharing(),
                consoles::sharing(),
                power::sharing(),
                hotplug::sharing(),
            ],
        ),
        group("balloon", [balloon::sharing()]),
        group(
            "reporting",
            [
                balloon::sharing_reporting(),
                life::sharing_reporting(),
                api::sharing_reporting(),
            ],
        ),
        group(
            "reporting-pair",
            [
                power::sharing_reporting_pair(),
                balloon::sharing_reporting_pair(),
            ],
        ),
        boot::tests(),
        power::tests(),
        life::tests(),
        consoles::tests(),
        devices::tests(),
        hotplug::tests(),
        network::tests(),
        operator::tests(),
        vsock::tests(),
        pmem::tests(),
        migration::tests(),
        clones::tests(),
        iommu::tests(),
        assigned::tests(),
        assigned_dma::tests(),
        assigned_group::tests(),
        assigned_load::tests(),
        balloon::tests(),
        stress::tests(),
        chaos::tests(),
        jail::tests(),
        zones::tests(),
        promises::tests(),
        snapshot::tests(),
        snapshot_cycles::tests(),
        fleet::tests(),
        patched::tests(),
        debian::tests(),
        readme::tests(),
        shared_folder::tests(),
        vhost_user_disk::tests(),
        vhost_user_devices::tests(),
        adopters::tests(),
    ];
    outcome::main(all.into_iter().flatten().collect())
}
