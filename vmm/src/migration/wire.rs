//! The messages of a migration.
//!
//! ```text
//!  0      4      6      8       12      16
//!  │magic │ kind │ 0    │ bytes │ crc32 │ payload …
//! ```
//! All integers are little-endian. The checksum covers the first twelve bytes and the payload. Each kind has a maximum
//! length, which is checked before anything is read. A peer therefore cannot make the reader allocate more than the
//! largest message that is possible at that point.

use std::fs::File;
use std::io::{self, Read, Write};
use std::time::Duration;

use machine::memory::{PageRun, Pages};

/// Version of the messages and of their order. Both sides must have the same.
pub const VERSION: u32 = 4;
const MAGIC: [u8; 4] = *b"CHBM";
const HEADER_BYTES: usize = 16;

/// Size of the header of a TLS record, and what it begins with.
const TLS_RECORD_BYTES: usize = 5;
const TLS_ALERT: u8 = 21;
const TLS_HANDSHAKE: u8 = 22;
const TLS_MAJOR: u8 = 3;

const CHUNK_BYTES: u32 = 2 << 20;
const BITMAP_BYTES_MAX: u32 = 64;
const PAGES_HEAD_BYTES: usize = 16;
const RUN_BYTES: usize = 20;
/// Runs in one message.
pub const RUNS_MAX: usize = 1024;
/// Longer than any [`Kind::Hello`] of this version: a peer of a later version is refused for its version.
const INTRODUCTION_BYTES_MAX: u32 = 64;
/// Connections of one migration.
pub const CONNECTIONS_MAX: u32 = 128;
/// Memory files that a target opens for a source.
pub const FILES_MAX: u32 = 256;
const REASON_BYTES_MAX: u32 = 4096;
/// The same limit as for a request body.
const CONFIG_BYTES_MAX: u32 = 4 << 20;
/// The largest state: [`Reader::set_state_bytes_max`] narrows it to that of the configuration.
const STATE_BYTES_MAX: u32 = 1 << 30;

/// Identifies one migration.
pub type MigrationId = [u8; 16];

/// How RAM comes to the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// Its content is copied.
    Copied,
    /// The target maps the source's memory files.
    HandedOver,
    /// Its content is copied, and the part that the guest writes too fast comes after the commit, when the target asks for
    /// it on the second connection.
    Postponed,
}

impl Transfer {
    fn number(self) -> u8 {
        match self {
            Self::Copied => 0,
            Self::HandedOver => 1,
            Self::Postponed => 2,
        }
    }
}

/// The start of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// Its identifier.
    pub id: MigrationId,
    /// How RAM comes.
    pub transfer: Transfer,
    /// Connections over which it comes, from 1 to [`CONNECTIONS_MAX`].
    pub connections: u32,
}

