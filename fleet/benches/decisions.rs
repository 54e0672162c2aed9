//! Benchmarks decisions: a plan for 500 VMs, and a placement among 10 000 hosts.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use fleet::admission::{HostHeadroom, Request};
use fleet::config::Config;
use fleet::model::*;
use fleet::placement::{HostCapacity, place};
use fleet::planner::{PlannerMemory, plan};

fn inventory(vms: u64, now_ms: u64) -> Inventory {
    let size = Bytes::gib(4);
    Inventory {
        now_ms,
        host: HostFacts {
            at_ms: now_ms,
            total: Bytes::gib(512),
            available: Bytes::gib(40),
            ..HostFacts::default()
        },
        vms: (0..vms)
            .map(|n| VmFacts {
                id: VmId::from(format!("vm{n:04}")),
                epoch: 1,
                level: FeatureLevel::L2,
                configured: size,
                has_balloon: true,
                policy: VmPolicy::halves(size),
                interlock: None,
                in_force: InForce::default(),
                lessons: Lessons::default(),
                sample: Some(VmSample {
                    at_ms: now_ms,
                    resident: Bytes::mib(700 + n),
                    guest: Some(GuestClaims {
                        at_ms: now_ms,
                        free: Bytes::mib(500 + n),
                        available: Bytes::mib(1500 + n),
                        ..GuestClaims::default()
                    }),
                    ..VmSample::default()
                }),
                missed_samples: 0,
            })
            .collect(),
        promised: Bytes::ZERO,
        wanted: Vec::new(),
    }
}

fn plans(criterion: &mut Criterion) {
    let config = Config::default();
    let mut memory = PlannerMemory::default();
    for round in 0..3 {
        memory = plan(&inventory(500, round * 5000), &config, &memory).memory;
    }
    let inventory = inventory(500, 15_000);
    criterion.bench_function("plan/500 VMs, host orange", |bencher| {
        bencher.iter(|| plan(black_box(&inventory), &config, &memory));
    });
}

fn placements(criterion: &mut Criterion) {
    let config = Config::default();
    let hosts: Vec<HostCapacity> = (0..10_000)
        .map(|n| HostCapacity {
            id: format!("host{n}"),
            schema: HostCapacity::SCHEMA,
            headroom: HostHeadroom {
                ledger: Ledger {
                    usable: Bytes::gib(100),
                    available: Bytes::gib(n % 60),
                    firm_free: Bytes::gib(n % 60),
                    ..Ledger::default()
                },
                ..HostHeadroom::default()
            },
            ..HostCapacity::default()
        })
        .collect();
    let request = Request {
        min: Bytes::gib(4),
        max: Bytes::gib(8),
    };
    let mut lot = 0;
    criterion.bench_function("place/10000 hosts", |bencher| {
        bencher.iter(|| {
            lot += 1;
            place(black_box(&request), &hosts, 0, lot, &config)
        });
    });
}

criterion_group!(benches, plans, placements);
criterion_main!(benches);
