//! Tests the wire format of the configuration.

#![allow(clippy::unwrap_used)]

use serde_json::json;

use super::super::*;
use crate::options::INTEGER_LIST_MAX;

#[test]
fn vm_config_minimal_input_takes_upstream_defaults() {
    let config: VmConfig = serde_json::from_value(json!({"payload": {"kernel": "/k"}})).unwrap();
    assert_eq!(config.cpus, CpusConfig::default());
    assert_eq!(config.memory.size, 512 << 20);
    assert_eq!(config.rng.src.to_str(), Some("/dev/urandom"));
    assert_eq!(config.serial.mode, ConsoleOutputMode::Null);
    assert_eq!(config.console.mode, ConsoleOutputMode::Tty);
    assert!(config.memory.thp && !config.memory.shared);
    assert!(config.unsupported_sections().is_empty());
}

#[test]
fn vm_config_unset_options_are_omitted_on_output() {
    let json = serde_json::to_value(VmConfig::default()).unwrap();
    let object = json.as_object().unwrap();
    for absent in [
        "payload",
        "disks",
        "net",
        "balloon",
        "fs",
        "vsock",
        "platform",
        "unsupported",
    ] {
        assert!(!object.contains_key(absent), "{absent}");
    }
    assert!(!json.to_string().contains("null"), "{json}");
}

#[test]
fn vm_config_unknown_fields_are_ignored() {
    let config: VmConfig = serde_json::from_value(json!({
        "payload": {"kernel": "/k", "igvm": "/i"},
        "balloon": {"size": 4096, "from_the_future": {"a": 1}},
        "from_the_future": true,
    }))
    .unwrap();
    assert_eq!(config.balloon.unwrap().size, 4096);
}

#[test]
fn vm_config_known_but_unsupported_sections_are_named() {
    let config: VmConfig = serde_json::from_value(json!({
        "payload": {"kernel": "/k"},
        "user_devices": [{"socket": "/s"}],
        "pmem": [],
        "tpm": {"socket": "/t"},
        "vdpa": null,
        "pci_segments": [],
        "vsock": {"cid": 3, "socket": "/s"},
    }))
    .unwrap();
    assert_eq!(config.unsupported_sections(), ["user_devices", "tpm"]);
}

#[test]
fn vm_config_missing_required_field_is_an_error() {
    for input in [
        json!({"balloon": {"deflate_on_oom": true}}),
        json!({"memory": {"shared": true}}),
        json!({"cpus": {"boot_vcpus": 1}}),
        json!({"serial": {"file": "/x"}}),
    ] {
        assert!(
            serde_json::from_value::<VmConfig>(input.clone()).is_err(),
            "{input}"
        );
    }
}

#[test]
fn net_config_descriptors_in_json_read_as_invalid() {
    let net: NetConfig = serde_json::from_value(json!({"fds": [3, 4]})).unwrap();
    assert_eq!(net.fds, Some(vec![INVALID_FD; 2]));
}

#[test]
fn platform_config_old_field_names_are_understood() {
    let platform: PlatformConfig =
        serde_json::from_value(json!({"serial_number": "s", "uuid": "u"})).unwrap();
    assert_eq!(platform.system_serial_number.as_deref(), Some("s"));
    assert_eq!(platform.system_uuid.as_deref(), Some("u"));
}

#[test]
fn memory_total_bytes_overflow_is_none() {
    let zone = |size| MemoryZoneConfig {
        id: "z".to_owned(),
        size,
        ..Default::default()
    };
    let memory = MemoryConfig {
        size: 0,
        zones: Some(vec![zone(1 << 30), zone(2 << 30)]),
        ..Default::default()
    };
    assert_eq!(memory.total_bytes(), Some(3 << 30));
    let memory = MemoryConfig {
        size: 0,
        zones: Some(vec![zone(u64::MAX), zone(1)]),
        ..Default::default()
    };
    assert_eq!(memory.total_bytes(), None);
}

#[test]
fn longest_list_that_an_option_accepts_is_read_from_json() {
    let of = |last: usize| format!("device_type=fs,socket=/s,queue_sizes=[1-{last}]");
    let config = GenericVhostUserConfig::parse(&of(INTEGER_LIST_MAX)).unwrap();
    let json = serde_json::to_string(&config).unwrap();
    let again: GenericVhostUserConfig = serde_json::from_str(&json).unwrap();
    assert_eq!(again, config);
    assert!(GenericVhostUserConfig::parse(&of(INTEGER_LIST_MAX + 1)).is_err());
}
