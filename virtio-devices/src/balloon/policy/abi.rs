//! The numbers of the guest/host interface (`guest-patches/README.md`), all little endian.
//!
//! The tests of this file compare the table there, these constants and, once the
//! patches carry it, the header that the guest kernel is built with.

/// Feature bit: the driver takes a reporting policy. Depends on `VIRTIO_BALLOON_F_REPORTING`.
pub const VIRTIO_BALLOON_F_REPORTING_POLICY_BIT: u32 = 56;
/// The same as a mask.
pub const VIRTIO_BALLOON_F_REPORTING_POLICY: u64 = 1 << VIRTIO_BALLOON_F_REPORTING_POLICY_BIT;

/// First byte of the policy in the configuration space. The standard fields end at
/// 0x10; what lies between is left to the standard.
pub const POLICY_OFFSET: u64 = 0x40;
/// First byte behind it.
pub const POLICY_END: u64 = 0x70;

/// Bit of `host_flags`: start no new report.
pub const VIRTIO_BALLOON_REPORTING_PAUSED: u32 = 1 << 0;
/// Bit of `host_flags`: a `report_now` forgets what was reported before.
pub const VIRTIO_BALLOON_REPORTING_AGAIN: u32 = 1 << 1;

/// Statistics tag: bytes free and not yet reported.
pub const VIRTIO_BALLOON_S_REPORTING_PENDING: u16 = 0x8000;
/// Statistics tag: bytes reported and still free.
pub const VIRTIO_BALLOON_S_REPORTING_REPORTED: u16 = 0x8001;
/// Statistics tag: batches sent since the guest booted.
pub const VIRTIO_BALLOON_S_REPORTING_BATCHES: u16 = 0x8002;
/// Statistics tag: blocks that could not be taken, as their pageblock is isolated.
pub const VIRTIO_BALLOON_S_REPORTING_ISOLATION_FAILURES: u16 = 0x8003;

macro_rules! fields {
    ($($offset:literal $bytes:literal $constant:ident $name:literal $writer:ident,)+) => {
        $(#[doc = concat!("Offset of `", $name, "`.")] pub const $constant: u64 = $offset;)+

        /// Every field, in the order of its offset.
        pub const FIELDS: &[Field] = &[
            $(Field { offset: $offset, bytes: $bytes, name: $name, writer: Writer::$writer },)+
        ];
    };
}

/// One field of the configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// From the start of the device's configuration space, bytes.
    pub offset: u64,
    /// Its size.
    pub bytes: u64,
    /// As the table and the header call it.
    pub name: &'static str,
    /// Whose word it is.
    pub writer: Writer,
}

/// Who writes a field; the other side only reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// The device.
    Host,
    /// The driver.
    Guest,
}

fields! {
    0x40 4 POLICY_GENERATION "policy_generation" Host,
    0x44 4 ORDER_MIN "order_min" Host,
    0x48 4 PENDING_BLOCKS "pending_blocks" Host,
    0x4c 4 DELAY_MS_MAX "delay_ms_max" Host,
    0x50 4 AGE_MS_MIN "age_ms_min" Host,
    0x54 4 HOST_FLAGS "host_flags" Host,
    0x58 8 BYTES_PER_SECOND_MAX "bytes_per_second_max" Host,
    0x60 4 REPORT_NOW_ID "report_now_id" Host,
    0x64 4 GUEST_GENERATION "guest_generation" Guest,
    0x68 4 GUEST_SETTINGS "guest_settings" Guest,
    0x6c 4 REPORT_NOW_DONE "report_now_done" Guest,
}

// The fields lie side by side from the first byte to the last.
const _: () = {
    let mut at = POLICY_OFFSET;
    let mut index = 0;
    while index < FIELDS.len() {
        assert!(FIELDS[index].offset == at && at.is_multiple_of(FIELDS[index].bytes));
        at += FIELDS[index].bytes;
        index += 1;
    }
    assert!(at == POLICY_END);
};

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::balloon::policy::PolicySetting;

    const TABLE: &str = include_str!("../../../../guest-patches/README.md");
    const PATCHES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../guest-patches/patches");

    /// Names that stand for a number, in the table and in the header.
    fn numbers() -> BTreeMap<&'static str, u64> {
        BTreeMap::from([
            (
                "VIRTIO_BALLOON_F_REPORTING_POLICY",
                u64::from(VIRTIO_BALLOON_F_REPORTING_POLICY_BIT),
            ),
            (
                "VIRTIO_BALLOON_S_REPORTING_PENDING",
                u64::from(VIRTIO_BALLOON_S_REPORTING_PENDING),
            ),
            (
                "VIRTIO_BALLOON_S_REPORTING_REPORTED",
                u64::from(VIRTIO_BALLOON_S_REPORTING_REPORTED),
            ),
            (
                "VIRTIO_BALLOON_S_REPORTING_BATCHES",
                u64::from(VIRTIO_BALLOON_S_REPORTING_BATCHES),
            ),
            (
                "VIRTIO_BALLOON_S_REPORTING_ISOLATION_FAILURES",
                u64::from(VIRTIO_BALLOON_S_REPORTING_ISOLATION_FAILURES),
            ),
        ])
    }

    /// The rows of the table whose first cell is `kind`, as their other cells.
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
        assert_eq!(rows.len(), FIELDS.len());
        for (row, field) in rows.iter().zip(FIELDS) {
            let kind = format!("le{}", field.bytes * 8);
            let writer = match field.writer {
                Writer::Host => "host",
                Writer::Guest => "guest",
            };
            assert_eq!(number(row[0]), field.offset, "{row:?}");
            assert_eq!(row[1..4], [kind.as_str(), field.name, writer]);
        }
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
            (
                "guest_settings",
                PolicySetting::ALL.map(|it| (it.bit(), it.name())).to_vec(),
            ),
        ] {
            let told: Vec<_> = rows(kind)
                .iter()
                .map(|row| (1_u32 << number(row[0]), row[2]))
                .collect();
            assert_eq!(told, bits, "{kind}");
        }
    }

    /// What the patches add to the header, without the `+`.
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

    /// Offsets of the members of `struct NAME`, by their sizes, from `at` on.
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
            eprintln!("SKIPPED: no patch touches include/uapi/linux/virtio_balloon.h");
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
        let expected: Vec<_> = FIELDS
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
}
