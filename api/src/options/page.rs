//! The table of all keys of all options. `docs/options.md` is generated from the declarations of the sections, and a
//! test checks that the file is up to date.

use std::fmt::Write as _;

use schemars::{JsonSchema, SchemaGenerator};
use serde_json::Value;

use crate::config::{
    BalloonConfig, ConsoleConfig, CpusConfig, DebugConsoleConfig, DiskConfig, FsConfig,
    GenericVhostUserConfig, LandlockConfig, MemoryConfig, MemoryZoneConfig, NetConfig, NumaConfig,
    PlatformConfig, PmemConfig, RateLimitGroupConfig, RngConfig, SerialConfig, VsockConfig,
};
use crate::{AlertChange, ReportingPolicy, RestoreConfig};

/// The version of a key without `since`.
const FIRST_VERSION: &str = "0.1.0";

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
    pub(crate) since: Option<&'static str>,
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
        CpusConfig::reference(),
        MemoryConfig::reference(),
        MemoryZoneConfig::reference(),
        NumaConfig::reference(),
        DiskConfig::reference(),
        NetConfig::reference(),
        RateLimitGroupConfig::reference(),
        FsConfig::reference(),
        GenericVhostUserConfig::reference(),
        PmemConfig::reference(),
        VsockConfig::reference(),
        BalloonConfig::reference(),
        RngConfig::reference(),
        SerialConfig::reference(),
        ConsoleConfig::reference(),
        DebugConsoleConfig::reference(),
        PlatformConfig::reference(),
        LandlockConfig::reference(),
        RestoreConfig::reference(),
    ]
}

/// The whole page.
fn page() -> String {
    let mut page = String::from(
        "# Options\n\n\
         This page lists every key of every `cloud-hypervisor` option that accepts `key=value,key=value`. The `ch-remote add-…` commands\n\
         accept the same keys as the option for the device. Sizes take a binary suffix: `K`, `M`, `G`, `T`, `KiB`, `MiB`, `GiB` or `TiB`, in any case. This page is generated\n\
         from the declarations in `api/src/config/`; a test compares the two. \"–\" in the column Default means that the key\n\
         has no default.\n",
    );
    for section in sections() {
        let _ = write!(page, "\n## --{}\n\n{HEADER}", section.option);
        for key in &section.keys {
            for syntax in &key.syntax {
                page.push_str(&row(key, syntax));
            }
        }
    }
    page.push_str("\n## reclaim-thresholds --set, alerts\n\n| Key | Meaning |\n| --- | --- |\n");
    page.push_str(&schema_rows::<AlertChange>());
    let _ = write!(
        page,
        "\n## reclaim-thresholds --set, reporting policy\n\n| Key | Default | Meaning |\n| --- | --- | --- |\n"
    );
    let schema = properties::<ReportingPolicy>();
    for setting in ReportingPolicy::TABLE {
        let doc = description(&schema[setting.name]);
        let _ = writeln!(page, "| `{}` | {} | {doc} |", setting.name, setting.default);
    }
    page
}

const HEADER: &str =
    "| Key | Value | Unit | Default | Since | Meaning |\n| --- | --- | --- | --- | --- | --- |\n";

fn row(key: &KeyReference, syntax: &str) -> String {
    // Alternatives consist of several words and keys and are not split.
    let (name, values) = match syntax.split_once('=') {
        Some((name, values)) if !name.contains('|') => (name, values),
        _ => ("", syntax),
    };
    let meaning = (key.meaning)(name).unwrap_or_else(|| key.doc.to_owned());
    let name = if name.is_empty() {
        "one of".to_owned()
    } else {
        format!("`{name}`")
    };
    let unit = unit(key.is_size, values);
    format!(
        "| {name} | `{}` | {unit} | {} | {} | {} |\n",
        values.replace('|', "\\|"),
        default(&key.default, values, unit == "bytes"),
        key.since.unwrap_or(FIRST_VERSION),
        meaning.replace('|', "\\|"),
    )
}

fn unit(is_size: bool, values: &str) -> &'static str {
    match values {
        "<bytes>" => "bytes",
        "<ms>" | "<milliseconds>" => "ms",
        "<io_ops>" => "operations",
        _ if is_size => "bytes",
        _ if values.contains("_bits>") => "bits",
        _ => "",
    }
}

fn default(default: &KeyDefault, values: &str, is_bytes: bool) -> String {
    match default {
        KeyDefault::SameAs(key) => format!("as `{key}`"),
        KeyDefault::Generated => "generated".to_owned(),
        KeyDefault::Required => "required".to_owned(),
        KeyDefault::Value(Value::Bool(on)) => if *on { "on" } else { "off" }.to_owned(),
        KeyDefault::Value(Value::Number(number)) => match number.as_u64() {
            Some(bytes) if is_bytes && bytes > 0 && bytes % (1 << 20) == 0 => {
                format!("{}M", bytes >> 20)
            }
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

fn schema_rows<T: JsonSchema>() -> String {
    let properties = properties::<T>();
    let rows = properties.as_object().into_iter().flatten();
    rows.map(|(key, schema)| format!("| `{key}` | {} |\n", description(schema)))
        .collect()
}

mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeSet;

    use super::*;

    const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/options.md");

    #[test]
    fn page_of_options_is_that_of_the_declarations() {
        if std::env::var_os("UPDATE_GENERATED").is_some() {
            std::fs::write(PAGE, page()).unwrap();
        }
        assert_eq!(
            std::fs::read_to_string(PAGE).unwrap(),
            page(),
            "write it again: UPDATE_GENERATED=1 cargo test -p cloud-hypervisor-balloon-api page_of_options"
        );
    }

    #[test]
    fn page_of_options_has_every_declared_option() {
        let mut declared = BTreeSet::new();
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/config");
        for file in std::fs::read_dir(folder).unwrap() {
            let path = file.unwrap().path();
            if path.is_file() {
                let text = std::fs::read_to_string(path).unwrap();
                let options = text.split("option = \"").skip(1);
                declared.extend(options.map(|rest| rest.split('"').next().unwrap().to_owned()));
            }
        }
        let page: BTreeSet<_> = sections().iter().map(|it| it.option.to_owned()).collect();
        assert_eq!(page, declared);
    }

    #[test]
    fn page_of_options_shows_defaults_as_they_are_typed() {
        let page = page();
        for part in [
            "| `size` | `<guest_memory_size>` | bytes | 512M | 0.1.0 |",
            "| `max` | `<max_vcpus>` |  | as `boot` |",
            "| `mac` | `<mac_addr>` |  | generated |",
            "| `guest_numa_id` | `<node_id>` |  | required |",
            "| `lock_granularity` | `byte-range\\|full` |  | byte-range |",
            "| `bw_refill_time` | `<ms>` | ms | – | 0.1.0 | Time after which a used-up `bw_size` is",
            "| `ops_one_time_burst` | `<io_ops>` | operations | – | 0.1.0 | Operations (",
        ] {
            assert!(page.contains(part), "{part} is missing:\n{page}");
        }
        let unexplained = |line: &&str| line.starts_with("| `") && line.ends_with("|  |");
        assert_eq!(page.lines().find(unexplained), None);
    }
}
