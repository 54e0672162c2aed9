//! The engine for direct I/O on hosts without io_uring, which many container runtimes forbid: Linux AIO (io_submit(2)).
//! Without direct I/O the kernel would execute its operations during the submission.
//!
//! Linux AIO has no operation that deallocates or zeroes. These are made by system calls.

#![allow(unsafe_code)]
// UNSAFETY: the calls have no safe wrappers, and control blocks carry raw pointers; the caller guarantees that they stay
// valid until completion (`IoEngine::submit`).

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::calls::Calls;
use super::operation::{Completion, IoEngine, IoOperation};
use super::zeroes::zeroes;
use crate::block::image::Image;

/// Operations and a flag of linux/aio_abi.h, which libc lacks.
const PWRITE: u16 = 1;
const FDSYNC: u16 = 3;
const PREADV: u16 = 7;
const PWRITEV: u16 = 8;
const NOTIFIES_EVENTFD: u32 = 1;
/// Completions that one call collects.
const EVENTS: usize = 64;

/// `struct io_event` of linux/aio_abi.h.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Event {
    data: u64,
    obj: u64,
    res: i64,
    res2: i64,
}

/// The kernel's side of a queue.
struct Context(libc::c_ulong);

impl Context {
    fn new(depth: u16) -> io::Result<Self> {
        let mut context: libc::c_ulong = 0;
        // SAFETY: the kernel writes one number there.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_setup,
                libc::c_ulong::from(depth),
                &raw mut context,
            )
        };
        checked(result).map(|_| Self(context))
    }

    /// Collects completions; waits for at least `min`.
    fn events(&self, min: usize, events: &mut [Event; EVENTS]) -> io::Result<usize> {
        loop {
            // SAFETY: the kernel writes at most so many events to the array.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_io_getevents,
                    self.0,
                    min,
                    EVENTS,
                    events.as_mut_ptr(),
                    std::ptr::null_mut::<libc::timespec>(),
                )
            };
            match checked(result) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

impl Drop for Context {
    /// Waits for the operations in progress.
    fn drop(&mut self) {
        // SAFETY: the context exists, and nothing uses it any more.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
    }
}

fn checked(result: libc::c_long) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

pub(super) struct AioEngine {
    context: Context,
    /// Readable while the context may hold completions.
    ready: EventFd,
    /// `calls` keeps this descriptor open.
    image: RawFd,
    calls: Calls,
    /// To be submitted.
    started: Vec<libc::iocb>,
    /// Completions of operations that were not submitted, and collected ones.
    done: Vec<Completion>,
}

impl AioEngine {
    /// Called on the control thread, so that workers need no permission to create contexts.
    ///
    /// # Errors
    /// The kernel has no Linux AIO, forbids it, or has too many requests reserved (`fs.aio-max-nr`).
    pub(super) fn new(image: Arc<Image>, depth: u16) -> io::Result<Self> {
        Ok(Self {
            context: Context::new(depth)?,
            ready: EventFd::new(EFD_NONBLOCK)?,
            image: image.fd(),
            calls: Calls::new(image),
            started: Vec::with_capacity(usize::from(depth)),
            done: Vec::new(),
        })
    }

    /// The control block of an operation; `None` if Linux AIO does not have it.
    fn control_block(&self, id: u16, operation: &IoOperation<'_>) -> Option<libc::iocb> {
        let (opcode, buffer, count, offset) = match *operation {
            IoOperation::Read { offset, into } => {
                (PREADV, into.as_ptr() as u64, into.len(), offset)
            }
            IoOperation::Write { offset, from } => {
                (PWRITEV, from.as_ptr() as u64, from.len(), offset)
            }
            IoOperation::WriteZeroBuffer { offset, bytes } => {
                let zeroes = zeroes(bytes);
                (PWRITE, zeroes.as_ptr() as u64, zeroes.len(), offset)
            }
            IoOperation::Sync => (FDSYNC, 0, 0, 0),
            IoOperation::PunchHole { .. }
            | IoOperation::ZeroRange { .. }
            | IoOperation::OwnDiscard { .. } => return None,
        };
        // SAFETY: all of its fields are numbers.
        let mut block: libc::iocb = unsafe { std::mem::zeroed() };
        block.aio_data = u64::from(id);
        block.aio_lio_opcode = opcode;
        block.aio_fildes = self.image as u32;
        block.aio_buf = buffer;
        block.aio_nbytes = count as u64;
        block.aio_offset = offset as i64;
        block.aio_flags = NOTIFIES_EVENTFD;
        block.aio_resfd = self.ready.as_raw_fd() as u32;
        Some(block)
    }

    /// Collects completions; waits for at least `min`.
    fn collect(&mut self, min: usize) -> io::Result<()> {
        let mut events = [Event::default(); EVENTS];
        loop {
            let wanted = if self.done.is_empty() { min } else { 0 };
            let count = self.context.events(wanted, &mut events)?;
            self.done
                .extend(events[..count].iter().map(|event| Completion {
                    // Set by `control_block` from a u16.
                    id: event.data as u16,
                    result: i32::try_from(event.res).unwrap_or(-libc::EIO),
                }));
            if count < EVENTS {
                return Ok(());
            }
        }
    }
}

impl IoEngine for AioEngine {
    fn completion_fd(&self) -> Option<RawFd> {
        Some(self.ready.as_raw_fd())
    }

