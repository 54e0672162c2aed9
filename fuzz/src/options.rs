//! Checks that an accepted option serializes to JSON that parses to the same value (fuzz target `options`).

use std::fmt::Debug;

use api::ReclaimThresholdsChange;
use api::config::{
    BalloonConfig, ConsoleConfig, CpusConfig, DebugConsoleConfig, DeviceConfig, DiskConfig,
    FsConfig, GenericVhostUserConfig, HotplugMethod, JailConfig, LandlockConfig, MemoryConfig,
    MemoryZoneConfig, NetConfig, NumaConfig, PathOrFd, PlatformConfig, PmemConfig,
    RateLimitGroupConfig, ResourceLimitsConfig, RestoreConfig, RngConfig, SerialConfig,
    VmReceiveMigrationData, VmSendMigrationData, VsockConfig,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

fn check<T: Serialize + DeserializeOwned + PartialEq + Debug, E>(parsed: Result<T, E>) -> bool {
    if let Ok(config) = &parsed {
        let json = serde_json::to_vec(config).expect("configurations are JSON");
        let again: T = serde_json::from_slice(&json).expect("just written");
        assert_eq!(config, &again);
    }
    parsed.is_ok()
}

/// Parses the text as the option that the first byte selects; returns whether it was accepted.
#[must_use]
pub fn run(bytes: &[u8]) -> bool {
    let Some((choice, text)) = bytes.split_first() else {
        return false;
    };
    let text = String::from_utf8_lossy(text);
    let option = match choice {
        0..240 => choice % 20,
        more => more - 220,
    };
    match option {
        0 => check(BalloonConfig::parse(&text)),
        1 => check(ConsoleConfig::parse(&text)),
        2 => check(CpusConfig::parse(&text)),
        3 => check(DiskConfig::parse(&text)),
        4 => check(FsConfig::parse(&text)),
        5 => {
            let zones: Vec<&str> = text.split('\n').collect();
            check(
                MemoryConfig::parse(zones[0], &zones[1..]).inspect(|memory| {
                    let room = memory.room_bytes(HotplugMethod::VirtioMem);
                    let zones = memory.zones.iter().flatten();
                    let most = zones.fold(memory.hotplug_size.unwrap_or(0), |sum, zone| {
                        sum.saturating_add(zone.hotplug_size.unwrap_or(0))
                    });
                    assert!(room <= most);
                    let total = memory.total_bytes();
                    assert!(total.is_none_or(|total| total >= memory.size));
                }),
            )
        }
        6 => check(MemoryZoneConfig::parse(&text)),
        7 => check(NetConfig::parse(&text).map(|net| NetConfig {
            // A descriptor means nothing to another process, so none is passed on.
            fds: None,
            ..net
        })),
        8 => check(NumaConfig::parse(&text)),
        9 => check(PlatformConfig::parse(&text)),
        10 => check(RestoreConfig::parse(&text).map(|mut restore| {
            // As above.
            for net in restore.net_fds.iter_mut().flatten() {
                net.fds.clear();
            }
            restore
        })),
        11 => check(RngConfig::parse(&text)),
        12 => check(VsockConfig::parse(&text)),
        13 => check(PmemConfig::parse(&text)),
        14 => check(GenericVhostUserConfig::parse(&text)),
        15 => check(LandlockConfig::parse(&text)),
        16 => check(RateLimitGroupConfig::parse(&text)),
        17 => check(SerialConfig::parse(&text)),
        18 => check(DebugConsoleConfig::parse(&text)),
        19 => check(ReclaimThresholdsChange::parse(&text)),
        20 => check(DeviceConfig::parse(&text)),
        21 => check(VmSendMigrationData::parse(&text)),
        22 => check(VmReceiveMigrationData::parse(&text)),
        // The rest belongs to the process and has no JSON.
        23 => JailConfig::parse(&text).is_ok(),
        24 => ResourceLimitsConfig::parse(&text).is_ok(),
        25 => PathOrFd::parse_event_monitor(&text).is_ok(),
        _ => PathOrFd::parse_api_socket(&text).is_ok(),
    }
}
