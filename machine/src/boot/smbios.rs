//! SMBIOS tables: manufacturer, product and serial strings (DSP0134, version 3.2).
//!
//! The tables are a 64-bit entry point and a list of structures: BIOS (type 0), system (1), chassis (3), OEM strings
//! (11) and end (127). The chassis exists only with an asset tag, and the OEM strings only if any are set. Each
//! structure is a fixed part followed by its strings and two zero bytes.

use api::config::PlatformConfig;

use crate::memory::layout::{SMBIOS_MAX_BYTES, SMBIOS_START};

/// Bytes of the `_SM3_` entry point. The structures follow at the next paragraph.
const ENTRY_POINT_BYTES: u8 = 24;
const STRUCTURES_OFFSET: usize = 32;
const VERSION: (u8, u8) = (3, 2);

/// BIOS characteristics, bit 3: the others are not supported.
const CHARACTERISTICS_NOT_SUPPORTED: u64 = 1 << 3;
/// BIOS characteristics extension byte 2, bit 4: this describes a virtual machine.
const EXTENSION_VIRTUAL_MACHINE: u8 = 1 << 4;
/// System wake-up type: power switch.
const WAKE_UP_POWER_SWITCH: u8 = 6;
/// Chassis type: other; states: safe.
const CHASSIS_OTHER: u8 = 1;
const CHASSIS_STATE_SAFE: u8 = 3;
/// Security status: none.
const CHASSIS_SECURITY_NONE: u8 = 3;

const BIOS_VENDOR: &str = "cloud-hypervisor";
const BIOS_VERSION: &str = "0";
const SYSTEM_MANUFACTURER: &str = "Cloud Hypervisor";
const SYSTEM_PRODUCT: &str = "cloud-hypervisor";

/// Reasons why the tables cannot be created.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SmbiosError {
    /// The system UUID is invalid.
    #[error("\"{text}\" is not a UUID")]
    InvalidUuid {
        /// The configured value.
        text: String,
    },
    /// A string holds a zero byte, which ends SMBIOS strings.
    #[error("The {what} contains a zero byte")]
    ZeroByte {
        /// The name of the string.
        what: &'static str,
    },
    /// More OEM strings than their counter can represent.
    #[error("There are {count} OEM strings, the limit is 255")]
    TooManyOemStrings {
        /// The number of strings.
        count: usize,
    },
    /// The tables are too large in total.
    #[error("The tables have {bytes} bytes, the limit is {max_bytes}")]
    TooLarge {
        /// The required size.
        bytes: u64,
        /// The limit.
        max_bytes: u64,
    },
}

/// Checks whether SMBIOS can represent these settings.
///
/// # Errors
/// A setting cannot be represented.
pub fn check_platform(platform: &PlatformConfig) -> Result<(), SmbiosError> {
    tables(Some(platform), SMBIOS_START, SMBIOS_MAX_BYTES).map(|_tables| ())
}

/// Entry point and structures, to be written at `address`.
pub(super) fn tables(
    platform: Option<&PlatformConfig>,
    address: u64,
    max_bytes: u64,
) -> Result<Vec<u8>, SmbiosError> {
    let default = PlatformConfig::default();
    let platform = platform.unwrap_or(&default);
    let mut structures = Structures::default();
    structures.bios();
    structures.system(platform)?;
    structures.chassis(platform)?;
    structures.oem_strings(platform)?;
    structures.end();

    let mut tables = entry_point(
        address + STRUCTURES_OFFSET as u64,
        structures.bytes.len() as u32,
    );
    tables.resize(STRUCTURES_OFFSET, 0);
    tables.extend(structures.bytes);
    let bytes = tables.len() as u64;
    if bytes > max_bytes {
        return Err(SmbiosError::TooLarge { bytes, max_bytes });
    }
    Ok(tables)
}

/// DSP0134 §5.2.2.
fn entry_point(structures_address: u64, structures_bytes: u32) -> Vec<u8> {
    let mut entry = b"_SM3_".to_vec();
    entry.push(0); // checksum, below
    entry.extend([ENTRY_POINT_BYTES, VERSION.0, VERSION.1]);
    entry.push(0); // revision of the specification
    entry.push(1); // revision of the entry point
    entry.push(0); // reserved
    entry.extend(structures_bytes.to_le_bytes());
    entry.extend(structures_address.to_le_bytes());
    entry[5] = entry
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg();
    entry
}

/// Structures in sequence, numbered in this order.
#[derive(Default)]
struct Structures {
    bytes: Vec<u8>,
    count: u16,
}

