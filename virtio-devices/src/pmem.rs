//! Persistent memory (virtio 1.2 §5.19): a file that the guest maps, and one queue of flush requests.
//!
//! The memory is not guest RAM: devices cannot transfer data to or from it, and the balloon never discards it. The
//! guest's writes go to the host's page cache, so they survive the VMM; a flush writes them to stable storage. With
//! `discard_writes`, the guest writes to a private copy, and a flush does nothing.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use state::{Part, Saved, State, StateError, parts, require};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, MmapRegion};

use crate::counters::counters;
use crate::device::{Counters, DeviceMemory, QueueHandler, VirtioDevice, boxed, read_config_space};
use crate::file_lock;
use crate::queue::{ChainBuffers, ChainError, Driver, Reply, SingleQueue, SingleQueueDevice};
use crate::worker::Turn;

/// Virtio device id.
const DEVICE_TYPE: u32 = 27;
/// Entries of the one queue.
const QUEUE_SIZES: [u16; 1] = [256];
/// The only request type; the response has the same size.
const REQUEST_FLUSH: u32 = 0;
const REQUEST_BYTES: usize = 4;
/// Responses to a flush.
const DONE: u32 = 0;
const FAILED: u32 = 1;
/// Cost of a flush in a turn: the same as for a disk.
const FLUSH_COST: u64 = 1 << 20;

/// Alignment of size and address, so that both sides can map huge pages.
pub const ALIGN_BYTES: u64 = 2 << 20;

/// Parameters of the device.
#[derive(Debug)]
pub struct PmemParams {
    /// Names the device and its thread.
    pub id: String,
    /// The file, or a folder in which a file without a name is created.
    pub file: PathBuf,
    /// Size that the guest sees, in bytes; the file's size if absent. Required for a folder.
    pub bytes: Option<u64>,
    /// The guest writes to a private copy.
    pub discard_writes: bool,
}

/// Reasons why a file cannot be used as persistent memory.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// The path cannot be opened.
    #[error("cannot open {}", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The path is a device, socket or the like.
    #[error("{} is neither a regular file nor a folder", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A new file has no size.
    #[error("{} is a folder: give the size of the file to create in it", path.display())]
    SizeMissing {
        /// The folder.
        path: PathBuf,
    },
    /// The size is not a multiple of a huge page.
    #[error("the size of {} must be a positive multiple of {ALIGN_BYTES} bytes; got {bytes}", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// The requested size, or that of the file.
        bytes: u64,
    },
    /// The file is too short: memory after its end would not exist.
    #[error("{} has {file_bytes} bytes, less than the size of {bytes} bytes", path.display())]
    FileTooShort {
        /// The file.
        path: PathBuf,
        /// Its size.
        file_bytes: u64,
        /// The requested size.
        bytes: u64,
    },
    /// Another VM, or another device, uses the file.
    #[error("cannot lock {}: it is in use by another process or device", path.display())]
    Locked {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// No address space is left.
    #[error("cannot map {bytes} bytes of {}", path.display())]
    Map {
        path: PathBuf,
        /// The size.
        bytes: u64,
        #[source]
        source: MmapRegionError,
    },
}

counters! {
    Stats {
        flushes,
        /// Number of times the host could not write the file.
        flush_failures,
        bad_requests,
    }
}

/// The saved state beyond the queue. The content stays in the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemState {
    /// Guest address of the memory; absent if the device was on no bus.
    pub start: Option<u64>,
    /// Its size.
    pub bytes: u64,
}

impl State for PmemState {
    const PART: Part = parts::PMEM;
}

/// The VMM's handle: writes the guest's data to stable storage.
#[derive(Debug, Clone)]
pub struct PmemHandle {
    /// `None` if the guest's writes are discarded.
    file: Option<Arc<File>>,
}

impl PmemHandle {
    /// Writes the file's content to stable storage.
    ///
    /// # Errors
    /// The error of fdatasync.
    pub fn sync(&self) -> io::Result<()> {
        match &self.file {
            Some(file) => file.sync_data(),
            None => Ok(()),
        }
    }

