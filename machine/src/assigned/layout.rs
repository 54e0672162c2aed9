//! BARs and capabilities of an assigned device, read once from its configuration space.

use std::ops::Range;

use super::error::AssignError;
use super::host::{BARS, HostDevice};

/// Bytes of conventional configuration space. Extended space reads as zero: SR-IOV, resizable BARs and the like are
/// the host's business.
pub(super) const SPACE_BYTES: usize = 256;
/// Capabilities start behind the header.
const FIRST_CAPABILITY: u8 = 0x40;
/// One for each dword behind the header.
const CAPABILITIES_MAX: usize = (SPACE_BYTES - FIRST_CAPABILITY as usize) / 4;

pub(super) const COMMAND: usize = 0x04;
pub(super) const HEADER_TYPE: usize = 0x0e;
pub(super) const BAR0: usize = 0x10;
pub(super) const CAPABILITY_POINTER: usize = 0x34;

/// Command register: the device responds at its BARs, and may access memory.
pub(super) const COMMAND_MEMORY: u8 = 1 << 1;
pub(super) const COMMAND_BUS_MASTER: u8 = 1 << 2;

const CAP_MSI: u8 = 0x05;
const CAP_VENDOR: u8 = 0x09;
const CAP_EXPRESS: u8 = 0x10;
const CAP_MSIX: u8 = 0x11;
/// Bytes of the Express capability from version 2 on; earlier versions are shorter and end at the next capability.
const EXPRESS_BYTES: usize = 0x3c;
const MSIX_BYTES: usize = 12;

/// Bit of the MSI message control: the address has 64 bits.
const MSI_64BIT: u16 = 1 << 7;

/// A visible capability.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Capability {
    pub(super) at: usize,
    pub(super) id: u8,
    /// Passed through, behind the identifier and the pointer.
    pub(super) passed: Range<usize>,
}

/// One memory BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BarLayout {
    pub(super) index: u8,
    pub(super) bytes: u64,
    pub(super) is_64bit: bool,
    /// The lowest bits of the register.
    pub(super) kind: u8,
}

impl BarLayout {
    /// The bytes of its registers in configuration space.
    pub(super) fn registers(&self) -> Range<usize> {
        let start = BAR0 + 4 * usize::from(self.index);
        start..start + if self.is_64bit { 8 } else { 4 }
    }
}

/// MSI with one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MsiLayout {
    pub(super) at: usize,
    pub(super) is_64bit: bool,
}

/// MSI-X.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MsixLayout {
    pub(super) at: usize,
    pub(super) vectors: u16,
    /// BAR and offset of the table, and of the pending bits.
    pub(super) table: (u8, u64),
    pub(super) pending: (u8, u64),
}

impl MsixLayout {
    /// The range of the table in BAR `index`.
    pub(super) fn table_in(&self, index: u8) -> Range<u64> {
        Self::range_in(self.table, u64::from(self.vectors) * 16, index)
    }

    /// The range of the pending bits in BAR `index`.
    pub(super) fn pending_in(&self, index: u8) -> Range<u64> {
        let bytes = u64::from(self.vectors).div_ceil(64) * 8;
        Self::range_in(self.pending, bytes, index)
    }

    fn range_in((bar, offset): (u8, u64), bytes: u64, index: u8) -> Range<u64> {
        match bar == index {
            true => offset..offset + bytes,
            false => 0..0,
        }
    }
}

/// The device as it will be presented.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    /// The value that the host's kernel shows.
    pub(super) header: Vec<u8>,
    pub(super) bars: Vec<BarLayout>,
    pub(super) capabilities: Vec<Capability>,
    pub(super) msi: Option<MsiLayout>,
    pub(super) msix: Option<MsixLayout>,
}