    unsafe fn submit(&mut self, id: u16, operation: &IoOperation<'_>) -> io::Result<()> {
        match self.control_block(id, operation) {
            Some(block) if !self.calls.must_perform(operation) => self.started.push(block),
            _ => {
                // SAFETY: the memory is valid until the completion is reaped, which includes this call.
                let result = unsafe { self.calls.perform(operation) };
                self.done.push(Completion { id, result });
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.started.is_empty() {
            let mut blocks: Vec<*mut libc::iocb> =
                self.started.iter_mut().map(std::ptr::from_mut).collect();
            // SAFETY: the kernel copies the blocks during the call. The caller of `submit` keeps vectors and memory valid
            // until completion.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_io_submit,
                    self.context.0,
                    blocks.len(),
                    blocks.as_mut_ptr(),
                )
            };
            match checked(result) {
                Ok(count) => drop(self.started.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => return Err(error),
                // The kernel rejects the first block.
                Err(error) => {
                    let id = self.started.remove(0).aio_data as u16;
                    let result = -error.raw_os_error().unwrap_or(libc::EIO);
                    self.done.push(Completion { id, result });
                    // The kernel does not signal what it rejects. Fails only if the descriptor is readable anyway.
                    self.ready.write(1).ok();
                }
            }
        }
        Ok(())
    }

    fn wait(&mut self) -> io::Result<()> {
        self.flush()?;
        self.collect(1)
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        // A completion after this makes the descriptor readable again.
        drop(self.ready.read());
        if let Err(error) = self.collect(0) {
            log::error!("completions of disk I/O cannot be collected: {error}");
        }
        completions.append(&mut self.done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::BlockParams;
    use crate::block::tests::{image, params};

    /// An engine over an image, unless this host lacks Linux AIO or the folder lacks direct I/O.
    fn engine(direct: bool) -> Option<(AioEngine, tempfile::NamedTempFile)> {
        let file = image(64);
        let params = BlockParams {
            direct,
            ..params(&file)
        };
        let engine = match Image::open(&params) {
            Ok(image) => AioEngine::new(Arc::new(image), 8).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        engine
            .map_err(|error| test_skip::skip(format!("no Linux AIO here: {error}")))
            .ok()
            .map(|engine| (engine, file))
    }

    fn results(engine: &mut AioEngine, count: usize) -> Vec<i32> {
        let mut completions = Vec::new();
        while completions.len() < count {
            engine.wait().expect("the kernel takes them");
            engine.reap(&mut completions);
        }
        completions.sort_unstable_by_key(|completion| completion.id);
        completions.iter().map(|it| it.result).collect()
    }

    #[test]
    fn operation_that_the_kernel_rejects_completes_with_its_error() {
        let Some((mut engine, _file)) = engine(false) else {
            return;
        };
        for id in 1..=2 {
            // SAFETY: a flush uses no memory.
            unsafe { engine.submit(id, &IoOperation::Sync) }.expect("there is room");
        }
        engine.started[0].aio_lio_opcode = 999;
        assert_eq!(results(&mut engine, 2), [-libc::EINVAL, 0]);
        drop(engine.ready.read());
        // SAFETY: as above.
        unsafe { engine.submit(1, &IoOperation::Sync) }.expect("there is room");
        engine.started[0].aio_lio_opcode = 999;
        engine.flush().expect("the kernel takes others");
        assert!(engine.ready.read().is_ok(), "a worker would sleep for ever");
    }

    #[test]
    fn aligned_direct_io_is_submitted_and_everything_else_is_called() {
        const BLOCK: usize = 4096;
        let Some((mut engine, file)) = engine(true) else {
            return;
        };
        let mut memory = vec![0x5a_u8; 3 * BLOCK];
        let start = memory.as_ptr().align_offset(BLOCK);
        let piece = |at: usize| libc::iovec {
            iov_base: memory[at..].as_ptr().cast_mut().cast(),
            iov_len: BLOCK,
        };
        let (aligned, misaligned) = ([piece(start)], [piece(start + 1)]);
        let bytes = BLOCK as u64;
        let operations = [
            IoOperation::Write {
                offset: 0,
                from: &aligned,
            },
            IoOperation::Write {
                offset: bytes,
                from: &misaligned,
            },
            IoOperation::WriteZeroBuffer {
                offset: 2 * bytes,
                bytes,
            },
            IoOperation::PunchHole {
                offset: 3 * bytes,
                bytes,
            },
            IoOperation::Sync,
        ];
        for (operation, id) in operations.iter().zip(0..) {
            // SAFETY: the memory outlives the engine's use of it, and is only read.
            unsafe { engine.submit(id, operation) }.expect("there is room");
        }
        let submitted: Vec<_> = engine.started.iter().map(|it| it.aio_data).collect();
        assert_eq!(submitted, [0, 2, 4]);
        let whole = BLOCK as i32;
        assert_eq!(results(&mut engine, 5), [whole, whole, whole, 0, 0]);
        let content = std::fs::read(file.path()).unwrap();
        let expected = [[0x5a; BLOCK], [0x5a; BLOCK], [0; BLOCK], [0; BLOCK]].concat();
        assert!(content[..4 * BLOCK] == expected);

        memory[start..][..BLOCK].fill(0);
        let into = [libc::iovec {
            iov_base: memory[start..].as_mut_ptr().cast(),
            iov_len: BLOCK,
        }];
        // SAFETY: as above; the memory is writable.
        unsafe {
            engine.submit(
                0,
                &IoOperation::Read {
                    offset: 0,
                    into: &into,
                },
            )
        }
        .expect("there is room");
        assert_eq!(results(&mut engine, 1), [whole]);
        assert!(memory[start..][..BLOCK] == [0x5a; BLOCK]);
    }
}
