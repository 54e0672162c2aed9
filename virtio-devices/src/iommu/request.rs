//! The wire format of requests and fault reports (virtio 1.2 §5.13.6).

use std::ops::RangeInclusive;

use vm_memory::Permissions;

use crate::dma::{Fault, FaultReason, MSI_RANGE, Refusal, Shared, StopsNow, Tables};

pub(super) const F_MAP_UNMAP: u64 = 1 << 2;
pub(super) const F_BYPASS_CONFIG: u64 = 1 << 6;

/// Bytes of the longest request that the device reads.
pub(super) const REQUEST_BYTES_MAX: usize = 72;
/// Bytes at the end of a request's result: status, reserved.
const TAIL_BYTES: usize = 4;
/// Bytes of a property in the result of a probe: a reserved range.
const PROPERTY_BYTES: usize = 24;
/// The range of interrupts, and what an assigned device cannot map.
const PROPERTIES_MAX: usize = 8;
/// Bytes of properties in the result of a probe.
pub(super) const PROBE_BYTES: usize = PROPERTIES_MAX * PROPERTY_BYTES;
pub(super) const FAULT_BYTES: usize = 24;
/// Bytes of the longest result.
pub(super) const RESULT_BYTES_MAX: usize = PROBE_BYTES + TAIL_BYTES;

const HEAD_BYTES: usize = 4;
const PROBE_RESERVED_BYTES: usize = 64;

const T_ATTACH: u8 = 1;
const T_DETACH: u8 = 2;
const T_MAP: u8 = 3;
const T_UNMAP: u8 = 4;
const T_PROBE: u8 = 5;

const ATTACH_F_BYPASS: u32 = 1 << 0;
const MAP_F_READ: u32 = 1 << 0;
const MAP_F_WRITE: u32 = 1 << 1;

const S_OK: u8 = 0;
const S_UNSUPP: u8 = 2;
const S_DEVERR: u8 = 3;
const S_INVAL: u8 = 4;
const S_RANGE: u8 = 5;
const S_NOENT: u8 = 6;
const S_NOMEM: u8 = 8;

const PROBE_T_RESV_MEM: u16 = 1;
const RESV_MEM_T_RESERVED: u8 = 0;
const RESV_MEM_T_MSI: u8 = 1;

const FAULT_R_DOMAIN: u8 = 1;
const FAULT_R_MAPPING: u8 = 2;
const FAULT_F_READ: u32 = 1 << 0;
const FAULT_F_WRITE: u32 = 1 << 1;
const FAULT_F_ADDRESS: u32 = 1 << 8;

/// A request whose length is right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    Attach {
        domain: u32,
        endpoint: u32,
        flags: u32,
        reserved: u32,
    },
    Detach {
        domain: u32,
        endpoint: u32,
    },
    Map {
        domain: u32,
        input: RangeInclusive<u64>,
        to: u64,
        flags: u32,
    },
    Unmap {
        domain: u32,
        input: RangeInclusive<u64>,
    },
    Probe {
        endpoint: u32,
        /// Space for properties, at most [`PROBE_BYTES`].
        bytes: usize,
    },
}

