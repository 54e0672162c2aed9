//! The io_uring engine: one ring per queue. The ring's descriptor is readable while the ring holds completions. Unlike an
//! eventfd, this descriptor costs nothing for completions that exist when submission returns.
//!
//! Writes to the page cache do not go through the ring. Most file systems cannot start them without blocking; the
//! kernel then passes them to its own threads, which takes longer than the copy.
//!
//! The image is not registered with the ring. The kernel tears a ring down some time after it is closed or its process
//! has died. Until then, a registered image would stay open and locked, and a quick restart would find the disk in use.
//!
//! A seccomp filter does not see the operations of a ring. Before the ring is enabled, it is therefore restricted to
//! the operations in use. It cannot open files or create sockets, and no further buffers, files or settings can be
//! registered.

#![allow(unsafe_code)]
// UNSAFETY: submission queue entries carry raw pointers; the caller guarantees that they stay valid until completion
// (`IoEngine::submit`).

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::register::Restriction;
use io_uring::{IoUring, Probe, opcode, squeue, types};

use super::calls::{Calls, PUNCH_HOLE, ZERO_RANGE};
use super::operation::{Completion, IoEngine, IoOperation};
use super::zeroes::zeroes;
use crate::block::image::Image;

/// The operations that the ring must support. All others are forbidden.
const OPCODES: [u8; 5] = [
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Write::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];

pub(super) struct IoUringEngine {
    /// `calls` keeps this descriptor open.
    image: types::Fd,
    direct: bool,
    ring: IoUring,
    calls: Calls,
    /// Completions of operations that the ring cannot execute.
    done: Vec<Completion>,
}

impl IoUringEngine {
    /// Sets up the ring. Called on the control thread, so that workers need no permission to create rings.
    ///
    /// # Errors
    /// The kernel has no io_uring, forbids it, lacks an operation, or cannot restrict rings (possible since 5.10).
    pub(super) fn new(image: Arc<Image>, depth: u16) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_r_disabled()
            .build(u32::from(depth))?;
        let submitter = ring.submitter();
        let mut probe = Probe::new();
        submitter.register_probe(&mut probe)?;
        if !OPCODES.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // Everything not listed is rejected, including registrations and flags.
        let mut allowed = OPCODES.map(Restriction::sqe_op);
        submitter.register_restrictions(&mut allowed)?;
        submitter.register_enable_rings()?;
        Ok(Self {
            image: types::Fd(image.fd()),
            direct: image.dio().is_some(),
            ring,
            calls: Calls::new(image),
            done: Vec::new(),
        })
    }

    /// Whether this operation is executed synchronously instead of by the ring.
    fn performs(&self, operation: &IoOperation<'_>) -> bool {
        let writes = matches!(
            operation,
            IoOperation::Write { .. } | IoOperation::WriteZeroBuffer { .. }
        );
        (writes && !self.direct) || self.calls.must_perform(operation)
    }

    /// Enters the kernel until it has accepted all entries, and waits for `want` completions.
    fn enter(&self, want: usize) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(want) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The entry for an operation; `None` for operations that do not go through the ring.
fn entry(image: types::Fd, operation: &IoOperation<'_>) -> Option<squeue::Entry> {
    Some(match *operation {
        IoOperation::Read { offset, into } => {
            opcode::Readv::new(image, into.as_ptr(), into.len() as u32)
                .offset(offset)
                .build()
        }
        IoOperation::Write { offset, from } => {
            opcode::Writev::new(image, from.as_ptr(), from.len() as u32)
                .offset(offset)
                .build()
        }
        IoOperation::WriteZeroBuffer { offset, bytes } => {
            let zeroes = zeroes(bytes);
            opcode::Write::new(image, zeroes.as_ptr(), zeroes.len() as u32)
                .offset(offset)
                .build()
        }
        IoOperation::Sync => opcode::Fsync::new(image)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        IoOperation::PunchHole { offset, bytes } => opcode::Fallocate::new(image, bytes)
            .offset(offset)
            .mode(PUNCH_HOLE)
            .build(),
        IoOperation::ZeroRange { offset, bytes } => opcode::Fallocate::new(image, bytes)
            .offset(offset)
            .mode(ZERO_RANGE)
            .build(),
        IoOperation::OwnDiscard { .. } => return None,
    })
}

