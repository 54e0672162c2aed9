//! Tests migrations that hand over memory files.

use std::fs::File;
use std::path::Path;

use super::super::peer::Peer;
use super::super::wire::{Hello, Kind, Reader, Transfer, Writer};
use super::*;

fn shared() -> VmConfig {
    let mut config = config();
    config.memory.shared = true;
    config
}

fn source(kvm: &Kvm) -> Source {
    let mut source = Source::of(kvm, shared());
    source.local = true;
    source
}

fn socket(folder: &Path) -> Address {
    Address::Unix(folder.join("socket"))
}

#[test]
fn target_maps_the_pages_of_its_source_and_no_content_is_sent() {
    let Some(kvm) = open_kvm() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let source = source(&kvm);
    let (received, address, _) = receive(&socket(folder.path()), "");
    let (sent, steps, _) = source.send(address);
    let (report, received) = expect_arrival(&source, &sent, &received);
    // They are the same pages, not equal ones.
    let target = received.memory.as_ref().unwrap();
    let write = GuestAddress(8 << 20);
    let ram = target.ram().memory();
    ram.write_obj(9_u64, write).unwrap();
    let ram = source.memory.ram().memory();
    assert_eq!(ram.read_obj::<u64>(write).unwrap(), 9);
    assert_eq!((report.data_bytes, report.passes), (0, 0));
    assert!(report.wire_bytes < 4096, "{report:?}");
    assert_eq!(*steps.lock().unwrap(), ["sync", "pause", "save", "commit"]);
}

#[test]
fn target_that_refuses_leaves_the_machine_and_its_memory_to_the_source() {
    let Some(kvm) = open_kvm() else {
        return;
    };
    for step in ["prepare", "build", "commit"] {
        // Its own for each run: the last target may still listen.
        let folder = tempfile::tempdir().unwrap();
        let source = source(&kvm);
        let (received, address, _) = receive(&socket(folder.path()), step);
        let (sent, ..) = source.send(address);
        let end = sent.recv_timeout(DEADLINE).unwrap();
        assert!(matches!(end, SourceEnd::Failed(_)), "{step}: {end:?}");
        let received = received.recv_timeout(DEADLINE).unwrap();
        assert_eq!(
            (received.error.as_deref(), received.runs),
            (Some(step), false)
        );
        let ram = source.memory.ram().memory();
        assert_eq!(ram.read_obj::<u64>(GuestAddress(0)).unwrap(), 1 << 40);
    }
}

#[test]
fn connection_cut_around_each_message_leaves_exactly_one_owner() {
    let Some(kvm) = open_kvm() else {
        return;
    };
    let run = |way, bytes, after| {
        // Its own for each run: a target may answer questions long after the end.
        let folder = tempfile::tempdir().unwrap();
        let source = source(&kvm);
        let (received, address, cancel) = receive(&socket(folder.path()), "");
        let (proxy, counted) = cut(&address, way, bytes, after);
        let (sent, ..) = source.send(proxy);
        let sent = sent.recv_timeout(DEADLINE).unwrap();
        if way == Way::ToTarget && bytes < HELLO_BYTES || bytes == 0 {
            cancel.set();
        }
        let received = received.recv_timeout(DEADLINE).unwrap();
        (sent, received, counted.recv_timeout(DEADLINE).unwrap())
    };
    let (end, _, [to_target, to_source]) = run(Way::ToTarget, usize::MAX, After::Reopened);
    assert!(matches!(end, SourceEnd::Finished(_)), "{end:?}");
    assert_eq!(to_source, 3 * HEADER);
    let commit = to_target - 2 * HEADER - 1;
    // The memory file comes between the two states, which are equally long.
    let state = HEADER + state_text().len();
    let file = commit - state - 2 * HEADER - 4 - 4 - 1;
    let places = [0, 30, file - 1, file, file + HEADER + 4, file + HEADER + 5];
    for bytes in places.into_iter().chain(commit - 3..to_target) {
        let arrives = bytes > commit + HEADER;
        for after in [After::Closed, After::Reopened] {
            let (end, received, _) = run(Way::ToTarget, bytes, after);
            let may_be_unsure = bytes >= commit && after == After::Closed;
            expect_one_owner(&end, &received, arrives, may_be_unsure, bytes);
        }
    }
    for bytes in [
        0,
        HEADER - 1,
        HEADER,
        2 * HEADER - 1,
        2 * HEADER,
        3 * HEADER - 1,
    ] {
        let (end, received, _) = run(Way::ToSource, bytes, After::Reopened);
        let arrives = bytes >= 2 * HEADER;
        assert_eq!(received.runs, arrives && received.error.is_none());
        match end {
            SourceEnd::Finished(_) => assert!(received.runs, "{bytes}: {received:?}"),
            SourceEnd::Failed(_) => assert!(!received.runs, "{bytes}: {received:?}"),
            end => panic!("{bytes}: {end:?}"),
        }
    }
}

