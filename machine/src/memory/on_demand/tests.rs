//! Tests of memory that is filled on demand, without a guest. Without userfaultfd, the tests print the reason and pass
//! without testing anything.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use virtio_devices::reclaim::{DiscardEngine, Expected, GuestRange, ResidencyProbe};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use super::super::content::{CHUNK_BYTES, PAGE, is_set};
use super::super::layout::{MIB, PAGE_BYTES};
use super::super::test_memory::{self, address, mark, zones};
use super::super::{ChunkState, ContentWriter, Pages, SavedZone, ZoneContentState};
use super::*;

const DEADLINE: Duration = Duration::from_secs(60);
const ZONE_PAGES: u64 = 7 * MIB / PAGE_BYTES;
/// At the borders of chunks and zones, single and in runs. The chunk from page 1024 on has none.
const PAGES: [u64; 12] = [0, 1, 511, 512, 700, 701, 702, 1700, 1791, 1792, 2303, 3583];

fn memory(shared: bool) -> GuestMemory {
    zones(&[("a", false), ("b", shared)])
}

fn read(memory: &GuestMemory, page: u64) -> u64 {
    memory.ram().memory().read_obj(address(page)).unwrap()
}

fn saved(pages: impl IntoIterator<Item = u64>) -> Vec<(File, ZoneContentState)> {
    let memory = memory(false);
    for page in pages {
        let ram = memory.ram().memory();
        ram.write_obj(mark(page), address(page)).unwrap();
    }
    test_memory::saved(&memory)
}

fn copies(files: &[(File, ZoneContentState)]) -> Vec<SavedZone> {
    let copy =
        |(file, table): &(File, ZoneContentState)| (file.try_clone().unwrap(), table.clone());
    files.iter().map(copy).map(SavedZone::from).collect()
}

#[derive(Debug, PartialEq)]
enum Sent {
    Filled(FillReport),
    Failed(String),
    Touched(Vec<u32>),
}

struct Owner(Sender<Sent>);

impl FillOwner for Owner {
    fn progress(&self, _bytes: u64) {}

    fn filled(&self, report: FillReport) {
        self.0.send(Sent::Filled(report)).unwrap();
    }

    fn touched(&self, pages: &[u32]) {
        // The test may have ended.
        self.0.send(Sent::Touched(pages.to_vec())).ok();
    }

    fn failed(&self, error: &FillError) {
        let text = api::error_line(error);
        self.0.send(Sent::Failed(text)).unwrap();
    }
}

/// The memory of a machine that is restored from `files`.
struct Restored {
    on_demand: OnDemand,
    memory: GuestMemory,
    told: Receiver<Sent>,
}

fn restored(files: &[(File, ZoneContentState)], fills: bool) -> Option<Restored> {
    restored_first(files, background(fills), &[])
}

fn background(fills: bool) -> Background {
    match fills {
        true => Background::AtOnce,
        false => Background::Never,
    }
}

fn restored_first(
    files: &[(File, ZoneContentState)],
    background: Background,
    first: &[u32],
) -> Option<Restored> {
    let faults = Faults::open().map_err(test_skip::skip).ok()?;
    let (owner, told) = channel();
    let memory = memory(false);
    let start: MachineThreadStart = Arc::new(|_| ());
    let owner = Box::new(Owner(owner));
    let content = Content::Files(copies(files));
    let on_demand = OnDemand::start(&memory, content, &faults, background, first, &start, owner);
    Some(Restored {
        on_demand: on_demand.unwrap(),
        memory,
        told,
    })
}

impl Restored {
    fn resident_pages(&self) -> u64 {
        let probe = ResidencyProbe::new(self.memory.ram().clone()).unwrap();
        probe.measure().unwrap().resident_bytes / PAGE_BYTES
    }

    fn discard(&self, pages: std::ops::Range<u64>) {
        discard(&self.memory, pages);
    }
}

fn discard(memory: &GuestMemory, pages: std::ops::Range<u64>) {
    let mut claims = [GuestRange {
        start: pages.start * PAGE_BYTES,
        bytes: (pages.end - pages.start) * PAGE_BYTES,
    }];
    let mut engine = DiscardEngine::new(Default::default());
    let outcome = engine.discard(memory.ram(), &mut claims, Expected::Anything);
    assert_eq!(outcome.discarded.bytes, claims[0].bytes, "{outcome:?}");
}

