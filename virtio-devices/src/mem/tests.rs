//! Tests the device with a mock driver.

use std::sync::{Arc, Mutex};

use state::Saved;
use vm_memory::GuestAddress;

use super::request::{ANSWER_BYTES, REQUEST_BYTES};
use super::spec::{
    VIRTIO_MEM_F_ACPI_PXM, VIRTIO_MEM_REQ_PLUG, VIRTIO_MEM_REQ_STATE, VIRTIO_MEM_REQ_UNPLUG,
    VIRTIO_MEM_REQ_UNPLUG_ALL, VIRTIO_MEM_RESP_ACK, VIRTIO_MEM_RESP_BUSY, VIRTIO_MEM_RESP_ERROR,
    VIRTIO_MEM_RESP_NACK, VIRTIO_MEM_STATE_MIXED, VIRTIO_MEM_STATE_PLUGGED,
    VIRTIO_MEM_STATE_UNPLUGGED,
};
use super::{Mem, MemBlocksState, MemHandle, MemParams, MemRegion, ResizeError, RunState};
use crate::device::{GuestRam, QueueHandler, VirtioDevice};
use crate::reclaim::guarded_ram::{GuardedRam, Kind, PAGE, RamArea};
use crate::testing::{
    Desc, HandlerHarness, MockInterrupt, Segment, TestBlocks, TestRam, WRITE, conformance,
};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;
const START: u64 = 4 << 30;
const BLOCKS: u64 = 8;

/// Type of a response, and the state that some responses carry.
type Response = (u16, u16);
const ACK: Response = (VIRTIO_MEM_RESP_ACK, 0);
const NACK: Response = (VIRTIO_MEM_RESP_NACK, 0);
const BUSY: Response = (VIRTIO_MEM_RESP_BUSY, 0);
const ERROR: Response = (VIRTIO_MEM_RESP_ERROR, 0);

struct Rig {
    blocks: Arc<TestBlocks>,
    device: Mem,
    handle: MemHandle,
    interrupt: Arc<MockInterrupt>,
    harness: HandlerHarness<Box<dyn QueueHandler>>,
}

struct Made {
    blocks: Arc<TestBlocks>,
    device: Mem,
    handle: MemHandle,
}

fn device(ram: GuestRam, start: u64, blocks: u64, requested: u64) -> Made {
    device_of_node(ram, start, blocks, requested, None)
}

fn device_of_node(
    ram: GuestRam,
    start: u64,
    blocks: u64,
    requested: u64,
    node: Option<u16>,
) -> Made {
    let region = MemRegion::new(start, blocks * BLOCK, BLOCK).unwrap();
    let blocks = Arc::new(TestBlocks::new(BLOCK));
    let (device, handle) = Mem::new(MemParams {
        id: "mem0".into(),
        region,
        ram,
        access: Arc::clone(&blocks) as _,
        requested_bytes: requested * BLOCK,
        node,
    })
    .unwrap();
    Made {
        blocks,
        device,
        handle,
    }
}

impl Rig {
    /// A region of [`BLOCKS`] after other RAM, `requested` of them requested.
    fn new(requested: u64) -> Self {
        let bytes = (BLOCKS * BLOCK) as usize;
        let ram = TestRam::from_regions(&[(0, 4 << 20), (START, bytes)]);
        let made = device(ram.mem(), START, BLOCKS, requested);
        Self::around(ram, made)
    }

    fn around(ram: TestRam, made: Made) -> Self {
        let Made {
            blocks,
            mut device,
            handle,
        } = made;
        let interrupt = Arc::new(MockInterrupt::default());
        device.set_interrupt(Arc::clone(&interrupt) as _);
        let handler = device.take_handlers().remove(0);
        let mut harness = HandlerHarness::with_ram(handler, device.features(), ram);
        harness.add_queues(1);
        harness.activate().unwrap();
        Self {
            blocks,
            device,
            handle,
            interrupt,
            harness,
        }
    }

