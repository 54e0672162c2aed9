//! Entry point of the fuzz target `migration`, and of ordinary tests with random bytes.

use api::VmConfig;
use api::config::MemoryConfig;
use machine::memory::GuestMemory;

use super::receive::{Reached, receive_from};
use super::wire::{Kind, Reader, Writer};
use super::{Limits, MigrationError, TargetOwner};
use crate::snapshot::SnapshotState;

/// Receives the bytes as a target does: as they are, or cut into messages with valid headers and checksums, which
/// random bytes would never have. Returns whether the target took over a machine.
#[must_use]
pub fn receive(bytes: &[u8]) -> bool {
    let (choice, bytes) = bytes.split_first().unwrap_or((&0, &[]));
    let framed = match choice % 2 {
        0 => bytes.to_vec(),
        _ => framed(bytes),
    };
    let mut owner = Owner { commits: false };
    let mut reached = Reached::NotPrepared;
    let mut answers = Writer::new(std::io::sink());
    let reader = Reader::new(&framed[..]);
    let limits = Limits::default();
    let id = [0; 16];
    let received = receive_from(reader, &mut answers, id, &limits, &mut owner, &mut reached);
    assert_eq!(
        received.is_ok(),
        owner.commits,
        "a target that has failed took over the machine, or the other way round"
    );
    owner.commits
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
        bytes = rest;
    }
    std::mem::take(writer.get_mut())
}

/// Has RAM of 16 MiB, whatever the configuration says.
struct Owner {
    commits: bool,
}

impl TargetOwner for Owner {
    fn begin(&mut self) {}

    fn prepare(
        &mut self,
        config: VmConfig,
        _state: SnapshotState,
    ) -> Result<GuestMemory, MigrationError> {
        super::movable(&config)?;
        let memory = MemoryConfig {
            size: 16 << 20,
            ..MemoryConfig::default()
        };
        Ok(GuestMemory::new(&memory, 46).expect("a small machine"))
    }

    fn build(&mut self, _state: SnapshotState, _memory: GuestMemory) -> Result<(), MigrationError> {
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
    fn whole() -> Vec<u8> {
        let state = r#"{"version":3,"pc":{"version":1},"thresholds":{},"reporting_paused":false,"memory_size_after_reboot":null}"#;
        let config = r#"{"payload":{"kernel":"/k"}}"#;
        let mut pages = vec![0; 16];
        // One byte of bitmap would be too few: a chunk has 64.
        pages[4] = 64;
        pages.resize(16 + 64 + 4096, 0);
        pages[16] = 1;
        let mut bytes = vec![1];
        let kind = |kind| Kind::ALL.iter().position(|it| *it == kind);
        for (it, payload) in [
            (Kind::Config, config.as_bytes()),
            (Kind::State, state.as_bytes()),
            (Kind::Pages, &pages[..]),
            (Kind::Clear, &[]),
            (Kind::PassEnd, &[0; 4]),
            (Kind::State, state.as_bytes()),
            (Kind::Commit, &[1]),
        ] {
            bytes.push(kind(it).expect("a kind") as u8);
            bytes.extend((payload.len() as u16).to_le_bytes());
            bytes.extend(payload);
        }
        bytes
    }

    #[test]
    fn whole_migration_is_received() {
        assert!(receive(&whole()));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn damaged_migration_never_panics(at in 0_usize..4700, byte in any::<u8>(), end in 1_usize..4700) {
            let mut bytes = whole();
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
