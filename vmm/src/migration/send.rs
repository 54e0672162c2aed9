//! The source of a migration.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use machine::memory::{Chunks, GuestMemory, PageRun, Pages, WriteTracker, WrittenPages};
use machine::random::random_id;

use super::converge::{Brake, Converge};
use super::pace::Pace;
use super::peer::{Cancel, Peer};
use super::postponed::PageServer;
use super::together::together;
use super::wire::{
    Channel, FILES_MAX, Hello, Kind, MigrationId, RUNS_MAX, Reader, Transfer, WireError, Writer,
};
use super::{Destination, Limits, MigrationError, SendProgress, SendReport};

/// A rest that can be sent in this part of the permitted downtime is not worth another pass.
const DOWNTIME_PARTS: u32 = 20;
/// How long a target that does not read may delay the end.
const FAREWELL: Duration = Duration::from_millis(500);
const ASK_INTERVAL: Duration = Duration::from_millis(200);

/// The owner of the machine on the source: what only its thread can do.
pub trait SourceOwner: Send {
    /// A pass over RAM begins.
    fn begin_pass(&mut self, pass: u32);

    /// The guest is held for this part of the time from now on.
    fn throttled(&mut self, percent: u8);

    /// Writes the data of disks to stable storage while the machine runs. Then [`SourceOwner::save`] has less to write
    /// during the pause.
    ///
    /// # Errors
    /// A disk cannot be written.
    fn sync(&mut self) -> Result<(), MigrationError>;

    /// Pauses the machine, unless it is paused.
    ///
    /// # Errors
    /// The machine has ended, was replaced, or does not pause.
    fn pause(&mut self) -> Result<(), MigrationError>;

    /// The final state of the paused machine, as JSON. The locks of its disks are released afterwards.
    ///
    /// # Errors
    /// It cannot be saved.
    fn save(&mut self) -> Result<String, MigrationError>;

    /// The machine belongs to the target from now on, and the migration can no longer be cancelled. Returns whether the
    /// machine continues to run there.
    ///
    /// # Errors
    /// The migration was cancelled.
    fn commit(&mut self) -> Result<bool, MigrationError>;

    /// The migration has ended.
    fn end(&mut self, end: SourceEnd);
}

/// How a migration ended on the source.
#[derive(Debug)]
pub enum SourceEnd {
    /// The target has the machine.
    Finished(SendReport),
    /// The source has the machine.
    Failed(MigrationError),
    /// The owner is unknown; the source must not resume without an order.
    Unconfirmed(MigrationError),
}

/// When the machine is paused for the last pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Convergence {
    /// As soon as the rest can be sent in this time.
    pub downtime: Duration,
    /// After this time …
    pub timeout: Duration,
    /// … the machine is paused; otherwise the migration fails.
    pub pauses_at_timeout: bool,
}

impl Convergence {
    /// Whether to pause now, if the rest can be sent in `rest`. As long as each pass leaves less than half of the last one
    /// (`shrinks`), another pass shortens the pause; the number of such passes is therefore limited. `elapsed`: since the
    /// first pass began.
    fn is_reached(self, rest: Duration, shrinks: bool, elapsed: Duration) -> bool {
        let is_short = rest <= self.downtime / DOWNTIME_PARTS;
        let has_time = elapsed < self.timeout / 2;
        rest <= self.downtime && (is_short || !shrinks || !has_time)
    }
}

/// How the guest's RAM comes to the target.
#[derive(Debug)]
pub enum Ram {
    /// Its content is sent; its writes are recorded.
    Copied(Box<WriteTracker>),
    /// The memory file of each zone is handed over.
    HandedOver(Vec<Arc<File>>),
}

impl Ram {
    /// Hands over the memory files of `memory`.
    ///
    /// # Errors
    /// A zone has none, or there are too many.
    pub fn handed_over(memory: &GuestMemory) -> Result<Self, MigrationError> {
        let files = memory.memory_files().map_err(MigrationError::PrivateRam)?;
        match files.len() <= FILES_MAX as usize {
            true => Ok(Self::HandedOver(files)),
            false => Err(MigrationError::Request(
                "RAM has more than 256 zones, so local cannot be used",
            )),
        }
    }
}