#[test]
fn page_comes_when_it_is_touched_and_no_other_does() {
    let Some(it) = restored(&saved(PAGES), false) else {
        return;
    };
    assert_eq!(it.resident_pages(), 0);
    for (done, page) in (1..).zip(PAGES) {
        assert_eq!(read(&it.memory, page), mark(page));
        assert_eq!(it.resident_pages(), done);
    }
    for page in (0..2 * ZONE_PAGES).filter(|page| !PAGES.contains(page)) {
        assert_eq!(read(&it.memory, page), 0, "{page}");
    }
    assert!(it.on_demand.finish());
    let report = FillReport {
        demanded_pages: PAGES.len() as u64,
        filled_pages: 0,
    };
    assert_eq!(it.told.recv_timeout(DEADLINE), Ok(Sent::Filled(report)));
}

#[test]
fn question_whether_ram_is_complete_fills_it_without_waiting() {
    let Some(it) = restored(&saved(PAGES), false) else {
        return;
    };
    assert!(!it.on_demand.is_complete());
    let told = it.told.recv_timeout(DEADLINE);
    assert!(matches!(told, Ok(Sent::Filled(_))), "{told:?}");
    assert!(it.on_demand.finish());
    assert!(it.on_demand.is_complete());
}

#[test]
fn fill_in_the_background_waits_for_its_beginning() {
    let Some(it) = restored_first(&saved(PAGES), Background::Later, &[]) else {
        return;
    };
    assert_eq!(read(&it.memory, PAGES[0]), mark(PAGES[0]));
    assert_eq!((it.resident_pages(), it.told.try_recv().ok()), (1, None));
    it.on_demand.begin();
    let told = it.told.recv_timeout(DEADLINE).unwrap();
    let report = FillReport {
        demanded_pages: 1,
        filled_pages: PAGES.len() as u64 - 1,
    };
    assert_eq!(told, Sent::Filled(report));
}

#[test]
fn fill_in_the_background_that_is_off_does_not_begin() {
    let Some(it) = restored(&saved(PAGES), false) else {
        return;
    };
    it.on_demand.begin();
    assert_eq!(read(&it.memory, PAGES[0]), mark(PAGES[0]));
    assert_eq!((it.resident_pages(), it.told.try_recv().ok()), (1, None));
}

#[test]
fn rest_comes_without_demand_and_holes_stay_absent() {
    let Some(it) = restored(&saved(PAGES), true) else {
        return;
    };
    let told = it.told.recv_timeout(DEADLINE).unwrap();
    let report = FillReport {
        demanded_pages: 0,
        filled_pages: PAGES.len() as u64,
    };
    assert_eq!(told, Sent::Filled(report));
    assert_eq!(it.resident_pages(), PAGES.len() as u64);
    for page in 0..2 * ZONE_PAGES {
        let expected = if PAGES.contains(&page) { mark(page) } else { 0 };
        assert_eq!(read(&it.memory, page), expected, "{page}");
    }
}

#[test]
fn write_to_a_page_that_is_still_to_come_changes_only_what_it_writes() {
    let Some(it) = restored(&saved(PAGES), false) else {
        return;
    };
    let ram = it.memory.ram().memory();
    ram.write_obj(7_u64, GuestAddress(701 * PAGE_BYTES + 8))
        .unwrap();
    ram.write_obj(8_u64, GuestAddress(100 * PAGE_BYTES))
        .unwrap();
    assert!(it.on_demand.finish());
    assert_eq!(read(&it.memory, 701), mark(701));
    assert_eq!(read(&it.memory, 100), 8);
    assert_eq!(
        ram.read_obj::<u64>(GuestAddress(701 * PAGE_BYTES + 8))
            .unwrap(),
        7
    );
}

