//! Entry point of the fuzz target `migration`, and of ordinary tests with random bytes.

use std::error::Error;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};

use api::VmConfig;
use api::config::MemoryConfig;
use machine::memory::on_demand::{Content, PageSource};
use machine::memory::{GuestMemory, ZoneFiles};

use super::receive::{Joined, Reached, receive_from};
use super::wire::{Hello, Kind, MigrationId, Reader, Transfer, Writer};
use super::{Address, Cancel, Incoming, Limits, Listener, MigrationError, TargetOwner};
use crate::snapshot::SnapshotState;

const ID: MigrationId = [0; 16];

/// Receives the bytes as a target does: as they are, or cut into messages with valid headers and checksums, which
/// random bytes would never have. Returns whether the target took over a machine.
#[must_use]
pub fn receive(bytes: &[u8]) -> bool {
    let (choice, bytes) = bytes.split_first().unwrap_or((&0, &[]));
    let transfer = match choice / 4 % 2 {
        0 => Transfer::Copied,
        _ => Transfer::HandedOver,
    };
    let connections = match choice / 8 % 2 {
        1 if transfer == Transfer::Copied => 2,
        _ => 1,
    };
    let transfer = match choice / 16 % 2 {
        1 if connections == 2 => Transfer::Postponed,
        _ => transfer,
    };
    let hello = Hello {
        id: ID,
        transfer,
        connections,
    };
    let (bytes, others) = divided(bytes, connections);
    let (framed, others_bytes) = match choice % 4 {
        0 => (bytes.to_vec(), others.to_vec()),
        1 => (framed(bytes), framed(others)),
        2 => return receive_from_socket(hello, &framed(bytes), &framed(others), &[]),
        // A client that is not a source connects first.
        _ => return receive_from_socket(hello, &framed(bytes), &framed(others), bytes),
    };
    let mut owner = Owner { commits: false };
    let mut reached = Reached::NotPrepared;
    let mut answers = Writer::new(std::io::sink());
    let reader = Reader::new(&framed[..]);
    let limits = Limits::default();
    let join = || {
        let is_postponed = transfer == Transfer::Postponed;
        let others = (1..connections).filter(|_| !is_postponed);
        Ok(Joined {
            peer: None,
            readers: others.map(|_| Reader::new(&others_bytes[..])).collect(),
            fetches: is_postponed.then(|| Box::new(NeverAsked) as Box<dyn PageSource>),
        })
    };
    let received = receive_from(
        reader,
        &mut answers,
        hello,
        join,
        &limits,
        &mut owner,
        &mut reached,
    );
    assert_eq!(
        received.is_ok(),
        owner.commits,
        "a target that has failed took over the machine, or the other way round"
    );
    owner.commits
}

/// Bytes of the first connection, and of the second if there is one. Two bytes divide them.
fn divided(bytes: &[u8], connections: u32) -> (&[u8], &[u8]) {
    match bytes.split_first_chunk() {
        Some((length, rest)) if connections > 1 => {
            rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()))
        }
        _ => (bytes, &[]),
    }
}

/// The same with the introduction of the source, which breaks the connection after its messages and asks for the outcome.
/// Returns whether the target took over a machine.
fn receive_from_socket(hello: Hello, messages: &[u8], others: &[u8], first: &[u8]) -> bool {
    let any = Address::parse("tcp:127.0.0.1:0").expect("an address");
    let listener = Listener::bind(&any, None).expect("a free port");
    let Address::Tcp(address) = listener.address() else {
        unreachable!("it is as bound");
    };
    let incoming = Incoming {
        listener,
        postpones: true,
        limits: Limits::default(),
        cancel: Cancel::default(),
    };
    let mut owner = Owner { commits: false };
    let mut introduction = Writer::new(Vec::new());
    introduction.hello(&hello).expect("no connection can fail");
    let answer = std::thread::scope(|scope| {
        scope.spawn(|| incoming.run(&mut owner));
        let _answered = first.first().map(|_| exchange(address, first));
        // Open until the source asks: unread words of the target would otherwise break it.
        let _connection = send(address, &[introduction.get_mut(), messages].concat());
        let _others = (hello.connections > 1).then(|| {
            let mut introduction = Writer::new(Vec::new());
            introduction.join(&ID, 1).expect("no connection can fail");
            send(address, &[introduction.get_mut(), others].concat())
        });
        let mut question = Writer::new(Vec::new());
        question.ask(&ID).expect("no connection can fail");
        question
            .send(Kind::Released, &[])
            .expect("no connection can fail");
        exchange(address, question.get_mut())
    });
    let answer = answer.unwrap_or_default();
    let outcomes = [Kind::Committed, Kind::Abandoned];
    if let Ok(answer) = Reader::new(&answer[..]).next(&outcomes, "the outcome") {
        assert_eq!(answer.kind == Kind::Committed, owner.commits, "a lie");
    }
    owner.commits
}