    fn ask_at(&mut self, kind: u16, address: u64, count: u16) -> Response {
        let mut request = [0; REQUEST_BYTES];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        let segments = [
            Segment::Readable(&request),
            Segment::Writable(ANSWER_BYTES as u32),
        ];
        let (chain, used) = self.harness.request(0, &segments).unwrap();
        assert_eq!(used.unwrap().len as usize, ANSWER_BYTES);
        let answer = self.harness.queue(0).read_buffer(chain.buffers[1]);
        let field = |at: usize| u16::from_le_bytes([answer[at], answer[at + 1]]);
        (field(0), field(8))
    }

    fn ask(&mut self, kind: u16, block: u64, count: u16) -> Response {
        self.ask_at(kind, START + block * BLOCK, count)
    }

    fn state(&mut self, block: u64, count: u16) -> u16 {
        let (answer, state) = self.ask(VIRTIO_MEM_REQ_STATE, block, count);
        assert_eq!(answer, VIRTIO_MEM_RESP_ACK);
        state
    }

    fn counter(&self, name: &str) -> u64 {
        self.device.counters()[name]
    }

    fn field(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.device.read_config(at, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// The numbers of the blocks that guest and devices reach.
    fn open(&self) -> Vec<u64> {
        let starts = self.blocks.open();
        starts.iter().map(|start| (start - START) / BLOCK).collect()
    }

    fn byte_of(&self, block: u64) -> u8 {
        let last = GuestAddress(START + (block + 1) * BLOCK - 1);
        self.harness.ram.read(last, 1)[0]
    }

    fn mark(&self, block: u64) {
        let last = GuestAddress(START + (block + 1) * BLOCK - 1);
        self.harness.ram.write(last, &[7]);
    }
}

#[test]
fn mem_conforms() {
    conformance("mem", |ram| {
        Arc::new(Mutex::new(device(ram.mem(), START, BLOCKS, 2).device))
    });
}

#[test]
fn blocks_unplugged_are_back_at_the_host_and_no_others() {
    let mut rig = Rig::new(6);
    let config = [0, 8, 16, 24, 32, 40, 48].map(|at| rig.field(at));
    let region = BLOCKS * BLOCK;
    assert_eq!(config, [BLOCK, 0, START, region, region, 0, 6 * BLOCK]);
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_PLUG, 1, 4), ACK);
    (1..5).for_each(|block| rig.mark(block));
    assert_eq!(rig.state(1, 4), VIRTIO_MEM_STATE_PLUGGED);
    assert_eq!(rig.state(0, 2), VIRTIO_MEM_STATE_MIXED);
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_UNPLUG, 2, 2), ACK);
    assert_eq!(
        (1..5).map(|it| rig.byte_of(it)).collect::<Vec<_>>(),
        [7, 0, 0, 7]
    );
    assert_eq!(rig.state(2, 2), VIRTIO_MEM_STATE_UNPLUGGED);
    assert_eq!(
        (rig.field(40), rig.handle.plugged_bytes()),
        (2 * BLOCK, 2 * BLOCK)
    );
    assert_eq!(rig.counter("unplug_discarded_bytes"), 2 * BLOCK);
    assert_eq!(rig.counter("unplug_syscalls"), 1);
    assert_eq!(rig.harness.interrupt.queue_signals(0), 5);
}

#[test]
fn plug_beyond_what_is_requested_waits_for_the_host() {
    let mut rig = Rig::new(2);
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_PLUG, 0, 3), NACK);
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_PLUG, 0, 2), ACK);
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_PLUG, 7, 1), NACK);
    assert_eq!(
        (rig.counter("requests_nacked"), rig.handle.plugged_bytes()),
        (2, 2 * BLOCK)
    );
    assert_eq!(rig.interrupt.config_signals(), 0);
    rig.handle.set_requested_bytes(3 * BLOCK).unwrap();
    assert_eq!(
        (rig.interrupt.config_signals(), rig.field(48)),
        (1, 3 * BLOCK)
    );
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_PLUG, 7, 1), ACK);
    // With a smaller request, no block is unplugged automatically, and no further block is plugged.
    rig.handle.set_requested_bytes(0).unwrap();
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_PLUG, 4, 1), NACK);
    assert_eq!(rig.handle.plugged_bytes(), 3 * BLOCK);
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_UNPLUG, 7, 1), ACK);
}

