//! Entry point of the fuzz target `http`, and of ordinary tests with random bytes.

use api::{Endpoint, ReclaimThresholdsChange, RestoreConfig, VmConfig};
use serde_json::{Value, json};
use state::testing::change;

use super::body;
use super::http::fuzz::requests;
use crate::config::{
    DeviceNumbers, NewDevice, rate_limits, take_id, validate, validate_addition, validate_sizes,
    with_device, with_rate_limit, without_device,
};

/// Maximum number of changes to a body.
const CHANGES_MAX: usize = 8;
/// Devices that are removed and added again.
const DEVICES_MAX: usize = 8;
/// A stream that begins with a byte from here on, which begins no request, describes changes to a body.
const CHANGES: u8 = 0x80;

/// Splits the bytes into requests, and parses each body as the endpoints with the largest structures do. Returns the
/// number of requests and of valid bodies.
///
/// # Panics
/// The server keeps more data than its limits allow.
#[must_use]
pub fn run(bytes: &[u8]) -> (usize, usize) {
    let (piece, stream) = bytes.split_first().unwrap_or((&0, &[]));
    let request = match stream.split_first() {
        Some((kind @ CHANGES.., changes)) => Some(request(*kind, changes)),
        _ => None,
    };
    let bodies = requests(
        request.as_deref().unwrap_or(stream),
        usize::from(*piece) + 1,
    );
    let valid = bodies.iter().filter(|body| read(body)).count();
    (bodies.len(), valid)
}

