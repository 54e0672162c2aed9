//! Option strings. An accepted option must serialize to JSON that parses to the same value.
#![no_main]

use std::fmt::Debug;

use api::config::{
    BalloonConfig, ConsoleConfig, CpusConfig, DiskConfig, FsConfig, MemoryConfig, MemoryZoneConfig,
    NetConfig, NumaConfig, PlatformConfig, RestoreConfig, RngConfig, VsockConfig,
};
use api::ReclaimThresholdsChange;
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

fn check<T: Serialize + DeserializeOwned + PartialEq + Debug, E>(parsed: Result<T, E>) {
    if let Ok(config) = parsed {
        let json = serde_json::to_vec(&config).expect("configurations are JSON");
        let again: T = serde_json::from_slice(&json).expect("just written");
        assert_eq!(config, again);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((choice, text)) = bytes.split_first() else {
        return;
    };
    let text = String::from_utf8_lossy(text);
    match choice % 14 {
        0 => check(BalloonConfig::parse(&text)),
        1 => check(ConsoleConfig::parse(&text)),
        2 => check(CpusConfig::parse(&text)),
        3 => check(DiskConfig::parse(&text)),
        4 => check(FsConfig::parse(&text)),
        5 => {
            let zones: Vec<&str> = text.split('\n').collect();
            check(MemoryConfig::parse(zones[0], &zones[1..]));
        }
        6 => check(MemoryZoneConfig::parse(&text)),
        7 => check(NetConfig::parse(&text).map(|net| NetConfig {
            // A descriptor means nothing to another process, so none is passed on.
            fds: None,
            ..net
        })),
        8 => check(NumaConfig::parse(&text)),
        9 => check(PlatformConfig::parse(&text)),
        10 => check(RestoreConfig::parse(&text)),
        11 => check(RngConfig::parse(&text)),
        12 => check(VsockConfig::parse(&text)),
        _ => check(ReclaimThresholdsChange::parse(&text)),
    }
});