#[test]
fn size_that_the_region_cannot_have_is_refused() {
    let rig = Rig::new(2);
    let region_bytes = BLOCKS * BLOCK;
    let bytes = region_bytes + BLOCK;
    assert_eq!(
        rig.handle.set_requested_bytes(bytes),
        Err(ResizeError::BeyondRegion {
            bytes,
            region_bytes
        })
    );
    assert!(rig.handle.set_requested_bytes(BLOCK + 4096).is_err());
    assert_eq!(
        (rig.handle.requested_bytes(), rig.interrupt.config_signals()),
        (2 * BLOCK, 0)
    );
}

#[test]
fn region_that_is_not_whole_blocks_is_refused() {
    for (start, bytes, block) in [
        (START + 4096, BLOCK, BLOCK),
        (START, BLOCK + 4096, BLOCK),
        (START, 0, BLOCK),
        (START, 3 * MIB, 3 * MIB),
        (START, BLOCK, 0),
        (u64::MAX - BLOCK + 1, BLOCK, BLOCK),
    ] {
        assert!(
            MemRegion::new(start, bytes, block).is_err(),
            "{start:#x} {bytes}"
        );
    }
}

#[test]
fn requests_that_break_a_rule_are_errors_and_change_nothing() {
    let mut rig = Rig::new(BLOCKS);
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_PLUG, 2, 2), ACK);
    rig.mark(2);
    let end = START + BLOCKS * BLOCK;
    let named = [
        (START + 4096, 1),
        (START - BLOCK, 1),
        (START - BLOCK, 2),
        (0, 1),
        (end, 1),
        (end - BLOCK, 2),
        (START, u16::MAX),
        (START, 0),
        (u64::MAX, 1),
        (u64::MAX - BLOCK + 1, u16::MAX),
    ];
    let kinds = [
        VIRTIO_MEM_REQ_PLUG,
        VIRTIO_MEM_REQ_UNPLUG,
        VIRTIO_MEM_REQ_STATE,
    ];
    for (address, count) in named {
        for kind in kinds {
            assert_eq!(
                rig.ask_at(kind, address, count),
                ERROR,
                "{kind} {address:#x} {count}"
            );
        }
    }
    // All or some of the blocks are in the wrong state.
    for (kind, block, count) in [
        (VIRTIO_MEM_REQ_PLUG, 2, 1),
        (VIRTIO_MEM_REQ_PLUG, 1, 2),
        (VIRTIO_MEM_REQ_PLUG, 3, 2),
        (VIRTIO_MEM_REQ_UNPLUG, 0, 1),
        (VIRTIO_MEM_REQ_UNPLUG, 1, 2),
        (VIRTIO_MEM_REQ_UNPLUG, 2, 3),
    ] {
        assert_eq!(rig.ask(kind, block, count), ERROR, "{kind} {block} {count}");
    }
    assert_eq!(rig.ask(0x100, 2, 1), ERROR);
    let wrong = (kinds.len() * named.len() + 6) as u64;
    assert_eq!(rig.counter("requests_wrong"), wrong);
    assert_eq!(rig.counter("requests_unknown"), 1);
    assert_eq!(rig.counter("unplug_requested_bytes"), 0);
    assert_eq!((rig.byte_of(2), rig.handle.plugged_bytes()), (7, 2 * BLOCK));
    assert_eq!(rig.state(2, 2), VIRTIO_MEM_STATE_PLUGGED);
}

