//! Tests migrations over several connections.

use std::net::Shutdown;

use super::super::peer::Peer;
use super::super::wire::{Channel as _, Hello, Kind, Reader, Transfer, WireError, Writer};
use super::*;

const COUNT: u32 = 4;

/// A source with data in every chunk.
fn source(kvm: &Kvm) -> Source {
    let mut source = Source::new(kvm);
    source.connections = COUNT;
    let ram = source.memory.ram().memory();
    for page in (0..RAM_BYTES / 4096 - 1).step_by(3) {
        ram.write_obj(page | 1 << 40, GuestAddress(page * 4096))
            .unwrap();
    }
    source
}

#[test]
fn machine_moves_over_several_connections_with_what_was_written_last() {
    let Some(kvm) = open_kvm() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let unix = Address::Unix(folder.path().join("socket"));
    for (address, limit) in [(local(), None), (unix, NonZeroU64::new(64 << 20))] {
        let source = Source {
            bytes_per_second_max: limit,
            ..source(&kvm)
        };
        let (received, address, _) = receive(&address, "");
        let (sent, steps, _) = source.send(address);
        let (report, _) = expect_arrival(&source, &sent, &received);
        let pages = RAM_BYTES / 4096;
        assert!(report.data_bytes > pages / 3 * 4096, "{report:?}");
        assert!(report.wire_bytes > report.data_bytes, "{report:?}");
        let steps = steps.lock().unwrap();
        assert_eq!(
            *steps,
            ["pass 0", "sync", "pause", "save", "pass 1", "commit"]
        );
    }
}

/// Forwards all connections; closes the one with this number when `bytes` bytes have come from the source.
fn cut_one(target: &Address, number: usize, bytes: usize) -> Address {
    let Address::Tcp(target) = *target else {
        panic!("{target}");
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = Address::Tcp(listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for (index, source) in listener.incoming().enumerate() {
            let (Ok(source), Ok(target)) = (source, TcpStream::connect(target)) else {
                return;
            };
            let limit = if index == number {
                bytes as u64
            } else {
                u64::MAX
            };
            let (from, to) = (source.try_clone().unwrap(), target.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut &to, &mut &from).ok());
            std::thread::spawn(move || {
                std::io::copy(&mut (&source).take(limit), &mut &target).ok();
                for stream in [source, target] {
                    stream.shutdown(Shutdown::Both).ok();
                }
            });
        }
    });
    address
}

#[test]
fn any_connection_that_breaks_ends_the_migration_on_both_sides() {
    let Some(kvm) = open_kvm() else {
        return;
    };
    for number in 0..COUNT as usize {
        // In the introduction, behind it, in the first message of a pass, which may be its end, and in its pages.
        let places = [10, HEADER + 24, HEADER + 34, 100_000];
        for bytes in places.into_iter().take(if number == 0 { 4 } else { 3 }) {
            let source = source(&kvm);
            let limits = Limits {
                connect: Duration::from_secs(1),
                ..LIMITS
            };
            let (received, address, cancel) = receive_within(&local(), "", limits);
            let (sent, ..) = source.send(cut_one(&address, number, bytes));
            let end = sent.recv_timeout(DEADLINE).unwrap();
            assert!(
                matches!(end, SourceEnd::Failed(_)),
                "{number} {bytes}: {end:?}"
            );
            if number == 0 && bytes < HELLO_BYTES {
                cancel.set();
            }
            let received = received.recv_timeout(DEADLINE).unwrap();
            assert!(!received.runs && received.error.is_some(), "{received:?}");
        }
    }
}

#[test]
fn target_that_refuses_is_heard_while_all_connections_are_busy() {
    let Some(kvm) = open_kvm() else {
        return;
    };
    let source = source(&kvm);
    let (received, address, cancel) = receive(&local(), "build");
    let (sent, ..) = source.send(address);
    let error = expect_failure(&sent, DEADLINE);
    assert!(error.contains("ended the migration: build"), "{error}");
    assert!(received.recv_timeout(DEADLINE).unwrap().error.is_some());
    drop(cancel);
}

