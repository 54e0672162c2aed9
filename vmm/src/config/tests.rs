//! Tests accepted configurations, and the error of each rejected one.

#![allow(clippy::unwrap_used, clippy::needless_pass_by_value)]

use api::config::HotplugMethod;
use machine::pci::Bdf;
use serde_json::{Value, json};

use super::*;

fn parse(input: Value) -> VmConfig {
    serde_json::from_value(input).unwrap()
}

/// A bootable configuration with `section` added.
fn with(section: &str, value: Value) -> VmConfig {
    let mut input = json!({ "payload": { "kernel": "/k" } });
    input[section] = value;
    parse(input)
}

fn fault(section: &str, value: Value) -> ValidationError {
    let config = with(section, value.clone());
    validate(&config).expect_err(&format!("{section}: {value}"))
}

fn mac() -> &'static str {
    "12:34:56:78:90:ab"
}

#[test]
fn validate_plain_configurations_pass() {
    for (section, value) in [
        ("cpus", json!({"boot_vcpus": 1, "max_vcpus": 1})),
        (
            "cpus",
            json!({"boot_vcpus": 2, "max_vcpus": 4, "affinity": [{"vcpu": 3, "host_cpus": [0]}],
            "topology": {"threads_per_core": 2, "cores_per_die": 2, "dies_per_package": 1, "packages": 1}}),
        ),
        ("net", json!([{"num_queues": 3}])),
        ("pvpanic", json!(true)),
        ("memory", json!({"size": 1u64 << 40})),
        (
            "memory",
            json!({"size": 2 << 20, "hugepages": true, "hugepage_size": 2 << 20}),
        ),
        (
            "memory",
            json!({"size": 4 << 20, "hotplug_method": "VirtioMem", "hotplug_size": 128 << 20,
                "hotplugged_size": 2 << 20}),
        ),
        ("balloon", json!({"size": 0})),
        ("balloon", json!({"size": 0, "stats_poll_ms": 100})),
        ("balloon", json!({"size": (512 << 20) - 4096})),
        (
            "disks",
            json!([{"path": "/d"}, {"path": "/e", "id": "root"}]),
        ),
        (
            "disks",
            json!([{"path": "/d", "readonly": true}, {"path": "/d", "readonly": true}]),
        ),
        ("net", json!([{"mac": mac(), "mtu": 9000}, {}])),
        ("payload", json!({"firmware": "/f"})),
        (
            "platform",
            json!({"system_uuid": "00112233-4455-6677-8899-aabbccddeeff", "oem_strings": ["a"]}),
        ),
        ("fs", json!([])),
    ] {
        let config = with(section, value.clone());
        assert_eq!(validate(&config), Ok(()), "{section}: {value}");
    }
}

#[test]
fn validate_payload_faults_are_named() {
    let bare = parse(json!({}));
    assert_eq!(validate(&bare), Err(ValidationError::PayloadMissing));
    assert_eq!(fault("payload", json!({})), ValidationError::PayloadMissing);
    assert_eq!(
        fault("payload", json!({"initramfs": "/i"})),
        ValidationError::InitramfsWithoutKernel
    );
    assert_eq!(
        fault("payload", json!({"kernel": "/k", "firmware": "/f"})),
        ValidationError::FirmwareAndKernel
    );
}

#[test]
fn validate_empty_list_of_zones_asks_for_nothing() {
    let config = parse(json!({
        "payload": {"kernel": "/k"},
        "memory": {"size": 512 << 20, "zones": []},
    }));
    assert_eq!(validate(&config), Ok(()));
}

#[test]
fn validate_memory_faults_are_named() {
    let memory = |value| match fault("memory", value) {
        ValidationError::Memory(fault) => fault,
        other => panic!("{other}"),
    };
    assert_eq!(memory(json!({"size": 0})), MemoryFault::Zero);
    let shared_zone = json!({"id": "z", "size": 512 << 20, "shared": true});
    for value in [
        json!({"size": 512 << 20, "mergeable": true, "shared": true}),
        json!({"size": 0, "mergeable": true, "zones": [shared_zone]}),
    ] {
        assert_eq!(memory(value), MemoryFault::MergeableShared);
    }
    assert!(matches!(
        memory(json!({"size": (512 << 20) + 1})),
        MemoryFault::NotWholePages {
            page_bytes: 4096,
            ..
        }
    ));
    assert!(matches!(
        memory(json!({"size": 1 << 20})),
        MemoryFault::TooSmall { .. }
    ));
    assert!(matches!(
        memory(json!({"size": 3 << 20, "hugepages": true})),
        MemoryFault::NotWholePages { .. }
    ));
    for bytes in [1u64 << 46, u64::MAX - 4095] {
        assert_eq!(
            memory(json!({ "size": bytes })),
            MemoryFault::BeyondAddressSpace {
                bytes,
                address_bits: 46
            }
        );
    }
    assert!(matches!(
        memory(json!({"size": 4 << 20, "hugepages": true, "hugepage_size": 3 << 20})),
        MemoryFault::HugePageSize { .. }
    ));
    assert_eq!(
        memory(json!({"size": 4 << 20, "hugepage_size": 2 << 20})),
        MemoryFault::HugePageSizeWithoutHugePages
    );
}

/// A configuration with these zones and nodes.
fn zoned(zones: Value, numa: Value) -> VmConfig {
    parse(json!({
        "payload": {"kernel": "/k"},
        "cpus": {"boot_vcpus": 1, "max_vcpus": 4},
        "memory": {"size": 0, "zones": zones},
        "numa": numa,
    }))
}

#[test]
fn validate_zones_and_nodes_pass() {
    let config = zoned(
        json!([
            {"id": "a", "size": 1 << 20, "host_numa_node": 0, "file": "/f"},
            {"id": "b", "size": 1 << 30, "shared": true, "file": "/f"},
            {"id": "c", "size": 4 << 20, "hugepages": true},
        ]),
        json!([
            {"guest_numa_id": 1, "cpus": [0, 3], "memory_zones": ["a"],
             "distances": [{"destination": 1, "distance": 10}, {"destination": 0, "distance": 11}]},
            {"guest_numa_id": 0, "memory_zones": ["c", "b"]},
        ]),
    );
    assert_eq!(validate(&config), Ok(()));
    // RAM without zones counts as a zone, too.
    let whole = with(
        "numa",
        json!([{"guest_numa_id": 0, "memory_zones": ["mem0"]}]),
    );
    assert_eq!(validate(&whole), Ok(()));
}

