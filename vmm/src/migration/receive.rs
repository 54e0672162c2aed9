//! The target of a migration.

use std::fs::File;
use std::io::{self, Read, Write};
use std::time::Instant;

use api::VmConfig;
use machine::memory::on_demand::{Content, PageSource};
use machine::memory::{AbsentPages, ContentWriter, GuestMemory, ZoneFiles};

use super::peer::{Cancel, Peer};
use super::postponed::Fetches;
use super::together::together;
use super::wire::{
    Channel, FILES_MAX, Hello, Kind, Message, MigrationId, Reader, Transfer, WireError, Writer,
};
use super::{Limits, Listener, MigrationError};
use crate::snapshot::{SnapshotState, state_bytes_max};
use state::Saved;

/// The owner of the machine on the target: what only its thread can do.
pub trait TargetOwner: Send {
    /// A source has connected.
    fn begin(&mut self);

    /// Checks whether this host can continue the machine, and creates its RAM from `files`, without content if they are
    /// new. Creates all other parts that do not depend on the final state, and that the source does not use. The RAM must not be written before [`TargetOwner::commit`] if they are not.
    ///
    /// # Errors
    /// It cannot.
    fn prepare(
        &mut self,
        config: VmConfig,
        state: SnapshotState,
        files: ZoneFiles,
    ) -> Result<GuestMemory, MigrationError>;

    /// Completes the machine from its final state, paused. `memory` is what [`TargetOwner::prepare`] has returned, with its
    /// content except for what is `postponed`.
    ///
    /// # Errors
    /// It cannot be created.
    fn build(
        &mut self,
        state: SnapshotState,
        memory: GuestMemory,
        postponed: Option<Content>,
    ) -> Result<(), MigrationError>;

    /// The machine belongs to this process. Resumes it if it `runs`.
    ///
    /// # Errors
    /// It cannot be resumed; it belongs to the source then.
    fn commit(&mut self, runs: bool) -> Result<(), MigrationError>;

    /// The migration has ended; after a failure, the machine and its configuration are dropped.
    fn end(&mut self, end: Result<(), MigrationError>);
}

/// A migration to be received.
#[derive(Debug)]
pub struct Incoming {
    /// Where the source connects.
    pub listener: Listener,
    /// Whether RAM may come after the machine.
    pub postpones: bool,
    /// How long it waits for the source.
    pub limits: Limits,
    /// Ends it.
    pub cancel: Cancel,
}

/// How far a target came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reached {
    /// The source has not sent the commit and never will.
    NotPrepared,
    /// The source may have sent it, or not.
    Prepared(MigrationId),
    /// The source may not know that the machine is here.
    Committed(MigrationId),
    /// The source knows it.
    Released,
}

impl Incoming {
    /// Receives a machine. Calls [`TargetOwner::end`], and then may answer a source that does not know the outcome.
    pub fn run(self, owner: &mut dyn TargetOwner) {
        let mut reached = Reached::NotPrepared;
        let mut connections = Vec::new();
        let received = self.receive(owner, &mut reached, &mut connections);
        let received = received.map_err(|error| self.cancel.or(error));
        let reason = received.as_ref().err().map(|error| api::error_line(error));
        owner.end(received);
        // Only now: a source that learns of the failure, also by the end of the connection, locks its disks again.
        if let (Some(first), Some(reason)) = (connections.first(), reason) {
            Writer::new(first.clone()).refuse(&reason).ok();
        }
        drop(connections);
        match reached {
            Reached::NotPrepared | Reached::Released => {}
            Reached::Prepared(id) => self.answer(&id, Kind::Abandoned),
            Reached::Committed(id) => self.answer(&id, Kind::Committed),
        }
    }