#[test]
fn page_discarded_before_or_after_it_came_is_zero_for_good() {
    let Some(it) = restored(&saved(PAGES), false) else {
        return;
    };
    assert_eq!(read(&it.memory, 700), mark(700));
    // 700 is there; 701, the chunk between the zones and the one without data are not.
    it.discard(700..702);
    it.discard(1024..2000);
    for page in [700, 701, 1700, 1791, 1792] {
        assert_eq!(read(&it.memory, page), 0, "{page}");
    }
    it.discard(3583..3584);
    assert!(it.on_demand.finish());
    for page in [700, 701, 1700, 1791, 1792, 3583] {
        assert_eq!(read(&it.memory, page), 0, "{page}");
    }
    for page in [0, 1, 511, 512, 702, 2303] {
        assert_eq!(read(&it.memory, page), mark(page), "{page}");
    }
    let report = FillReport {
        demanded_pages: 1,
        filled_pages: 6,
    };
    assert_eq!(it.told.recv_timeout(DEADLINE), Ok(Sent::Filled(report)));
}

#[test]
fn memory_that_is_touched_filled_and_discarded_at_once_has_no_wrong_page() {
    let all = 0..2 * ZONE_PAGES;
    let files = saved(all.clone());
    for round in 0..8 {
        let Some(it) = restored(&files, true) else {
            return;
        };
        // Each discards other pages, in another order than they come; one touches all.
        std::thread::scope(|scope| {
            for first in 0..2 {
                let memory = &it.memory;
                scope.spawn(move || {
                    for step in 0..2 * ZONE_PAGES / 16 {
                        let block = (step * 37 + round) % (2 * ZONE_PAGES / 16);
                        let start = block * 16 + first * 8;
                        discard(memory, start..start + 4);
                        assert_eq!(read(memory, start + 1), 0);
                    }
                });
            }
            let (memory, all) = (&it.memory, all.clone());
            scope.spawn(move || {
                for page in all.rev() {
                    let found = read(memory, page);
                    assert!(
                        found == mark(page) || (found == 0 && page % 8 < 4),
                        "{page}"
                    );
                }
            });
        });
        assert!(it.on_demand.finish());
        for page in all.clone() {
            let expected = if page % 8 < 4 { 0 } else { mark(page) };
            assert_eq!(read(&it.memory, page), expected, "{page}");
        }
        assert!(matches!(
            it.told.recv_timeout(DEADLINE),
            Ok(Sent::Filled(_))
        ));
    }
}

/// Touches a page that cannot come; returns the report to the owner.
fn failure(files: &[(File, ZoneContentState)], page: u64) -> Option<String> {
    let it = restored(files, false)?;
    let memory = it.memory.clone();
    let waits = std::thread::spawn(move || read(&memory, page));
    let told = it.told.recv_timeout(DEADLINE).unwrap();
    assert!(!waits.is_finished(), "nobody gets a page that is not there");
    let Sent::Failed(error) = told else {
        panic!("{told:?}");
    };
    assert!(!it.on_demand.finish());
    // The machine would have ended before.
    drop(it.on_demand);
    waits.join().unwrap();
    Some(error)
}

#[test]
fn damaged_piece_is_refused_by_name_before_any_page_of_it_comes() {
    let files = saved(512..520);
    // Pages 516 to 519 are a piece.
    files[0].0.write_all_at(&[1], 518 * PAGE_BYTES + 1).unwrap();
    let Some(told) = failure(&files, 516) else {
        return;
    };
    assert_eq!(
        told,
        "The memory file of zone a is damaged at offset 0x200000"
    );
    let it = restored(&files, false).unwrap();
    assert_eq!(read(&it.memory, 515), mark(515), "others are sound");
}

/// Replaces the checksums by those of versions before 6.
fn make_early(files: &mut [(File, ZoneContentState)]) {
    for (file, table) in files {
        for chunk in &mut table.chunks {
            let mut crc = crc32fast::Hasher::new();
            for page in (0..512).filter(|page| is_set(&chunk.pages.0, *page)) {
                let mut data = [0; PAGE];
                let at = chunk.offset + (page * PAGE) as u64;
                file.read_exact_at(&mut data, at).unwrap();
                crc.update(&data);
            }
            chunk.sums.0.clear();
            chunk.crc32 = Some(crc.finalize());
        }
    }
}

#[test]
fn damaged_chunk_of_an_early_version_is_refused_as_a_whole() {
    let mut files = saved(512..520);
    make_early(&mut files);
    let Some(it) = restored(&files, false) else {
        return;
    };
    assert_eq!(read(&it.memory, 512), mark(512));
    assert_eq!(read(&it.memory, 519), mark(519));
    drop(it);
    files[0].0.write_all_at(&[1], 518 * PAGE_BYTES + 1).unwrap();
    assert_eq!(
        failure(&files, 512).unwrap(),
        "The memory file of zone a is damaged at offset 0x200000"
    );
}