    /// Releases the lock of the file, or takes it again. A file to which nothing is written keeps its lock, which allows
    /// other readers.
    ///
    /// # Errors
    /// `WouldBlock`: another process has a conflicting lock.
    pub fn hold(&self, hold: bool) -> io::Result<()> {
        match (&self.file, hold) {
            (Some(file), true) => file_lock::lock(file, true, 0),
            (Some(file), false) => file_lock::unlock(file),
            (None, _) => Ok(()),
        }
    }
}

/// The configuration half.
pub struct Pmem {
    memory: Arc<MmapRegion<()>>,
    start: Option<u64>,
    handle: PmemHandle,
    handler: Option<PmemHandler>,
    stats: Arc<Stats>,
}

crate::debug_fields!(Pmem { start, handle });

impl Pmem {
    /// Opens, locks and maps the file.
    ///
    /// # Errors
    /// See [`PmemError`].
    pub fn new(params: &PmemParams) -> Result<Self, PmemError> {
        let (file, bytes) = open(params)?;
        let memory = map(params, &file, bytes)?;
        let stats = Arc::new(Stats::default());
        let handle = PmemHandle {
            file: (!params.discard_writes).then(|| Arc::new(file)),
        };
        Ok(Self {
            memory: Arc::new(memory),
            start: None,
            handler: Some(PmemHandler {
                name: params.id.clone(),
                handle: handle.clone(),
                stats: Arc::clone(&stats),
            }),
            handle,
            stats,
        })
    }

    /// The handle by which the VMM syncs the file.
    pub fn handle(&self) -> PmemHandle {
        self.handle.clone()
    }

    fn bytes(&self) -> u64 {
        self.memory.size() as u64
    }
}

/// The locked file, and the size that the guest sees.
fn open(params: &PmemParams) -> Result<(File, u64), PmemError> {
    let path = &params.file;
    let failed = |source| PmemError::Open {
        path: path.clone(),
        source,
    };
    // A FIFO or device is not opened, because that could block or have side effects.
    let stat = std::fs::metadata(path).map_err(failed)?;
    if stat.is_dir() {
        let bytes = params
            .bytes
            .ok_or_else(|| PmemError::SizeMissing { path: path.clone() })?;
        check_size(path, bytes)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .open(path)
            .map_err(failed)?;
        file.set_len(bytes).map_err(failed)?;
        return Ok((file, bytes));
    }
    if !stat.is_file() {
        return Err(PmemError::NotAFile { path: path.clone() });
    }
    let writable = !params.discard_writes;
    let file = OpenOptions::new()
        .read(true)
        .write(writable)
        .open(path)
        .map_err(failed)?;
    let file_bytes = file.metadata().map_err(failed)?.len();
    let bytes = params.bytes.unwrap_or(file_bytes);
    check_size(path, bytes)?;
    if bytes > file_bytes {
        return Err(PmemError::FileTooShort {
            path: path.clone(),
            file_bytes,
            bytes,
        });
    }
    file_lock::lock(&file, writable, 0).map_err(|source| PmemError::Locked {
        path: path.clone(),
        source,
    })?;
    Ok((file, bytes))
}

fn check_size(path: &Path, bytes: u64) -> Result<(), PmemError> {
    if bytes == 0 || !bytes.is_multiple_of(ALIGN_BYTES) {
        let path = path.to_owned();
        return Err(PmemError::Size { path, bytes });
    }
    Ok(())
}

