//! The initial descriptor table: flat 32-bit segments.
//!
//! One table serves both protocols. The Linux boot protocol requires code at selector 0x10 and data at 0x18; PVH has no
//! requirement.

/// A segment, both as a descriptor and as the processor's hidden registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootSegment {
    /// Offset in the table.
    pub selector: u16,
    /// Attributes: bits 0–7 are descriptor bits 40–47, bits 12–15 are bits 52–55.
    pub flags: u16,
    /// First address.
    pub base: u32,
    /// Last offset, in bytes or 4 KiB units, depending on the granularity bit.
    pub limit: u32,
}

/// Busy 32-bit task state segment, which is never switched to.
pub const TASK_SEGMENT: BootSegment = BootSegment {
    selector: 0x08,
    flags: 0x008b,
    base: 0,
    limit: 0x67,
};

/// Flat code: present, executable, readable, accessed; 32-bit, 4 KiB units.
pub const CODE_SEGMENT: BootSegment = BootSegment {
    selector: 0x10,
    flags: 0xc09b,
    base: 0,
    limit: 0xf_ffff,
};

/// Flat data: present, writable, accessed; 32-bit, 4 KiB units.
pub const DATA_SEGMENT: BootSegment = BootSegment {
    selector: 0x18,
    flags: 0xc093,
    base: 0,
    limit: 0xf_ffff,
};

/// The table's content in memory.
pub const BOOT_GDT: [u64; 4] = [
    0,
    TASK_SEGMENT.descriptor(),
    CODE_SEGMENT.descriptor(),
    DATA_SEGMENT.descriptor(),
];

const _: () = {
    assert!(TASK_SEGMENT.selector == 8 && CODE_SEGMENT.selector == 16);
    assert!(DATA_SEGMENT.selector == 24);
    // The standard flat descriptors.
    assert!(CODE_SEGMENT.descriptor() == 0x00cf_9b00_0000_ffff);
    assert!(DATA_SEGMENT.descriptor() == 0x00cf_9300_0000_ffff);
};

impl BootSegment {
    /// Intel SDM volume 3, figure 3-8.
    const fn descriptor(&self) -> u64 {
        let (base, limit, flags) = (self.base as u64, self.limit as u64, self.flags as u64);
        ((base & 0xff00_0000) << 32)
            | ((flags & 0xf0ff) << 40)
            | ((limit & 0x000f_0000) << 32)
            | ((base & 0x00ff_ffff) << 16)
            | (limit & 0xffff)
    }

    /// Bits 0–3: the segment type.
    pub fn kind(&self) -> u8 {
        (self.flags & 0xf) as u8
    }

    /// One attribute bit of `flags`, as 0 or 1.
    pub fn bit(&self, bit: u32) -> u8 {
        ((self.flags >> bit) & 1) as u8
    }

    /// Last offset in bytes.
    pub fn limit_bytes(&self) -> u32 {
        if self.bit(15) == 1 {
            (self.limit << 12) | 0xfff
        } else {
            self.limit
        }
    }
}
