//! The table of all keys of all options. `docs/options.md` is generated from the declarations of the sections, and a
//! test checks that the file is up to date.
//!
//! The page itself records the first version of each key ([`FirstVersions`]).

use std::fmt::Write as _;

use schemars::{JsonSchema, SchemaGenerator};
use serde_json::Value;
use test_docs::{ALTERNATIVES, FirstVersions, Meanings};

use crate::config::{
    BalloonConfig, ConsoleConfig, CpusConfig, DebugConsoleConfig, DeviceConfig, DiskConfig,
    FsConfig, GenericVhostUserConfig, JailConfig, LandlockConfig, MemoryConfig, MemoryZoneConfig,
    NetConfig, NumaConfig, PathOrFd, PciSegmentConfig, PlatformConfig, PmemConfig,
    RateLimitGroupConfig, ResourceLimitsConfig, RngConfig, RtcConfig, SerialConfig, VsockConfig,
};
use crate::{
    AlertChange, ReportingPolicy, RestoreConfig, VmReceiveMigrationData, VmSendMigrationData,
    VmUpdateRateLimiter,
};

/// An option with its keys.
pub(crate) struct OptionReference {
    pub(crate) option: &'static str,
    pub(crate) keys: Vec<KeyReference>,
}

/// One declared key, or the group of keys that form one field.
pub(crate) struct KeyReference {
    /// `key=values` of each.
    pub(crate) syntax: Vec<String>,
    pub(crate) doc: &'static str,
    /// The meaning of a key, if `doc` describes the group as a whole.
    pub(crate) meaning: fn(&str) -> Option<String>,
    pub(crate) default: KeyDefault,
    /// A number of bytes that may have a suffix.
    pub(crate) is_size: bool,
}