#[test]
fn chains_that_are_no_request_are_answered_empty_and_not_carried_out() {
    let mut rig = Rig::new(BLOCKS);
    // Each chain requests to plug the first block, or is part of such a request.
    let mut request = [0; REQUEST_BYTES];
    request[8..16].copy_from_slice(&START.to_le_bytes());
    request[16] = 1;
    let room = Segment::Writable(ANSWER_BYTES as u32);
    let short = &request[..REQUEST_BYTES - 1];
    let chains: [&[Segment<'_>]; 4] = [
        &[Segment::Readable(short), room],
        &[
            Segment::Readable(&request),
            Segment::Writable(ANSWER_BYTES as u32 - 1),
        ],
        &[Segment::Readable(&request)],
        &[room],
    ];
    for chain in chains {
        let (_, used) = rig.harness.request(0, chain).unwrap();
        assert_eq!(used.unwrap().len, 0);
    }
    let outside = Desc {
        addr: START + BLOCKS * BLOCK,
        len: 4096,
        flags: WRITE,
        next: 0,
    };
    rig.harness.queue(0).push_raw(&[outside]);
    rig.harness.kick(0).unwrap();
    assert_eq!(rig.counter("requests_malformed"), 5);
    assert_eq!(rig.handle.plugged_bytes(), 0);
    // A request split over descriptors is valid.
    let (front, back) = request.split_at(9);
    let split = [
        Segment::Readable(front),
        Segment::Readable(back),
        Segment::Writable(4),
        room,
    ];
    let (_, used) = rig.harness.request(0, &split).unwrap();
    // The response to the chain outside of RAM comes first.
    assert_eq!(used.unwrap().len, 0);
    assert_eq!(rig.harness.queue(0).pop_used().unwrap().len, 10);
    assert_eq!(rig.handle.plugged_bytes(), BLOCK);
}

#[test]
fn reset_leaves_blocks_as_they_are_and_unplug_all_takes_them() {
    let mut rig = Rig::new(BLOCKS);
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_PLUG, 0, 2), ACK);
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_PLUG, 5, 1), ACK);
    for block in [0, 1, 5] {
        rig.mark(block);
    }
    rig.device.reset();
    rig.harness.reset();
    rig.harness.activate().unwrap();
    assert_eq!(rig.field(40), 3 * BLOCK);
    assert_eq!(
        (rig.state(0, 2), rig.byte_of(5)),
        (VIRTIO_MEM_STATE_PLUGGED, 7)
    );
    assert_eq!(rig.ask_at(VIRTIO_MEM_REQ_UNPLUG_ALL, 0, 0), ACK);
    assert_eq!([0, 1, 5].map(|block| rig.byte_of(block)), [0; 3]);
    assert_eq!(rig.state(0, BLOCKS as u16), VIRTIO_MEM_STATE_UNPLUGGED);
    assert_eq!(
        (rig.field(40), rig.counter("unplug_discarded_bytes")),
        (0, 3 * BLOCK)
    );
    // Without plugged blocks the request is valid and needs no system call.
    let syscalls = rig.counter("unplug_syscalls");
    assert_eq!(rig.ask_at(VIRTIO_MEM_REQ_UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(rig.counter("unplug_syscalls"), syscalls);
}

#[test]
fn block_that_the_host_cannot_take_back_stays_plugged() {
    let first_page = START / PAGE as u64;
    let pages = BLOCK as usize / PAGE;
    let area = |guest_page, pages, kind| RamArea {
        guest_page,
        pages,
        kind,
    };
    let guarded = GuardedRam::new(&[
        area(0, 256, Kind::Anonymous),
        area(first_page, pages, Kind::ReadOnlyMemfd),
    ]);
    let ram = TestRam::around(guarded.ram, 0, MIB);
    // The rings must initially be zeros.
    ram.write(GuestAddress(0), &vec![0; MIB as usize]);
    let made = device(ram.mem(), START, 1, 1);
    let mut rig = Rig::around(ram, made);
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_PLUG, 0, 1), ACK);
    for kind in [VIRTIO_MEM_REQ_UNPLUG, VIRTIO_MEM_REQ_UNPLUG_ALL] {
        assert_eq!(rig.ask(kind, 0, 1), BUSY);
        assert_eq!(rig.state(0, 1), VIRTIO_MEM_STATE_PLUGGED);
        assert_eq!(rig.open(), [0], "the guest keeps it");
    }
    assert_eq!(rig.handle.plugged_bytes(), BLOCK);
    assert_eq!(
        (
            rig.counter("requests_busy"),
            rig.counter("unplug_failed_bytes")
        ),
        (2, 2 * BLOCK)
    );
}