#[test]
fn table_with_other_checksums_than_pages_is_refused_by_name() {
    for change in [
        |chunk: &mut ChunkState| chunk.sums.0.truncate(4),
        |chunk: &mut ChunkState| chunk.sums.0.push(0),
        |chunk: &mut ChunkState| chunk.crc32 = Some(1),
    ] {
        let mut files = saved(512..520);
        change(&mut files[0].1.chunks[0]);
        let memory = memory(false);
        let chunks = Chunks::new(&memory, Content::Files(copies(&files)));
        let told = chunks.unwrap_err().to_string();
        assert!(
            told.contains("other checksums at 0x200000 than pages"),
            "{told}"
        );
    }
}

#[test]
fn file_that_was_cut_since_is_refused_by_name() {
    let files = saved(PAGES);
    files[1].0.set_len(PAGE as u64).unwrap();
    files[1].0.set_len(7 * MIB).unwrap();
    if let Some(told) = failure(&files, 3583) {
        assert_eq!(
            told,
            "The memory file of zone b is damaged at offset 0x600000"
        );
    }
    let files = saved(PAGES);
    let Some(it) = restored(&files, false) else {
        return;
    };
    files[0].0.set_len(0).unwrap();
    let memory = it.memory.clone();
    let waits = std::thread::spawn(move || read(&memory, 0));
    let told = it.told.recv_timeout(DEADLINE).unwrap();
    let Sent::Failed(error) = &told else {
        panic!("{told:?}");
    };
    assert!(
        error.starts_with("Cannot access the memory file of zone a at offset 0x0"),
        "{error}"
    );
    drop(it.on_demand);
    waits.join().unwrap();
}

#[test]
fn other_memory_than_private_memory_is_refused_by_name() {
    let Ok(faults) = Faults::open().map_err(test_skip::skip) else {
        return;
    };
    let (owner, _told) = channel();
    let start: MachineThreadStart = Arc::new(|_| ());
    let owner = Box::new(Owner(owner));
    let files = saved(PAGES);
    let refused = OnDemand::start(
        &memory(true),
        Content::Files(copies(&files)),
        &faults,
        Background::AtOnce,
        &[],
        &start,
        owner,
    );
    let told = refused.unwrap_err().to_string();
    assert!(told.contains("zone b is memfd-shared"), "{told}");
}

#[test]
fn ranges_are_joined_so_that_there_are_not_too_many() {
    let files = saved(PAGES);
    let memory = memory(false);
    let chunks = Chunks::new(&memory, Content::Files(copies(&files))).unwrap();
    let ram = memory.ram().memory();
    let host = |page: u64| ram.get_host_address(address(page)).unwrap() as u64;
    // Each of the two regions has its own; chunks without data are in none.
    let expected = [
        host(0)..host(1024),
        host(1536)..host(1791) + PAGE_BYTES,
        host(1792)..host(2304),
        host(3328)..host(3583) + PAGE_BYTES,
    ];
    assert_eq!(chunks.ranges(&memory), expected);
}

#[test]
fn pages_touched_first_are_recorded_in_their_order_and_come_first_in_the_next_run() {
    let files = saved(PAGES);
    let Some(it) = restored(&files, false) else {
        return;
    };
    let touched = [1792, 3, 700, 0, 511, 700];
    for page in touched {
        read(&it.memory, page);
    }
    drop(it.on_demand);
    let recorded = match it.told.recv_timeout(DEADLINE).unwrap() {
        Sent::Touched(pages) => pages,
        other => panic!("{other:?}"),
    };
    // Page 3 holds no data, and page 700 comes once.
    assert_eq!(recorded, [1792, 700, 0, 511]);

    // Numbers of no page do no harm.
    let first = [&recorded[..], &[3, 9999, u32::MAX, 1792]].concat();
    let Some(it) = restored_first(&files, Background::AtOnce, &first) else {
        return;
    };
    let told = it.told.recv_timeout(DEADLINE).unwrap();
    let pages = PAGES.len() as u64;
    let Sent::Filled(report) = told else {
        panic!("{told:?}");
    };
    assert_eq!(report.demanded_pages + report.filled_pages, pages);
    for page in PAGES {
        assert_eq!(read(&it.memory, page), mark(page));
    }
    assert_eq!(it.resident_pages(), pages);
}