/// Sends this to a target that waits for memory files; returns the reason for its refusal.
fn refusal(files: impl FnOnce(&mut Writer<Peer>)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let (received, address, _) = receive(&socket(folder.path()), "");
    let mut peer = address.connect(&Cancel::default(), DEADLINE).unwrap();
    wire::Channel::set_limit(&mut peer, DEADLINE);
    let mut writer = Writer::new(peer.clone());
    let hello = Hello {
        id: [1; 16],
        transfer: Transfer::HandedOver,
        connections: 1,
    };
    writer.hello(&hello).unwrap();
    let config = serde_json::to_string(&shared()).unwrap();
    writer.send(Kind::Config, config.as_bytes()).unwrap();
    writer.send(Kind::State, state_text().as_bytes()).unwrap();
    files(&mut writer);
    let mut reader = Reader::new(peer);
    let answer = reader.next(&[Kind::Accepted], "an answer");
    let refusal = answer.unwrap_err().to_string();
    assert!(received.recv_timeout(DEADLINE).unwrap().error.is_some());
    refusal
}

fn end(writer: &mut Writer<Peer>) {
    writer.send(Kind::PassEnd, &[0; 4]).unwrap();
}

#[test]
fn files_of_a_lying_source_are_refused_by_name() {
    let null = || File::open("/dev/null").unwrap();
    let refused = refusal(end);
    assert!(refused.contains("it is missing"), "{refused}");
    let refused = refusal(|writer| {
        writer.memory_file(0, &null()).unwrap();
        end(writer);
    });
    assert!(refused.contains("not a memory file"), "{refused}");
    let refused = refusal(|writer| writer.memory_file(1, &null()).unwrap());
    assert!(refused.contains("not of the next zone"), "{refused}");
    let refused = refusal(|writer| {
        writer.send(Kind::MemoryFile, &[0; 4]).unwrap();
        writer.get_mut().write_all(&[0]).unwrap();
    });
    assert!(refused.contains("carries no file"), "{refused}");
    let refused = refusal(|writer| {
        // The target closes the connection before all of them have been sent.
        for number in 0..=wire::FILES_MAX {
            writer.memory_file(number, &null()).ok();
        }
    });
    assert!(refused.contains("too many memory files"), "{refused}");
}

#[test]
fn tcp_carries_no_files() {
    let Some(kvm) = open_kvm() else {
        return;
    };
    let source = source(&kvm);
    let (received, address, _) = receive(&local(), "");
    let (sent, ..) = source.send(address);
    let error = expect_failure(&sent, DEADLINE);
    assert!(error.contains("only a UNIX socket"), "{error}");
    assert!(received.recv_timeout(DEADLINE).unwrap().error.is_some());
}

#[test]
fn private_memory_is_refused_with_the_settings_that_help() {
    let memory = GuestMemory::new(&config().memory, 46).unwrap();
    let error = Ram::handed_over(&memory).unwrap_err();
    assert!(error.is_of_request());
    assert!(error.to_string().contains("use shared=on"), "{error}");
}