/// The default of a key.
pub(crate) enum KeyDefault {
    /// The value in the wire format.
    Value(Value),
    /// The value of another key.
    SameAs(&'static str),
    /// A new value each time.
    Generated,
    /// None: the key is required.
    Required,
}

fn sections() -> Vec<OptionReference> {
    vec![
        PathOrFd::api_socket_reference(),
        PathOrFd::event_monitor_reference(),
        CpusConfig::reference(),
        MemoryConfig::reference(),
        MemoryZoneConfig::reference(),
        NumaConfig::reference(),
        DiskConfig::reference(),
        NetConfig::reference(),
        RateLimitGroupConfig::reference(),
        FsConfig::reference(),
        GenericVhostUserConfig::reference(),
        DeviceConfig::reference(),
        PmemConfig::reference(),
        VsockConfig::reference(),
        BalloonConfig::reference(),
        RngConfig::reference(),
        RtcConfig::reference(),
        SerialConfig::reference(),
        ConsoleConfig::reference(),
        DebugConsoleConfig::reference(),
        PlatformConfig::reference(),
        PciSegmentConfig::reference(),
        LandlockConfig::reference(),
        JailConfig::reference(),
        ResourceLimitsConfig::reference(),
        RestoreConfig::reference(),
    ]
}

/// The commands of `ch-remote` whose value is of the same form.
fn commands() -> Vec<OptionReference> {
    vec![
        VmSendMigrationData::reference(),
        VmReceiveMigrationData::reference(),
        VmUpdateRateLimiter::reference(),
    ]
}

/// The whole page, with the versions of the keys that `old` has.
fn page(old: &str) -> String {
    let versions = FirstVersions::of(old);
    let mut page = String::from(
        "# Options\n\n\
         This page lists every key of every `cloud-hypervisor` option that accepts `key=value,key=value`. The `ch-remote\n\
         add-…` commands accept the same keys as the option for the device. [commands/](commands/) lists the options of each\n\
         program. A size is a number of bytes, or a number with a binary unit: `K`, `M`, `G`, `T`, `KiB`, `MiB`, `GiB` or\n\
         `TiB`, in any case, such as `512M` or `1.5GiB`. This page is generated from the declarations in `api/src/`; a test\n\
         compares the two. \"–\" in the column Default means that the key has no default. The column Since has the version\n\
         that introduced the key.\n",
    );
    let options = sections().into_iter().map(|section| ("--", section));
    let commands = commands()
        .into_iter()
        .map(|section| ("ch-remote ", section));
    for (kind, section) in options.chain(commands) {
        let heading = format!("{kind}{}", section.option);
        let _ = write!(page, "\n## {heading}\n\n{HEADER}");
        let mut meanings = Meanings::default();
        for key in &section.keys {
            for syntax in &key.syntax {
                page.push_str(&row(&versions, &heading, key, syntax, &mut meanings));
            }
        }
        page.push_str(&meanings.below());
    }
    let heading = "reclaim-thresholds --set, alerts";
    let _ = write!(
        page,
        "\n## {heading}\n\n| Key | Unit | Default | Since | Meaning |\n| --- | --- | --- | --- | --- |\n"
    );
    let mut meanings = Meanings::default();
    for key in AlertChange::reference().keys {
        let (key, doc) = (key.syntax[0].split('=').next().unwrap_or_default(), key.doc);
        let name = format!("`{key}`");
        let (unit, default) = (alert_unit(key), alert_default(key));
        let doc = meanings.cell(&name, &without_unit(doc, unit));
        let since = versions.get(heading, &[&name]);
        let _ = writeln!(page, "| {name} | {unit} | {default} | {since} | {doc} |");
    }
    page.push_str(&meanings.below());
    let heading = "reclaim-thresholds --set, reporting policy";
    let _ = write!(
        page,
        "\n## {heading}\n\n| Key | Unit | Default | Since | Meaning |\n| --- | --- | --- | --- | --- |\n"
    );
    let schema = properties::<ReportingPolicy>();
    let mut meanings = Meanings::default();
    for setting in ReportingPolicy::TABLE {
        let name = format!("`{}`", setting.name);
        let default = setting.default;
        let unit = match setting.unit.name() {
            "bytes" if setting.name.contains("per_second") => "bytes/s",
            unit => unit,
        };
        let doc = without_unit(&description(&schema[setting.name]), unit);
        let doc = meanings.cell(&name, &doc);
        let since = versions.get(heading, &[&name]);
        let _ = writeln!(page, "| {name} | {unit} | {default} | {since} | {doc} |");
    }
    page.push_str(&meanings.below());
    page
}

const HEADER: &str =
    "| Key | Value | Unit | Default | Since | Meaning |\n| --- | --- | --- | --- | --- | --- |\n";
fn row(
    versions: &FirstVersions,
    heading: &str,
    key: &KeyReference,
    syntax: &str,
    meanings: &mut Meanings,
) -> String {
    // Alternatives consist of several words and keys and are not split.
    let (name, values) = match syntax.split_once('=') {
        Some((name, values)) if !name.contains('|') => (name, values),
        _ => ("", syntax),
    };
    let meaning = (key.meaning)(name).unwrap_or_else(|| key.doc.to_owned());
    let name = if name.is_empty() {
        ALTERNATIVES.to_owned()
    } else {
        format!("`{name}`")
    };
    let syntax = format!("`{}`", values.replace('|', "\\|"));
    let unit = unit(key.is_size, values);
    let default = default(&key.default, values, unit == "bytes");
    let meaning = without_unit(&meaning, unit);
    let since = versions.get(heading, &[&name, &syntax]);
    let meaning = meanings.cell(&name, &meaning);
    format!("| {name} | {syntax} | {unit} | {default} | {since} | {meaning} |\n")
}

fn unit(is_size: bool, values: &str) -> &'static str {
    match values {
        "<bytes>" => "bytes",
        "<ms>" | "<milliseconds>" => "ms",
        "<seconds>" => "s",
        "<io_ops>" => "operations",
        "<bits>" => "bits",
        _ if is_size => "bytes",
        _ if values.contains("_bits>") => "bits",
        _ => "",
    }
}

/// The meaning without the unit, which has its own column.
fn without_unit(meaning: &str, unit: &str) -> String {
    let words = match unit {
        "bytes" => &[", bytes"][..],
        "ms" => &[", ms", ", milliseconds"],
        "s" => &[", seconds"],
        "bits" => &[", in bits"],
        _ => &[],
    };
    let text = meaning.to_owned();
    words.iter().fold(text, |text, word| text.replace(word, ""))
}

fn alert_unit(key: &str) -> &'static str {
    match key {
        "enter" | "leave" => "that of `figure`",
        "duration_ms" => "ms",
        _ => "",
    }
}

/// The value of a key that a new alert does not give.
fn alert_default(key: &str) -> &'static str {
    match key {
        "leave" => "as `enter`",
        "duration_ms" => "0",
        _ => "required",
    }
}