#[test]
fn validate_memory_to_be_plugged_in_is_whole_and_fits() {
    let growing = |value: Value| {
        let mut memory = json!({"size": 512 << 20, "hotplug_method": "VirtioMem"});
        memory
            .as_object_mut()
            .unwrap()
            .append(&mut value.as_object().unwrap().clone());
        with("memory", memory)
    };
    let fault = |value| match validate(&growing(value)) {
        Err(ValidationError::Memory(fault)) => fault,
        other => panic!("{other:?}"),
    };
    let not_whole = |field, bytes, unit_bytes| MemoryFault::HotplugNotWhole {
        field,
        bytes,
        unit_bytes,
    };
    assert_eq!(
        fault(json!({"hotplug_size": 64 << 20})),
        not_whole("hotplug_size", 64 << 20, 128 << 20)
    );
    assert_eq!(
        fault(
            json!({"hotplug_size": 512 << 20, "hugepages": true, "hugepage_size": 1 << 30, "size": 1 << 30})
        ),
        not_whole("hotplug_size", 512 << 20, 1 << 30)
    );
    assert_eq!(
        fault(json!({"hotplug_size": 128 << 20, "hotplugged_size": 1 << 20})),
        not_whole("hotplugged_size", 1 << 20, 2 << 20)
    );
    assert_eq!(
        fault(json!({"hotplugged_size": 2 << 20})),
        MemoryFault::HotpluggedBeyondRoom {
            added_bytes: 2 << 20,
            room_bytes: 0
        }
    );
    let bytes = 1u64 << 45;
    assert_eq!(
        fault(json!({"size": bytes, "hotplug_size": bytes})),
        MemoryFault::BeyondAddressSpace {
            bytes: 2 * bytes,
            address_bits: 46
        }
    );
    // Memory devices are of whole sections; the room for them need not be.
    let by_acpi = |bytes: u64| json!({"hotplug_method": "Acpi", "hotplug_size": bytes});
    let mut named = growing(by_acpi(100 << 20));
    named.disks = parse(json!({"payload": {}, "disks": [{"path": "/d", "id": "mem0"}]})).disks;
    assert_eq!(validate(&named), Ok(()));
    assert_eq!(
        fault(
            json!({"hotplug_method": "Acpi", "hotplug_size": 1 << 30, "hotplugged_size": 1 << 28})
        ),
        MemoryFault::HotpluggedByAcpi
    );
    assert!(matches!(
        fault(by_acpi(u64::MAX)),
        MemoryFault::BeyondAddressSpace { .. }
    ));
    let mut named = growing(json!({"hotplug_size": 128 << 20}));
    named.disks = parse(json!({"payload": {}, "disks": [{"path": "/d", "id": "mem0"}]})).disks;
    let taken = ValidationError::IdentifierNotUnique {
        id: "mem0".to_owned(),
    };
    assert_eq!(validate(&named), Err(taken));
}

#[test]
fn validate_zones_grow_only_by_virtio_mem_each_by_itself() {
    let config = |memory: Value, zone: Value| {
        let mut a = json!({"id": "a", "size": 1 << 30});
        a.as_object_mut()
            .unwrap()
            .append(&mut zone.as_object().unwrap().clone());
        let mut all = json!({"size": 0, "hotplug_method": "VirtioMem", "zones": [a,
            {"id": "b", "size": 64 << 20, "hotplug_size": 128 << 20}]});
        all.as_object_mut()
            .unwrap()
            .append(&mut memory.as_object().unwrap().clone());
        with("memory", all)
    };
    let of_zone = |memory, zone| match validate(&config(memory, zone)) {
        Err(ValidationError::Memory(MemoryFault::Zone { id, fault })) => (id, *fault),
        other => panic!("{other:?}"),
    };
    let of_a = |zone| {
        let (id, fault) = of_zone(json!({}), zone);
        assert_eq!(id, "a");
        fault
    };
    let none = json!({});
    assert_eq!(validate(&config(none.clone(), none.clone())), Ok(()));
    let growing = json!({"hotplug_size": 1 << 30, "hotplugged_size": 512 << 20});
    let memory = config(none.clone(), growing);
    assert_eq!(validate(&memory), Ok(()));
    assert_eq!(memory.memory.total_bytes(), Some((1 << 30) + (576 << 20)));
    assert_eq!(
        memory.memory.room_bytes(HotplugMethod::VirtioMem),
        (1 << 30) + (128 << 20)
    );
    let not_whole = |field, bytes, unit_bytes| MemoryFault::HotplugNotWhole {
        field,
        bytes,
        unit_bytes,
    };
    assert_eq!(
        of_a(json!({"hotplug_size": 64 << 20})),
        not_whole("hotplug_size", 64 << 20, 128 << 20)
    );
    assert_eq!(
        of_a(json!({"hotplug_size": 128 << 20, "hotplugged_size": 1 << 20})),
        not_whole("hotplugged_size", 1 << 20, 2 << 20)
    );
    assert_eq!(
        of_a(json!({"hotplugged_size": 2 << 20})),
        MemoryFault::HotpluggedBeyondRoom {
            added_bytes: 2 << 20,
            room_bytes: 0
        }
    );
    // The regions of both zones need blocks of 4 MiB.
    assert_eq!(
        of_a(json!({"hotplug_size": 32_u64 << 30, "hotplugged_size": 2 << 20})),
        not_whole("hotplugged_size", 2 << 20, 4 << 20)
    );
    let acpi = json!({"hotplug_method": "Acpi"});
    let fault = of_zone(acpi, none.clone());
    assert_eq!(fault, ("b".to_owned(), MemoryFault::ZoneGrowsByAcpi));
    for beside in [
        json!({"hotplug_size": 128 << 20}),
        json!({"hotplugged_size": 2 << 20}),
    ] {
        assert_eq!(
            validate(&config(beside, none.clone())),
            Err(ValidationError::Memory(MemoryFault::HotplugBesideZones))
        );
    }
    assert!(matches!(
        validate(&config(none.clone(), json!({"size": 1_u64 << 46}))),
        Err(ValidationError::Memory(
            MemoryFault::BeyondAddressSpace { .. }
        ))
    ));
    // Names: the device has the zone's, and the region its own.
    for (id, status) in [("b-hotplug", false), ("a-hotplug", true)] {
        let mut named = config(none.clone(), none.clone());
        named.disks = parse(json!({"payload": {}, "disks": [{"path": "/d", "id": id}]})).disks;
        assert_eq!(validate(&named).is_ok(), status, "{id}");
    }
}