#[test]
fn blocks_are_open_as_long_as_they_are_plugged() {
    let mut rig = Rig::new(6);
    assert_eq!(rig.open(), [0; 0]);
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_PLUG, 1, 4), ACK);
    assert_eq!(rig.open(), [1, 2, 3, 4]);
    // Refused requests open and close nothing.
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_PLUG, 4, 2), ERROR);
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_PLUG, 5, 3), NACK);
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_UNPLUG, 4, 2), ERROR);
    assert_eq!(rig.open(), [1, 2, 3, 4]);
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_UNPLUG, 2, 2), ACK);
    assert_eq!(rig.open(), [1, 4]);
    rig.device.reset();
    rig.harness.reset();
    rig.harness.activate().unwrap();
    assert_eq!(rig.open(), [1, 4]);
    assert_eq!(rig.ask_at(VIRTIO_MEM_REQ_UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(rig.open(), [0; 0]);
}

#[test]
fn blocks_that_the_host_cannot_open_or_close_keep_their_state() {
    let mut rig = Rig::new(BLOCKS);
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_PLUG, 0, 2), ACK);
    rig.mark(0);
    rig.blocks.refuse(true);
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_PLUG, 2, 2), BUSY);
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_UNPLUG, 0, 1), BUSY);
    assert_eq!(rig.ask_at(VIRTIO_MEM_REQ_UNPLUG_ALL, 0, 0), BUSY);
    assert_eq!(rig.counter("requests_busy"), 3);
    assert_eq!(rig.counter("unplug_requested_bytes"), 0);
    assert_eq!((rig.open(), rig.byte_of(0)), (vec![0, 1], 7));
    assert_eq!(rig.handle.plugged_bytes(), 2 * BLOCK);
    rig.blocks.refuse(false);
    assert_eq!(rig.ask(VIRTIO_MEM_REQ_PLUG, 2, 2), ACK);
    assert_eq!(rig.open(), [0, 1, 2, 3]);
}

#[test]
fn saved_blocks_are_open_in_the_restored_device_and_no_others() {
    let ram = TestRam::from_regions(&[(0, 4 << 20), (START, (BLOCKS * BLOCK) as usize)]);
    let mut made = device(ram.mem(), START, BLOCKS, 4);
    let run = |first, count| RunState { first, count };
    let state = Saved::of(&MemBlocksState {
        plugged: vec![run(1, 2), run(6, 1)],
    });
    let mut handler = made.device.take_handlers().remove(0);
    handler.restore(Some(&state)).unwrap();
    let starts = [1, 2, 6].map(|block| START + block * BLOCK);
    assert_eq!(made.blocks.open(), starts);
    // A host that refuses ends the restore, with a reason.
    let mut made = device(ram.mem(), START, BLOCKS, 4);
    made.blocks.refuse(true);
    let mut handler = made.device.take_handlers().remove(0);
    let error = handler.restore(Some(&state)).unwrap_err().to_string();
    assert!(error.contains("cannot be opened on this host"), "{error}");
}

#[test]
fn node_is_shown_and_offered_if_there_is_one() {
    let ram = TestRam::from_regions(&[(0, 4 << 20), (START, (BLOCKS * BLOCK) as usize)]);
    for (node, offered, shown) in [(None, 0, 0), (Some(0), 1, 0), (Some(255), 1, 255)] {
        let made = device_of_node(ram.mem(), START, BLOCKS, 0, node);
        assert_eq!(made.device.features() & VIRTIO_MEM_F_ACPI_PXM, offered);
        let mut field = [0xff; 8];
        made.device.read_config(8, &mut field);
        assert_eq!(field, [shown, 0, 0, 0, 0, 0, 0, 0]);
    }
}

#[test]
fn requests_beyond_one_call_are_all_served() {
    let mut rig = Rig::new(0);
    let mut request = [0; REQUEST_BYTES];
    request[0] = VIRTIO_MEM_REQ_UNPLUG_ALL as u8;
    let segments = [Segment::Readable(&request), Segment::Writable(16)];
    for _ in 0..30 {
        rig.harness.queue(0).push(&segments);
    }
    rig.harness.kick(0).unwrap();
    assert_eq!(rig.harness.queue(0).used_idx(), 30);
}