    fn receive(
        &self,
        owner: &mut dyn TargetOwner,
        reached: &mut Reached,
        connections: &mut Vec<Peer>,
    ) -> Result<(), MigrationError> {
        let (mut peer, hello) = self.accept()?;
        owner.begin();
        peer.set_limit(self.limits.running);
        if hello.transfer == Transfer::Postponed && !self.postpones {
            connections.push(peer);
            return Err(MigrationError::Request(
                "the source would send a part of RAM after the VM: use memory_mode=postcopy here, too",
            ));
        }
        let mut last_word = peer.clone();
        last_word.ignore_cancel();
        connections.push(last_word);
        let mut writer = Writer::new(peer.clone());
        let reader = Reader::new(peer.clone());
        let join = || {
            let others = self.join(&peer, &hello)?;
            // Open until the end: a source that finds one closed expects the reason on the first one.
            connections.extend(others.iter().cloned());
            let mut joined = Joined {
                peer: Some(peer.clone()),
                readers: Vec::new(),
                fetches: None,
            };
            for mut other in others {
                if hello.transfer == Transfer::Postponed {
                    // A machine that is dropped asks no more.
                    other.ignore_cancel();
                    // The control thread may wait for a page, also before the commit.
                    other.set_limit(self.limits.paused);
                    let reader = Reader::new(other.clone());
                    joined.fetches = Some(Box::new(Fetches::new(reader, Writer::new(other))));
                } else {
                    joined.readers.push(Reader::new(other));
                }
            }
            Ok(joined)
        };
        let limits = &self.limits;
        receive_from(reader, &mut writer, hello, join, limits, owner, reached)
    }

    /// The other connections of the migration that `first` has begun.
    fn join(&self, first: &Peer, hello: &Hello) -> Result<Vec<Peer>, MigrationError> {
        let until = Instant::now() + self.limits.connect;
        let (expected, limit) = (hello.connections, self.limits.question);
        let mut others: Vec<Option<Peer>> = (1..expected).map(|_| None).collect();
        while let opened = others.iter().flatten().count() as u32 + 1
            && opened < expected
        {
            let mut peer = match self.listener.accept(&self.cancel, limit, Some(until)) {
                Ok(peer) => peer,
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    return Err(MigrationError::TooFewConnections { opened, expected });
                }
                Err(error) => return Err(MigrationError::Wire(error.into())),
            };
            peer.set_limit(limit);
            let mut reader = Reader::new(peer.clone());
            let joins = reader.next(&[Kind::Join], "another connection of a migration");
            let mut writer = Writer::new(peer.clone());
            let number = match joins.and_then(|joins| joins.joins()) {
                Ok((id, number)) if id == hello.id => number,
                Ok(_) => {
                    writer.refuse("this is about another migration").ok();
                    continue;
                }
                Err(error) => {
                    log::warn!("A client does not join a migration: {error}");
                    writer.refuse(&error.to_string()).ok();
                    continue;
                }
            };
            let place = (number as usize).checked_sub(1);
            let reason = match place.and_then(|place| others.get_mut(place)) {
                Some(place) if place.is_none() => {
                    peer.join(first);
                    peer.set_limit(self.limits.running);
                    *place = Some(peer);
                    continue;
                }
                Some(_) => "twice",
                None => "that does not exist",
            };
            let error = MigrationError::WrongConnection {
                number,
                reason,
                expected,
            };
            writer.refuse(&error.to_string()).ok();
            return Err(error);
        }
        Ok(others.into_iter().flatten().collect())
    }

    /// The first client that uses this protocol.
    fn accept(&self) -> Result<(Peer, Hello), MigrationError> {
        loop {
            let limit = self.limits.hello;
            let accepted = self.listener.accept(&self.cancel, limit, None);
            let mut peer = accepted.map_err(|error| MigrationError::Wire(error.into()))?;
            peer.set_limit(limit);
            let mut reader = Reader::new(peer.clone());
            let hello = reader.next(&[Kind::Hello], "the start of a migration");
            match hello.and_then(|hello| hello.hello()) {
                Ok(hello) => return Ok((peer, hello)),
                Err(error) => {
                    log::warn!("A client does not start a migration: {error}");
                    let mut writer = Writer::new(peer);
                    writer.refuse(&error.to_string()).ok();
                }
            }
        }
    }

    /// Answers questions after migration `id` until a source confirms the answer, or for a while.
    fn answer(&self, id: &MigrationId, outcome: Kind) {
        let until = Instant::now() + self.limits.answers;
        loop {
            let limit = self.limits.question;
            let accepted = self.listener.accept(&Cancel::default(), limit, Some(until));
            let mut peer = match accepted {
                Ok(peer) => peer,
                Err(error) if error.kind() == io::ErrorKind::TimedOut => return,
                Err(error) => {
                    log::warn!(
                        "The source of a migration can no longer ask for its outcome: {error}"
                    );
                    return;
                }
            };
            peer.set_limit(limit);
            let mut reader = Reader::new(peer.clone());
            let mut writer = Writer::new(peer);
            let asked = reader.next(&[Kind::Ask], "a question");
            match asked.and_then(|asked| asked.asked()) {
                Ok(asked) if asked == *id => {
                    let told = writer.send(outcome, &[]).and_then(|()| {
                        let expected = "the confirmation of the answer";
                        reader.next(&[Kind::Released], expected).map(drop)
                    });
                    if told.is_ok() {
                        return;
                    }
                }
                Ok(_) => drop(writer.refuse("this is about another migration")),
                Err(error) => drop(writer.refuse(&error.to_string())),
            }
        }
    }
}