/// The structures in sequence, numbered in this order.
#[derive(Default)]
struct Strings {
    bytes: Vec<u8>,
    count: u8,
}

impl Strings {
    /// Number of the string in the structure; 0 for one that is absent or empty.
    fn add(&mut self, text: Option<&str>, what: &'static str) -> Result<u8, SmbiosError> {
        let Some(text) = text.filter(|text| !text.is_empty()) else {
            return Ok(0);
        };
        if text.contains('\0') {
            return Err(SmbiosError::ZeroByte { what });
        }
        self.bytes.extend(text.as_bytes());
        self.bytes.push(0);
        self.count += 1;
        Ok(self.count)
    }
}

impl Structures {
    fn push(&mut self, kind: u8, fixed: &[u8], strings: &Strings) {
        // The length includes kind, length and handle.
        let length = fixed.len() as u8 + 4;
        self.bytes.extend([kind, length]);
        self.bytes.extend(self.count.to_le_bytes());
        self.bytes.extend(fixed);
        self.bytes.extend(&strings.bytes);
        if strings.count == 0 {
            self.bytes.push(0);
        }
        self.bytes.push(0);
        self.count += 1;
    }

    /// DSP0134 §7.1.
    fn bios(&mut self) {
        let strings = Strings {
            bytes: format!("{BIOS_VENDOR}\0{BIOS_VERSION}\0").into_bytes(),
            count: 2,
        };
        let mut fixed = vec![1, 2]; // vendor, version
        fixed.extend(0u16.to_le_bytes()); // start segment
        fixed.extend([0, 0]); // release date, ROM size
        fixed.extend(CHARACTERISTICS_NOT_SUPPORTED.to_le_bytes());
        fixed.extend([0, EXTENSION_VIRTUAL_MACHINE]);
        fixed.extend([0xff; 4]); // BIOS and controller releases: none
        self.push(0, &fixed, &strings);
    }

    /// DSP0134 §7.2.
    fn system(&mut self, platform: &PlatformConfig) -> Result<(), SmbiosError> {
        let mut strings = Strings::default();
        let manufacturer = platform.system_manufacturer.as_deref();
        let product = platform.system_product_name.as_deref();
        let mut fixed = vec![
            strings.add(
                manufacturer.or(Some(SYSTEM_MANUFACTURER)),
                "system manufacturer",
            )?,
            strings.add(product.or(Some(SYSTEM_PRODUCT)), "system product name")?,
            strings.add(platform.system_version.as_deref(), "system version")?,
            strings.add(
                platform.system_serial_number.as_deref(),
                "system serial number",
            )?,
        ];
        fixed.extend(match &platform.system_uuid {
            Some(text) => parse_uuid(text)?,
            None => [0; 16],
        });
        fixed.push(WAKE_UP_POWER_SWITCH);
        fixed.push(strings.add(platform.system_sku_number.as_deref(), "system SKU number")?);
        fixed.push(strings.add(platform.system_family.as_deref(), "system family")?);
        self.push(1, &fixed, &strings);
        Ok(())
    }

    /// DSP0134 §7.4.
    fn chassis(&mut self, platform: &PlatformConfig) -> Result<(), SmbiosError> {
        let mut strings = Strings::default();
        let tag = strings.add(platform.chassis_asset_tag.as_deref(), "chassis asset tag")?;
        if tag == 0 {
            return Ok(());
        }
        let mut fixed = vec![0, CHASSIS_OTHER, 0, 0, tag];
        fixed.extend([CHASSIS_STATE_SAFE; 3]); // boot-up, power supply, thermal
        fixed.push(CHASSIS_SECURITY_NONE);
        fixed.extend([0; 4]); // OEM-defined
        fixed.extend([0, 0, 0, 0]); // height, power cords, contained elements: count, size
        fixed.push(0); // SKU number
        self.push(3, &fixed, &strings);
        Ok(())
    }

    /// DSP0134 §7.12.
    fn oem_strings(&mut self, platform: &PlatformConfig) -> Result<(), SmbiosError> {
        let texts = platform.oem_strings.as_deref().unwrap_or_default();
        if texts.len() > usize::from(u8::MAX) {
            return Err(SmbiosError::TooManyOemStrings { count: texts.len() });
        }
        let mut strings = Strings::default();
        for text in texts {
            strings.add(Some(text), "OEM string")?;
        }
        if strings.count > 0 {
            self.push(11, &[strings.count], &strings);
        }
        Ok(())
    }

    /// DSP0134 §7.45.
    fn end(&mut self) {
        self.push(127, &[], &Strings::default());
    }
}