/// A request with a body that was valid before the changes.
fn request(kind: u8, changes: &[u8]) -> Vec<u8> {
    let mut body = match kind % 8 {
        0..=2 => with_devices(),
        3..=5 => with_zones(),
        6 => json!({
            "source_url": "file:///s",
            "memory_restore_mode": "OnDemand",
            "net_fds": [{"id": "n", "num_fds": 1, "fds": [3]}],
        }),
        _ => json!({
            "alerts": [{"name": "a", "figure": "resident_bytes", "direction": "above", "enter": 1}],
            "remove_alerts": ["b"],
        }),
    };
    let mut changes = changes.iter().copied();
    for _ in 0..CHANGES_MAX {
        if changes.len() == 0 {
            break;
        }
        change(&mut body, || changes.next().unwrap_or(0));
    }
    let body = body.to_string();
    let head = format!(
        "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    [head, body].concat().into_bytes()
}

/// A configuration with devices of each kind.
fn with_devices() -> Value {
    let limit = json!({
        "bandwidth": {"size": 1000, "refill_time": 100},
        "ops": {"size": 10, "one_time_burst": 1, "refill_time": 100},
    });
    json!({
        "payload": {"kernel": "/k", "cmdline": "c"},
        "cpus": {
            "boot_vcpus": 2, "max_vcpus": 4,
            "topology": {"threads_per_core": 2, "cores_per_die": 2, "dies_per_package": 1, "packages": 1},
            "affinity": [{"vcpu": 0, "host_cpus": [0, 1]}],
        },
        "memory": {
            "size": 1 << 30, "shared": true, "hotplug_method": "VirtioMem", "hotplug_size": 1 << 30, "hotplugged_size": 2 << 20,
        },
        "platform": {"num_pci_segments": 2, "system_uuid": "00112233-4455-6677-8899-aabbccddeeff", "oem_strings": ["a"]},
        "pci_segments": [{"pci_segment": 1, "mmio32_aperture_weight": 2, "mmio64_aperture_weight": 3}],
        "rate_limit_groups": [{"id": "g", "rate_limiter_config": limit}],
        "disks": [
            {"path": "/d", "id": "d", "num_queues": 2, "rate_limiter_config": limit,
             "queue_affinity": [{"queue_index": 0, "host_cpus": [0]}, {"queue_index": 1, "host_cpus": [1]}]},
            {"path": "/e", "rate_limit_group": "g", "pci_segment": 1, "pci_device_id": 2},
            {"vhost_user": true, "vhost_socket": "/s"},
        ],
        "net": [
            {"id": "n", "mac": "52:54:00:01:02:03", "num_queues": 4, "mtu": 1500, "rate_limiter_config": limit},
            {"vhost_user": true, "vhost_socket": "/s", "vhost_mode": "Server"},
        ],
        "fs": [{"tag": "t", "socket": "/s", "num_queues": 1, "queue_size": 64}],
        "generic_vhost_user": [{"device_type": 26, "socket": "/s", "queue_sizes": [64, 64]}],
        "pmem": [{"file": "/p", "size": 2 << 20}],
        "vsock": {"cid": 3, "socket": "/v"},
        "balloon": {"size": 4096, "free_page_reporting": true, "reporting_policy": true, "device_init": true, "stats_poll_ms": 200},
        "serial": {"mode": "File", "file": "/c", "file_bytes_max": 4096},
        "console": {"mode": "Socket", "socket": "/t"},
        "debug_console": {"mode": "Tty", "iobase": 233},
        "landlock_enable": true,
        "landlock_rules": [{"path": "/l", "access": "rw"}],
        "rtc": {"pci_device_id": 9},
        "watchdog": true,
        "pvpanic": true,
    })
}

/// A configuration with zones and nodes.
fn with_zones() -> Value {
    json!({
        "payload": {"firmware": "/f"},
        "cpus": {"boot_vcpus": 1, "max_vcpus": 4},
        "memory": {"size": 0, "zones": [
            {"id": "a", "size": 1 << 20, "host_numa_node": 0, "file": "/f"},
            {"id": "b", "size": 1 << 30, "shared": true, "file": "/f"},
            {"id": "c", "size": 4 << 20, "hugepages": true, "hugepage_size": 2 << 20},
        ]},
        "numa": [
            {"guest_numa_id": 1, "cpus": [0, 3], "memory_zones": ["a"], "pci_segments": [0],
             "distances": [{"destination": 1, "distance": 10}, {"destination": 0, "distance": 11}]},
            {"guest_numa_id": 0, "memory_zones": ["c", "b"]},
        ],
    })
}

/// Parses and checks a body; returns whether it is valid for one of the endpoints.
fn read(body: &[u8]) -> bool {
    let restore = body::read::<RestoreConfig>(Endpoint::VmRestore, body);
    let change = body::read::<ReclaimThresholdsChange>(Endpoint::VmSetReclaimThresholds, body);
    let config = body::read::<VmConfig>(Endpoint::VmCreate, body);
    let created = config.is_ok_and(|config| {
        let checked = validate(&config);
        plug_again(config);
        // Its message must be possible, too.
        checked.inspect_err(|error| drop(error.to_string())).is_ok()
    });
    created || restore.is_ok() || change.is_ok()
}

/// Names all devices; then removes some, and limits and adds them again, as requests to a running machine do.
///
/// # Panics
/// The removed device is not there, or the configuration changes otherwise.
fn plug_again(mut config: VmConfig) {
    DeviceNumbers::default().assign(&mut config);
    // The results do not matter.
    validate_sizes(&config).ok();
    let mut disks = config.disks.iter().flatten();
    let limit = disks.find_map(|disk| disk.rate_limiter_config);
    let _limits = rate_limits(limit.as_ref());
    for mut device in devices(&config).into_iter().take(DEVICES_MAX) {
        let id = device.id().expect("just named").to_owned();
        let without = without_device(&config, &id).expect("just found");
        assert!(without_device(&without, &id).is_none(), "{id} is there");
        let again = with_device(&without, device.clone());
        validate_addition(&again, &device).ok();
        take_id(&again, &mut device);
        assert_eq!(device.id(), Some(&*id));
        with_rate_limit(&again, &id, limit).ok();
    }
}

fn devices(config: &VmConfig) -> Vec<NewDevice> {
    let mut all: Vec<NewDevice> = Vec::new();
    all.extend(config.vsock.iter().cloned().map(NewDevice::Vsock));
    all.extend(config.balloon.iter().cloned().map(NewDevice::Balloon));
    all.extend(config.disks.iter().flatten().cloned().map(NewDevice::Disk));
    all.extend(config.net.iter().flatten().cloned().map(NewDevice::Net));
    all.extend(config.fs.iter().flatten().cloned().map(NewDevice::Fs));
    all.extend(config.pmem.iter().flatten().cloned().map(NewDevice::Pmem));
    let generic = config.generic_vhost_user.iter().flatten().cloned();
    all.extend(generic.map(NewDevice::GenericVhostUser));
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_in_pieces_are_found_and_their_bodies_read() {
        let body = r#"{"payload":{"kernel":"/k"}}"#;
        let request = format!(
            "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        for piece in [0, 6, 255] {
            let stream = [&[piece], request.as_bytes(), request.as_bytes()].concat();
            assert_eq!(run(&stream), (2, 2));
        }
    }

    #[test]
    fn bodies_to_change_are_valid() {
        for body in [with_devices(), with_zones()] {
            let config = serde_json::from_value(body).expect("it is a configuration");
            assert_eq!(validate(&config), Ok(()));
        }
        for kind in 0..8 {
            assert_eq!(run(&[99, CHANGES | kind]), (1, 1), "{kind}");
        }
        // Other vCPUs than the topology has.
        let changed = (0..=u8::MAX).filter(|place| {
            let counts = run(&[99, CHANGES, 0, *place, 1, 77]);
            assert_eq!(counts.0, 1);
            counts.1 == 0
        });
        assert!(changed.count() > 20, "changes must matter");
    }

    proptest! {
        #[test]
        fn random_changes_are_read_or_refused(
            kind in CHANGES..,
            changes in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let _counts = run(&[&[99, kind], changes.as_slice()].concat());
        }

        #[test]
        fn random_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _counts = run(&bytes);
        }

        #[test]
        fn random_bodies_are_read_or_refused(body in r#"[{}\[\]",:a-z0-9.-]{0,200}"#) {
            read(body.as_bytes());
        }
    }
}