/// The connections of a migration.
pub(super) struct Joined<R> {
    /// The first one, if the others can end early.
    pub(super) peer: Option<Peer>,
    /// The others, over which content comes.
    pub(super) readers: Vec<Reader<R>>,
    /// The one on which the target asks for postponed content.
    pub(super) fetches: Option<Box<dyn PageSource>>,
}

/// Everything after the introduction of the source. `join` waits for the other connections.
pub(super) fn receive_from<R: Read + Channel + Send>(
    mut reader: Reader<R>,
    writer: &mut Writer<impl Write + Channel>,
    hello: Hello,
    join: impl FnOnce() -> Result<Joined<R>, MigrationError>,
    limits: &Limits,
    owner: &mut dyn TargetOwner,
    reached: &mut Reached,
) -> Result<(), MigrationError> {
    let config = reader.next(&[Kind::Config], "the configuration")?.text()?;
    let config: VmConfig = json("configuration", config)?;
    let thp = config.memory.thp;
    reader.set_state_bytes_max(state_bytes_max(&config));
    let state = read_state(reader.next(&[Kind::State], "the state")?.text()?)?;
    let files = match hello.transfer {
        Transfer::Copied | Transfer::Postponed => ZoneFiles::New,
        Transfer::HandedOver => ZoneFiles::Given(receive_files(&mut reader)?.into_iter()),
    };
    let memory = owner.prepare(config, state, files)?;
    writer.send(Kind::Accepted, &[])?;
    let mut fetches = None;
    let (state, memory, absent) = match hello.transfer {
        Transfer::Copied | Transfer::Postponed => {
            let joined = join()?;
            if hello.connections > 1 {
                writer.send(Kind::Joined, &[])?;
            }
            fetches = joined.fetches;
            let (peer, readers) = (joined.peer.as_ref(), joined.readers);
            receive_content(&mut reader, peer, readers, memory, thp, fetches.is_some())?
        }
        Transfer::HandedOver => {
            let state = reader.next(&[Kind::State], "the final state")?;
            (read_state(state.text()?)?, memory, Vec::new())
        }
    };
    let fetches = fetches.filter(|_| !absent.is_empty());
    let postponed = fetches.map(|fetches| Content::Elsewhere(absent, fetches));
    owner.build(state, memory, postponed)?;
    let id = hello.id;
    *reached = Reached::Prepared(id);
    writer.send(Kind::Prepared, &[])?;
    reader.get_mut().set_limit(limits.paused);
    let runs = match reader.next(&[Kind::Commit], "the commit") {
        Ok(commit) => commit.runs_on()?,
        Err(error) => {
            if matches!(error, WireError::Refused { .. }) {
                *reached = Reached::NotPrepared;
            }
            return Err(error.into());
        }
    };
    owner.commit(runs)?;
    *reached = Reached::Committed(id);
    reader.get_mut().set_limit(limits.committed);
    let confirmed = writer.send(Kind::Committed, &[]).and_then(|()| {
        let expected = "the confirmation of the answer";
        reader.next(&[Kind::Released], expected).map(drop)
    });
    match confirmed {
        Ok(()) => *reached = Reached::Released,
        Err(error) => log::warn!("The source has not confirmed that the VM is here: {error}"),
    }
    Ok(())
}

