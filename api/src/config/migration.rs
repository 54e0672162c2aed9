//! Bodies of `PUT /vm.send-migration` and `PUT /vm.receive-migration`.

use std::path::PathBuf;

use api_macros::{Words, section};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::options::parse_bytes;

/// The migration to send.
#[section(option = "send-migration", about = "Migration to send")]
#[derive(Clone, Debug, PartialEq, Eq)]
#[schemars(extend("example" = json!({"destination_url": "tcp:192.0.2.7:4444", "downtime_ms": 100})))]
pub struct VmSendMigrationData {
    /// Where the target listens: `tcp:ADDRESS:PORT` with a numeric IP address, or `unix:PATH`.
    #[key("<url>", required)]
    pub destination_url: String,
    /// Pause the VM once the rest of its memory can be sent in this time.
    #[key("<ms>", default = 300)]
    pub downtime_ms: u64,
    /// Time for which the VM may keep running during the migration, seconds.
    #[key("<seconds>", default = 3600)]
    pub timeout_s: u64,
    /// The action after that time.
    #[key]
    pub timeout_strategy: MigrationTimeoutStrategy,
    /// Slow the vCPUs down in steps while passes do not get shorter.
    #[key]
    pub auto_converge: bool,
    /// Number of connections over which memory is sent, 1 to 128.
    #[key(default = 1)]
    pub connections: u32,
    /// Maximum amount of memory sent per second while the VM runs, bytes. At least 1 MiB per connection. The last
    /// pass, for which the VM is paused, has no limit.
    #[key("<size>", read = parse_bytes)]
    pub bytes_per_second_max: Option<u64>,
    /// Hand over the memory files of RAM with `shared=on` or `hugepages=on` instead of copying it. Needs a UNIX socket.
    #[key]
    pub local: bool,
    /// Keep the paused VM afterwards. Not supported.
    #[key]
    pub preserve_source: bool,
    /// When memory is sent. With postcopy, the rest of it follows the VM if the guest writes it faster than it can be sent.
    /// The target needs the same setting. Excludes other connections, `local` and `auto_converge`.
    #[key]
    pub memory_mode: MigrationMemoryMode,
    /// Folder with `ca-cert.pem`, `client-cert.pem` and `client-key.pem`: encrypts TCP by TLS.
    #[key("<path>")]
    pub tls_dir: Option<PathBuf>,
}

/// The migration to receive.
#[section(option = "receive-migration", about = "Migration to receive")]
#[derive(Clone, Debug, PartialEq, Eq)]
#[schemars(extend("example" = json!({"receiver_url": "tcp:0.0.0.0:4444"})))]
pub struct VmReceiveMigrationData {
    /// Where to listen: `tcp:ADDRESS:PORT` with a numeric IP address, or `unix:PATH`.
    #[key("<url>", required)]
    pub receiver_url: String,
    /// When memory comes. With postcopy, a part of it may come after the VM; needs userfaultfd, and RAM without files and huge
    /// pages.
    #[key]
    pub memory_mode: MigrationMemoryMode,
    /// Folder with `ca-cert.pem`, `server-cert.pem` and `server-key.pem`: accepts only sources with a certificate of this authority.
    #[key("<path>")]
    pub tls_dir: Option<PathBuf>,
}

/// The reaction if a VM writes its memory faster than it can be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema, Words)]
pub enum MigrationTimeoutStrategy {
    /// The migration fails and the VM keeps running.
    #[default]
    #[word("cancel")]
    Cancel,
    /// The VM is paused while the rest of its memory is sent.
    #[word("ignore")]
    Ignore,
}

/// When memory is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema, Words)]
pub enum MigrationMemoryMode {
    /// Before the VM runs on the target.
    #[default]
    #[word("precopy")]
    Precopy,
    /// A part of it may be sent afterwards.
    #[word("postcopy")]
    Postcopy,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn options_are_read_with_the_names_and_defaults_of_upstream() {
        let text = "destination_url=tcp:[::1]:4444,downtime_ms=50,timeout_strategy=ignore";
        let send = VmSendMigrationData::parse(text).unwrap();
        let wire = serde_json::to_value(&send).unwrap();
        assert_eq!(wire["destination_url"], "tcp:[::1]:4444");
        assert_eq!(wire["downtime_ms"], 50);
        assert_eq!(wire["timeout_s"], 3600);
        assert_eq!(wire["timeout_strategy"], "Ignore");
        assert_eq!(wire["memory_mode"], "Precopy");
        let text = "destination_url=unix:/s,bytes_per_second_max=100M";
        let limited = VmSendMigrationData::parse(text).unwrap();
        assert_eq!(limited.bytes_per_second_max, Some(100 << 20));
        let body = json!({"destination_url": "unix:/s"});
        let least: VmSendMigrationData = serde_json::from_value(body).unwrap();
        assert_eq!((least.downtime_ms, least.connections), (300, 1));
        let receive = VmReceiveMigrationData::parse("receiver_url=unix:/s").unwrap();
        assert_eq!(receive.receiver_url, "unix:/s");
        for text in [
            "downtime_ms=5",
            "destination_url=unix:/s,timeout_strategy=x",
        ] {
            assert!(VmSendMigrationData::parse(text).is_err(), "{text}");
        }
    }
}