/// A connection over which these bytes were sent, and nothing will follow.
fn send(address: SocketAddr, bytes: &[u8]) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(bytes)?;
    stream.shutdown(Shutdown::Write)?;
    Ok(stream)
}

/// Sends the bytes; returns the answer. The target may have ended before.
fn exchange(address: SocketAddr, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    send(address, bytes)?.read_to_end(&mut answer)?;
    Ok(answer)
}

/// Each message is a byte for its kind, two for its length, and its payload.
fn framed(mut bytes: &[u8]) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new());
    while let Some(([kind, low, high], rest)) = bytes.split_first_chunk() {
        let kind = Kind::ALL[usize::from(*kind) % Kind::ALL.len()];
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (payload, rest) = rest.split_at(length);
        // A payload that is too long for its kind is left out.
        writer.send(kind, payload).ok();
        if kind == Kind::MemoryFile {
            // The byte that carries the file.
            writer.get_mut().push(u8::from(!payload.is_empty()));
        }
        bytes = rest;
    }
    std::mem::take(writer.get_mut())
}

/// The machine of [`Owner`] does not touch its RAM.
#[derive(Debug)]
struct NeverAsked;

impl PageSource for NeverAsked {
    fn fetch(
        &mut self,
        _zone: usize,
        _offset: u64,
        _bits: &[u8],
        _put: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(())
    }

    fn end(&mut self) {}
}

/// Has RAM of 16 MiB, regardless of the configuration.
struct Owner {
    commits: bool,
}

impl TargetOwner for Owner {
    fn begin(&mut self) {}

    fn prepare(
        &mut self,
        config: VmConfig,
        _state: SnapshotState,
        _files: ZoneFiles,
    ) -> Result<GuestMemory, MigrationError> {
        super::movable(&config)?;
        let memory = MemoryConfig {
            size: 16 << 20,
            ..MemoryConfig::default()
        };
        Ok(GuestMemory::new(&memory, 46).expect("a small machine"))
    }

    fn build(
        &mut self,
        _state: SnapshotState,
        _memory: GuestMemory,
        _postponed: Option<Content>,
    ) -> Result<(), MigrationError> {
        Ok(())
    }

    fn commit(&mut self, _runs: bool) -> Result<(), MigrationError> {
        self.commits = true;
        Ok(())
    }

    fn end(&mut self, _end: Result<(), MigrationError>) {}
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A whole migration in the form that [`framed`] reads.
    fn whole(choice: u8) -> Vec<u8> {
        let state = r#"{"version":3,"pc":{"version":1},"thresholds":{},"reporting_paused":false,"memory_size_after_reboot":null}"#;
        let config = r#"{"payload":{"kernel":"/k"}}"#;
        let mut pages = vec![0; 16];
        // One byte of bitmap would be too few: a chunk has 64.
        pages[4] = 64;
        pages.resize(16 + 64 + 4096, 0);
        pages[16] = 1;
        let mut bytes = Vec::new();
        let kind = |kind| Kind::ALL.iter().position(|it| *it == kind);
        let memory = match choice / 4 % 2 {
            0 => vec![
                (Kind::PassBegin, &[0; 4][..]),
                (Kind::Pages, &pages[..]),
                (Kind::Clear, &[]),
                (Kind::PassEnd, &[0; 4]),
            ],
            _ => vec![
                (Kind::MemoryFile, &[0; 4][..]),
                (Kind::MemoryFile, &[1, 0, 0, 0]),
                (Kind::PassEnd, &[0; 4]),
            ],
        };
        let introduction = [
            (Kind::Config, config.as_bytes()),
            (Kind::State, state.as_bytes()),
        ];
        let end = [(Kind::State, state.as_bytes()), (Kind::Commit, &[1])];
        for (it, payload) in introduction.into_iter().chain(memory).chain(end) {
            bytes.push(kind(it).expect("a kind") as u8);
            bytes.extend((payload.len() as u16).to_le_bytes());
            bytes.extend(payload);
        }
        if choice / 8 == 0 {
            return [&[choice][..], &bytes].concat();
        }
        let length = (bytes.len() as u16).to_le_bytes();
        let pass_end = [kind(Kind::PassEnd).expect("a kind") as u8, 4, 0, 0, 0, 0, 0];
        [&[choice][..], &length, &bytes, &pass_end].concat()
    }

    #[test]
    fn whole_migration_is_received() {
        // TCP carries no files.
        for choice in [1, 2, 3, 5, 9, 10, 11] {
            assert!(receive(&whole(choice)), "{choice}");
        }
        assert!(!receive(&whole(6)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn damaged_migration_never_panics(choice in 1_u8..12, at in 0_usize..4700, byte in any::<u8>(), end in 1_usize..4700) {
            let mut bytes = whole(choice);
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(end);
            let _taken_over = receive(&bytes);
        }

        #[test]
        fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            prop_assert!(!receive(&bytes));
        }
    }
}