macro_rules! kinds {
    ($($(#[doc = $doc:literal])* $kind:ident = $number:literal, $bytes_max:expr;)*) => {
        /// The kind of message.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Kind {
            $($(#[doc = $doc])* $kind,)*
        }

        impl Kind {
            /// Every kind.
            pub const ALL: &[Self] = &[$(Self::$kind),*];

            fn number(self) -> u16 {
                match self { $(Self::$kind => $number,)* }
            }

            fn of(number: u16) -> Option<Self> {
                match number {
                    $($number => Some(Self::$kind),)*
                    _ => None,
                }
            }

            /// Maximum length of its payload.
            fn bytes_max(self) -> u32 {
                match self { $(Self::$kind => $bytes_max,)* }
            }
        }
    };
}

kinds! {
    /// Source: the version, the identifier of this migration, how RAM comes, and over how many connections.
    Hello = 1, INTRODUCTION_BYTES_MAX;
    /// Source: the configuration as JSON.
    Config = 2, CONFIG_BYTES_MAX;
    /// Source: the machine and the operator's settings as JSON; first before any memory, then the final state.
    State = 3, STATE_BYTES_MAX;
    /// Target: the machine can continue here.
    Accepted = 4, 0;
    /// Either side: it ends the migration, for the reason in the text.
    Refused = 5, REASON_BYTES_MAX;
    /// Source: pages with data.
    Pages = 6, PAGES_HEAD_BYTES as u32 + BITMAP_BYTES_MAX + CHUNK_BYTES;
    /// Source: pages that read as zeros.
    Clear = 7, (RUNS_MAX * RUN_BYTES) as u32;
    /// Source, at the end of a pass on each connection: the number of the pass.
    PassEnd = 8, 4;
    /// Target: the machine exists here and waits.
    Prepared = 9, 0;
    /// Source: the machine belongs to the target from now on. A byte: whether it runs.
    Commit = 10, 1;
    /// Target: the machine continues here.
    Committed = 11, 0;
    /// Source: it has received that answer.
    Released = 12, 0;
    /// Source, on a new connection: whether the target has received the commit of this migration.
    Ask = 13, INTRODUCTION_BYTES_MAX;
    /// Target: it has not, and never will.
    Abandoned = 14, 0;
    /// Source: the number of a zone. A byte that carries its memory file follows.
    MemoryFile = 15, 4;
    /// Source, on another connection: the version, the identifier, and the number of the connection.
    Join = 16, INTRODUCTION_BYTES_MAX;
    /// Target: all connections are here.
    Joined = 17, 0;
    /// Source: the number of a pass over RAM that begins on all connections.
    PassBegin = 18, 4;
    /// Source: pages that come later.
    Absent = 19, PAGES_HEAD_BYTES as u32 + BITMAP_BYTES_MAX;
    /// Target, on the second connection: it needs these pages now.
    Fetch = 20, PAGES_HEAD_BYTES as u32 + BITMAP_BYTES_MAX;
    /// Target, on the second connection: it needs no further page.
    Complete = 21, 0;
}

/// Reasons why a stream is not that of a migration.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection.
    #[error("The connection to the peer failed")]
    Io(#[from] io::Error),
    /// The end of the stream at or in a message.
    #[error("The peer closed the connection")]
    Closed,
    /// No message begins here.
    #[error("The peer does not send messages of a migration")]
    Magic,
    /// A record of TLS.
    #[error("The peer encrypts the connection by TLS, and this side does not: use tls_dir")]
    Encrypted,
    /// The header or the payload was damaged.
    #[error("A message of kind {kind} is damaged: its checksum does not match")]
    Checksum {
        /// Its number.
        kind: u16,
    },
    /// An unknown kind.
    #[error("The peer sent a message of the unknown kind {kind}")]
    UnknownKind {
        /// Its number.
        kind: u16,
    },
    /// A message of a kind that is not valid now.
    #[error("Unexpected message from the peer: expected {expected}; got {got:?}")]
    Unexpected {
        /// The received value.
        got: Kind,
        /// The valid messages.
        expected: &'static str,
    },
    /// Longer than its kind allows here.
    #[error("The peer sent {kind:?} with {bytes} bytes; at most {bytes_max} are allowed")]
    TooLong {
        /// The received value.
        kind: Kind,
        /// Its length.
        bytes: u32,
        /// Its maximum.
        bytes_max: u32,
    },
    /// A payload that cannot be one.
    #[error("The peer sent an invalid {kind:?}: {reason}")]
    Invalid {
        /// The received value.
        kind: Kind,
        /// The fault.
        reason: &'static str,
    },
    /// Another version.
    #[error(
        "The peer uses version {theirs} of the migration protocol, this program version {VERSION}"
    )]
    Version {
        /// The peer's.
        theirs: u32,
    },
    /// The peer has ended the migration.
    #[error("The peer ended the migration: {reason}")]
    Refused {
        /// Its reason.
        reason: String,
    },
}

/// A stream of messages, each of which must be complete within a limit of time.
pub trait Channel {
    /// A message begins to be sent or to be waited for.
    fn begin_message(&mut self) {}

    /// Changes the limit, from the next message on.
    fn set_limit(&mut self, _limit: Duration) {}

    /// Sends an open file of this process with a byte.
    ///
    /// # Errors
    /// The connection fails, or does not carry files.
    fn send_file(&mut self, _file: &File) -> io::Result<()> {
        Err(no_files())
    }

    /// Receives a byte, and the file that it carries, if any.
    ///
    /// # Errors
    /// The connection fails or has ended, or does not carry files.
    fn receive_file(&mut self) -> io::Result<Option<File>> {
        Err(no_files())
    }
}

pub(super) fn no_files() -> io::Error {
    io::Error::new(
        io::ErrorKind::Unsupported,
        "only a UNIX socket carries files",
    )
}

/// Writes messages.
#[derive(Debug)]
pub struct Writer<W> {
    to: W,
}

impl<W: Write + Channel> Writer<W> {
    /// Writes to `to`.
    pub fn new(to: W) -> Self {
        Self { to }
    }

    /// The destination.
    pub fn get_mut(&mut self) -> &mut W {
        &mut self.to
    }

    /// Sends a message without a payload, or with a plain one.
    ///
    /// # Errors
    /// The connection.
    pub fn send(&mut self, kind: Kind, payload: &[u8]) -> Result<(), WireError> {
        self.send_parts(kind, &[payload])
    }

    fn send_parts(&mut self, kind: Kind, parts: &[&[u8]]) -> Result<(), WireError> {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let bytes = u32::try_from(bytes)
            .ok()
            .filter(|bytes| *bytes <= kind.bytes_max());
        let bytes = bytes.ok_or(WireError::Invalid {
            kind,
            reason: "it is too long to be sent",
        })?;
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&MAGIC);
        header[4..6].copy_from_slice(&kind.number().to_le_bytes());
        header[8..12].copy_from_slice(&bytes.to_le_bytes());
        let mut crc = crc32fast::Hasher::new();
        crc.update(&header[..12]);
        for part in parts {
            crc.update(part);
        }
        header[12..].copy_from_slice(&crc.finalize().to_le_bytes());
        self.to.begin_message();
        self.to.write_all(&header)?;
        for part in parts {
            self.to.write_all(part)?;
        }
        Ok(self.to.flush()?)
    }

    /// Sends [`Kind::Hello`].
    ///
    /// # Errors
    /// The connection.
    pub fn hello(&mut self, hello: &Hello) -> Result<(), WireError> {
        let transfer = [hello.transfer.number()];
        let connections = hello.connections.to_le_bytes();
        let parts = [
            &VERSION.to_le_bytes()[..],
            &hello.id,
            &transfer,
            &connections,
        ];
        self.send_parts(Kind::Hello, &parts)
    }

    /// Sends [`Kind::Join`].
    ///
    /// # Errors
    /// The connection.
    pub fn join(&mut self, id: &MigrationId, number: u32) -> Result<(), WireError> {
        let parts = [&VERSION.to_le_bytes()[..], id, &number.to_le_bytes()];
        self.send_parts(Kind::Join, &parts)
    }

    /// Sends [`Kind::Ask`].
    ///
    /// # Errors
    /// The connection.
    pub fn ask(&mut self, id: &MigrationId) -> Result<(), WireError> {
        self.send_parts(Kind::Ask, &[&VERSION.to_le_bytes(), id])
    }

    /// Sends [`Kind::MemoryFile`] with the memory file of zone `number`.
    ///
    /// # Errors
    /// The connection fails, or does not carry files.
    pub fn memory_file(&mut self, number: u32, file: &File) -> Result<(), WireError> {
        self.send(Kind::MemoryFile, &number.to_le_bytes())?;
        Ok(self.to.send_file(file)?)
    }

    /// Sends [`Kind::Refused`], with as much of the reason as fits.
    ///
    /// # Errors
    /// The connection.
    pub fn refuse(&mut self, reason: &str) -> Result<(), WireError> {
        let mut end = reason.len().min(REASON_BYTES_MAX as usize);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        self.send(Kind::Refused, &reason.as_bytes()[..end])
    }

    /// Sends [`Kind::Pages`], or [`Kind::Absent`] or [`Kind::Fetch`] without data.
    ///
    /// # Errors
    /// The connection.
    pub fn pages(&mut self, kind: Kind, pages: Pages<'_>) -> Result<(), WireError> {
        let mut head = [0; PAGES_HEAD_BYTES];
        head[..4].copy_from_slice(&pages.zone.to_le_bytes());
        head[4..8].copy_from_slice(&(pages.bits.len() as u32).to_le_bytes());
        head[8..].copy_from_slice(&pages.offset.to_le_bytes());
        self.send_parts(kind, &[&head, pages.bits, pages.data])
    }

    /// Sends [`Kind::Clear`] with up to [`RUNS_MAX`] runs.
    ///
    /// # Errors
    /// The connection.
    pub fn clear(&mut self, runs: &[PageRun]) -> Result<(), WireError> {
        let mut payload = Vec::with_capacity(runs.len() * RUN_BYTES);
        for run in runs {
            payload.extend(run.zone.to_le_bytes());
            payload.extend(run.offset.to_le_bytes());
            payload.extend(run.bytes.to_le_bytes());
        }
        self.send(Kind::Clear, &payload)
    }
}