#[test]
fn validate_zone_faults_are_named() {
    let zone = |value: Value| match validate(&zoned(json!([value]), json!(null))) {
        Err(ValidationError::Memory(MemoryFault::Zone { id, fault })) => {
            assert_eq!(id, "a");
            *fault
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(zone(json!({"id": "a", "size": 0})), MemoryFault::Zero);
    assert!(matches!(
        zone(json!({"id": "a", "size": (1 << 20) + 1})),
        MemoryFault::NotWholePages { .. }
    ));
    assert!(matches!(
        zone(json!({"id": "a", "size": 3 << 20, "hugepages": true})),
        MemoryFault::NotWholePages { .. }
    ));
    assert_eq!(
        zone(json!({"id": "a", "size": 2 << 20, "hugepage_size": 2 << 20})),
        MemoryFault::HugePageSizeWithoutHugePages
    );
    assert_eq!(
        zone(json!({"id": "a", "size": 2 << 20, "host_numa_node": 1024})),
        MemoryFault::HostNumaNode { node: 1024 }
    );
    assert_eq!(
        zone(
            json!({"id": "a", "size": 2 << 20, "host_numa_node": 0, "shared": true, "file": "/f"})
        ),
        MemoryFault::HostNumaNodeOfSharedFile
    );
}

#[test]
fn validate_zones_beside_memory_are_refused() {
    let memory = |value: Value| match fault("memory", value) {
        ValidationError::Memory(fault) => fault,
        other => panic!("{other}"),
    };
    let zones = json!([{"id": "a", "size": 2 << 20}]);
    assert_eq!(
        memory(json!({"size": 4096, "zones": zones})),
        MemoryFault::SizeAndZones { bytes: 4096 }
    );
    assert_eq!(
        memory(json!({"size": 0, "shared": true, "zones": zones})),
        MemoryFault::KindBesideZones
    );
    assert_eq!(memory(json!({"size": 0, "zones": []})), MemoryFault::Zero);
    assert!(matches!(
        memory(json!({"size": 0, "zones": [{"id": "a", "size": 1 << 20}]})),
        MemoryFault::TooSmall { .. }
    ));
    let large = json!({"id": "a", "size": 1u64 << 63});
    let other = json!({"id": "b", "size": 1u64 << 63});
    assert!(matches!(
        memory(json!({"size": 0, "zones": [large, other]})),
        MemoryFault::BeyondAddressSpace { .. }
    ));
}

#[test]
fn validate_zone_names_are_unique_among_all_names() {
    let zone = |id: &str| json!({"id": id, "size": 2 << 20});
    for id in ["", "__mine"] {
        assert_eq!(
            validate(&zoned(json!([zone(id)]), json!(null))),
            Err(ValidationError::InvalidIdentifier { id: id.to_owned() })
        );
    }
    let twice = ValidationError::IdentifierNotUnique { id: "x".to_owned() };
    let config = zoned(json!([zone("x"), zone("x")]), json!(null));
    assert_eq!(validate(&config), Err(twice));
    let mut config = zoned(json!([zone("x")]), json!(null));
    config.disks = Some(vec![api::config::DiskConfig {
        id: Some("x".to_owned()),
        path: Some("/d".into()),
        ..Default::default()
    }]);
    assert!(matches!(
        validate(&config),
        Err(ValidationError::IdentifierNotUnique { .. })
    ));
}

#[test]
fn validate_node_faults_are_named() {
    let numa = |nodes: Value| match validate(&zoned(
        json!([{"id": "a", "size": 2 << 20}, {"id": "b", "size": 2 << 20}]),
        nodes,
    )) {
        Err(ValidationError::Numa(fault)) => fault,
        other => panic!("{other:?}"),
    };
    let distance = |destination: u32, distance: u8| {
        numa(json!([
            {"guest_numa_id": 0, "distances": [{"destination": destination, "distance": distance}]},
            {"guest_numa_id": 1},
        ]))
    };
    assert!(matches!(
        numa(json!([{"guest_numa_id": 256}])),
        NumaFault::NodeNumber { node: 256, .. }
    ));
    assert_eq!(
        numa(json!([{"guest_numa_id": 1}, {"guest_numa_id": 1}])),
        NumaFault::NodeTwice { node: 1 }
    );
    assert!(matches!(
        numa(json!([{"guest_numa_id": 0, "memory_zones": ["mem0"]}])),
        NumaFault::UnknownZone { node: 0, .. }
    ));
    assert!(matches!(
        numa(json!([
            {"guest_numa_id": 0, "memory_zones": ["a"]},
            {"guest_numa_id": 1, "memory_zones": ["b", "a"]},
        ])),
        NumaFault::ZoneReused {
            first: 0,
            second: 1,
            ..
        }
    ));
    assert_eq!(
        numa(json!([{"guest_numa_id": 0, "cpus": [4]}])),
        NumaFault::UnknownVcpu {
            node: 0,
            vcpu: 4,
            last: 3
        }
    );
    assert!(matches!(
        numa(json!([{"guest_numa_id": 0, "cpus": [1, 1]}])),
        NumaFault::VcpuReused { vcpu: 1, .. }
    ));
    assert!(matches!(
        distance(2, 20),
        NumaFault::UnknownDestination { .. }
    ));
    assert!(matches!(distance(0, 11), NumaFault::Distance { .. }));
    assert!(matches!(distance(1, 10), NumaFault::Distance { .. }));
}

#[test]
fn validate_balloon_as_large_as_ram_is_refused() {
    assert_eq!(
        fault("balloon", json!({"size": 512 << 20})),
        ValidationError::BalloonLargerThanRam {
            balloon_bytes: 512 << 20,
            ram_bytes: 512 << 20
        }
    );
}

#[test]
fn validate_policy_without_reporting_is_refused() {
    assert_eq!(
        fault("balloon", json!({"size": 0, "reporting_policy": true})),
        ValidationError::PolicyWithoutReporting
    );
}

#[test]
fn validate_device_init_without_reporting_is_refused() {
    assert_eq!(
        fault("balloon", json!({"size": 0, "device_init": true})),
        ValidationError::DeviceInitWithoutReporting
    );
}

#[test]
fn validate_statistics_too_often_are_refused() {
    assert_eq!(
        fault("balloon", json!({"size": 0, "stats_poll_ms": 99})),
        ValidationError::StatsPollTooOften {
            poll_ms: 99,
            least_ms: 100
        }
    );
}

#[test]
fn validate_cpu_faults_are_named() {
    let cpus = |value| match fault("cpus", value) {
        ValidationError::Cpus(fault) => fault,
        other => panic!("{other}"),
    };
    for (boot, max) in [(0, 1), (2, 1), (1, 4097)] {
        assert!(matches!(
            cpus(json!({"boot_vcpus": boot, "max_vcpus": max})),
            CpusFault::Count { .. }
        ));
    }
    let pinned = |affinity| cpus(json!({"boot_vcpus": 1, "max_vcpus": 2, "affinity": affinity}));
    assert!(matches!(
        pinned(json!([{"vcpu": 2, "host_cpus": [0]}])),
        CpusFault::AffinityOfUnknownVcpu { vcpu: 2, last: 1 }
    ));
    assert!(matches!(
        pinned(json!([{"vcpu": 0, "host_cpus": [0]}, {"vcpu": 0, "host_cpus": [1]}])),
        CpusFault::AffinityTwice { vcpu: 0 }
    ));
    assert!(matches!(
        pinned(json!([{"vcpu": 1, "host_cpus": []}])),
        CpusFault::AffinityEmpty { vcpu: 1 }
    ));
    let topology =
        json!({"threads_per_core": 1, "cores_per_die": 3, "dies_per_package": 1, "packages": 1});
    assert_eq!(
        cpus(json!({"boot_vcpus": 2, "max_vcpus": 2, "topology": topology})),
        CpusFault::Topology { product: 3, max: 2 }
    );
    assert!(matches!(
        cpus(json!({"boot_vcpus": 1, "max_vcpus": 1, "max_phys_bits": 64})),
        CpusFault::PhysBits { bits: 64, .. }
    ));
}

#[test]
fn validate_device_faults_are_named() {
    let device = |section: &str, value: Value| match fault(section, json!([value])) {
        ValidationError::Device { device, fault } => {
            assert!(
                device.starts_with(section.trim_end_matches('s')),
                "{device}"
            );
            fault
        }
        other => panic!("{other}"),
    };
    assert_eq!(device("disks", json!({})), DeviceFault::PathMissing);
    for size in [0, 1, 3, 2048] {
        assert!(matches!(
            device("disks", json!({"path": "/d", "queue_size": size})),
            DeviceFault::QueueSize { .. }
        ));
    }
    for count in [0, 2] {
        assert!(matches!(
            device("disks", json!({"path": "/d", "num_queues": count})),
            DeviceFault::QueueCount { .. }
        ));
    }
    for count in [0, 1, 4, 5] {
        assert!(matches!(
            device("net", json!({"num_queues": count})),
            DeviceFault::QueueCount { .. }
        ));
    }
    assert!(matches!(
        device("net", json!({"mtu": 1279})),
        DeviceFault::Mtu { .. }
    ));
    for mac in ["ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"] {
        assert!(matches!(
            device("net", json!({ "mac": mac })),
            DeviceFault::Mac { .. }
        ));
    }
    assert_eq!(
        device("net", json!({"fds": [5]})),
        DeviceFault::Descriptor { fd: -1 }
    );
    assert!(matches!(
        device("net", json!({"fds": []})),
        DeviceFault::DescriptorCount { fds: 0, pairs: 1 }
    ));
}

fn at(segment: u16, slot: u8) -> Bdf {
    Bdf { segment, slot }
}

#[test]
fn validate_shares_of_segments_in_the_windows() {
    let shares = |shares: Value| {
        let mut config = with("platform", json!({"num_pci_segments": 3}));
        config.pci_segments = serde_json::from_value(shares).unwrap();
        config
    };
    let share = |segment: u16, weight32: u32, weight64: u32| {
        json!({
            "pci_segment": segment,
            "mmio32_aperture_weight": weight32,
            "mmio64_aperture_weight": weight64,
        })
    };
    let valid = shares(json!([share(2, 3, 65535), {"pci_segment": 0}]));
    validate(&valid).unwrap();
    let weights = segment_weights(&valid);
    let weights: Vec<_> = weights.iter().map(|it| (it.mmio32, it.mmio64)).collect();
    assert_eq!(weights, [(1, 1), (1, 1), (3, 65535)]);
    for (wrong, reason) in [
        (
            json!([share(3, 1, 1)]),
            "--pci-segment 3: it must be below num_pci_segments (3)",
        ),
        (
            json!([share(1, 1, 1), share(1, 2, 2)]),
            "--pci-segment 1: it is given twice",
        ),
        (
            json!([share(0, 0, 1)]),
            "mmio32_aperture_weight must be between 1 and 65535; got 0",
        ),
        (
            json!([share(0, 1, 65536)]),
            "mmio64_aperture_weight must be between 1 and 65535; got 65536",
        ),
    ] {
        let error = validate(&shares(wrong)).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn validate_devices_are_on_segments_that_exist() {
    let segments = |count: u16, devices: Value| {
        let mut config = with("platform", json!({"num_pci_segments": count}));
        config.disks = serde_json::from_value(devices).unwrap();
        config
    };
    let disk = |segment: u16, slot: Option<u8>| json!({"path": "/d", "readonly": true, "pci_segment": segment, "pci_device_id": slot});
    let valid = segments(
        2,
        json!([disk(1, Some(0)), disk(1, Some(8)), disk(0, Some(8))]),
    );
    validate(&valid).unwrap();
    assert_eq!(wished_slots(&valid).max(), Some(at(1, 8)));
    validate(&segments(96, json!([disk(95, None)]))).unwrap();
    for count in [0, 97, u16::MAX] {
        assert_eq!(
            validate(&segments(count, json!([]))),
            Err(ValidationError::PciSegmentCount { count, max: 96 })
        );
    }
    assert!(matches!(
        validate(&segments(2, json!([disk(2, None)]))),
        Err(ValidationError::Device {
            fault: DeviceFault::PciSegment {
                segment: 2,
                count: 2
            },
            ..
        })
    ));
    assert_eq!(
        validate(&segments(2, json!([disk(1, Some(8)), disk(1, Some(8))]))),
        Err(ValidationError::DuplicatePciSlot { place: at(1, 8) })
    );
    // The host bridge, the random numbers and the console are on segment 0.
    for (segment, fit) in [(0, 29), (1, 32)] {
        let many = |count: usize| segments(2, json!(vec![disk(segment, None); count]));
        let max = 32 - usize::from(segment == 0);
        validate(&many(fit)).unwrap();
        assert_eq!(
            validate(&many(fit + 1)),
            Err(ValidationError::TooManyDevices {
                segment,
                count: max + 1,
                max
            })
        );
    }
    let mut nodes = with(
        "numa",
        json!([{"guest_numa_id": 0, "pci_segments": [0]}, {"guest_numa_id": 1, "pci_segments": [1]}]),
    );
    assert_eq!(
        validate(&nodes),
        Err(ValidationError::Numa(NumaFault::UnknownSegment {
            node: 1,
            segment: 1,
            last: 0
        }))
    );
    nodes.platform = segments(2, json!([])).platform;
    validate(&nodes).unwrap();
    nodes.numa.as_mut().unwrap()[1].pci_segments = Some(vec![1, 0]);
    assert_eq!(
        validate(&nodes),
        Err(ValidationError::Numa(NumaFault::SegmentReused {
            segment: 0,
            first: 0,
            second: 1
        }))
    );
}

#[test]
fn validate_names_and_slots_are_unique_and_free() {
    for id in ["", "__mine", "a\nb"] {
        assert_eq!(
            fault("disks", json!([{"path": "/d", "id": id}])),
            ValidationError::InvalidIdentifier { id: id.to_owned() }
        );
    }
    let mut config = with("disks", json!([{"path": "/d", "id": "x"}]));
    config.net = Some(vec![api::config::NetConfig {
        id: Some("x".to_owned()),
        ..Default::default()
    }]);
    assert_eq!(
        validate(&config),
        Err(ValidationError::IdentifierNotUnique { id: "x".to_owned() })
    );
    assert!(matches!(
        fault(
            "disks",
            json!([{"path": "/d"}, {"path": "/d", "readonly": true}])
        ),
        ValidationError::DuplicateDiskPath { .. }
    ));
    assert_eq!(
        fault(
            "disks",
            json!([{"path": "/d", "pci_device_id": 8}, {"path": "/e", "pci_device_id": 8}])
        ),
        ValidationError::DuplicatePciSlot { place: at(0, 8) }
    );
    assert_eq!(
        fault("disks", json!([{"path": "/d", "pci_device_id": 0}])),
        ValidationError::DuplicatePciSlot { place: at(0, 0) }
    );
    assert!(matches!(
        fault("disks", json!([{"path": "/d", "pci_device_id": 32}])),
        ValidationError::Device {
            fault: DeviceFault::PciSlot { slot: 32 },
            ..
        }
    ));
}

#[test]
fn validate_rate_limits_are_possible_and_their_groups_exist() {
    let limit = |refill_time: u64| json!({"ops": {"size": 1, "refill_time": refill_time}});
    let group = |id: &str| json!({"id": id, "rate_limiter_config": limit(1)});
    let mut config = with(
        "disks",
        json!([{"path": "/d", "rate_limit_group": "g"}, {"path": "/e", "rate_limiter_config": limit(86_400_000)}]),
    );
    config.rate_limit_groups = serde_json::from_value(json!([group("g"), group("h")])).unwrap();
    validate(&config).unwrap();

    let device_fault = |section: &str, value: Value| match fault(section, value) {
        ValidationError::Device { fault, .. } => fault,
        other => panic!("{other}"),
    };
    for (section, value) in [
        (
            "disks",
            json!([{"path": "/d", "rate_limiter_config": limit(86_400_001)}]),
        ),
        ("net", json!([{"rate_limiter_config": limit(u64::MAX)}])),
        (
            "rate_limit_groups",
            json!([{"id": "g", "rate_limiter_config": limit(86_400_001)}]),
        ),
    ] {
        assert!(matches!(
            device_fault(section, value),
            DeviceFault::RefillTime { bucket: "ops", .. }
        ));
    }
    for groups in [json!([group("g"), group("g")]), json!([group("")])] {
        assert!(matches!(
            device_fault("rate_limit_groups", groups),
            DeviceFault::LimitGroupId { .. }
        ));
    }
    assert_eq!(
        device_fault("disks", json!([{"path": "/d", "rate_limit_group": "x"}])),
        DeviceFault::UnknownLimitGroup {
            group: "x".to_owned()
        }
    );
    let both = json!([{"path": "/d", "rate_limit_group": "g", "rate_limiter_config": limit(1)}]);
    assert_eq!(
        device_fault("disks", both),
        DeviceFault::LimitBesideGroup {
            group: "g".to_owned()
        }
    );
}

#[test]
fn validate_consoles_may_share_the_terminal_and_have_their_paths() {
    validate(&with("serial", json!({"mode": "Tty"}))).unwrap();
    for (device, mode) in [
        ("serial", "File"),
        ("serial", "Socket"),
        ("console", "File"),
        ("debug_console", "File"),
    ] {
        assert!(matches!(
            fault(device, json!({ "mode": mode })),
            ValidationError::Device {
                fault: DeviceFault::ConsolePathMissing,
                ..
            }
        ));
    }
}

#[test]
fn validate_limit_of_a_console_file_needs_a_file() {
    for device in ["serial", "console", "debug_console"] {
        let file = json!({"mode": "File", "file": "/f", "file_bytes_max": 0});
        validate(&with(device, file)).unwrap();
        let refused = fault(device, json!({"mode": "Null", "file_bytes_max": 1}));
        assert!(matches!(
            refused,
            ValidationError::Device {
                fault: DeviceFault::ConsoleLimitWithoutFile,
                ..
            }
        ));
    }
}

#[test]
fn validate_debug_console_has_a_port_of_its_own() {
    for mode in ["Null", "Tty", "Pty"] {
        let console = |port: Option<u16>| json!({"mode": mode, "iobase": port});
        for port in [None, Some(0), Some(0xe9), Some(0x2f8), Some(0x500)] {
            validate(&with("debug_console", console(port))).unwrap();
        }
        for port in [0x80, 0x3f8, 0x402, 0x601, 0xcff] {
            assert_eq!(
                fault("debug_console", console(Some(port))),
                ValidationError::Device {
                    device: "debug_console".to_owned(),
                    fault: DeviceFault::PortInUse { port },
                }
            );
        }
    }
    // Without the device, its port is ignored.
    validate(&with(
        "debug_console",
        json!({"mode": "Off", "iobase": 0x80}),
    ))
    .unwrap();
}

#[test]
fn validate_queue_affinity_names_queues_and_host_cpus() {
    let disk = |queue_affinity: Value| json!([{"path": "/d", "id": "a", "queue_affinity": queue_affinity}]);
    let pin =
        |queue: u16, host_cpus: &[usize]| json!({"queue_index": queue, "host_cpus": host_cpus});
    validate(&with("disks", disk(json!([])))).unwrap();
    validate(&with("disks", disk(json!([pin(0, &[0, 1023])])))).unwrap();
    let refused = |pins: Value| match fault("disks", disk(pins)) {
        ValidationError::Device { device, fault } if device == "disk a" => fault,
        other => panic!("{other}"),
    };
    assert_eq!(
        refused(json!([pin(1, &[0])])),
        DeviceFault::AffinityQueue {
            queue_index: 1,
            num_queues: 1
        }
    );
    assert_eq!(
        refused(json!([pin(0, &[0]), pin(0, &[1])])),
        DeviceFault::AffinityTwice { queue_index: 0 }
    );
    assert_eq!(
        refused(json!([pin(0, &[])])),
        DeviceFault::AffinityEmpty { queue_index: 0 }
    );
    assert_eq!(
        refused(json!([pin(0, &[1024])])),
        DeviceFault::AffinityHostCpu {
            queue_index: 0,
            host_cpu: 1024,
            max: 1023
        }
    );
}

#[test]
fn validate_pmem_has_a_file_and_a_size_in_huge_pages() {
    validate(&with(
        "pmem",
        json!([{"file": "/m"}, {"file": "/n", "size": 4 << 20}]),
    ))
    .unwrap();
    for (pmem, expected) in [
        (json!([{"file": ""}]), DeviceFault::PathMissing),
        (
            json!([{"file": "/m", "size": 4096}]),
            DeviceFault::PmemSize {
                bytes: 4096,
                unit_bytes: 2 << 20,
            },
        ),
        (
            json!([{"file": "/m", "size": 0}]),
            DeviceFault::PmemSize {
                bytes: 0,
                unit_bytes: 2 << 20,
            },
        ),
    ] {
        let ValidationError::Device { device, fault } = fault("pmem", pmem) else {
            panic!("another error");
        };
        assert_eq!((device.as_str(), fault), ("pmem number 0", expected));
    }
    assert!(matches!(
        fault("pmem", json!([{"file": "/m", "pci_segment": 1}])),
        ValidationError::Device {
            fault: DeviceFault::PciSegment { segment: 1, .. },
            ..
        }
    ));
}

#[test]
fn validate_vsock_needs_an_address_of_a_guest_and_a_path() {
    for cid in [0, 1, 2, u32::MAX] {
        assert!(matches!(
            fault("vsock", json!({"cid": cid, "socket": "/s"})),
            ValidationError::Device {
                fault: DeviceFault::Cid { cid: refused, min: 3, .. },
                ..
            } if refused == cid
        ));
    }
    for path in [String::new(), "s".repeat(108)] {
        assert!(matches!(
            fault("vsock", json!({"cid": 3, "socket": path})),
            ValidationError::Device {
                fault: DeviceFault::SocketPath { max: 107, .. },
                ..
            }
        ));
    }
    assert!(matches!(
        fault("vsock", json!({"cid": 3, "socket": "/s", "pci_segment": 1})),
        ValidationError::Device {
            fault: DeviceFault::PciSegment {
                segment: 1,
                count: 1
            },
            ..
        }
    ));
}

#[test]
fn validate_vhost_user_disk_needs_shared_memory_and_a_socket_and_has_no_image() {
    let shared = |disk: &Value, shared: bool| {
        let mut config = with("disks", json!([disk]));
        config.memory.shared = shared;
        match validate(&config) {
            Ok(()) => None,
            Err(ValidationError::Device { fault, .. }) => Some(fault),
            Err(other) => panic!("{other}"),
        }
    };
    let disk = json!({"vhost_user": true, "vhost_socket": "/s"});
    assert_eq!(shared(&disk, true), None);
    assert_eq!(shared(&disk, false), Some(DeviceFault::MemoryPrivate));
    for (key, value) in [
        ("path", json!("/d")),
        ("readonly", json!(true)),
        ("direct", json!(true)),
        ("serial", json!("s")),
        ("image_type", json!("Raw")),
        ("sparse", json!(false)),
        ("lock_granularity", json!("Full")),
        (
            "queue_affinity",
            json!([{"queue_index": 0, "host_cpus": [0]}]),
        ),
    ] {
        let mut wrong = disk.clone();
        wrong[key] = value;
        assert_eq!(shared(&wrong, true), Some(DeviceFault::OfBackEnd { key }));
    }
    let mut limited = disk.clone();
    limited["rate_limiter_config"] = json!({"ops": {"size": 1, "refill_time": 1}});
    let key = "a rate limit";
    assert_eq!(shared(&limited, true), Some(DeviceFault::OfBackEnd { key }));
    let mut placed = disk.clone();
    for (key, value) in [
        ("id", json!("d")),
        ("queue_size", json!(64)),
        ("pci_device_id", json!(7)),
        ("_disable_io_uring", json!(true)),
    ] {
        placed[key] = value;
    }
    assert_eq!(shared(&placed, true), None);
    let without_socket = json!({"vhost_user": true});
    assert_eq!(
        shared(&without_socket, true),
        Some(DeviceFault::SocketMissing)
    );
    let without_vhost_user = json!({"path": "/d", "vhost_socket": "/s"});
    assert_eq!(
        shared(&without_vhost_user, true),
        Some(DeviceFault::SocketWithoutVhostUser)
    );
    for wrong in [json!(""), json!("s".repeat(108))] {
        let mut disk = disk.clone();
        disk["vhost_socket"] = wrong;
        let fault = shared(&disk, true);
        assert!(matches!(fault, Some(DeviceFault::SocketPath { .. })));
    }
}

#[test]
fn validate_vhost_user_net_needs_shared_memory_and_a_socket() {
    let fault_of = |net: &Value, shared: bool| {
        let mut config = with("net", json!([net]));
        config.memory.shared = shared;
        match validate(&config) {
            Ok(()) => None,
            Err(ValidationError::Device { fault, .. }) => Some(fault),
            Err(other) => panic!("{other}"),
        }
    };
    let net = json!({"vhost_user": true, "vhost_socket": "/s", "vhost_mode": "Server"});
    assert_eq!(fault_of(&net, true), None);
    assert_eq!(fault_of(&net, false), Some(DeviceFault::MemoryPrivate));
    for (key, value) in [
        ("tap", json!("tap0")),
        ("ip", json!("192.0.2.1")),
        ("mask", json!("255.255.255.0")),
        ("host_mac", json!(mac())),
    ] {
        let mut wrong = net.clone();
        wrong[key] = value;
        assert_eq!(fault_of(&wrong, true), Some(DeviceFault::OfBackEnd { key }));
    }
    // At most one pair per vCPU, and a control queue.
    let mut pairs = net;
    pairs["num_queues"] = json!(3);
    assert_eq!(fault_of(&pairs, true), None);
    pairs["num_queues"] = json!(4);
    assert!(matches!(
        fault_of(&pairs, true),
        Some(DeviceFault::QueueCount { count: 4, .. })
    ));
    assert_eq!(
        fault_of(&json!({"vhost_user": true}), true),
        Some(DeviceFault::SocketMissing)
    );
    for stray in [
        json!({"vhost_socket": "/s"}),
        json!({"vhost_mode": "Server"}),
    ] {
        assert_eq!(
            fault_of(&stray, true),
            Some(DeviceFault::SocketWithoutVhostUser)
        );
    }
}

#[test]
fn validate_generic_vhost_user_device_is_one_that_another_process_can_serve() {
    let device = json!({"device_type": 4, "socket": "/s", "queue_sizes": [64]});
    let fault_of = |device: Value, shared: bool| {
        let mut config = with("generic_vhost_user", json!([device]));
        config.memory.shared = shared;
        match validate(&config) {
            Ok(()) => None,
            Err(ValidationError::Device { fault, .. }) => Some(fault),
            Err(other) => panic!("{other}"),
        }
    };
    assert_eq!(fault_of(device.clone(), true), None);
    assert_eq!(
        fault_of(device.clone(), false),
        Some(DeviceFault::MemoryPrivate)
    );
    for (key, value) in [
        ("device_type", json!(0)),
        ("device_type", json!(5)),
        ("device_type", json!(64)),
        ("socket", json!("")),
        ("queue_sizes", json!([])),
        ("queue_sizes", json!([64, 3])),
        ("queue_sizes", json!(vec![64; 65])),
    ] {
        let mut wrong = device.clone();
        wrong[key] = value;
        assert!(fault_of(wrong.clone(), true).is_some(), "{wrong}");
    }
    // Upstream's former name.
    let former = json!({"virtio_id": 4, "socket": "/s", "queue_sizes": [64]});
    assert_eq!(fault_of(former, true), None);
}

#[test]
fn validate_shared_folder_needs_shared_memory_a_tag_and_a_path() {
    let shared = |fs: Value| {
        let mut config = with("fs", json!([fs]));
        config.memory.shared = true;
        config
    };
    let folder = json!({"tag": "t", "socket": "/s"});
    assert!(validate(&shared(folder.clone())).is_ok());
    let private = fault("fs", json!([folder]));
    assert!(matches!(
        private,
        ValidationError::Device {
            fault: DeviceFault::MemoryPrivate,
            ..
        }
    ));
    assert!(api::error_line(&private).contains("shared=on"));
    for (key, value) in [
        ("tag", json!("")),
        ("tag", json!("t".repeat(37))),
        ("tag", json!("a\0b")),
        ("socket", json!("")),
        ("socket", json!("s".repeat(108))),
        ("num_queues", json!(0)),
        ("num_queues", json!(65)),
        ("queue_size", json!(3)),
        ("queue_size", json!(2048)),
    ] {
        let mut wrong = folder.clone();
        wrong[key] = value;
        let refused = validate(&shared(wrong.clone()));
        assert!(
            matches!(refused, Err(ValidationError::Device { .. })),
            "{wrong}: {refused:?}"
        );
    }
    let mut elsewhere = folder;
    elsewhere["pci_segment"] = json!(1);
    assert!(matches!(
        validate(&shared(elsewhere)).unwrap_err(),
        ValidationError::Device {
            fault: DeviceFault::PciSegment {
                segment: 1,
                count: 1
            },
            ..
        }
    ));
}

#[test]
fn validate_what_is_not_built_is_refused_by_name() {
    for (section, value, name) in [
        ("tpm", json!({"socket": "/t"}), "tpm"),
        (
            "numa",
            json!([{"guest_numa_id": 0, "device_id": "x"}]),
            "device_id of NUMA nodes",
        ),
        (
            "disks",
            json!([{"path": "/d", "image_type": "Vhdx"}]),
            "image_type vhdx",
        ),
        (
            "balloon",
            json!({"size": 0, "iommu": true}),
            "iommu of the balloon",
        ),
        (
            "net",
            json!([{"iommu": true, "vhost_user": true, "vhost_socket": "/s"}]),
            "iommu of vhost-user network interfaces",
        ),
        (
            "disks",
            json!([{"iommu": true, "vhost_user": true, "vhost_socket": "/s"}]),
            "iommu of vhost-user disks",
        ),
        (
            "debug_console",
            json!({"mode": "Socket"}),
            "a debug console on a socket",
        ),
    ] {
        assert_eq!(
            fault(section, value),
            ValidationError::Unsupported {
                what: name.to_owned()
            }
        );
    }
}

#[test]
fn validate_iommu_segments_hold_only_devices_behind_it() {
    let machine = |platform: serde_json::Value, disk: serde_json::Value| {
        let config = json!({"payload": {"kernel": "/k"}, "platform": platform, "disks": [disk]});
        let config = parse(config);
        validate(&config).map(|()| has_iommu(&config))
    };
    let two = json!({"num_pci_segments": 2, "iommu_segments": [1]});
    let disk = |segment: u16, iommu: bool| json!({"path": "/d", "id": "d", "pci_segment": segment, "iommu": iommu});
    assert_eq!(machine(json!({}), disk(0, false)), Ok(false));
    assert_eq!(machine(json!({}), disk(0, true)), Ok(true));
    assert_eq!(machine(two.clone(), disk(0, false)), Ok(true));
    assert_eq!(machine(two.clone(), disk(1, true)), Ok(true));
    assert_eq!(
        machine(two, disk(1, false)),
        Err(ValidationError::Device {
            device: "d".to_owned(),
            fault: DeviceFault::OnIommuSegment { segment: 1 },
        })
    );
    for segment in [0, 2, u16::MAX] {
        let platform = json!({"num_pci_segments": 2, "iommu_segments": [segment]});
        assert_eq!(
            machine(platform, disk(0, true)),
            Err(ValidationError::IommuSegment { segment, count: 2 })
        );
    }
    for bits in [0, 31, 65] {
        let platform = json!({"iommu_address_width_bits": bits});
        assert_eq!(
            machine(platform, disk(0, true)),
            Err(ValidationError::IommuAddressWidth {
                bits,
                min: 32,
                max: 64
            })
        );
    }
    let forced = parse(json!({"payload": {"kernel": "/k"}, "iommu": true}));
    validate(&forced).unwrap();
    assert!(has_iommu(&forced));
}

#[test]
fn validate_landlock_rules_need_landlock_and_known_access() {
    let with_rules = |enabled: bool, access: &str| {
        parse(json!({
            "payload": {"kernel": "/k"},
            "landlock_enable": enabled,
            "landlock_rules": [{"path": "/a", "access": "r"}, {"path": "/b", "access": access}],
        }))
    };
    for access in ["r", "w", "rw", "wr"] {
        validate(&with_rules(true, access)).unwrap();
    }
    assert_eq!(
        validate(&with_rules(false, "r")),
        Err(ValidationError::LandlockRulesWithoutLandlock)
    );
    for access in ["", "x", "rwx", "R"] {
        assert_eq!(
            validate(&with_rules(true, access)),
            Err(ValidationError::LandlockAccess {
                path: "/b".into(),
                access: access.to_owned()
            })
        );
    }
    let empty = json!({"payload": {"kernel": "/k"}, "landlock_rules": []});
    validate(&parse(empty)).unwrap();
}

#[test]
fn generated_name_of_a_device_added_later_has_no_number_of_another_kind() {
    let mut config = parse(json!({
        "payload": {"kernel": "/k"},
        "disks": [{"path": "/a", "id": "_disk_of_mine"}, {"path": "/b"}],
        "net": [{}],
    }));
    let mut numbers = DeviceNumbers::default();
    numbers.assign(&mut config);
    let mut config = with_device(&config, NewDevice::Net(api::config::NetConfig::default()));
    numbers.assign(&mut config);
    let disks = config.disks.iter().flatten().map(|disk| &disk.id);
    let nets = config.net.iter().flatten().map(|net| &net.id);
    let ids: Vec<_> = disks.chain(nets).flatten().collect();
    assert_eq!(ids, ["_disk_of_mine", "_disk0", "_net1", "_net2"]);
}

#[test]
fn generated_names_count_over_disks_and_nets_and_leave_out_what_is_taken() {
    let mut config = parse(json!({
        "payload": {"kernel": "/k"},
        "disks": [{"path": "/a"}, {"path": "/b", "id": "mine"}, {"path": "/c"}],
        "net": [{}, {"id": "_net2"}, {}],
    }));
    let mut numbers = DeviceNumbers::default();
    numbers.assign(&mut config);
    let ids: Vec<_> = config
        .disks
        .iter()
        .flatten()
        .map(|disk| disk.id.clone().unwrap())
        .collect();
    assert_eq!(ids, ["_disk0", "mine", "_disk1"]);
    let ids: Vec<_> = config
        .net
        .iter()
        .flatten()
        .map(|net| net.id.clone().unwrap())
        .collect();
    assert_eq!(ids, ["_net3", "_net2", "_net4"]);
    let again = config.clone();
    numbers.assign(&mut config);
    assert_eq!(config, again);
}

#[test]
fn names_of_removed_devices_are_not_generated_and_large_numbers_are_no_end() {
    let new_name = |numbers: &mut DeviceNumbers| {
        let mut config = parse(json!({"payload": {"kernel": "/k"}, "net": [{}]}));
        numbers.assign(&mut config);
        config.net.unwrap()[0].id.clone().unwrap()
    };
    let mut numbers = DeviceNumbers::default();
    numbers.retire("_disk4");
    numbers.retire("_disk2");
    numbers.retire("_disk_mine");
    assert_eq!(new_name(&mut numbers), "_net5");
    numbers.retire(&format!("_fs{}", u64::MAX));
    assert_eq!(new_name(&mut numbers), "_net6");
    let mut saved = DeviceNumbers::from_saved(numbers.next()).unwrap();
    assert_eq!(new_name(&mut saved), "_net7");
    let damaged = DeviceNumbers::from_saved(u64::MAX).unwrap_err();
    assert_eq!(
        damaged.to_string(),
        "state of snapshot: next_device_number 18446744073709551615 is not below 4611686018427387904"
    );
}