/// A migration to be sent.
#[derive(Debug)]
pub struct Outgoing {
    /// The target.
    pub target: Destination,
    /// The configuration, as JSON.
    pub config: String,
    /// A state of the machine by which the target can check whether it can continue it.
    pub state: String,
    /// The guest's RAM.
    pub ram: Ram,
    /// The number of connections over which its content is sent; at least 1.
    pub connections: u32,
    /// Limit of the rate at which it is sent while the machine runs.
    pub bytes_per_second_max: Option<NonZeroU64>,
    /// When to pause.
    pub convergence: Convergence,
    /// Whether the rest of RAM follows the machine if the guest writes faster than the connection transfers. Excludes
    /// other connections and the brake, and RAM is copied.
    pub postpones: bool,
    /// Slows the guest down if it writes faster than the connection transfers.
    pub brake: Option<Arc<dyn Brake>>,
    /// How long it waits for the target.
    pub limits: Limits,
    /// Ends it.
    pub cancel: Cancel,
    /// The figures while it runs.
    pub progress: Arc<SendProgress>,
}

/// State that [`Outgoing::send`] keeps while it sends.
struct Connection {
    peer: Peer,
    reader: Reader<Peer>,
    writer: Writer<Peer>,
    /// Further ones.
    others: Vec<Writer<Peer>>,
    data_bytes: AtomicU64,
    /// Sends the pages that come after the commit.
    server: Option<PageServer>,
}

impl Outgoing {
    /// Sends the machine; returns when [`SourceOwner::end`] has returned.
    pub fn run(self, owner: &mut dyn SourceOwner) {
        let end = self.send(owner);
        let end = end.unwrap_or_else(|error| SourceEnd::Failed(self.cancel.or(error)));
        // The guest's writes are no longer recorded when it runs again.
        drop(self);
        owner.end(end);
    }

    fn send(&self, owner: &mut dyn SourceOwner) -> Result<SourceEnd, MigrationError> {
        let id = random_id().map_err(|error| MigrationError::Owner(Box::new(error)))?;
        let peer = self.target.connect(&self.cancel, self.limits.connect)?;
        let mut connection = Connection {
            reader: Reader::new(peer.clone()),
            writer: Writer::new(peer.clone()),
            peer,
            others: Vec::new(),
            data_bytes: AtomicU64::default(),
            server: None,
        };
        connection.set_limit(self.limits.running);
        let sent = self.send_to(&mut connection, &id, owner);
        match sent.and_then(|sent| Ok((sent, owner.commit()?))) {
            Ok((sent, runs)) => Ok(self.hand_over(connection, &id, sent, runs)),
            Err(error) => Err(connection.refuse(error)),
        }
    }

    /// Everything up to the target's word that it is prepared.
    fn send_to(
        &self,
        connection: &mut Connection,
        id: &MigrationId,
        owner: &mut dyn SourceOwner,
    ) -> Result<Sent, MigrationError> {
        connection.writer.hello(&Hello {
            id: *id,
            transfer: match self.ram {
                Ram::HandedOver(_) => Transfer::HandedOver,
                Ram::Copied(_) if self.postpones => Transfer::Postponed,
                Ram::Copied(_) => Transfer::Copied,
            },
            connections: self.connections(),
        })?;
        connection
            .writer
            .send(Kind::Config, self.config.as_bytes())?;
        connection.writer.send(Kind::State, self.state.as_bytes())?;
        if let Ram::HandedOver(files) = &self.ram {
            for (number, file) in (0..).zip(files) {
                connection.writer.memory_file(number, file)?;
            }
            connection
                .writer
                .send(Kind::PassEnd, &0_u32.to_le_bytes())?;
        }
        connection
            .reader
            .next(&[Kind::Accepted], "the answer to the configuration")?;
        let Ram::Copied(tracker) = &self.ram else {
            owner.sync()?;
            return self.send_paused(connection, None, owner);
        };
        self.open_others(connection, id)?;
        // Pages are only sent over it when the target asks for them.
        let asked = match self.postpones {
            true => connection.others.pop(),
            false => None,
        };
        let started = Instant::now();
        let until = started.checked_add(self.convergence.timeout);
        if !self.convergence.pauses_at_timeout && !self.postpones {
            connection.set_end(until);
        }
        let mut converge = self.brake.as_ref().map(Converge::new);
        let sent = self.send_while_running(connection, tracker, started, converge.as_mut(), owner);
        let (passes, written, fits) = match sent {
            Err(error) if connection.is_over() => {
                log::info!("The migration is out of time: {}", api::error_line(&error));
                return Err(self.timeout());
            }
            sent => sent?,
        };
        let rest = Rest {
            tracker,
            passes,
            written,
            converge,
            asked: asked.filter(|_| !fits),
        };
        self.send_paused(connection, Some(rest), owner)
    }