/// A message whose checksum matched. The payload may still be invalid.
#[derive(Debug)]
pub struct Message<'a> {
    /// Its kind.
    pub kind: Kind,
    payload: &'a [u8],
}

/// Reads messages.
#[derive(Debug)]
pub struct Reader<R> {
    from: R,
    payload: Vec<u8>,
    state_bytes_max: u32,
}

impl<R: Read + Channel> Reader<R> {
    /// Reads from `from`.
    pub fn new(from: R) -> Self {
        Self {
            from,
            payload: Vec::new(),
            state_bytes_max: STATE_BYTES_MAX,
        }
    }

    /// The source.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.from
    }

    /// Limits the length of [`Kind::State`].
    pub fn set_state_bytes_max(&mut self, bytes: u64) {
        self.state_bytes_max = u32::try_from(bytes)
            .unwrap_or(u32::MAX)
            .min(STATE_BYTES_MAX);
    }

    /// The next message, if it is one of `expected`, which `names` describes. [`Kind::Refused`] may always come.
    ///
    /// # Errors
    /// The connection ended, or the peer sent something else.
    pub fn next(
        &mut self,
        expected: &[Kind],
        names: &'static str,
    ) -> Result<Message<'_>, WireError> {
        let mut header = [0; HEADER_BYTES];
        self.from.begin_message();
        self.read_header(&mut header)?;
        let [
            m0,
            m1,
            m2,
            m3,
            k0,
            k1,
            r0,
            r1,
            b0,
            b1,
            b2,
            b3,
            c0,
            c1,
            c2,
            c3,
        ] = header;
        if [m0, m1, m2, m3] != MAGIC || [r0, r1] != [0, 0] {
            return Err(WireError::Magic);
        }
        let number = u16::from_le_bytes([k0, k1]);
        let kind = Kind::of(number).ok_or(WireError::UnknownKind { kind: number })?;
        if kind != Kind::Refused && !expected.contains(&kind) {
            return Err(WireError::Unexpected {
                got: kind,
                expected: names,
            });
        }
        let bytes = u32::from_le_bytes([b0, b1, b2, b3]);
        let bytes_max = match kind {
            Kind::State => self.state_bytes_max,
            _ => kind.bytes_max(),
        };
        if bytes > bytes_max {
            return Err(WireError::TooLong {
                kind,
                bytes,
                bytes_max,
            });
        }
        self.payload.clear();
        // Grows with what has come, and not with what was announced.
        let read = (&mut self.from)
            .take(u64::from(bytes))
            .read_to_end(&mut self.payload)?;
        if read as u64 != u64::from(bytes) {
            return Err(WireError::Closed);
        }
        let mut crc = crc32fast::Hasher::new();
        crc.update(&header[..12]);
        crc.update(&self.payload);
        if crc.finalize() != u32::from_le_bytes([c0, c1, c2, c3]) {
            return Err(WireError::Checksum { kind: number });
        }
        if kind == Kind::Refused {
            let reason = String::from_utf8_lossy(&self.payload);
            let reason = reason.chars().filter(|it| !it.is_control()).collect();
            return Err(WireError::Refused { reason });
        }
        Ok(Message {
            kind,
            payload: &self.payload,
        })
    }

    /// The file that follows a [`Kind::MemoryFile`].
    ///
    /// # Errors
    /// The connection ended or does not carry files, or no file came.
    pub fn receive_file(&mut self) -> Result<File, WireError> {
        let file = self.from.receive_file().map_err(of_read)?;
        file.ok_or(WireError::Invalid {
            kind: Kind::MemoryFile,
            reason: "it carries no file",
        })
    }

    /// A record of TLS may be shorter than a header.
    fn read_header(&mut self, header: &mut [u8; HEADER_BYTES]) -> Result<(), WireError> {
        let (start, rest) = header.split_at_mut(TLS_RECORD_BYTES);
        self.from.read_exact(start).map_err(of_read)?;
        match start {
            [TLS_ALERT | TLS_HANDSHAKE, TLS_MAJOR, ..] => Err(WireError::Encrypted),
            _ => self.from.read_exact(rest).map_err(of_read),
        }
    }
}