impl Request {
    /// Reads a request. `None`: the driver may not send its type, or its length is wrong. `driver_may_write` is the
    /// number of bytes for the result; `features` are those of the driver.
    ///
    /// Reserved bytes mean nothing, except those of an attachment (§5.13.6.3).
    pub(super) fn read(bytes: &[u8], driver_may_write: usize, features: u64) -> Option<Self> {
        let (head, body) = bytes.split_at_checked(HEAD_BYTES)?;
        let properties_bytes = driver_may_write.checked_sub(TAIL_BYTES)?;
        let may_map = features & F_MAP_UNMAP != 0;
        let mut fields = Fields(body);
        let request = match head[0] {
            T_ATTACH => Self::Attach {
                domain: fields.u32()?,
                endpoint: fields.u32()?,
                flags: fields.u32()?,
                reserved: fields.u32()?,
            },
            T_DETACH => Self::Detach {
                domain: fields.u32()?,
                endpoint: fields.u32()?,
            },
            T_MAP if may_map => Self::Map {
                domain: fields.u32()?,
                input: fields.u64()?..=fields.u64()?,
                to: fields.u64()?,
                flags: fields.u32()?,
            },
            T_UNMAP if may_map => Self::Unmap {
                domain: fields.u32()?,
                input: fields.u64()?..=fields.u64()?,
            },
            T_PROBE => Self::Probe {
                endpoint: fields.u32()?,
                bytes: properties_bytes,
            },
            _ => return None,
        };
        let (reserved_bytes, properties_bytes_max) = match request {
            Self::Attach { .. } | Self::Map { .. } => (0, 0),
            Self::Unmap { .. } => (4, 0),
            Self::Detach { .. } => (8, 0),
            Self::Probe { .. } => (PROBE_RESERVED_BYTES, PROBE_BYTES),
        };
        let fits = fields.0.len() == reserved_bytes && properties_bytes <= properties_bytes_max;
        fits.then_some(request)
    }

    /// Executes the request. Writes the bytes for the driver into `answer`, which is zero, and returns their number, and
    /// whether the request succeeded. If it takes memory away from a device, this returns after the device's last access
    /// to it. `None`: `stops_now` returned true, and the request must be executed again.
    pub(super) fn execute(
        self,
        shared: &Shared,
        features: u64,
        answer: &mut [u8; RESULT_BYTES_MAX],
        stops_now: StopsNow<'_>,
    ) -> Option<(usize, bool)> {
        let properties_bytes = match &self {
            Self::Probe { bytes, .. } => *bytes,
            _ => 0,
        };
        let result = match &self {
            Self::Probe { endpoint, bytes } => {
                shared.read(|tables| probe(tables, *endpoint, &mut answer[..*bytes]))
            }
            Self::Unmap { domain, input } => unmap(shared, *domain, input, stops_now),
            request => shared.request(
                |tables| request.apply(tables, features),
                |tables| request.undo(tables),
                stops_now,
            ),
        };
        let status = match result {
            Ok(()) => S_OK,
            Err(Refusal::Invalid) => S_INVAL,
            Err(Refusal::Range) => S_RANGE,
            Err(Refusal::NoEntry) => S_NOENT,
            Err(Refusal::NoMemory) => S_NOMEM,
            Err(Refusal::Unsupported) => S_UNSUPP,
            Err(Refusal::Device) => S_DEVERR,
            Err(Refusal::Interrupted) => return None,
        };
        answer[properties_bytes] = status;
        Some((properties_bytes + TAIL_BYTES, result.is_ok()))
    }

    /// Takes out of the tables what an assigned device cannot have. What was taken away stays away.
    fn undo(&self, tables: &mut Tables) {
        match self {
            Self::Attach {
                domain, endpoint, ..
            } => tables.undo_attach(*domain, *endpoint),
            Self::Map { domain, input, .. } => tables.undo_map(*domain, *input.start()),
            Self::Detach { .. } | Self::Unmap { .. } | Self::Probe { .. } => {}
        }
    }

    fn apply(&self, tables: &mut Tables, features: u64) -> Result<(), Refusal> {
        let known_flags = match features & F_BYPASS_CONFIG {
            0 => 0,
            _ => ATTACH_F_BYPASS,
        };
        match self.clone() {
            Self::Attach {
                flags, reserved, ..
            } if flags & !known_flags != 0 || reserved != 0 => Err(Refusal::Invalid),
            Self::Attach {
                domain,
                endpoint,
                flags,
                ..
            } => tables.attach(domain, endpoint, flags & ATTACH_F_BYPASS != 0),
            Self::Detach { domain, endpoint } => tables.detach(domain, endpoint),
            Self::Map {
                domain,
                input,
                to,
                flags,
            } => {
                let allows = match flags {
                    MAP_F_READ => Permissions::Read,
                    MAP_F_WRITE => Permissions::Write,
                    flags if flags == MAP_F_READ | MAP_F_WRITE => Permissions::ReadWrite,
                    0 => Permissions::No,
                    _ => return Err(Refusal::Invalid),
                };
                tables.map(domain, input, to, allows)
            }
            // The first is not one change, and the second needs space for its result.
            Self::Unmap { .. } | Self::Probe { .. } => Err(Refusal::Invalid),
        }
    }
}