    fn connections(&self) -> u32 {
        match self.postpones {
            true => 2,
            false => self.connections,
        }
    }

    /// Opens the other connections.
    fn open_others(
        &self,
        connection: &mut Connection,
        id: &MigrationId,
    ) -> Result<(), MigrationError> {
        for number in 1..self.connections() {
            let mut peer = self.target.connect(&self.cancel, self.limits.connect)?;
            peer.join(&connection.peer);
            peer.set_limit(self.limits.running);
            let mut writer = Writer::new(peer);
            writer.join(id, number)?;
            connection.others.push(writer);
        }
        if self.connections() > 1 {
            let expected = "the answer to the other connections";
            connection.reader.next(&[Kind::Joined], expected)?;
        }
        Ok(())
    }

    fn timeout(&self) -> MigrationError {
        let now = self.progress.now();
        MigrationError::Timeout {
            seconds: self.convergence.timeout.as_secs(),
            passes: now.passes,
            left_bytes: now.left_bytes,
        }
    }

    /// Sends RAM until the rest can be sent in the permitted downtime, or another pass is of no use. Returns the number of
    /// passes, the rest, and whether it can.
    fn send_while_running(
        &self,
        connection: &mut Connection,
        tracker: &WriteTracker,
        started: Instant,
        mut converge: Option<&mut Converge>,
        owner: &mut dyn SourceOwner,
    ) -> Result<(u32, WrittenPages, bool), MigrationError> {
        let zones = tracker.memory().zones().iter();
        let mut left_bytes: u64 = zones.map(|zone| zone.bytes()).sum();
        let mut pass = 0;
        let mut pages = None;
        loop {
            owner.begin_pass(pass);
            self.progress.begin_pass(left_bytes);
            let (before, begun) = (connection.peer.written(), Instant::now());
            let limit = self.bytes_per_second_max;
            self.send_pass(connection, tracker.memory(), pass, pages.as_ref(), limit)?;
            let speed = Speed::new(connection.peer.written() - before, begun);
            if pass == 0 {
                // Before the record is taken: the guest writes to RAM meanwhile.
                owner.sync()?;
            }
            pass += 1;
            let written = take(tracker)?;
            let last = std::mem::replace(&mut left_bytes, written.bytes());
            let rest = speed.time_for(left_bytes);
            let shrinks = left_bytes > 0 && left_bytes < last / 2;
            if self
                .convergence
                .is_reached(rest, shrinks, started.elapsed())
            {
                return Ok((pass, written, true));
            }
            let is_late = started.elapsed() >= self.convergence.timeout;
            if self.postpones && (is_late || !shrinks) {
                return Ok((pass, written, false));
            }
            if is_late {
                self.progress.begin_pass(left_bytes);
                return match self.convergence.pauses_at_timeout {
                    true => Ok((pass, written, true)),
                    false => Err(self.timeout()),
                };
            }
            if let Some(converge) = &mut converge {
                let percent = converge.after_pass(left_bytes);
                if let Some(percent) = percent.map_err(MigrationError::Thread)? {
                    self.progress.set_throttle(percent);
                    owner.throttled(percent);
                }
            }
            pages = Some(written);
        }
    }