fn of_read(error: io::Error) -> WireError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => WireError::Closed,
        _ => WireError::Io(error),
    }
}

impl<'a> Message<'a> {
    fn invalid<T>(&self, reason: &'static str) -> Result<T, WireError> {
        let kind = self.kind;
        Err(WireError::Invalid { kind, reason })
    }

    /// The data after the version in an introduction.
    fn introduction(&self) -> Result<&'a [u8], WireError> {
        let Some((version, rest)) = self.payload.split_first_chunk() else {
            return self.invalid("it is too short");
        };
        let theirs = u32::from_le_bytes(*version);
        match theirs == VERSION {
            true => Ok(rest),
            false => Err(WireError::Version { theirs }),
        }
    }

    /// The content of a [`Kind::Hello`].
    ///
    /// # Errors
    /// Another version, length, way or number of connections.
    pub fn hello(&self) -> Result<Hello, WireError> {
        let Some((id, rest)) = self.introduction()?.split_first_chunk() else {
            return self.invalid("it is too short");
        };
        let [transfer, connections @ ..] = rest else {
            return self.invalid("it has another length");
        };
        let Ok(connections) = connections.try_into().map(u32::from_le_bytes) else {
            return self.invalid("it has another length");
        };
        let transfer = match transfer {
            0 => Transfer::Copied,
            1 => Transfer::HandedOver,
            2 => Transfer::Postponed,
            _ => return self.invalid("RAM comes in an unknown way"),
        };
        let possible = match transfer {
            Transfer::Copied => 1..=CONNECTIONS_MAX,
            Transfer::HandedOver => 1..=1,
            Transfer::Postponed => 2..=2,
        };
        if !possible.contains(&connections) {
            return self.invalid("RAM cannot come over that many connections");
        }
        Ok(Hello {
            id: *id,
            transfer,
            connections,
        })
    }

    /// The identifier and the number of a [`Kind::Join`].
    ///
    /// # Errors
    /// Another version or length.
    pub fn joins(&self) -> Result<(MigrationId, u32), WireError> {
        let Some((id, number)) = self.introduction()?.split_first_chunk() else {
            return self.invalid("it is too short");
        };
        match number.try_into().map(u32::from_le_bytes) {
            Ok(number) => Ok((*id, number)),
            Err(_) => self.invalid("it has another length"),
        }
    }

    /// The identifier of a [`Kind::Ask`].
    ///
    /// # Errors
    /// Another version or length.
    pub fn asked(&self) -> Result<MigrationId, WireError> {
        match self.introduction()?.try_into() {
            Ok(id) => Ok(id),
            Err(_) => self.invalid("it has another length"),
        }
    }

    /// The text of a [`Kind::Config`] or [`Kind::State`].
    ///
    /// # Errors
    /// It is not text.
    pub fn text(&self) -> Result<&'a str, WireError> {
        match std::str::from_utf8(self.payload) {
            Ok(text) => Ok(text),
            Err(_) => self.invalid("it is not text"),
        }
    }

    /// The content of a [`Kind::Pages`], [`Kind::Absent`] or [`Kind::Fetch`]. Only its own lengths are checked.
    ///
    /// # Errors
    /// It is too short.
    pub fn pages(&self) -> Result<Pages<'a>, WireError> {
        let Some((head, rest)) = self.payload.split_first_chunk::<PAGES_HEAD_BYTES>() else {
            return self.invalid("it is too short");
        };
        let [z0, z1, z2, z3, b0, b1, b2, b3, offset @ ..] = *head;
        let bits = u32::from_le_bytes([b0, b1, b2, b3]);
        if bits > BITMAP_BYTES_MAX {
            return self.invalid("its bitmap is too long");
        }
        let Some((bits, data)) = rest.split_at_checked(bits as usize) else {
            return self.invalid("it is too short");
        };
        Ok(Pages {
            zone: u32::from_le_bytes([z0, z1, z2, z3]),
            offset: u64::from_le_bytes(offset),
            bits,
            data,
        })
    }

    /// The content of a [`Kind::Clear`].
    ///
    /// # Errors
    /// It is not made of whole runs.
    pub fn runs(&self) -> Result<impl Iterator<Item = PageRun> + 'a, WireError> {
        let runs = self.payload.chunks_exact(RUN_BYTES);
        if !runs.remainder().is_empty() {
            return self.invalid("it ends within a range");
        }
        Ok(runs.map(|run| {
            let (zone, rest) = run.split_at(4);
            let (offset, bytes) = rest.split_at(8);
            PageRun {
                zone: u32::from_le_bytes(zone.try_into().expect("four bytes")),
                offset: u64::from_le_bytes(offset.try_into().expect("eight bytes")),
                bytes: u64::from_le_bytes(bytes.try_into().expect("eight bytes")),
            }
        }))
    }

    /// The number of a [`Kind::PassBegin`], [`Kind::PassEnd`] or [`Kind::MemoryFile`].
    ///
    /// # Errors
    /// It has another length.
    pub fn number(&self) -> Result<u32, WireError> {
        match self.payload.try_into() {
            Ok(number) => Ok(u32::from_le_bytes(number)),
            Err(_) => self.invalid("it is too short"),
        }
    }

    /// Whether the machine of a [`Kind::Commit`] runs.
    ///
    /// # Errors
    /// It has another length or value.
    pub fn runs_on(&self) -> Result<bool, WireError> {
        match self.payload {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => self.invalid("it is neither 0 nor 1"),
        }
    }
}

