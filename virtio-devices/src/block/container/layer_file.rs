//! The file of one image as imago sees it, with delayed changes of the L1 table.
//!
//! imago writes an entry of the L1 table to the file immediately. It writes the reference count of the table that the
//! entry points to only later. If the VMM were killed in between, the next VMM would take that table for free space
//! and overwrite it. Therefore entries are kept in memory until everything that they point to is in the file. If the VMM is
//! killed, the image is as of the last flush, with some clusters allocated but unused.
//!
//! imago also writes a new L2 table immediately, possibly over a cluster that it has just freed. The tables in the file
//! still refer to that cluster. Therefore the caller checks [`LayerFile::lacks_l2`] and, if it is true, flushes
//! first.
//!
//! The L1 table never moves: it covers the whole disk (checked), which keeps its size.

#![allow(unsafe_code)]
// UNSAFETY: implements unsafe methods of a trait by safe ones of the wrapped file.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

use imago::file::File as ImagoFile;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageExt};

use super::qcow2::{READABLE_BITS, READABLE_BYTE};
use crate::Unpoisoned;

/// Bytes of an entry of the L1 table, and its bit for an L2 table that is changed in place.
const ENTRY_BYTES: usize = 8;
const ENTRY_COPIED: u64 = 1 << 63;

/// A file, and its L1 table if the image can be written.
#[derive(Debug)]
pub(super) struct LayerFile {
    file: ImagoFile,
    l1: L1,
    /// The image is only read, and imago must not see the features of the header that only forbid writing.
    hides_features: bool,
    helper: CommonStorageHelper,
}

/// The place of the L1 table, and a copy of it once an entry has changed.
#[derive(Debug)]
struct L1 {
    range: Range<u64>,
    copy: Mutex<L1Copy>,
}

#[derive(Debug, Default)]
struct L1Copy {
    entries: Option<Vec<u8>>,
    is_changed: bool,
}

impl L1 {
    fn copy(&self) -> MutexGuard<'_, L1Copy> {
        self.copy.lock().unpoisoned()
    }

    /// The parts of `range` before, in and after the table.
    fn split(&self, range: Range<u64>) -> [Range<u64>; 3] {
        let start = self.range.start.clamp(range.start, range.end);
        let end = self.range.end.clamp(start, range.end);
        [range.start..start, start..end, end..range.end]
    }

    /// Indexes of a part of the table in its copy.
    fn indexes(&self, part: &Range<u64>) -> Range<usize> {
        (part.start - self.range.start) as usize..(part.end - self.range.start) as usize
    }
}

impl LayerFile {
    /// `l1`: where the L1 table is; empty if nothing is written.
    pub(super) fn new(file: ImagoFile, l1: Range<u64>, hides_features: bool) -> Self {
        Self {
            file,
            hides_features,
            l1: L1 {
                range: l1,
                copy: Mutex::default(),
            },
            helper: CommonStorageHelper::default(),
        }
    }

    /// Writes everything to the file: by `flush_rest` what the L1 table points to, and then the table itself as it was
    /// before that. One call at a time.
    pub(super) fn flush_all(&self, flush_rest: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut copy = self.l1.copy();
        let was_changed = std::mem::take(&mut copy.is_changed);
        let entries = was_changed.then(|| copy.entries.clone()).flatten();
        drop(copy);
        let flushed = flush_rest().and_then(|()| {
            let Some(entries) = entries else {
                return Ok(());
            };
            // The table must not reach the disk first.
            self.file.sync()?;
            self.file.write(&entries, self.l1.range.start)
        });
        if flushed.is_err() && was_changed {
            self.l1.copy().is_changed = true;
        }
        flushed
    }

    /// Whether a write to the range of this L1 entry needs a new L2 table.
    pub(super) fn lacks_l2(&self, index: usize) -> io::Result<bool> {
        let mut copy = self.l1.copy();
        let (entries, _) = self.load(&mut copy)?.as_chunks::<ENTRY_BYTES>();
        let entry = entries.get(index).map(|entry| u64::from_be_bytes(*entry));
        Ok(entry.is_some_and(|entry| entry & ENTRY_COPIED == 0))
    }

    /// The entries of the L1 table, read when they are first needed.
    fn load<'a>(&self, copy: &'a mut L1Copy) -> io::Result<&'a mut [u8]> {
        let entries = match copy.entries.take() {
            Some(entries) => entries,
            None => {
                let range = &self.l1.range;
                let mut entries = vec![0; (range.end - range.start) as usize];
                self.file.read(entries.as_mut_slice(), range.start)?;
                entries
            }
        };
        Ok(copy.entries.insert(entries))
    }

    fn reads(&self, mut into: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let end = offset + into.len();
        if self.hides_features && (offset..end).contains(&READABLE_BYTE) {
            let mut bytes = vec![0; into.len() as usize];
            self.file.read(bytes.as_mut_slice(), offset)?;
            bytes[(READABLE_BYTE - offset) as usize] &= !READABLE_BITS;
            into.copy_from_slice(&bytes);
            return Ok(());
        }
        let [before, within, after] = self.l1.split(offset..end);
        for (part, is_l1) in [(before, false), (within, true), (after, false)] {
            let (mut piece, rest) = into.split_at(part.end - part.start);
            into = rest;
            if piece.is_empty() {
                continue;
            }
            let copy = self.l1.copy();
            match (&copy.entries, is_l1) {
                (Some(entries), true) => piece.copy_from_slice(&entries[self.l1.indexes(&part)]),
                _ => {
                    drop(copy);
                    self.file.readv(piece, part.start)?;
                }
            }
        }
        Ok(())
    }

    fn writes(&self, mut from: IoVector<'_>, offset: u64) -> io::Result<()> {
        let end = offset + from.len();
        let [before, within, after] = self.l1.split(offset..end);
        for (part, is_l1) in [(before, false), (within, true), (after, false)] {
            let (piece, rest) = from.split_at(part.end - part.start);
            from = rest;
            if piece.is_empty() {
                continue;
            }
            if !is_l1 {
                self.file.writev(piece, part.start)?;
                continue;
            }
            let mut copy = self.l1.copy();
            let entries = self.load(&mut copy)?;
            piece.copy_into_slice(&mut entries[self.l1.indexes(&part)]);
            copy.is_changed = true;
        }
        Ok(())
    }
}

impl fmt::Display for LayerFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file.fmt(f)
    }
}

/// The wrapped file aligns what direct I/O requires, so this one has no alignment.
impl Storage for LayerFile {
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn zero_align(&self) -> usize {
        self.file.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.file.discard_align()
    }

    unsafe fn pure_readv(&self, into: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        self.reads(into, offset)
    }

    unsafe fn pure_writev(&self, from: IoVector<'_>, offset: u64) -> io::Result<()> {
        self.writes(from, offset)
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.file.write_zeroes(offset, length)
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.file.write_allocated_zeroes(offset, length)
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.file.discard(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    /// Forgets the L1 table. It was written before the image was released.
    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        *self.l1.copy() = L1Copy::default();
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, size: u64, mode: imago::storage::PreallocateMode) -> io::Result<()> {
        self.file.resize(size, mode)
    }
}