    /// Pauses the machine, and sends its state and the rest of its RAM, if it is copied.
    fn send_paused(
        &self,
        connection: &mut Connection,
        rest: Option<Rest<'_>>,
        owner: &mut dyn SourceOwner,
    ) -> Result<Sent, MigrationError> {
        let paused = Instant::now();
        connection.set_limit(self.limits.paused);
        connection.set_end(match self.convergence.pauses_at_timeout {
            true => None,
            false => paused.checked_add(self.convergence.downtime + self.limits.paused),
        });
        owner.pause()?;
        let mut passes = 0;
        let rest = rest.map(|mut rest| {
            // Held until here, so that the guest writes less before the pause.
            drop(rest.converge.take());
            self.progress.set_throttle(0);
            rest
        });
        let state = owner.save()?;
        if let Some(mut rest) = rest {
            // Saving the state may have written to RAM.
            rest.written.add_all(&take(rest.tracker)?);
            self.progress.begin_pass(rest.written.bytes());
            let memory = rest.tracker.memory();
            passes = rest.passes;
            match rest.asked {
                Some(asked) => self.postpone(connection, memory, &rest.written, asked)?,
                None => {
                    owner.begin_pass(rest.passes);
                    self.send_pass(connection, memory, rest.passes, Some(&rest.written), None)?;
                    passes += 1;
                }
            }
        }
        connection.writer.send(Kind::State, state.as_bytes())?;
        connection
            .reader
            .next(&[Kind::Prepared], "the answer to the state")?;
        Ok(Sent { passes, paused })
    }

    /// Announces these pages, which the target asks for on the connection `asked`.
    fn postpone(
        &self,
        connection: &mut Connection,
        memory: &GuestMemory,
        written: &WrittenPages,
        asked: Writer<Peer>,
    ) -> Result<(), MigrationError> {
        let writer = &mut connection.writer;
        memory.each_written(written, |pages| writer.pages(Kind::Absent, pages))?;
        let progress = Arc::clone(&self.progress);
        let server = PageServer::start(memory.clone(), asked, self.limits.running, progress)?;
        connection.server = Some(server);
        Ok(())
    }

    fn send_pass(
        &self,
        connection: &mut Connection,
        memory: &GuestMemory,
        pass: u32,
        written: Option<&WrittenPages>,
        limit: Option<NonZeroU64>,
    ) -> Result<(), MigrationError> {
        let Connection {
            peer,
            writer,
            others,
            data_bytes,
            ..
        } = connection;
        writer.send(Kind::PassBegin, &pass.to_le_bytes())?;
        let left = Chunks::default();
        let pace = limit.map(|limit| Pace::new(peer, limit));
        let sent = |data: usize| {
            data_bytes.fetch_add(data as u64, Ordering::Relaxed);
            self.progress.set_wire_bytes(peer.written());
            if let Some(pace) = &pace {
                pace.wait();
            }
        };
        let send = |writer: &mut Writer<Peer>| -> Result<(), MigrationError> {
            send_share(writer, memory, written, &left, &sent)?;
            Ok(writer.send(Kind::PassEnd, &pass.to_le_bytes())?)
        };
        together(Some(&*peer), others, || send(writer), send)?;
        self.progress.end_pass();
        self.progress.set_wire_bytes(peer.written());
        Ok(())
    }