/// Removes the mappings piece by piece. What is gone before a command stays so, and the rest goes when the request is
/// executed again. If a host fails, all are removed, because the driver must receive the error.
fn unmap(
    shared: &Shared,
    domain: u32,
    input: &RangeInclusive<u64>,
    stops_now: StopsNow<'_>,
) -> Result<(), Refusal> {
    let mut result = Ok(());
    loop {
        let mut is_left = false;
        let removed = shared.request(
            |tables| {
                is_left = tables.unmap_some(domain, input.clone())?;
                Ok(())
            },
            |_tables| (),
            &mut || false,
        );
        result = result.and(removed);
        if !is_left {
            return result;
        }
        if stops_now() && result.is_ok() {
            return Err(Refusal::Interrupted);
        }
    }
}

/// Writes the properties of an endpoint: the range of message-signalled interrupts, and what an assigned device cannot
/// map, as far as there is space. The first zeros end them.
fn probe(tables: &Tables, endpoint: u32, bytes: &mut [u8]) -> Result<(), Refusal> {
    if !tables.has_endpoint(endpoint) {
        return Err(Refusal::NoEntry);
    }
    // A driver that was set up by another version of this device may have less space.
    let room = (bytes.len() / PROPERTY_BYTES).checked_sub(1);
    let room = room.ok_or(Refusal::Invalid)?;
    let mut reserved = tables.reserved(endpoint);
    // A host with more gaps than there is space for: the last one reaches to the end.
    if let Some(end) = reserved.last().map(|last| *last.end())
        && reserved.len() > room
    {
        reserved.truncate(room);
        if let Some(last) = reserved.last_mut() {
            *last = *last.start()..=end;
        }
    }
    let all = std::iter::once((RESV_MEM_T_MSI, MSI_RANGE))
        .chain(reserved.into_iter().map(|it| (RESV_MEM_T_RESERVED, it)));
    for (room, (kind, range)) in bytes.chunks_exact_mut(PROPERTY_BYTES).zip(all) {
        room.copy_from_slice(&property(kind, &range));
    }
    Ok(())
}

fn property(kind: u8, range: &RangeInclusive<u64>) -> [u8; PROPERTY_BYTES] {
    let mut bytes = [0; PROPERTY_BYTES];
    bytes[0..2].copy_from_slice(&PROBE_T_RESV_MEM.to_le_bytes());
    let length = PROPERTY_BYTES as u16 - 4;
    bytes[2..4].copy_from_slice(&length.to_le_bytes());
    bytes[4] = kind;
    bytes[8..16].copy_from_slice(&range.start().to_le_bytes());
    bytes[16..24].copy_from_slice(&range.end().to_le_bytes());
    bytes
}

impl Fault {
    /// The report for the driver.
    pub(super) fn bytes(&self) -> [u8; FAULT_BYTES] {
        let mut flags = FAULT_F_ADDRESS;
        if self.access.allow(Permissions::Read) {
            flags |= FAULT_F_READ;
        }
        if self.access.has_write() {
            flags |= FAULT_F_WRITE;
        }
        let mut bytes = [0; FAULT_BYTES];
        bytes[0] = match self.reason {
            FaultReason::Domain => FAULT_R_DOMAIN,
            FaultReason::Mapping => FAULT_R_MAPPING,
        };
        bytes[4..8].copy_from_slice(&flags.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.endpoint.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.address.to_le_bytes());
        bytes
    }
}

/// Takes little-endian numbers from the front.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&mut self) -> Option<u32> {
        let (number, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*number))
    }

    fn u64(&mut self) -> Option<u64> {
        let (number, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*number))
    }
}