/// Streams without a peer.
#[cfg(any(test, fuzzing))]
mod plain {
    use std::fs::File;
    use std::io;

    impl super::Channel for &[u8] {
        /// The file of this byte is any one.
        fn receive_file(&mut self) -> io::Result<Option<File>> {
            let Some((carries, rest)) = self.split_first() else {
                return Err(io::ErrorKind::UnexpectedEof.into());
            };
            *self = rest;
            match carries {
                0 => Ok(None),
                1 => File::open("/dev/null").map(Some),
                _ => Err(io::ErrorKind::InvalidData.into()),
            }
        }
    }
    impl super::Channel for Vec<u8> {
        fn send_file(&mut self, _file: &File) -> io::Result<()> {
            self.push(1);
            Ok(())
        }
    }
    impl super::Channel for std::io::Sink {}
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const ID: MigrationId = *b"0123456789abcdef";
    const HELLO: Hello = Hello {
        id: ID,
        transfer: Transfer::Copied,
        connections: 4,
    };

    /// One message of each kind.
    fn stream() -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        writer.hello(&HELLO).unwrap();
        writer.send(Kind::Config, b"{}").unwrap();
        writer.send(Kind::State, b"[]").unwrap();
        let file = File::open("/dev/null").unwrap();
        writer.memory_file(5, &file).unwrap();
        writer.send(Kind::Accepted, &[]).unwrap();
        writer
            .pages(
                Kind::Pages,
                Pages {
                    zone: 1,
                    offset: 2 << 20,
                    bits: &[1],
                    data: &[7; 4096],
                },
            )
            .unwrap();
        for kind in [Kind::Absent, Kind::Fetch] {
            let bits = &[1];
            let pages = Pages {
                zone: 1,
                offset: 2 << 20,
                bits,
                data: &[],
            };
            writer.pages(kind, pages).unwrap();
        }
        writer.send(Kind::Complete, &[]).unwrap();
        let run = PageRun {
            zone: 3,
            offset: 4096,
            bytes: 8192,
        };
        writer.clear(&[run, run]).unwrap();
        writer.send(Kind::PassEnd, &9_u32.to_le_bytes()).unwrap();
        writer.send(Kind::Prepared, &[]).unwrap();
        writer.send(Kind::Commit, &[1]).unwrap();
        writer.send(Kind::Committed, &[]).unwrap();
        writer.send(Kind::Released, &[]).unwrap();
        writer.ask(&ID).unwrap();
        writer.join(&ID, 3).unwrap();
        writer.send(Kind::Joined, &[]).unwrap();
        writer.send(Kind::PassBegin, &9_u32.to_le_bytes()).unwrap();
        writer.send(Kind::Abandoned, &[]).unwrap();
        std::mem::take(writer.get_mut())
    }

    /// Reads a whole stream as one of our own; the number of messages.
    fn read(stream: &[u8]) -> Result<usize, WireError> {
        let mut reader = Reader::new(stream);
        for count in 0.. {
            if count == Kind::ALL.len() - 1 && reader.get_mut().is_empty() {
                return Ok(count);
            }
            let message = reader.next(Kind::ALL, "any message")?;
            match message.kind {
                Kind::Hello => assert_eq!(message.hello()?, HELLO),
                Kind::Ask => assert_eq!(message.asked()?, ID),
                Kind::Join => assert_eq!(message.joins()?, (ID, 3)),
                Kind::Config | Kind::State => drop(message.text()?),
                Kind::Pages => assert_eq!(message.pages()?.data, [7; 4096]),
                Kind::Clear => assert_eq!(message.runs()?.count(), 2),
                Kind::PassBegin | Kind::PassEnd => assert_eq!(message.number()?, 9),
                Kind::MemoryFile => {
                    assert_eq!(message.number()?, 5);
                    reader.receive_file()?;
                }
                Kind::Commit => assert!(message.runs_on()?),
                _ => {}
            }
        }
        unreachable!("the range has no end")
    }

    #[test]
    fn every_kind_of_message_comes_back() {
        assert_eq!(read(&stream()).unwrap(), Kind::ALL.len() - 1);
    }

    #[test]
    fn stream_cut_at_any_byte_is_refused() {
        let stream = stream();
        for end in 0..stream.len() {
            assert!(read(&stream[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn stream_with_any_flipped_bit_is_refused() {
        let stream = stream();
        for at in 0..stream.len() {
            let mut damaged = stream.clone();
            damaged[at] ^= 1 << (at % 8);
            let error = read(&damaged).unwrap_err();
            assert!(!error.to_string().is_empty(), "byte {at}");
        }
    }

    fn first_error(stream: &[u8], expected: &[Kind]) -> String {
        let mut reader = Reader::new(stream);
        reader.set_state_bytes_max(10);
        let message = reader.next(expected, "what the test expects");
        let message = message.and_then(|message| match message.kind {
            Kind::Hello => message.hello().map(drop),
            Kind::Ask => message.asked().map(drop),
            Kind::Join => message.joins().map(drop),
            Kind::MemoryFile => message.number().map(drop),
            Kind::Config => message.text().map(drop),
            Kind::Pages => message.pages().map(drop),
            Kind::Clear => message.runs().map(drop),
            Kind::PassEnd => message.number().map(drop),
            Kind::Commit => message.runs_on().map(drop),
            _ => Ok(()),
        });
        message.unwrap_err().to_string()
    }

    fn message(kind: Kind, payload: &[u8]) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        writer.send(kind, payload).unwrap();
        std::mem::take(writer.get_mut())
    }

    #[test]
    fn lies_are_refused_by_name() {
        let expect = |kind, payload: &[u8], text: &str| {
            let error = first_error(&message(kind, payload), &[kind]);
            assert!(error.contains(text), "{kind:?}: {error}");
        };
        expect(Kind::Hello, &[9, 0, 0, 0], "version 9");
        expect(Kind::Hello, &[4, 0, 0, 0, 5], "too short");
        let hello = |rest: &[u8]| [&[4, 0, 0, 0][..], &ID, rest].concat();
        expect(Kind::Hello, &hello(&[]), "another length");
        expect(Kind::Hello, &hello(&[3, 1, 0, 0, 0]), "unknown way");
        expect(Kind::Hello, &hello(&[0, 1, 0, 0]), "another length");
        for [transfer, connections] in [[0, 0], [0, 129], [1, 2], [2, 1], [2, 3]] {
            let rest = [transfer, connections, 0, 0, 0];
            expect(Kind::Hello, &hello(&rest), "that many connections");
        }
        expect(Kind::Ask, &hello(&[0]), "another length");
        expect(Kind::Join, &hello(&[0]), "another length");
        expect(Kind::MemoryFile, &[1], "too short");
        expect(Kind::Hello, &[], "too short");
        expect(Kind::Config, &[0xff], "not text");
        expect(Kind::State, &[b' '; 11], "at most 10");
        expect(Kind::Pages, &[0; 15], "too short");
        let mut head = [0; 16];
        head[4] = 65;
        expect(Kind::Pages, &head, "bitmap is too long");
        head[4] = 64;
        expect(Kind::Pages, &head, "too short");
        expect(Kind::Clear, &[0; 21], "within a range");
        expect(Kind::PassEnd, &[1], "too short");
        expect(Kind::Commit, &[2], "neither 0 nor 1");
        expect(Kind::Commit, &[], "neither 0 nor 1");
        let error = first_error(&message(Kind::Committed, &[]), &[Kind::Prepared]);
        assert!(
            error.contains("expected what the test expects; got Committed"),
            "{error}"
        );
        let mut unknown = message(Kind::Committed, &[]);
        unknown[4] = 200;
        assert!(first_error(&unknown, Kind::ALL).contains("kind 200"));
        let mut long = message(Kind::Accepted, &[]);
        long[8] = 1;
        assert!(first_error(&long, Kind::ALL).contains("at most 0"));
        assert!(first_error(b"GET / HTTP/1.1\r\n\r\n", Kind::ALL).contains("does not send"));
        let alert = [21, 3, 3, 0, 2, 2, 10];
        let error = first_error(&alert, Kind::ALL);
        assert!(error.contains("use tls_dir"), "{error}");
    }

    #[test]
    fn refusal_is_shortened_and_shown_without_control_characters() {
        let mut writer = Writer::new(Vec::new());
        writer
            .refuse(&format!("no\u{1b}[2J{}", "ü".repeat(3000)))
            .unwrap();
        let stream = std::mem::take(writer.get_mut());
        let error = first_error(&stream, &[Kind::Prepared]);
        assert!(error.contains("no[2Jüü") && error.len() < 4200, "{error}");
    }

    #[test]
    fn announced_length_allocates_nothing() {
        let mut header = message(Kind::Config, &[]);
        header[8..12].copy_from_slice(&CONFIG_BYTES_MAX.to_le_bytes());
        let mut reader = Reader::new(&header[..]);
        assert!(matches!(
            reader.next(Kind::ALL, "any message"),
            Err(WireError::Closed)
        ));
        assert!(reader.payload.capacity() < 64 << 10);
    }
}
