//! The fields of the reporting policy in the balloon's configuration space, and the feature bit that announces them.
//! All fields are little endian. `guest-patches/README.md` is the specification.

use crate::reporting_policy::ReportingPolicy;

/// Feature bit: the driver accepts a reporting policy. Depends on `VIRTIO_BALLOON_F_REPORTING`. Experimental until the
/// standard assigns a bit (`guest-patches/SPEC-PROPOSAL.md`).
pub const VIRTIO_BALLOON_F_REPORTING_POLICY_BIT: u32 = 56;
/// The feature bit as a mask.
pub const VIRTIO_BALLOON_F_REPORTING_POLICY: u64 = 1 << VIRTIO_BALLOON_F_REPORTING_POLICY_BIT;

/// First byte of the policy in the configuration space, directly after the standard fields.
pub const POLICY_OFFSET: u64 = 0x10;
/// First byte after the policy.
pub const POLICY_END: u64 = {
    let mut bytes = 0;
    let mut index = 0;
    while index < WORDS.len() {
        bytes += WORDS[index].bytes;
        index += 1;
    }
    index = 0;
    while index < ReportingPolicy::TABLE.len() {
        bytes += ReportingPolicy::TABLE[index].bytes;
        index += 1;
    }
    POLICY_OFFSET + bytes
};

/// Bit of `host_flags`: start no new report.
pub const VIRTIO_BALLOON_REPORTING_PAUSED: u32 = 1 << 0;
/// Bit of `host_flags`: a `report_now` also reports blocks that were reported before.
pub const VIRTIO_BALLOON_REPORTING_AGAIN: u32 = 1 << 1;

/// One field of the configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Offset from the start of the device's configuration space, in bytes.
    pub offset: u64,
    /// Size in bytes.
    pub bytes: u64,
    /// Name in the specification and the header.
    pub name: &'static str,
    /// The side that writes it.
    pub writer: Writer,
}

/// The side that writes a field; the other side only reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// The device.
    Host,
    /// The driver.
    Guest,
}

macro_rules! words {
    ($($offset:literal $constant:ident $name:literal $writer:ident,)+) => {
        $(#[doc = concat!("Offset of `", $name, "`.")] pub const $constant: u64 = $offset;)+

        /// The fields that are not settings of the policy, 32 bits each.
        const WORDS: &[Field] = &[
            $(Field { offset: $offset, bytes: 4, name: $name, writer: Writer::$writer },)+
        ];
    };
}

words! {
    0x10 POLICY_GENERATION "policy_generation" Host,
    0x24 HOST_FLAGS "host_flags" Host,
    0x30 REPORT_NOW_ID "report_now_id" Host,
    0x34 GUEST_GENERATION "guest_generation" Guest,
    0x38 GUEST_SETTINGS "guest_settings" Guest,
    0x3c REPORT_NOW_DONE "report_now_done" Guest,
}

/// Every field, settings included, in order of offset.
#[must_use]
pub fn fields() -> Vec<Field> {
    let settings = ReportingPolicy::TABLE.iter().map(|setting| Field {
        offset: setting.offset,
        bytes: setting.bytes,
        name: setting.name,
        writer: Writer::Host,
    });
    let mut fields: Vec<_> = WORDS.iter().copied().chain(settings).collect();
    fields.sort_by_key(|field| field.offset);
    fields
}

/// The bytes of a field as a bit mask, counted from the start of the policy.
const fn occupied(offset: u64, bytes: u64) -> u64 {
    assert!(offset >= POLICY_OFFSET && offset.is_multiple_of(bytes));
    ((1 << bytes) - 1) << (offset - POLICY_OFFSET)
}

// The fields are aligned and cover every byte of the policy exactly once.
const _: () = {
    let mut covered = 0;
    let mut index = 0;
    while index < WORDS.len() {
        let bits = occupied(WORDS[index].offset, WORDS[index].bytes);
        assert!(covered & bits == 0);
        covered |= bits;
        index += 1;
    }
    index = 0;
    while index < ReportingPolicy::TABLE.len() {
        let setting = &ReportingPolicy::TABLE[index];
        let bits = occupied(setting.offset, setting.bytes);
        assert!(covered & bits == 0);
        covered |= bits;
        index += 1;
    }
    assert!(covered == u64::MAX >> (64 - (POLICY_END - POLICY_OFFSET)));
};