impl Layout {
    /// Reads the device.
    ///
    /// # Errors
    /// It is a bridge, it cannot interrupt, or its MSI-X structures are nowhere.
    pub(super) fn read(host: &dyn HostDevice) -> Result<Self, AssignError> {
        let mut space = vec![0; SPACE_BYTES];
        for (at, dword) in (0..).step_by(4).zip(space.chunks_mut(4)) {
            host.config_read(at, dword);
        }
        let header_type = space[HEADER_TYPE] & 0x7f;
        if header_type != 0 {
            return Err(AssignError::HeaderType { header_type });
        }
        let bars = bars(host, &space);
        let starts = capability_starts(&space);
        let capabilities: Vec<_> = starts
            .iter()
            .filter_map(|at| capability(&space, &starts, *at))
            .collect();
        let find = |id| capabilities.iter().find(|it| it.id == id);
        let msi = find(CAP_MSI).map(|it| MsiLayout {
            at: it.at,
            is_64bit: word(&space, it.at + 2) & MSI_64BIT != 0,
        });
        let msix = find(CAP_MSIX).map(|it| msix(&space, it.at));
        if msi.is_none() && msix.is_none() {
            return Err(AssignError::NoInterrupt);
        }
        let fits = |index: u8, range: Range<u64>| {
            let mut bars = bars.iter();
            bars.any(|bar| bar.index == index && range.end <= bar.bytes)
        };
        if let Some(msix) = &msix {
            let (table, pending) = (msix.table.0, msix.pending.0);
            if !fits(table, msix.table_in(table)) || !fits(pending, msix.pending_in(pending)) {
                return Err(AssignError::BadMsix);
            }
        }
        Ok(Self {
            header: space,
            bars,
            capabilities,
            msi,
            msix,
        })
    }
}

fn word(space: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([space[at], space[at + 1]])
}

fn dword(space: &[u8], at: usize) -> u32 {
    u32::from(word(space, at)) | u32::from(word(space, at + 2)) << 16
}

/// The memory BARs. I/O BARs are hidden: the devices that have them have them for old software.
fn bars(host: &dyn HostDevice, space: &[u8]) -> Vec<BarLayout> {
    let mut bars = Vec::new();
    let mut index = 0;
    while index < BARS {
        let kind = space[BAR0 + 4 * usize::from(index)] & 0xf;
        let is_64bit = kind & 0b111 == 0b100 && index + 1 < BARS;
        let bytes = host.bar_bytes(index);
        let is_io = kind & 1 != 0;
        if !is_io && bytes.is_power_of_two() && bytes >= 16 && (is_64bit || bytes < 1 << 32) {
            bars.push(BarLayout {
                index,
                bytes,
                is_64bit,
                kind,
            });
        }
        index += 1 + u8::from(is_64bit);
    }
    bars
}

/// The offsets of all capabilities, in the order of the list. The kernel shows a sound list; a loop ends all the same.
fn capability_starts(space: &[u8]) -> Vec<usize> {
    let mut starts = Vec::new();
    let mut at = space[CAPABILITY_POINTER] & !3;
    while at >= FIRST_CAPABILITY && starts.len() < CAPABILITIES_MAX {
        starts.push(usize::from(at));
        at = space[usize::from(at) + 1] & !3;
    }
    starts
}

/// The capability at this offset, if the guest may see it. Power management is hidden because the registers of a
/// sleeping device are not accessible.
fn capability(space: &[u8], starts: &[usize], at: usize) -> Option<Capability> {
    let id = space[at];
    let bytes = match id {
        CAP_MSI => return Some(emulated(at, id)),
        CAP_MSIX if at + MSIX_BYTES <= SPACE_BYTES => return Some(emulated(at, id)),
        CAP_VENDOR => usize::from(space[at + 2]),
        CAP_EXPRESS => EXPRESS_BYTES,
        _ => return None,
    };
    let next = starts.iter().copied().filter(|start| *start > at).min();
    let end = (at + bytes.max(4)).min(next.unwrap_or(SPACE_BYTES));
    Some(Capability {
        at,
        id,
        passed: at + 2..end.min(SPACE_BYTES),
    })
}

fn emulated(at: usize, id: u8) -> Capability {
    Capability {
        at,
        id,
        passed: 0..0,
    }
}

fn msix(space: &[u8], at: usize) -> MsixLayout {
    let place = |at| {
        let dword = dword(space, at);
        ((dword & 7) as u8, u64::from(dword & !7))
    };
    MsixLayout {
        at,
        vectors: (word(space, at + 2) & 0x7ff) + 1,
        table: place(at + 4),
        pending: place(at + 8),
    }
}