impl IoEngine for IoUringEngine {
    fn completion_fd(&self) -> Option<RawFd> {
        Some(self.ring.as_raw_fd())
    }

    unsafe fn submit(&mut self, id: u16, operation: &IoOperation<'_>) -> io::Result<()> {
        let entry = match entry(self.image, operation) {
            Some(entry) if !self.performs(operation) => entry,
            _ => {
                // SAFETY: the memory is valid until the completion is reaped, which includes this call.
                let result = unsafe { self.calls.perform(operation) };
                self.done.push(Completion { id, result });
                return Ok(());
            }
        };
        let entry = entry.user_data(u64::from(id));
        // SAFETY: the caller keeps vectors and memory valid until completion.
        let mut pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            // The queue is full: submitting its entries empties it.
            self.enter(0)?;
            // SAFETY: as above.
            pushed = unsafe { self.ring.submission().push(&entry) };
        }
        pushed.map_err(|_| io::ErrorKind::WouldBlock.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        self.enter(0)
    }

    fn wait(&mut self) -> io::Result<()> {
        if !self.done.is_empty() {
            return self.flush();
        }
        self.enter(1)
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        completions.append(&mut self.done);
        completions.extend(self.ring.completion().map(|entry| Completion {
            // Set by `submit` from a u16.
            id: entry.user_data() as u16,
            result: entry.result(),
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::tests::{image, params};

    /// An engine, unless this host lacks io_uring.
    fn engine() -> Option<IoUringEngine> {
        let file = image(8);
        let image = Arc::new(Image::open(&params(&file)).expect("the image is sound"));
        match IoUringEngine::new(image, 8) {
            Ok(engine) => Some(engine),
            Err(error) => {
                test_skip::skip(format!("no io_uring here: {error}"));
                None
            }
        }
    }

    /// The result of one entry.
    fn result_of(engine: &mut IoUringEngine, entry: &squeue::Entry) -> i32 {
        // SAFETY: the memory behind the test's entries is static or outlives this call.
        unsafe { engine.ring.submission().push(entry) }.expect("the ring is empty");
        engine.enter(1).expect("the ring is enabled");
        let completion = engine.ring.completion().next();
        completion.expect("the call waited for it").result()
    }

    #[test]
    fn ring_refuses_operations_that_are_not_in_use() {
        let Some(mut engine) = engine() else {
            return;
        };
        let path = c"/etc/passwd";
        let mut statx = [0_u64; 32];
        let entries = [
            opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr()).build(),
            opcode::OpenAt2::new(types::Fd(libc::AT_FDCWD), path.as_ptr(), std::ptr::null())
                .build(),
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
            opcode::Statx::new(
                types::Fd(libc::AT_FDCWD),
                path.as_ptr(),
                statx.as_mut_ptr().cast(),
            )
            .build(),
            opcode::Nop::new().build(),
        ];
        for entry in &entries {
            assert_eq!(result_of(&mut engine, entry), -libc::EACCES, "{entry:?}");
        }
        // The operations in use still work.
        let sync = entry(engine.image, &IoOperation::Sync).expect("the ring does that");
        assert_eq!(result_of(&mut engine, &sync), 0);
        // With a flag they are rejected.
        let linked = sync.flags(squeue::Flags::IO_LINK);
        assert_eq!(result_of(&mut engine, &linked), -libc::EACCES);
    }

    #[test]
    fn ring_takes_no_registration_once_it_is_enabled() {
        let Some(engine) = engine() else {
            return;
        };
        let submitter = engine.ring.submitter();
        let refused = |result: io::Result<()>| {
            let error = result.expect_err("must be refused");
            assert_eq!(error.raw_os_error(), Some(libc::EACCES));
        };
        refused(submitter.register_files(&[0]));
        refused(submitter.register_eventfd(0));
        refused(submitter.register_probe(&mut Probe::new()));
        refused(submitter.register_restrictions(&mut [Restriction::sqe_op(opcode::OpenAt::CODE)]));
    }
}