/// A UUID in SMBIOS's order: the first three fields little-endian.
fn parse_uuid(text: &str) -> Result<[u8; 16], SmbiosError> {
    let invalid = || SmbiosError::InvalidUuid {
        text: text.to_owned(),
    };
    let groups: Vec<&str> = text.split('-').collect();
    let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
    let digits = groups.concat();
    let well_formed = lengths == [8, 4, 4, 4, 12] || lengths == [32];
    if !well_formed || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(invalid());
    }
    let value = u128::from_str_radix(&digits, 16).map_err(|_| invalid())?;
    let mut uuid = value.to_be_bytes();
    uuid[0..4].reverse();
    uuid[4..6].reverse();
    uuid[6..8].reverse();
    Ok(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kinds and strings of the structures, read as a guest reads them.
    fn parse(tables: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        assert_eq!(
            tables[..24].iter().fold(0u8, |sum, b| sum.wrapping_add(*b)),
            0
        );
        let length = u32::from_le_bytes(tables[12..16].try_into().unwrap()) as usize;
        assert_eq!(tables.len(), STRUCTURES_OFFSET + length);
        let mut rest = &tables[STRUCTURES_OFFSET..];
        let mut structures = Vec::new();
        while !rest.is_empty() {
            let fixed = rest[..usize::from(rest[1])].to_vec();
            let tail = &rest[fixed.len()..];
            let end = tail.windows(2).position(|pair| pair == [0, 0]).unwrap();
            let strings = String::from_utf8(tail[..end].to_vec()).unwrap();
            let strings = strings.split_terminator('\0').map(str::to_owned).collect();
            structures.push((fixed[0], fixed, strings));
            rest = &tail[end + 2..];
        }
        structures
    }

    #[test]
    fn tables_default_have_bios_system_and_end() {
        let structures = parse(&tables(None, 0xf_0000, 0x1_0000).unwrap());
        let kinds: Vec<u8> = structures.iter().map(|structure| structure.0).collect();
        assert_eq!(kinds, [0, 1, 127]);
        assert_eq!(structures[0].1.len(), 24);
        assert_eq!(structures[1].1.len(), 27);
        assert_eq!(structures[1].2, [SYSTEM_MANUFACTURER, SYSTEM_PRODUCT]);
    }

    #[test]
    fn tables_tell_what_the_platform_says() {
        let platform = PlatformConfig {
            system_serial_number: Some("serial-7".into()),
            system_uuid: Some("00112233-4455-6677-8899-aabbccddeeff".into()),
            oem_strings: Some(vec!["one".into(), "two".into()]),
            chassis_asset_tag: Some("rack 3".into()),
            ..PlatformConfig::default()
        };
        let structures = parse(&tables(Some(&platform), 0xf_0000, 0x1_0000).unwrap());
        let kinds: Vec<u8> = structures.iter().map(|structure| structure.0).collect();
        assert_eq!(kinds, [0, 1, 3, 11, 127]);
        let (_, system, strings) = &structures[1];
        assert_eq!(strings[usize::from(system[7]) - 1], "serial-7");
        assert_eq!(
            system[8..24],
            [
                0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd,
                0xee, 0xff
            ]
        );
        assert_eq!(structures[2].1.len(), 0x16);
        assert_eq!(structures[3].1[4], 2);
        assert_eq!(structures[3].2, ["one", "two"]);
    }

    #[test]
    fn tables_that_cannot_be_told_are_refused() {
        let uuid = |text: &str| PlatformConfig {
            system_uuid: Some(text.into()),
            ..PlatformConfig::default()
        };
        for text in [
            "",
            "1234",
            "00112233-4455-6677-8899-aabbccddeef",
            "g0112233445566778899aabbccddeeff",
        ] {
            assert!(matches!(
                tables(Some(&uuid(text)), 0xf_0000, 0x1_0000),
                Err(SmbiosError::InvalidUuid { .. })
            ));
        }
        let strings = |texts: Vec<String>| PlatformConfig {
            oem_strings: Some(texts),
            ..PlatformConfig::default()
        };
        assert!(matches!(
            tables(Some(&strings(vec!["a\0b".into()])), 0xf_0000, 0x1_0000),
            Err(SmbiosError::ZeroByte { what: "OEM string" })
        ));
        assert!(matches!(
            tables(Some(&strings(vec!["x".into(); 256])), 0xf_0000, 0x1_0000),
            Err(SmbiosError::TooManyOemStrings { count: 256 })
        ));
        assert!(matches!(
            tables(
                Some(&strings(vec!["x".repeat(0x1_0000)])),
                0xf_0000,
                0x1_0000
            ),
            Err(SmbiosError::TooLarge { .. })
        ));
    }
}
