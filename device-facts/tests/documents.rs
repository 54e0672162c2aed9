//! Compares the tables with `guest-patches/README.md`, the header in the patches, and the manual.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use device_facts::policy_space::{
    POLICY_OFFSET, VIRTIO_BALLOON_F_REPORTING_POLICY_BIT, VIRTIO_BALLOON_REPORTING_AGAIN,
    VIRTIO_BALLOON_REPORTING_PAUSED, Writer, fields,
};
use device_facts::{GuestReporting, PolicySetting, ReportingPolicy, SkipReason};

const TABLE: &str = include_str!("../../guest-patches/README.md");
const PATCHES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../guest-patches/patches");

/// Names that stand for a number in the table and in the header.
fn numbers() -> BTreeMap<&'static str, u64> {
    let feature = u64::from(VIRTIO_BALLOON_F_REPORTING_POLICY_BIT);
    let tags = GuestReporting::TABLE.iter();
    tags.map(|it| (it.constant, u64::from(it.tag)))
        .chain([("VIRTIO_BALLOON_F_REPORTING_POLICY", feature)])
        .collect()
}

/// The rows of the table whose first cell is `kind`, without that cell.
fn rows(kind: &str) -> Vec<Vec<&'static str>> {
    TABLE
        .lines()
        .filter_map(|line| line.strip_prefix('|')?.strip_suffix('|'))
        .map(|line| {
            line.split('|')
                .map(|cell| cell.trim().trim_matches('`'))
                .collect::<Vec<_>>()
        })
        .filter(|cells| cells[0] == kind)
        .map(|cells| cells[1..].to_vec())
        .collect()
}

fn number(text: &str) -> u64 {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    }
    .unwrap_or_else(|_| panic!("{text:?} is no number"))
}

#[test]
fn table_and_constants_name_the_same_fields() {
    let rows = rows("field");
    let fields = fields();
    assert_eq!(rows.len(), fields.len());
    for (row, field) in rows.iter().zip(fields) {
        let kind = format!("le{}", field.bytes * 8);
        let writer = match field.writer {
            Writer::Host => "host",
            Writer::Guest => "guest",
        };
        assert_eq!(number(row[0]), field.offset, "{row:?}");
        assert_eq!(row[1..4], [kind.as_str(), field.name, writer]);
    }
}

/// The bits of `guest_settings`, ascending.
fn by_bit() -> Vec<(u32, &'static str)> {
    let mut bits: Vec<_> = PolicySetting::ALL
        .iter()
        .map(|it| (it.mask(), it.name()))
        .collect();
    bits.sort_unstable();
    bits
}

#[test]
fn table_and_constants_name_the_same_numbers() {
    let mut named: BTreeMap<_, _> = rows("feature")
        .iter()
        .chain(&rows("statistic"))
        .map(|row| (row[2], number(row[0])))
        .collect();
    assert_eq!(named, numbers());
    named.clear();
    for (kind, bits) in [
        (
            "host_flags",
            vec![
                (
                    VIRTIO_BALLOON_REPORTING_PAUSED,
                    "VIRTIO_BALLOON_REPORTING_PAUSED",
                ),
                (
                    VIRTIO_BALLOON_REPORTING_AGAIN,
                    "VIRTIO_BALLOON_REPORTING_AGAIN",
                ),
            ],
        ),
        ("guest_settings", by_bit()),
    ] {
        let told: Vec<_> = rows(kind)
            .iter()
            .map(|row| (1_u32 << number(row[0]), row[2]))
            .collect();
        assert_eq!(told, bits, "{kind}");
    }
}

/// The lines that the patches add to the header, without the `+`.
fn header_lines() -> Vec<String> {
    let mut lines = Vec::new();
    let Ok(entries) = fs::read_dir(Path::new(PATCHES)) else {
        return lines;
    };
    for entry in entries {
        let path = entry.expect("an entry of a folder").path();
        let text = fs::read_to_string(&path).unwrap_or_default();
        let mut in_header = false;
        for line in text.lines() {
            if let Some(file) = line.strip_prefix("+++ ") {
                in_header = file.ends_with("include/uapi/linux/virtio_balloon.h");
            } else if let Some(added) = line.strip_prefix('+').filter(|_| in_header) {
                lines.push(added.to_owned());
            }
        }
    }
    lines
}

/// Offsets of the members of `struct NAME`, computed from their sizes, starting at `at`.
fn members(lines: &[String], name: &str, mut at: u64) -> Vec<(u64, u64, String)> {
    let opening = format!("struct {name} {{");
    let body = lines.iter().skip_while(|line| !line.starts_with(&opening));
    let mut members = Vec::new();
    for line in body.skip(1).take_while(|line| !line.starts_with('}')) {
        let Some((kind, member)) = line.trim().split_once([' ', '\t']) else {
            continue;
        };
        let bytes = match kind {
            "__le32" | "__virtio32" => 4,
            "__le64" | "__virtio64" => 8,
            _ => continue,
        };
        let member = member.trim().split(';').next().expect("never empty");
        members.push((at, bytes, member.to_owned()));
        at += bytes;
    }
    members
}

#[test]
fn header_of_the_patches_agrees_with_the_constants() {
    let lines = header_lines();
    if lines.is_empty() {
        test_skip::skip("no patch touches include/uapi/linux/virtio_balloon.h");
        return;
    }
    let defined: BTreeMap<_, _> = lines
        .iter()
        .filter_map(|line| line.strip_prefix("#define"))
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            Some((words.next()?, words.next()?))
        })
        .collect();
    for (name, value) in numbers() {
        let header = defined.get(name).copied();
        assert_eq!(header.map(number), Some(value), "{name}");
    }
    let expected: Vec<_> = fields()
        .iter()
        .map(|field| (field.offset, field.bytes, field.name.to_owned()))
        .collect();
    assert_eq!(
        members(&lines, "virtio_balloon_reporting_policy", POLICY_OFFSET),
        expected
    );
}

#[test]
fn members_of_a_header_get_their_offsets() {
    let lines: Vec<_> = [
        "struct other { int x; };",
        "struct some {",
        "\t/* a comment */",
        "\t__le32 first;",
        "\t__le64\tsecond;\t/* why */",
        "};",
        "\t__le32 stray;",
    ]
    .map(str::to_owned)
    .into();
    let found = members(&lines, "some", 0x10);
    assert_eq!(
        found,
        [
            (0x10, 4, "first".to_owned()),
            (0x14, 8, "second".to_owned())
        ]
    );
}

#[test]
fn settings_and_skip_reasons_are_explained_to_operators() {
    let manual = include_str!("../../docs/balloon.md");
    for setting in ReportingPolicy::TABLE {
        let row = format!("| `{}` | {}", setting.name, setting.default);
        assert!(manual.contains(&row), "{row} is missing");
    }
    for reason in SkipReason::ALL {
        let row = format!("| `{}` |", reason.name());
        assert!(manual.contains(&row), "{row} is missing");
    }
}