    /// From here on, the target may run the machine.
    fn hand_over(
        &self,
        mut connection: Connection,
        id: &MigrationId,
        sent: Sent,
        runs: bool,
    ) -> SourceEnd {
        connection.reader.get_mut().ignore_cancel();
        connection.writer.get_mut().ignore_cancel();
        connection.set_limit(self.limits.committed);
        connection.set_end(None);
        let answer = connection
            .writer
            .send(Kind::Commit, &[u8::from(runs)])
            .and_then(|()| {
                let expected = "the answer to the commit";
                connection
                    .reader
                    .next(&[Kind::Committed], expected)
                    .map(drop)
            });
        let downtime_ms = sent.paused.elapsed().as_millis() as u64;
        let error = match answer {
            Ok(()) => {
                // A target that does not receive it only waits longer for questions.
                connection.writer.send(Kind::Released, &[]).ok();
                return connection.finish(sent.passes, downtime_ms);
            }
            Err(error @ WireError::Refused { .. }) => {
                connection.abandon();
                return SourceEnd::Failed(error.into());
            }
            Err(error) => error,
        };
        log::warn!("The target's answer to the commit is lost: {error}");
        match self.ask(id) {
            Some(true) => {
                let downtime_ms = sent.paused.elapsed().as_millis() as u64;
                connection.finish(sent.passes, downtime_ms)
            }
            Some(false) => {
                connection.abandon();
                SourceEnd::Failed(error.into())
            }
            None => {
                connection.abandon();
                let cause = Box::new(error.into());
                SourceEnd::Unconfirmed(MigrationError::Unconfirmed(cause))
            }
        }
    }

    /// Asks the target on new connections whether it has received the commit.
    fn ask(&self, id: &MigrationId) -> Option<bool> {
        let until = Instant::now() + self.limits.asks;
        while Instant::now() < until {
            match self.ask_once(id) {
                Ok(answer) => return Some(answer),
                Err(error) => {
                    let error = api::error_line(&error);
                    log::info!("The target has not reported the outcome: {error}");
                }
            }
            std::thread::sleep(ASK_INTERVAL);
        }
        None
    }

    fn ask_once(&self, id: &MigrationId) -> Result<bool, MigrationError> {
        let limit = self.limits.question;
        let mut peer = self.target.connect(&Cancel::default(), limit)?;
        peer.set_limit(limit);
        let mut writer = Writer::new(peer.clone());
        writer.ask(id)?;
        let mut reader = Reader::new(peer);
        let expected = &[Kind::Committed, Kind::Abandoned];
        let answer = reader.next(expected, "the outcome of the migration")?;
        let committed = answer.kind == Kind::Committed;
        writer.send(Kind::Released, &[]).ok();
        Ok(committed)
    }
}

impl Connection {
    /// The target has the machine; waits until it also has all of its RAM.
    fn finish(self, passes: u32, downtime_ms: u64) -> SourceEnd {
        let was_postponed = self.server.is_some();
        let mut data_bytes = self.data_bytes.into_inner();
        match self.server.map(PageServer::finish).transpose() {
            Ok(sent) => data_bytes += sent.unwrap_or(0),
            Err(error) => {
                let cause = Box::new(error);
                return SourceEnd::Unconfirmed(MigrationError::Incomplete(cause));
            }
        }
        SourceEnd::Finished(SendReport {
            passes,
            wire_bytes: self.peer.written(),
            data_bytes,
            downtime_ms,
            was_postponed,
        })
    }

    /// No further page is sent.
    fn abandon(&mut self) {
        if let Some(server) = self.server.take() {
            server.abandon();
        }
    }

    fn set_limit(&mut self, limit: Duration) {
        self.reader.get_mut().set_limit(limit);
        let writers = std::iter::once(&mut self.writer).chain(&mut self.others);
        writers.for_each(|writer| writer.get_mut().set_limit(limit));
    }

    fn set_end(&mut self, until: Option<Instant>) {
        self.peer.set_end(until);
        self.reader.get_mut().set_end(until);
        let writers = std::iter::once(&mut self.writer).chain(&mut self.others);
        writers.for_each(|writer| writer.get_mut().set_end(until));
    }

    /// Whether the time of all messages is over.
    fn is_over(&self) -> bool {
        self.peer.is_over()
    }