/// The memory files of the source, in the order of its zones.
fn receive_files(reader: &mut Reader<impl Read + Channel>) -> Result<Vec<File>, MigrationError> {
    let mut files = Vec::new();
    loop {
        let expected = &[Kind::MemoryFile, Kind::PassEnd];
        let message = reader.next(expected, "a memory file or the end of them")?;
        let (kind, number) = (message.kind, message.number()?);
        let invalid = |reason| Err(WireError::Invalid { kind, reason }.into());
        match kind {
            Kind::PassEnd => return Ok(files),
            _ if number as usize != files.len() => return invalid("it is not of the next zone"),
            _ if number >= FILES_MAX => return invalid("there are too many memory files"),
            _ => files.push(reader.receive_file()?),
        }
    }
}

/// The content of `memory`, and the final state, which follows it; also the pages that are absent, if it `postpones` any.
/// `peer` is the first connection, `others` are further ones.
fn receive_content<R: Read + Channel + Send>(
    reader: &mut Reader<R>,
    peer: Option<&Peer>,
    others: Vec<Reader<R>>,
    memory: GuestMemory,
    thp: bool,
    postpones: bool,
) -> Result<(SnapshotState, GuestMemory, Vec<AbsentPages>), MigrationError> {
    let mut content = ContentWriter::new(memory);
    let others = others.into_iter();
    let mut others: Vec<_> = others.map(|it| (it, content.another())).collect();
    let mut pass = 0_u32;
    let mut absent: Vec<AbsentPages> = Vec::new();
    loop {
        let expected: &[Kind] = match (postpones, absent.is_empty()) {
            (false, _) => &[Kind::State, Kind::PassBegin],
            (true, true) => &[Kind::State, Kind::PassBegin, Kind::Absent],
            (true, false) => &[Kind::State, Kind::Absent],
        };
        let message = reader.next(expected, "a pass over memory or the final state")?;
        if message.kind == Kind::State {
            let state = read_state(message.text()?)?;
            // Otherwise, the owner decides when it waits for the pages that were left out.
            let memory = content.finish(thp && absent.is_empty());
            return Ok((state, memory, absent));
        }
        if message.kind == Kind::Absent {
            let pages = content.leave_out(message.pages()?)?;
            // Also limits their number.
            if absent.last().is_some_and(|last| !last.is_before(&pages)) {
                let kind = Kind::Absent;
                let reason = "its chunk is not behind the previous one";
                return Err(WireError::Invalid { kind, reason }.into());
            }
            absent.push(pages);
            continue;
        }
        require_pass(&message, pass)?;
        let first = || receive_share(reader, &mut content, pass);
        together(peer, &mut others, first, |(reader, content)| {
            receive_share(reader, content, pass)
        })?;
        log::debug!("Pass {pass} over guest RAM has come");
        pass = pass.wrapping_add(1);
    }
}

/// The messages of one connection in a pass.
fn receive_share(
    reader: &mut Reader<impl Read + Channel>,
    content: &mut ContentWriter,
    pass: u32,
) -> Result<(), MigrationError> {
    loop {
        let expected = &[Kind::Pages, Kind::Clear, Kind::PassEnd];
        let message = reader.next(expected, "memory or the end of the pass")?;
        match message.kind {
            Kind::Pages => content.write(message.pages()?)?,
            Kind::Clear => {
                for run in message.runs()? {
                    content.clear(run)?;
                }
            }
            _ => return require_pass(&message, pass),
        }
    }
}

fn require_pass(message: &Message<'_>, pass: u32) -> Result<(), MigrationError> {
    let kind = message.kind;
    let reason = "it is of another pass";
    match message.number()? == pass {
        true => Ok(()),
        false => Err(WireError::Invalid { kind, reason }.into()),
    }
}

fn json<T: serde::de::DeserializeOwned>(
    what: &'static str,
    text: &str,
) -> Result<T, MigrationError> {
    serde_json::from_str(text).map_err(|source| MigrationError::Json { what, source })
}

fn read_state(text: &str) -> Result<SnapshotState, MigrationError> {
    let saved: Saved = json("state", text)?;
    let read = saved.read();
    read.map_err(|error| MigrationError::Owner(Box::new(error)))
}
