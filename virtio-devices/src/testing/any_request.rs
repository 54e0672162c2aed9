//! Requests of a device's driver with arbitrary values but valid lengths, which random bytes rarely have. Used by the
//! guest with arbitrary behaviour.

use super::any_device::{NET_PAIRS, mem_block};
use super::fuzz_input::Input;
use crate::reclaim::guarded_ram::PAGE;

/// Types of requests of a disk; the last one is never offered.
const BLOCK_TYPES: [u32; 7] = [0, 1, 4, 8, 11, 13, 14];
const BLOCK_IN: u32 = 0;
const BLOCK_OUT: u32 = 1;
const BLOCK_GET_ID: u32 = 8;
const BLOCK_DISCARD: u32 = 11;
const BLOCK_WRITE_ZEROES: u32 = 13;
const SECTOR_BYTES: u32 = 512;
/// Near the end of the image.
const LATE_SECTOR: u64 = 2040;
const IOMMU_PROBE: u8 = 5;
const NET_CONTROL_QUEUE: u16 = 2;
const NET_HEADER_BYTES: usize = 12;

/// The parts of a chain.
#[derive(Debug, Default)]
pub(super) struct Request {
    /// Readable.
    pub(super) head: Vec<u8>,
    pub(super) data_bytes: u32,
    pub(super) is_data_writable: bool,
    /// Writable.
    pub(super) answer_bytes: u32,
}

impl Request {
    fn answered(head: Vec<u8>, answer_bytes: u32) -> Self {
        Self {
            head,
            answer_bytes,
            ..Self::default()
        }
    }

    fn written(data_bytes: u32) -> Self {
        Self {
            data_bytes,
            is_data_writable: true,
            ..Self::default()
        }
    }
}

/// A request on a queue of the device with this name; `None` if its requests have no structure.
pub(super) fn request(device: &str, queue: u16, input: &mut Input<'_>) -> Option<Request> {
    Some(match device {
        name if name.starts_with("block") => block(input),
        "iommu" if queue == 0 => iommu(input),
        "mem" => mem(input),
        "net" if queue == NET_CONTROL_QUEUE => net_control(input),
        "vhost-user-net" if queue == 2 * NET_PAIRS => net_control(input),
        "net" if !queue.is_multiple_of(2) => Request {
            head: vec![0; NET_HEADER_BYTES],
            data_bytes: u32::from(input.byte()) * 8,
            ..Request::default()
        },
        "pmem" => Request::answered(vec![input.byte() % 2, 0, 0, 0], 4),
        "console" | "iommu" | "net" | "rng" | "vsock" => {
            Request::written(u32::from(input.byte()) * 32)
        }
        _ => return None,
    })
}

fn block(input: &mut Input<'_>) -> Request {
    let kind = BLOCK_TYPES[usize::from(input.byte()) % BLOCK_TYPES.len()];
    let sector = match input.byte() {
        late @ 224.. => LATE_SECTOR + u64::from(late % 16),
        early => u64::from(early),
    };
    let mut head = kind.to_le_bytes().to_vec();
    head.extend(0_u32.to_le_bytes());
    head.extend(sector.to_le_bytes());
    let sectors = 1 + u32::from(input.byte() % 24);
    let mut request = Request::answered(head, 1);
    match kind {
        BLOCK_IN | BLOCK_OUT => {
            request.data_bytes = sectors * SECTOR_BYTES;
            request.is_data_writable = kind == BLOCK_IN;
        }
        BLOCK_GET_ID => {
            request.data_bytes = 20;
            request.is_data_writable = true;
        }
        BLOCK_DISCARD | BLOCK_WRITE_ZEROES => {
            let unmap = u32::from(input.byte() % 3);
            request.head.extend(sector.to_le_bytes());
            request.head.extend(sectors.to_le_bytes());
            request.head.extend(unmap.to_le_bytes());
        }
        _ => {}
    }
    request
}

fn iommu(input: &mut Input<'_>) -> Request {
    let kind = 1 + input.byte() % 5;
    let domain = u32::from(input.byte() % 3).to_le_bytes();
    let endpoint = u32::from(input.byte() % 5).to_le_bytes();
    let first = u64::from(input.byte()) * PAGE as u64;
    let last = first + u64::from(1 + input.byte() % 8) * PAGE as u64 - 1;
    // Sometimes a flag that is not defined.
    let flags = u32::from(input.byte() % 5).to_le_bytes();
    let range = [first.to_le_bytes(), last.to_le_bytes()].concat();
    let to = (u64::from(input.byte() % 64) * PAGE as u64).to_le_bytes();
    let body = match kind {
        1 => [domain, endpoint, flags, [0; 4]].concat(),
        2 => [domain, endpoint, [0; 4], [0; 4]].concat(),
        3 => [&domain[..], &range, &to, &flags].concat(),
        4 => [&domain[..], &range, &[0; 4]].concat(),
        _ => [&endpoint[..], &[0; 64]].concat(),
    };
    let head = [&[kind, 0, 0, 0], &body[..]].concat();
    Request::answered(head, if kind == IOMMU_PROBE { 28 } else { 4 })
}

fn mem(input: &mut Input<'_>) -> Request {
    let kind = u16::from(input.byte() % 5);
    let block = mem_block(input.byte() % 3);
    let count = u16::from(input.byte() % 4);
    let mut head = u64::from(kind).to_le_bytes().to_vec();
    head.extend(block.to_le_bytes());
    head.extend(u64::from(count).to_le_bytes());
    Request::answered(head, 10)
}

fn net_control(input: &mut Input<'_>) -> Request {
    let choice = input.byte();
    let head = match choice % 3 {
        0 => vec![4, 0, choice >> 4, 0],
        1 => {
            let offloads = input.number(8) & 0xffff;
            [&[5, 0], &offloads.to_le_bytes()[..]].concat()
        }
        _ => vec![input.byte(), input.byte()],
    };
    Request::answered(head, 1)
}
