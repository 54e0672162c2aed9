//! Tests migrations in which the rest of RAM follows the machine.

use machine::memory::on_demand::{Background, Faults, FillError, FillOwner, FillReport};

use super::super::postponed::Fetches;
use super::super::wire::{Kind, Reader, Writer};
use super::*;

struct Owner;

impl FillOwner for Owner {
    fn progress(&self, _bytes: u64) {}

    fn filled(&self, _report: FillReport) {}

    fn touched(&self, _pages: &[u32]) {}

    fn failed(&self, error: &FillError) {
        panic!("{}", api::error_line(error));
    }
}

/// As the owner of a target does when it completes the machine.
pub(super) fn fill(memory: &GuestMemory, content: Content) -> OnDemand {
    let faults = Faults::open().unwrap();
    let start: machine::threads::MachineThreadStart = Arc::new(|_| ());
    let at_once = Background::AtOnce;
    OnDemand::start(
        memory,
        content,
        &faults,
        at_once,
        &[],
        &start,
        Box::new(Owner),
    )
    .unwrap()
}

/// Its guest writes so many pages in each pass that no pass is short enough.
fn busy_source() -> Option<Source> {
    Faults::open().map_err(test_skip::skip).ok()?;
    let mut source = Source::new(&open_kvm()?);
    source.postpones = true;
    source.busy_pages = 1500;
    source.downtime = Duration::from_nanos(1);
    Some(source)
}

#[test]
fn rest_that_the_guest_writes_too_fast_follows_the_machine() {
    let Some(source) = busy_source() else {
        return;
    };
    let (received, address, _) = receive(&local(), "");
    let (sent, steps, _) = source.send(address);
    let (report, received) = expect_arrival(&source, &sent, &received);
    assert!(report.was_postponed);
    assert!(received.on_demand.unwrap().finish());
    let steps = steps.lock().unwrap();
    assert_eq!(
        *steps,
        ["pass 0", "sync", "pass 1", "pause", "save", "commit"]
    );
}

#[test]
fn nothing_follows_a_machine_whose_rest_can_be_sent_during_the_pause() {
    let Some(mut source) = busy_source() else {
        return;
    };
    source.busy_pages = 0;
    let (received, address, _) = receive(&local(), "");
    let (sent, ..) = source.send(address);
    let (report, received) = expect_arrival(&source, &sent, &received);
    assert!(!report.was_postponed && received.on_demand.is_none());
}

#[test]
fn target_that_refuses_a_postponed_machine_leaves_it_to_the_source() {
    for step in ["prepare", "build", "commit"] {
        let Some(source) = busy_source() else {
            return;
        };
        let (received, address, _) = receive(&local(), step);
        let (sent, ..) = source.send(address);
        let error = expect_failure(&sent, DEADLINE);
        assert!(error.contains(step), "{error}");
        let received = received.recv_timeout(DEADLINE).unwrap();
        assert_eq!(
            (received.error.as_deref(), received.runs),
            (Some(step), false)
        );
    }
}

#[test]
fn target_that_does_not_expect_postponed_ram_names_the_setting() {
    let Some(source) = busy_source() else {
        return;
    };
    let (ends, received) = channel();
    let incoming = Incoming {
        listener: Listener::bind(&local(), None).unwrap(),
        postpones: false,
        limits: LIMITS,
        cancel: Cancel::default(),
    };
    let address = incoming.listener.address();
    let mut owner = FakeTarget {
        received: Received::default(),
        refuses_to: "",
        ends,
    };
    std::thread::spawn(move || incoming.run(&mut owner));
    let (sent, ..) = source.send(address);
    let error = expect_failure(&sent, DEADLINE);
    assert!(error.contains("memory_mode=postcopy"), "{error}");
    assert!(received.recv_timeout(DEADLINE).unwrap().error.is_some());
}

#[test]
fn pages_that_were_not_asked_for_are_refused() {
    use machine::memory::Pages;
    use machine::memory::on_demand::PageSource;

    let data = [7_u8; 4096];
    let wanted = [0b101_u8];
    let right = Pages {
        zone: 1,
        offset: 4096,
        bits: &[0b100],
        data: &data,
    };
    let answer = |pages: Pages<'_>| {
        let mut answer = Writer::new(Vec::new());
        answer.pages(Kind::Pages, pages).unwrap();
        let bytes = std::mem::take(answer.get_mut());
        let mut fetches = Fetches::new(Reader::new(&bytes[..]), Writer::new(std::io::sink()));
        let mut got = Vec::new();
        let fetched = fetches.fetch(1, 4096, &wanted, &mut |page, data| {
            got.push((page, data[0]));
        });
        fetched.map(|()| got).map_err(|error| error.to_string())
    };
    assert_eq!(answer(right), Ok(vec![(2, 7)]));
    let nothing = Pages {
        bits: &[0],
        data: &[],
        ..right
    };
    assert_eq!(answer(nothing), Ok(vec![]));
    let bits: [&[u8]; 4] = [&[0b110], &[], &[0b100, 0], &[0b101]];
    let wrong = [Pages { zone: 0, ..right }, Pages { offset: 0, ..right }];
    let wrong = wrong
        .into_iter()
        .chain(bits.map(|bits| Pages { bits, ..right }));
    for pages in wrong.chain([Pages {
        data: &data[1..],
        ..right
    }]) {
        let error = answer(pages).unwrap_err();
        assert!(error.contains("invalid Pages"), "{error}");
    }
}
