//! Parses a descriptor chain as a block request (virtio 1.2 §5.2.6).
//!
//! The layout does not depend on how the driver splits it into descriptors. The first 16 readable bytes are the header,
//! the last writable byte is the status, and all other bytes are data.

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::format::{self, HEADER_BYTES as SIGNATURE_BYTES, ImageFormat};
use super::{DATA_BYTES_MAX, SECTOR_BYTES, WRITE_ZEROES_SECTORS_MAX};
use crate::queue::{ChainBuffers, ChainError, GuestBuffers};

/// `struct virtio_blk_req` up to the data: type, reserved, sector.
const HEADER_BYTES: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`: sector, num_sectors, flags.
const RANGE_BYTES: usize = 16;

/// The properties that determine whether a request is allowed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    pub(super) capacity_sectors: u64,
    pub(super) readonly: bool,
    pub(super) discard: bool,
    pub(super) write_zeroes: bool,
    /// Whether write zeroes with the unmap flag deallocates.
    pub(super) unmap: bool,
    /// The format was guessed: the guest must not write the signature of another one.
    pub(super) guards_format: bool,
}

/// A valid request. Offsets and lengths in bytes of the image, inside its capacity.
#[derive(Debug)]
pub(super) enum Operation {
    Read {
        offset: u64,
        data: GuestBuffers,
    },
    Write {
        offset: u64,
        /// A copy of the beginning, if that was checked.
        front: Option<GuestBuffers>,
        data: GuestBuffers,
    },
    Flush,
    GetId {
        data: GuestBuffers,
    },
    Discard {
        offset: u64,
        bytes: u64,
    },
    WriteZeroes {
        offset: u64,
        bytes: u64,
        unmap: bool,
    },
}

/// A request and the location of its status byte.
#[derive(Debug)]
pub(super) struct Request {
    /// One byte of guest RAM.
    pub(super) status: GuestBuffers,
    pub(super) operation: Result<Operation, Refusal>,
}

/// Reasons why a chain has no writable status.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unanswerable {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("no room for the status byte")]
    NoStatus,
}

/// Reasons why a request fails without accessing the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("request header is incomplete")]
    ShortHeader,
    #[error("data length is zero or not a multiple of a sector")]
    DataLength,
    #[error("data has the wrong direction or size for its request")]
    DataShape,
    #[error("the number of sectors is zero or above the limit of one request")]
    TooLong,
    #[error("sectors beyond the end of the disk")]
    OutOfRange,
    #[error("disk is read-only")]
    ReadOnly,
    #[error("the write would make the raw image look like a {0} image at its next start")]
    Signature(ImageFormat),
    #[error("unknown or not offered request type or flag")]
    Unsupported,
}

impl Refusal {
    /// The corresponding status byte.
    pub(super) fn status(self) -> u8 {
        match self {
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
            _ => VIRTIO_BLK_S_IOERR as u8,
        }
    }
}

impl Request {
    /// Parses a chain and checks it against `rules`.
    pub(super) fn parse(chain: ChainBuffers, rules: &Rules) -> Result<Self, Unanswerable> {
        let ChainBuffers {
            readable,
            mut writable,
        } = chain;
        let status = writable.split_last_byte().ok_or(Unanswerable::NoStatus)?;
        Ok(Self {
            status,
            operation: parse_operation(readable, writable, rules),
        })
    }
}

fn parse_operation(
    mut readable: GuestBuffers,
    writable: GuestBuffers,
    rules: &Rules,
) -> Result<Operation, Refusal> {
    let mut header = [0; HEADER_BYTES];
    if readable.copy_out(&mut header) < HEADER_BYTES {
        return Err(Refusal::ShortHeader);
    }
    readable.advance(HEADER_BYTES);
    let request_type = le_u32(&header, 0);
    let sector = le_u64(&header, 8);
    match request_type {
        VIRTIO_BLK_T_IN => {
            only(&writable, &readable)?;
            let offset = rules.transfer(sector, writable.bytes())?;
            Ok(Operation::Read {
                offset,
                data: writable,
            })
        }
        VIRTIO_BLK_T_OUT => {
            only(&readable, &writable)?;
            rules.may_write()?;
            let offset = rules.transfer(sector, readable.bytes())?;
            let guarded = rules.guards_format && sector == 0;
            let front = guarded.then(|| checked_front(&mut readable)).transpose()?;
            Ok(Operation::Write {
                offset,
                front,
                data: readable,
            })
        }
        // Drivers may attach data to a flush by mistake; the data is ignored.
        VIRTIO_BLK_T_FLUSH => Ok(Operation::Flush),
        VIRTIO_BLK_T_GET_ID if writable.bytes() >= VIRTIO_BLK_ID_BYTES as usize => {
            Ok(Operation::GetId { data: writable })
        }
        VIRTIO_BLK_T_GET_ID => Err(Refusal::DataShape),
        VIRTIO_BLK_T_DISCARD if rules.discard => {
            let range = Range::parse(&readable)?;
            // The unmap flag is valid only for write zeroes (§5.2.6.2).
            if range.flags != 0 {
                return Err(Refusal::Unsupported);
            }
            let (offset, bytes) = rules.range(range)?;
            Ok(Operation::Discard { offset, bytes })
        }
        VIRTIO_BLK_T_WRITE_ZEROES if rules.write_zeroes => {
            let range = Range::parse(&readable)?;
            if range.flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                return Err(Refusal::Unsupported);
            }
            if range.sectors > WRITE_ZEROES_SECTORS_MAX {
                return Err(Refusal::TooLong);
            }
            let (offset, bytes) = rules.range(range)?;
            Ok(Operation::WriteZeroes {
                offset,
                bytes,
                unmap: rules.unmap && range.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
            })
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if rules.readonly => {
            Err(Refusal::ReadOnly)
        }
        _ => Err(Refusal::Unsupported),
    }
}

/// The first sector of the image, if it has no signature. A copy, because the guest can change its memory at any time.
fn checked_front(data: &mut GuestBuffers) -> Result<GuestBuffers, Refusal> {
    let front = data.split_front_copy(SIGNATURE_BYTES);
    let mut header = [0; SIGNATURE_BYTES];
    front.copy_out(&mut header);
    match format::detect(&header) {
        ImageFormat::Raw => Ok(front),
        format => Err(Refusal::Signature(format)),
    }
}

/// Rejects data in the other direction.
fn only(data: &GuestBuffers, other: &GuestBuffers) -> Result<(), Refusal> {
    if other.bytes() != 0 || data.bytes() == 0 {
        return Err(Refusal::DataShape);
    }
    Ok(())
}

/// One range of a discard or write zeroes request.
#[derive(Debug, Clone, Copy)]
struct Range {
    sector: u64,
    sectors: u32,
    flags: u32,
}

impl Range {
    /// Parses exactly one range: more are not offered (`max_discard_seg`).
    fn parse(data: &GuestBuffers) -> Result<Self, Refusal> {
        let mut raw = [0; RANGE_BYTES];
        if data.bytes() != RANGE_BYTES || data.copy_out(&mut raw) != RANGE_BYTES {
            return Err(Refusal::DataShape);
        }
        Ok(Self {
            sector: le_u64(&raw, 0),
            sectors: le_u32(&raw, 8),
            flags: le_u32(&raw, 12),
        })
    }
}

impl Rules {
    fn may_write(&self) -> Result<(), Refusal> {
        match self.readonly {
            true => Err(Refusal::ReadOnly),
            false => Ok(()),
        }
    }

    /// Offset in bytes of a transfer of `bytes` from `sector` on.
    fn transfer(&self, sector: u64, bytes: usize) -> Result<u64, Refusal> {
        let bytes = bytes as u64;
        if !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(Refusal::DataLength);
        }
        if bytes > DATA_BYTES_MAX {
            return Err(Refusal::TooLong);
        }
        self.inside(sector, bytes / SECTOR_BYTES)
    }

    /// Offset and length in bytes of a range to discard or to zero.
    fn range(&self, range: Range) -> Result<(u64, u64), Refusal> {
        if range.sectors == 0 {
            return Err(Refusal::DataLength);
        }
        self.may_write()?;
        let sectors = u64::from(range.sectors);
        Ok((self.inside(range.sector, sectors)?, sectors * SECTOR_BYTES))
    }

    fn inside(&self, sector: u64, sectors: u64) -> Result<u64, Refusal> {
        match sector.checked_add(sectors) {
            Some(end) if end <= self.capacity_sectors => Ok(sector * SECTOR_BYTES),
            _ => Err(Refusal::OutOfRange),
        }
    }
}

fn le_u32(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

fn le_u64(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transfer_of_more_than_one_request_may_move_is_refused() {
        let rules = Rules {
            capacity_sectors: u64::MAX,
            readonly: false,
            discard: true,
            write_zeroes: true,
            unmap: true,
            guards_format: false,
        };
        let most = DATA_BYTES_MAX as usize;
        assert_eq!(rules.transfer(1, most), Ok(SECTOR_BYTES));
        let refusal = rules.transfer(1, most + SECTOR_BYTES as usize).unwrap_err();
        assert_eq!(refusal.status(), VIRTIO_BLK_S_IOERR as u8);
    }
}