    /// Ends the migration before the commit. The target learns the reason, and need not answer questions; it may be gone.
    /// Returns the target's own reason if there is one.
    fn refuse(&mut self, error: MigrationError) -> MigrationError {
        self.reader.get_mut().ignore_cancel();
        self.writer.get_mut().ignore_cancel();
        // The machine is paused in the meantime.
        self.set_end(Some(Instant::now() + FAREWELL));
        let error = self.reason_of_peer(error);
        self.writer.refuse(&api::error_line(&error)).ok();
        // Afterwards: a target that waits for a page takes the end of that connection for a failure.
        self.abandon();
        error
    }

    /// The reason that the target sent before it closed the connection, if that is why `error` occurred.
    fn reason_of_peer(&mut self, error: MigrationError) -> MigrationError {
        let is_closed = matches!(
            &error,
            MigrationError::Wire(WireError::Io(error)) if matches!(
                error.kind(),
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
            )
        );
        if !is_closed {
            return error;
        }
        match self.reader.next(&[], "no further message") {
            Err(reason @ (WireError::Refused { .. } | WireError::Encrypted)) => reason.into(),
            _ => error,
        }
    }
}

/// Sends the chunks of a pass that no other connection sends. `sent` receives the bytes of data in each message.
fn send_share(
    writer: &mut Writer<Peer>,
    memory: &GuestMemory,
    written: Option<&WrittenPages>,
    left: &Chunks,
    sent: &impl Fn(usize),
) -> Result<(), MigrationError> {
    let mut runs: Vec<PageRun> = Vec::new();
    let cell = RefCell::new(&mut *writer);
    let send = |pages: Pages<'_>| {
        cell.borrow_mut().pages(Kind::Pages, pages)?;
        sent(pages.data.len());
        Ok::<_, MigrationError>(())
    };
    let clear = |run| {
        runs.push(run);
        if runs.len() == RUNS_MAX {
            cell.borrow_mut().clear(&runs)?;
            runs.clear();
        }
        Ok(())
    };
    memory.send_share(written, left, send, clear)?;
    match runs.is_empty() {
        true => Ok(()),
        false => Ok(writer.clear(&runs)?),
    }
}

/// RAM that is left to be copied when the machine is paused.
struct Rest<'a> {
    tracker: &'a WriteTracker,
    passes: u32,
    written: WrittenPages,
    converge: Option<Converge>,
    /// The connection over which it follows the machine; otherwise it is sent before.
    asked: Option<Writer<Peer>>,
}

fn take(tracker: &WriteTracker) -> Result<WrittenPages, MigrationError> {
    tracker.take().map_err(MigrationError::Track)
}

#[derive(Clone, Copy)]
struct Sent {
    passes: u32,
    paused: Instant,
}

/// Bytes per second of a pass.
#[derive(Debug, Clone, Copy)]
struct Speed {
    bytes: u64,
    time: Duration,
}

impl Speed {
    fn new(bytes: u64, since: Instant) -> Self {
        Self {
            bytes,
            time: since.elapsed(),
        }
    }

    /// How long it takes to send `bytes` at this speed.
    fn time_for(self, bytes: u64) -> Duration {
        let factor = bytes as f64 / self.bytes.max(1) as f64;
        Duration::try_from_secs_f64(self.time.as_secs_f64() * factor).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rest_that_fits_is_sent_while_the_machine_runs_as_long_as_it_shrinks() {
        let ms = Duration::from_millis;
        let it = Convergence {
            downtime: ms(100),
            timeout: ms(10_000),
            pauses_at_timeout: false,
        };
        let begin = Duration::ZERO;
        assert!(it.is_reached(ms(0), false, begin), "nothing is left");
        assert!(!it.is_reached(ms(101), false, begin), "too much is left");
        assert!(
            !it.is_reached(ms(90), true, begin),
            "another pass is worth it"
        );
        assert!(
            it.is_reached(ms(90), false, begin),
            "the guest writes as much"
        );
        assert!(it.is_reached(ms(5), true, begin), "hardly anything is left");
        assert!(
            it.is_reached(ms(90), true, ms(5000)),
            "the time is running out"
        );
    }
}