/// The first connection of a source that announces [`COUNT`] connections and has been accepted.
struct Liar {
    address: Address,
    reader: Reader<Peer>,
    writer: Writer<Peer>,
    received: Receiver<Received>,
}

impl Liar {
    fn new() -> Self {
        let limits = Limits {
            connect: Duration::from_millis(500),
            ..LIMITS
        };
        let (received, address, _) = receive_within(&local(), "", limits);
        let peer = connect(&address);
        let mut writer = Writer::new(peer.clone());
        let hello = Hello {
            id: [1; 16],
            transfer: Transfer::Copied,
            connections: COUNT,
        };
        writer.hello(&hello).unwrap();
        let config = serde_json::to_string(&config()).unwrap();
        writer.send(Kind::Config, config.as_bytes()).unwrap();
        writer.send(Kind::State, state_text().as_bytes()).unwrap();
        let mut reader = Reader::new(peer);
        reader.next(&[Kind::Accepted], "an answer").unwrap();
        Self {
            address,
            reader,
            writer,
            received,
        }
    }

    fn join(&self, number: u32) -> Writer<Peer> {
        let mut writer = Writer::new(connect(&self.address));
        writer.join(&[1; 16], number).unwrap();
        writer
    }

    /// The reason that the target gives.
    fn refusal(mut self) -> String {
        let refusal = self.reader.next(&[], "no further message").unwrap_err();
        let received = self.received.recv_timeout(DEADLINE).unwrap();
        assert!(!received.runs && received.error.is_some(), "{received:?}");
        assert!(matches!(refusal, WireError::Refused { .. }), "{refusal}");
        refusal.to_string()
    }
}

fn connect(address: &Address) -> Peer {
    let mut peer = address.connect(&Cancel::default(), DEADLINE).unwrap();
    peer.set_limit(DEADLINE);
    peer
}

#[test]
fn connections_that_were_not_announced_are_refused_by_name() {
    let liar = Liar::new();
    let _first = liar.join(1);
    let refused = liar.refusal();
    assert!(refused.contains("opened 2 of 4 connections"), "{refused}");
    let liar = Liar::new();
    let _beyond = liar.join(COUNT);
    let refused = liar.refusal();
    assert!(
        refused.contains("connection 4 that does not exist"),
        "{refused}"
    );
    let liar = Liar::new();
    let _twice = [liar.join(2), liar.join(2)];
    let refused = liar.refusal();
    assert!(refused.contains("connection 2 twice"), "{refused}");
    // Somebody else's is not counted, and does not end the migration.
    let liar = Liar::new();
    let mut other = Writer::new(connect(&liar.address));
    other.join(&[2; 16], 1).unwrap();
    let mut answer = Reader::new(other.get_mut().clone());
    let refused = answer.next(&[], "no answer").unwrap_err().to_string();
    assert!(refused.contains("another migration"), "{refused}");
    let refused = liar.refusal();
    assert!(refused.contains("opened 1 of 4 connections"), "{refused}");
}

#[test]
fn pass_that_is_not_the_same_on_all_connections_is_refused_by_name() {
    for (begin, end, text) in [(1, 0, "PassBegin"), (0, 1, "PassEnd")] {
        let mut liar = Liar::new();
        let mut others: Vec<_> = (1..COUNT).map(|number| liar.join(number)).collect();
        liar.reader.next(&[Kind::Joined], "the answer").unwrap();
        let number = |it: u32| it.to_le_bytes();
        liar.writer.send(Kind::PassBegin, &number(begin)).unwrap();
        // The target may have ended already.
        others[1].send(Kind::PassEnd, &number(end)).ok();
        let refused = liar.refusal();
        assert!(
            refused.contains(text) && refused.contains("of another pass"),
            "{refused}"
        );
    }
}