/// Pages of another process without data.
const EMPTY: std::ops::Range<u64> = 20..30;

/// Another process, which has a mark on each page that it is asked for except some, and answers a limited number of times.
#[derive(Debug)]
struct Elsewhere {
    zones: Vec<(u64, u64)>,
    answers: usize,
    ended: Sender<()>,
}

impl PageSource for Elsewhere {
    fn fetch(
        &mut self,
        zone: usize,
        offset: u64,
        bits: &[u8],
        put: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.answers = self.answers.checked_sub(1).ok_or("it has gone")?;
        let first = (self.zones[zone].0 + offset) / PAGE_BYTES;
        let wanted = (0..bits.len() * 8).filter(|page| is_set(bits, *page));
        for page in wanted.filter(|page| !EMPTY.contains(&(first + *page as u64))) {
            let mut data = [0; PAGE_BYTES as usize];
            data[..8].copy_from_slice(&mark(first + page as u64).to_le_bytes());
            put(page, &data);
        }
        Ok(())
    }

    fn end(&mut self) {
        self.ended.send(()).unwrap();
    }
}

/// The pages 0 to 63 of RAM, which held something else before, come from another process.
fn from_elsewhere(fills: bool, answers: usize) -> Option<(Restored, Receiver<()>)> {
    let faults = Faults::open().map_err(test_skip::skip).ok()?;
    let (owner, told) = channel();
    let (ended, end) = channel();
    let memory = memory(false);
    let mut writer = ContentWriter::new(memory.clone());
    let mut bits = vec![0; CHUNK_BYTES / PAGE / 8];
    bits[..8].fill(0xff);
    let pages = Pages {
        zone: 0,
        offset: 0,
        bits: &bits,
        data: &vec![9; 64 * PAGE],
    };
    writer.write(pages).unwrap();
    let absent = vec![writer.leave_out(pages).unwrap()];
    let ranges = memory.zones().iter().map(|zone| zone.ranges[0].clone());
    let source = Elsewhere {
        zones: ranges.map(|range| (range.start, range.end)).collect(),
        answers,
        ended,
    };
    let start: MachineThreadStart = Arc::new(|_| ());
    let content = Content::Elsewhere(absent, Box::new(source));
    let owner = Box::new(Owner(owner));
    let fills = background(fills);
    let on_demand = OnDemand::start(&memory, content, &faults, fills, &[], &start, owner);
    let restored = Restored {
        on_demand: on_demand.unwrap(),
        memory,
        told,
    };
    Some((restored, end))
}

#[test]
fn pages_come_from_another_process_when_they_are_touched() {
    let Some((it, end)) = from_elsewhere(false, usize::MAX) else {
        return;
    };
    assert_eq!(it.resident_pages(), 0);
    assert_eq!(read(&it.memory, 5), mark(5));
    assert_eq!(it.resident_pages(), 1);
    it.discard(7..9);
    assert_eq!(read(&it.memory, 8), 0, "it was discarded before it came");
    assert!(end.try_recv().is_err(), "the others may still be needed");
    assert!(it.on_demand.finish());
    end.recv_timeout(DEADLINE).unwrap();
    let with_data = (0..64).filter(|page| !(7..9).contains(page) && !EMPTY.contains(page));
    let resident = it.resident_pages();
    assert!(
        resident <= with_data.clone().count() as u64 + 1,
        "{resident}"
    );
    for page in with_data {
        assert_eq!(read(&it.memory, page), mark(page));
    }
    for page in EMPTY.chain([7, 8, 64]) {
        assert_eq!(read(&it.memory, page), 0);
    }
}

#[test]
fn process_without_its_pages_is_named_and_nothing_reads_as_zeros() {
    let Some((it, end)) = from_elsewhere(true, 0) else {
        return;
    };
    let told = it.told.recv_timeout(DEADLINE).unwrap();
    assert!(
        matches!(&told, Sent::Failed(text) if text.contains("does not send it: it has gone")),
        "{told:?}"
    );
    assert!(!it.on_demand.finish());
    assert!(end.try_recv().is_err());
}