fn map(params: &PmemParams, file: &File, bytes: u64) -> Result<MmapRegion<()>, PmemError> {
    let failed = |source| PmemError::Map {
        path: params.file.clone(),
        bytes,
        source,
    };
    let size = usize::try_from(bytes).map_err(|_| failed(MmapRegionError::InvalidPointer))?;
    let file = file
        .try_clone()
        .map_err(|source| failed(MmapRegionError::Mmap(source)))?;
    let sharing = if params.discard_writes {
        libc::MAP_PRIVATE
    } else {
        libc::MAP_SHARED
    };
    MmapRegionBuilder::new(size)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(sharing | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::new(file, 0))
        .build()
        .map_err(failed)
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_pmem_config`: start and size.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; 16];
        space[..8].copy_from_slice(&self.start.unwrap_or(0).to_le_bytes());
        space[8..].copy_from_slice(&self.bytes().to_le_bytes());
        read_config_space(&space, offset, data);
    }

    fn memory(&self) -> Option<DeviceMemory> {
        Some(DeviceMemory {
            mapping: Arc::clone(&self.memory),
            start: self.start,
            align_bytes: ALIGN_BYTES,
        })
    }

    fn set_memory_start(&mut self, start: u64) {
        self.start = Some(start);
    }

    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
        boxed(self.handler.take().map(SingleQueue::new))
    }

    fn state(&self) -> Saved {
        Saved::of(&PmemState {
            start: self.start,
            bytes: self.bytes(),
        })
    }

    fn restore(&mut self, state: &Saved) -> Result<(), StateError> {
        let PmemState { start, bytes } = state.read()?;
        require(bytes == self.bytes(), parts::PMEM, "bytes", || {
            format!("is {bytes}, the file has {}", self.bytes())
        })?;
        let aligned = start.is_none_or(|start| start.is_multiple_of(ALIGN_BYTES));
        require(aligned, parts::PMEM, "start", || {
            format!("is {start:?}, not a multiple of {ALIGN_BYTES}")
        })?;
        self.start = start;
        Ok(())
    }

    fn counters(&self) -> Counters {
        self.stats.read()
    }
}

/// The queue half.
struct PmemHandler {
    name: String,
    handle: PmemHandle,
    stats: Arc<Stats>,
}

impl PmemHandler {
    fn flush(&self, turn: &mut Turn) -> u32 {
        turn.charge_call(1, FLUSH_COST);
        self.stats.flushes.count();
        match self.handle.sync() {
            Ok(()) => DONE,
            Err(error) => {
                if self.stats.flush_failures.count_loudly() {
                    log::error!("{}: cannot sync persistent memory: {error}", self.name);
                }
                FAILED
            }
        }
    }
}

impl SingleQueueDevice for PmemHandler {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn answer(
        &mut self,
        _driver: &Driver,
        request: Result<ChainBuffers, ChainError>,
        turn: &mut Turn,
    ) -> Reply {
        let mut kind = [0; REQUEST_BYTES];
        let answer_to = match request {
            Ok(ChainBuffers { readable, writable })
                if writable.bytes() >= REQUEST_BYTES
                    && readable.copy_out(&mut kind) == kind.len() =>
            {
                writable
            }
            _ => {
                self.stats.bad_requests.count();
                return Reply::Done(0);
            }
        };
        let answer = match u32::from_le_bytes(kind) {
            REQUEST_FLUSH => self.flush(turn),
            _ => {
                self.stats.bad_requests.count();
                FAILED
            }
        };
        answer_to.copy_in(&answer.to_le_bytes());
        Reply::Done(REQUEST_BYTES as u32)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::Mutex;

    use tempfile::NamedTempFile;
    use vm_memory::{Bytes, VolatileMemory};

    use super::*;
    use crate::testing::{HandlerHarness, Segment, conformance};

    fn file(bytes: u64) -> NamedTempFile {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        file
    }

    fn params(path: &Path) -> PmemParams {
        PmemParams {
            id: "_pmem0".into(),
            file: path.into(),
            bytes: None,
            discard_writes: false,
        }
    }

    fn refused(params: &PmemParams) -> String {
        Pmem::new(params).unwrap_err().to_string()
    }

    #[test]
    fn pmem_conforms() {
        let file = file(ALIGN_BYTES);
        conformance("pmem", |_| {
            // Only readers may open the file a second time.
            let pmem = Pmem::new(&PmemParams {
                discard_writes: true,
                ..params(file.path())
            });
            Arc::new(Mutex::new(pmem.unwrap()))
        });
    }

    #[test]
    fn what_the_guest_writes_is_in_the_file_unless_it_is_discarded() {
        for discard_writes in [false, true] {
            let file = file(ALIGN_BYTES);
            let pmem = Pmem::new(&PmemParams {
                discard_writes,
                ..params(file.path())
            })
            .unwrap();
            let memory = pmem.memory().unwrap();
            let guest = memory.mapping.as_volatile_slice();
            guest.write_slice(b"kept", 4096).unwrap();
            let mut found = [0; 4];
            guest.read_slice(&mut found, 4096).unwrap();
            assert_eq!(&found, b"kept");
            file.as_file().read_exact_at(&mut found, 4096).unwrap();
            assert_eq!(&found == b"kept", !discard_writes);
        }
    }

    #[test]
    fn flush_is_answered_and_other_requests_fail() {
        let file = file(ALIGN_BYTES);
        let mut pmem = Pmem::new(&params(file.path())).unwrap();
        let handler = pmem.take_handlers().remove(0);
        let mut harness = HandlerHarness::new(handler, pmem.features());
        harness.add_queues(1);
        harness.activate().unwrap();
        for (request, answer) in [(0_u32, 0_u32), (1, 1), (u32::MAX, 1), (0, 0)] {
            let request = request.to_le_bytes();
            let segments = [Segment::Readable(&request), Segment::Writable(4)];
            let (chain, used) = harness.request(0, &segments).unwrap();
            assert_eq!(used.unwrap().len, 4);
            let found = harness.queue(0).read_buffer(chain.buffers[1]);
            assert_eq!(found, answer.to_le_bytes());
        }
        for segments in [
            &[Segment::Readable(&[0; 3]), Segment::Writable(4)][..],
            &[Segment::Readable(&[0; 4]), Segment::Writable(3)],
            &[Segment::Readable(&[0; 4])],
            &[Segment::Writable(4)],
        ] {
            let (_, used) = harness.request(0, segments).unwrap();
            assert_eq!(used.unwrap().len, 0);
        }
        let counters = pmem.counters();
        assert_eq!((counters["flushes"], counters["bad_requests"]), (2, 6));
    }

    #[test]
    fn config_space_names_the_memory() {
        let file = file(2 * ALIGN_BYTES);
        let mut pmem = Pmem::new(&PmemParams {
            bytes: Some(ALIGN_BYTES),
            ..params(file.path())
        })
        .unwrap();
        pmem.set_memory_start(0x12_3420_0000);
        let mut space = [0; 16];
        pmem.read_config(0, &mut space);
        assert_eq!(space[..8], 0x12_3420_0000_u64.to_le_bytes());
        assert_eq!(space[8..], ALIGN_BYTES.to_le_bytes());
        let state = pmem.state();
        drop(pmem);
        let mut restored = Pmem::new(&PmemParams {
            bytes: Some(ALIGN_BYTES),
            ..params(file.path())
        })
        .unwrap();
        restored.restore(&state).unwrap();
        assert_eq!(restored.memory().unwrap().start, Some(0x12_3420_0000));
        let odd = Saved::of(&PmemState {
            start: Some(4096),
            bytes: ALIGN_BYTES,
        });
        assert!(restored.restore(&odd).is_err());
    }

    #[test]
    fn unusable_files_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let short = file(ALIGN_BYTES);
        let path = short.path().display().to_string();
        let sized = |bytes| PmemParams {
            bytes: Some(bytes),
            ..params(short.path())
        };
        for (params, text) in [
            (params(&folder.path().join("none")), "cannot open"),
            (
                params(Path::new("/dev/null")),
                "neither a regular file nor a folder",
            ),
            (params(folder.path()), "give the size"),
            (sized(0), "positive multiple of 2097152"),
            (sized(ALIGN_BYTES + 4096), "got 2101248"),
            (sized(2 * ALIGN_BYTES), "has 2097152 bytes, less than"),
        ] {
            let error = refused(&params);
            assert!(error.contains(text), "{error}");
        }
        let first = Pmem::new(&params(short.path())).unwrap();
        let error = refused(&params(short.path()));
        assert!(error.contains("in use") && error.contains(&path), "{error}");
        drop(first);
        Pmem::new(&params(short.path())).unwrap();
        let unnamed = PmemParams {
            bytes: Some(ALIGN_BYTES),
            discard_writes: true,
            ..params(folder.path())
        };
        Pmem::new(&unnamed).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