fn default(default: &KeyDefault, values: &str, is_bytes: bool) -> String {
    match default {
        KeyDefault::SameAs(key) => format!("as `{key}`"),
        KeyDefault::Generated => "generated".to_owned(),
        KeyDefault::Required => "required".to_owned(),
        KeyDefault::Value(Value::Bool(on)) => if *on { "on" } else { "off" }.to_owned(),
        KeyDefault::Value(Value::Number(number)) => match number.as_u64() {
            Some(bytes) if is_bytes => crate::exact_bytes(bytes, &["", "K", "M", "G"]),
            Some(port) if values == "<port>" => format!("{port:#x}"),
            _ => number.to_string(),
        },
        KeyDefault::Value(Value::String(text)) => word(text, values),
        // Absent, or a structure without set fields.
        KeyDefault::Value(_) => "–".to_owned(),
    }
}

/// The command line's word for a value of the wire format, which is spelled differently: `VirtioMem` is `virtio-mem`.
fn word(text: &str, values: &str) -> String {
    let plain = |text: &str| text.replace('-', "").to_ascii_lowercase();
    let known = values.split('|').find(|word| plain(word) == plain(text));
    known.unwrap_or(text).to_owned()
}

fn properties<T: JsonSchema>() -> Value {
    let schema = SchemaGenerator::default().into_root_schema_for::<T>();
    schema
        .as_value()
        .get("properties")
        .cloned()
        .unwrap_or_default()
}

fn description(schema: &Value) -> String {
    let text = schema["description"].as_str().unwrap_or_default();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeSet;

    use test_docs::THIS_VERSION;

    use super::*;

    #[test]
    fn page_of_options_is_that_of_the_declarations() {
        let update = "cargo test -p cloud-hypervisor-balloon-api page_of_options";
        test_docs::expect_page("docs/options.md", update, page);
    }

    #[test]
    fn page_of_options_has_every_declared_option() {
        let mut declared = BTreeSet::from(["api-socket".to_owned(), "event-monitor".to_owned()]);
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src");
        for folder in [source, &format!("{source}/config")] {
            for file in std::fs::read_dir(folder).unwrap() {
                let path = file.unwrap().path();
                if path.is_file() {
                    let text = std::fs::read_to_string(path).unwrap();
                    let options = text.split("option = \"").skip(1);
                    declared.extend(options.map(|rest| rest.split('"').next().unwrap().to_owned()));
                }
            }
        }
        let page = sections().into_iter().chain(commands());
        let page = page.chain([AlertChange::reference()]);
        let page: BTreeSet<_> = page.map(|it| it.option.to_owned()).collect();
        assert_eq!(page, declared);
    }

    #[test]
    fn page_of_options_shows_defaults_as_they_are_typed() {
        let page = page("");
        for part in [
            "| `size` | `<guest_memory_size>` | bytes | 512M |",
            "| `max` | `<max_vcpus>` |  | as `boot` |",
            "| `mac` | `<mac_addr>` |  | generated |",
            "| `guest_numa_id` | `<node_id>` |  | required |",
            "| `lock_granularity` | `byte-range\\|full` |  | byte-range |",
            "| `bw_refill_time` | `<ms>` | ms | – |",
            "| `ops_one_time_burst` | `<io_ops>` | operations | – |",
        ] {
            assert!(page.contains(part), "{part} is missing:\n{page}");
        }
        assert!(page.contains("Time after which a used-up `bw_size` is"));
        let unexplained = |line: &&str| line.starts_with("| `") && line.ends_with("|  |");
        assert_eq!(page.lines().find(unexplained), None);
    }

    #[test]
    fn first_version_of_a_key_stays_and_a_new_key_gets_the_current_one() {
        let first = page("").replace(THIS_VERSION, "0.0.1");
        assert_eq!(page(&first), first);

        let new = [
            "| `boot` |",
            "| `size` | `<balloon_size>` |",
            "| `leave` |",
            "| `age_ms_min` |",
            "| one of |",
        ];
        let is_new = |line: &&str| new.iter().any(|start| line.starts_with(start));
        let lines = || first.lines().filter(is_new);
        assert!(lines().count() >= new.len(), "{first}");
        let old: Vec<&str> = first.lines().filter(|line| !is_new(line)).collect();
        let again = page(&old.join("\n"));
        for line in lines() {
            let line = line.replace("| 0.0.1 |", &format!("| {THIS_VERSION} |"));
            assert!(again.contains(&line), "{line} is missing:\n{again}");
        }
        let kept = |page: &str| page.matches("| 0.0.1 |").count();
        assert_eq!(kept(&again), kept(&first) - lines().count());
    }
}
