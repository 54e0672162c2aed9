//! What is accepted, and what is refused with which error.

#![allow(clippy::unwrap_used, clippy::needless_pass_by_value)]

use serde_json::{Value, json};

use super::*;

fn parse(input: Value) -> VmConfig {
    serde_json::from_value(input).unwrap()
}

/// A bootable configuration with `section` put in.
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
        ("memory", json!({"size": 1u64 << 40})),
        (
            "memory",
            json!({"size": 2 << 20, "hugepages": true, "hugepage_size": 2 << 20}),
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
    for (boot, max) in [(0, 1), (2, 1), (1, 255)] {
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
    assert_eq!(
        device("net", json!({"num_queues": 3})),
        DeviceFault::QueuePairs { count: 3 }
    );
    for count in [0, 4] {
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
        ValidationError::DuplicatePciSlot { slot: 8 }
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
fn validate_consoles_do_not_share_the_terminal_and_have_their_paths() {
    assert_eq!(
        fault("serial", json!({"mode": "Tty"})),
        ValidationError::DoubleTty
    );
    for mode in ["File", "Socket"] {
        assert!(matches!(
            fault("serial", json!({ "mode": mode })),
            ValidationError::Device {
                fault: DeviceFault::ConsolePathMissing,
                ..
            }
        ));
    }
}

#[test]
fn validate_what_is_not_built_is_refused_by_name() {
    for (section, value, name) in [
        ("vsock", json!({"cid": 3, "socket": "/s"}), "vsock"),
        ("numa", json!([{"guest_numa_id": 0}]), "numa"),
        ("devices", json!([{"path": "/sys/x"}]), "devices"),
        ("watchdog", json!(true), "watchdog"),
        ("landlock_enable", json!(true), "landlock"),
        (
            "memory",
            json!({"size": 0, "zones": [{"id": "a", "size": 4096}]}),
            "memory.zones",
        ),
        (
            "memory",
            json!({"size": 4096, "hotplug_size": 4096}),
            "memory.hotplug_size",
        ),
        (
            "cpus",
            json!({"boot_vcpus": 1, "max_vcpus": 1, "kvm_hyperv": true}),
            "cpus.kvm_hyperv",
        ),
        (
            "disks",
            json!([{"path": "/d", "image_type": "Qcow2"}]),
            "disks.image_type other than raw",
        ),
        ("disks", json!([{"vhost_user": true}]), "disks.vhost_user"),
        (
            "disks",
            json!([{"path": "/d", "queue_affinity": [{"queue_index": 0, "host_cpus": [1]}]}]),
            "disks.queue_affinity",
        ),
        (
            "cpus",
            json!({"boot_vcpus": 1, "max_vcpus": 1, "core_scheduling": "Vcpu"}),
            "cpus.core_scheduling Vcpu",
        ),
        ("net", json!([{"iommu": true}]), "net.iommu"),
        (
            "platform",
            json!({"num_pci_segments": 2}),
            "platform.num_pci_segments",
        ),
        (
            "balloon",
            json!({"size": 0, "pci_segment": 1}),
            "balloon.pci_segment",
        ),
        ("debug_console", json!({"mode": "Tty"}), "debug_console"),
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
fn assign_ids_counts_over_disks_and_nets_and_leaves_out_what_is_taken() {
    let mut config = parse(json!({
        "payload": {"kernel": "/k"},
        "disks": [{"path": "/a"}, {"path": "/b", "id": "mine"}, {"path": "/c"}],
        "net": [{}, {"id": "_net2"}, {}],
    }));
    assign_ids(&mut config);
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
    assign_ids(&mut config);
    assert_eq!(config, again);
}
