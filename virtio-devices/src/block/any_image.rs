//! Arbitrary disk images, for the fuzz target `image` and for ordinary tests with random bytes.
//!
//! The bytes describe the files: one of any bytes, a fixed VHD, a flat VMDK, or a chain of qcow2 images, with or without
//! damage.
//! Then they describe operations that a guest can cause. Afterwards, these invariants are checked:
//!
//! * memory around the guest's buffer is unchanged;
//! * the images below the first one are unchanged;
//! * if nothing is damaged, the disk has the content of a model, also after it is opened again.

#![allow(unsafe_code)]
// UNSAFETY: `memfd_create` has no safe wrapper here; vectors that describe a buffer go to the engine, as from the queues.

use std::fs::File;
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use super::engine::{IoEngine, IoOperation, new_engine};
use super::image::Image;
use super::{BlockParams, EngineChoice, ImageFormat, SECTOR_BYTES};
use crate::testing::disk_images::vhd_footer;
use crate::testing::fuzz_input::Input;
use crate::testing::qcow2::{Cluster, Qcow2};

/// Maximum number of operations per input; further bytes are ignored.
const STEPS_MAX: usize = 24;
/// Maximum number of changes to a sound image.
const DAMAGE_MAX: u8 = 8;
/// Images of one disk.
const LAYERS_MAX: usize = 3;
/// Images of any bytes state that their disk is longer.
const DISK_BYTES_MAX: u64 = 128 << 10;
/// The smallest clusters, and one larger than a page.
const CLUSTER_BITS: [u32; 4] = [9, 9, 10, 13];
const SECTORS_PER_OPERATION_MAX: u8 = 48;
/// Bytes before and after the buffer that must not change.
const GUARD_BYTES: usize = 512;
const GUARD: u8 = 0xc5;
const SECTOR: usize = SECTOR_BYTES as usize;
/// Header fields end here.
const HEADER_BYTES: usize = 112;
/// Clusters with tables.
const TABLES: u8 = 8;

/// Figures of a run, for checks that the bytes reach what they should.
#[derive(Debug, Default, Clone, Copy)]
pub struct Seen {
    /// The image was accepted.
    pub opened: bool,
    /// It was damaged before.
    pub damaged: bool,
    /// Operations that succeeded.
    pub done: usize,
    /// Operations that failed.
    pub failed: usize,
}

/// Makes the image that the bytes describe, and runs the operations.
///
/// # Panics
/// An invariant is violated.
pub fn run(bytes: &[u8]) -> Seen {
    thread_local! {
        static FILES: Vec<File> = (0..LAYERS_MAX).map(|_| memory_file()).collect();
    }
    FILES.with(|files| play(files, Input(bytes)))
}

fn memory_file() -> File {
    // SAFETY: the name is a C string; the result is checked.
    let fd = unsafe { libc::memfd_create(c"image".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the kernel has just returned this descriptor, and it has no other owner.
    unsafe { File::from_raw_fd(fd) }
}

fn path(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

fn fill(file: &File, bytes: &[u8]) {
    file.set_len(0).expect("files can be emptied");
    file.write_all_at(bytes, 0).expect("memory for small files");
}

/// A disk as it was made.
struct Made {
    /// Its files, the first one at the front.
    layers: Vec<Vec<u8>>,
    format: Option<ImageFormat>,
    /// The format can only be read.
    only_readable: bool,
    /// The disk's content, if nothing is damaged.
    content: Option<Vec<u8>>,
}

fn play(files: &[File], mut input: Input<'_>) -> Seen {
    let choice = input.byte();
    let made = match choice % 8 {
        0 => any_bytes(choice, &mut input),
        1 | 2 => vhd(&mut input),
        7 => vmdk(files, &mut input),
        _ => qcow2(files, choice, &mut input),
    };
    for (file, bytes) in files.iter().zip(&made.layers) {
        fill(file, bytes);
    }
    let params = BlockParams {
        path: path(&files[0]).into(),
        readonly: choice >= 0xf0 || made.only_readable,
        sparse: true,
        backing_files: made.layers.len() > 1 || choice & 0x40 != 0,
        format: made.format,
        ..BlockParams::default()
    };
    let mut seen = Seen {
        damaged: made.content.is_none(),
        ..Seen::default()
    };
    let opened = Image::open(&params);
    assert!(opened.is_ok() || seen.damaged, "{opened:?}");
    // Its message must be possible, too.
    let Ok(image) = opened.map_err(|error| drop(error.to_string())) else {
        return seen;
    };
    seen.opened = true;
    let mut disk = Disk::new(image, made.content);
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        let succeeded = disk.step(params.readonly, &mut input);
        seen.done += usize::from(succeeded);
        seen.failed += usize::from(!succeeded);
    }
    disk.check_content();
    let content = disk.content.take();
    drop(disk);
    for (file, before) in files.iter().zip(&made.layers).skip(1) {
        let mut now = vec![0; before.len()];
        file.read_exact_at(&mut now, 0).expect("it is not shorter");
        assert!(now == *before, "an image below was changed");
    }
    match Image::open(&params) {
        Ok(image) => Disk::new(image, content).check_content(),
        Err(error) => assert!(seen.damaged, "{error}"),
    }
    seen
}

fn any_bytes(choice: u8, input: &mut Input<'_>) -> Made {
    let format = match choice >> 3 & 7 {
        0 => Some(ImageFormat::Raw),
        1 => Some(ImageFormat::Qcow2),
        2 => Some(ImageFormat::Vhd),
        3 => Some(ImageFormat::Vhdx),
        4 => Some(ImageFormat::Vmdk),
        _ => None,
    };
    let length = usize::from(input.word()).min(input.0.len());
    let (file, rest) = input.0.split_at(length);
    input.0 = rest;
    Made {
        layers: vec![file.to_vec()],
        format,
        only_readable: false,
        content: None,
    }
}

/// A raw disk, of which no two neighbouring sectors are equal.
fn sectors(count: usize) -> Vec<u8> {
    (1..=count).flat_map(|at| [at as u8; SECTOR]).collect()
}

/// A fixed VHD, and changes to its footer. It is a raw image unless the configuration states the format.
fn vhd(input: &mut Input<'_>) -> Made {
    const CHECKSUM: usize = 64;
    const FIXED: u32 = 2;
    let content = sectors(usize::from(input.byte() % 64));
    let mut footer = vhd_footer(FIXED, content.len() as u64);
    let shape = input.byte();
    let changes = shape % 4;
    let mut is_sound = true;
    let mut change = |footer: &mut [u8], input: &mut Input<'_>| {
        let at = usize::from(input.byte()) % footer.len();
        let byte = input.byte();
        is_sound &= footer[at] == byte;
        footer[at] = byte;
    };
    for _ in 0..changes {
        change(&mut footer[..CHECKSUM], input);
    }
    footer[CHECKSUM..][..4].fill(0);
    let sum: u32 = footer.iter().map(|byte| u32::from(*byte)).sum();
    footer[CHECKSUM..][..4].copy_from_slice(&(!sum).to_be_bytes());
    if shape & 4 != 0 {
        change(&mut footer, input);
    }
    let file = [content.as_slice(), &footer].concat();
    let (format, content) = match shape >> 3 & 1 {
        // A footer alone looks like the front of a dynamic VHD.
        0 => (None, (!content.is_empty()).then(|| file.clone())),
        _ => (Some(ImageFormat::Vhd), is_sound.then_some(content)),
    };
    Made {
        layers: vec![file],
        format,
        only_readable: false,
        content,
    }
}

/// A VMDK whose extents are zeroes and parts of two files, and damage to its descriptor.
fn vmdk(files: &[File], input: &mut Input<'_>) -> Made {
    let mut descriptor = String::from("# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\n");
    let mut layers = vec![Vec::new()];
    layers.extend((1..LAYERS_MAX).map(|_| sectors(usize::from(input.byte() % 64))));
    let shape = input.byte();
    let mut content = Vec::new();
    for _ in 0..=shape % 4 {
        let index = usize::from(input.byte()) % LAYERS_MAX;
        let file = &layers[index];
        let start = usize::from(input.byte() % 64).min(file.len() / SECTOR);
        let count = usize::from(input.byte() % 16) + 1;
        if index == 0 {
            descriptor += &format!("RW {count} ZERO\n");
            content.resize(content.len() + count * SECTOR, 0);
            continue;
        }
        let count = count.min(file.len() / SECTOR - start);
        if count > 0 {
            let name = files[index].as_raw_fd();
            descriptor += &format!("RW {count} FLAT \"{name}\" {start}\n");
            content.extend_from_slice(&file[start * SECTOR..][..count * SECTOR]);
        }
    }
    let sound = descriptor.into_bytes();
    layers[0].clone_from(&sound);
    let changes = input.byte();
    // Half of the images are sound.
    if changes >= 0x80 {
        for _ in 0..=changes % DAMAGE_MAX {
            let at = usize::from(input.byte()) % sound.len();
            layers[0][at] = input.byte();
        }
    }
    let is_sound = layers[0] == sound && !content.is_empty();
    Made {
        layers,
        format: [None, Some(ImageFormat::Vmdk)][usize::from(shape >> 7)],
        only_readable: true,
        content: is_sound.then_some(content),
    }
}

/// A chain of images, the last of which may be raw, and damage to the first one.
fn qcow2(files: &[File], choice: u8, input: &mut Input<'_>) -> Made {
    let above = usize::from(choice >> 3) % LAYERS_MAX;
    let is_raw_below = above > 0 && choice & 0x20 != 0;
    let (mut layers, mut content) = (Vec::new(), Vec::new());
    for depth in (0..=above).rev() {
        if depth == above && is_raw_below {
            content = sectors(usize::from(input.byte() % 64));
            layers.push(content.clone());
            continue;
        }
        let format = match depth + 1 == above && is_raw_below {
            true => "raw",
            false => "qcow2",
        };
        let below = (depth < above).then(|| path(&files[depth + 1]));
        let backing = below.as_deref().map(|path| (path, format));
        let shape = input.byte();
        let version = if shape & 1 == 0 { 3 } else { 2 };
        let cluster_bits = CLUSTER_BITS[usize::from(shape >> 1 & 3)];
        let disk_bytes = (u64::from(input.byte()) + 1) * SECTOR_BYTES;
        let count = u64::from(input.byte() % 40).min(disk_bytes >> cluster_bits);
        let clusters: Vec<_> = (0..count)
            .map(|_| match input.byte() {
                0..0x40 => Cluster::Unallocated,
                0x40..0x60 if version == 3 => Cluster::Zero,
                byte @ 0x60..0x90 => Cluster::Compressed(byte),
                byte => Cluster::Data(byte),
            })
            .collect();
        let image = Qcow2 {
            version,
            cluster_bits,
            refcount_order: if version == 2 {
                4
            } else {
                u32::from(shape >> 3) % 7
            },
            disk_bytes,
            backing,
            clusters: &clusters,
        };
        layers.push(image.file());
        content = image.content(&content);
    }
    layers.reverse();
    let is_sound = !damage(&mut layers[0], input);
    Made {
        layers,
        format: [None, Some(ImageFormat::Qcow2)][usize::from(choice >> 7)],
        only_readable: false,
        content: is_sound.then_some(content),
    }
}

/// Changes the header, entries of tables, or any other byte; returns whether anything was changed.
fn damage(file: &mut [u8], input: &mut Input<'_>) -> bool {
    let before = file.to_vec();
    let cluster_bits = u32::from(file[23]);
    let count = input.byte();
    // Half of the images are sound.
    let count = if count < 0x80 {
        0
    } else {
        count % DAMAGE_MAX + 1
    };
    for _ in 0..count {
        let kind = input.byte();
        match kind % 4 {
            0 => file[usize::from(input.byte()) % HEADER_BYTES] = input.byte(),
            1 => {
                let at = input.number(3) as usize % file.len();
                file[at] = input.byte();
            }
            _ => {
                // An entry that refers to any cluster near.
                let table = usize::from(kind >> 2) % usize::from(TABLES) + 1;
                let at = (table << cluster_bits) + usize::from(input.byte()) * 8;
                let flags = u64::from(input.byte());
                let entry = u64::from(input.byte()) << cluster_bits
                    | flags >> 6 << 62
                    | flags & 1
                    | u64::from(flags & 2 != 0) << 50;
                if let Some(place) = file.get_mut(at..at + 8) {
                    place.copy_from_slice(&entry.to_be_bytes());
                }
            }
        }
    }
    file != before
}

/// An open disk, and what should be on it.
struct Disk {
    image: Arc<Image>,
    engine: Box<dyn IoEngine>,
    bytes: u64,
    content: Option<Vec<u8>>,
    buffer: Vec<u8>,
}

impl Disk {
    fn new(image: Image, content: Option<Vec<u8>>) -> Self {
        let image = Arc::new(image);
        let bytes = image.sectors() * SECTOR_BYTES;
        if let Some(content) = &content {
            assert_eq!(bytes, content.len() as u64);
        }
        let engine = new_engine(EngineChoice::Sync, &image, 1).expect("system calls need nothing");
        let bytes_max = usize::from(SECTORS_PER_OPERATION_MAX) * SECTOR;
        Self {
            image,
            engine,
            bytes: bytes.min(DISK_BYTES_MAX),
            content,
            buffer: vec![GUARD; bytes_max + 2 * GUARD_BYTES],
        }
    }

    /// Executes an operation as the queues do it; returns its result.
    fn perform(&mut self, operation: &IoOperation<'_>) -> i32 {
        // SAFETY: the vectors describe the buffer; the engine completes the operation within the call.
        unsafe { self.engine.submit(0, operation) }.expect("system calls need nothing");
        let mut completions = Vec::new();
        self.engine.reap(&mut completions);
        completions[0].result
    }

    /// The part of the buffer for `bytes`, in two pieces.
    fn pieces(&mut self, bytes: usize, cut: u8) -> [libc::iovec; 2] {
        let cut = bytes * usize::from(cut) / 256;
        let (front, back) = self.buffer[GUARD_BYTES..][..bytes].split_at_mut(cut);
        [front, back].map(|piece| libc::iovec {
            iov_base: piece.as_mut_ptr().cast(),
            iov_len: piece.len(),
        })
    }

    fn check_guards(&self, bytes: usize) {
        let (front, rest) = self.buffer.split_at(GUARD_BYTES);
        let guards = front.iter().chain(&rest[bytes..]);
        assert!({ guards }.all(|byte| *byte == GUARD), "beyond the buffer");
    }

    fn read(&mut self, offset: u64, bytes: usize, cut: u8) -> bool {
        let pieces = self.pieces(bytes, cut);
        let read = self.perform(&IoOperation::Read {
            offset,
            into: &pieces,
        });
        self.check_guards(bytes);
        let buffer = &mut self.buffer[GUARD_BYTES..][..bytes];
        if let Some(content) = &self.content {
            assert_eq!(usize::try_from(read), Ok(bytes));
            let expected = &content[offset as usize..][..bytes];
            assert!(buffer == expected, "wrong data at {offset}");
        }
        buffer.fill(GUARD);
        assert!(read <= bytes as i32);
        read >= 0
    }

    fn write(&mut self, offset: u64, bytes: usize, (fill, cut): (u8, u8)) -> bool {
        self.buffer[GUARD_BYTES..][..bytes].fill(fill);
        let pieces = self.pieces(bytes, cut);
        let written = self.perform(&IoOperation::Write {
            offset,
            from: &pieces,
        });
        let buffer = &mut self.buffer[GUARD_BYTES..][..bytes];
        assert!(buffer.iter().all(|byte| *byte == fill), "it is only read");
        buffer.fill(GUARD);
        if let Some(content) = &mut self.content {
            assert_eq!(usize::try_from(written), Ok(bytes));
            content[offset as usize..][..bytes].fill(fill);
        }
        assert!(written <= bytes as i32);
        written >= 0
    }

    /// An operation that makes part of the disk zero. Not every format and file system has it.
    fn zero(&mut self, offset: u64, bytes: u64, operation: &IoOperation<'_>) -> bool {
        let result = self.perform(operation);
        let unsupported = [libc::EOPNOTSUPP, libc::EINVAL, libc::ENODEV];
        if result >= 0 {
            let whole = matches!(operation, IoOperation::OwnDiscard { .. });
            let unit = match (whole, self.image.container()) {
                (true, Some(container)) => u64::from(container.cluster_bytes()),
                _ => 1,
            };
            if let Some(content) = &mut self.content {
                let end = offset + bytes;
                let whole_end = match end == content.len() as u64 {
                    true => end,
                    false => end / unit * unit,
                };
                let start = offset.next_multiple_of(unit).min(whole_end);
                content[start as usize..whole_end as usize].fill(0);
            }
        } else if self.content.is_some() {
            assert!(unsupported.contains(&-result), "errno {}", -result);
        }
        result >= 0
    }

    fn step(&mut self, readonly: bool, input: &mut Input<'_>) -> bool {
        let kind = input.byte();
        if self.bytes == 0 {
            return false;
        }
        let offset = u64::from(input.byte()) * SECTOR_BYTES % self.bytes;
        let sectors = u64::from(input.byte() % SECTORS_PER_OPERATION_MAX) + 1;
        let bytes = (sectors * SECTOR_BYTES).min(self.bytes - offset);
        if readonly {
            return self.read(offset, bytes as usize, kind);
        }
        match kind % 8 {
            0 => self.read(offset, bytes as usize, kind),
            1..=3 => {
                let fill = input.byte();
                self.write(offset, bytes as usize, (fill, kind))
            }
            4 => self.zero(offset, bytes, &IoOperation::ZeroRange { offset, bytes }),
            5 if self.image.has_own_discard() => {
                self.zero(offset, bytes, &IoOperation::OwnDiscard { offset, bytes })
            }
            5 => self.zero(offset, bytes, &IoOperation::PunchHole { offset, bytes }),
            6 if kind & 8 == 0 => {
                let zeroes = IoOperation::WriteZeroBuffer { offset, bytes };
                self.zero(offset, bytes, &zeroes)
            }
            6 => self.zero(offset, bytes, &IoOperation::PunchHole { offset, bytes }),
            _ if kind & 8 == 0 => self.perform(&IoOperation::Sync) >= 0,
            // Another process may change the image in the meantime.
            _ => {
                let let_go = self.image.sync().and_then(|()| self.image.hold(false));
                let again = self.image.hold(true);
                assert!(self.content.is_none() || let_go.is_ok() && again.is_ok());
                let_go.and(again).is_ok()
            }
        }
    }

    fn check_content(&mut self) {
        let piece = u64::from(SECTORS_PER_OPERATION_MAX) * SECTOR_BYTES;
        let mut offset = 0;
        while offset < self.bytes {
            let bytes = piece.min(self.bytes - offset);
            self.read(offset, bytes as usize, 0);
            offset += bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    use super::*;

    /// The first entry of the L1 table refers to the refcount table, which the guest overwrites. Then the VMM reads all
    /// tables again, as after a migration that failed.
    #[test]
    fn image_whose_guest_overwrites_its_refcounts_is_not_read_again() {
        let input = [
            0x04, 0xfc, 0x3b, 0x02, 0x6a, 0x00, 0xb0, 0x0b, 0x00, 0x00, 0x01, 0x00, 0x00, 0x08,
            0xfe, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
            0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00, 0xff, 0x29, 0xff, 0xa1, 0xdd,
            0x2a, 0xc5, 0xe5, 0x2f, 0xff, 0x6a,
        ];
        let seen = run(&input);
        assert!(seen.opened && seen.damaged && seen.failed > 0, "{seen:?}");
    }

    /// Without figures above zero, the checks of `run` would mean nothing.
    #[test]
    fn image_of_random_bytes_keeps_its_data_or_fails() {
        let mut runner = TestRunner::deterministic();
        let mut done = [0; 2];
        let mut failed = [0; 2];
        for _ in 0..2000 {
            let bytes = prop::collection::vec(any::<u8>(), 0..300);
            let seen = run(&bytes.new_tree(&mut runner).expect("bytes").current());
            done[usize::from(seen.damaged)] += seen.done;
            failed[usize::from(seen.damaged)] += seen.failed;
        }
        println!("done: {done:?}, failed: {failed:?}, sound and damaged");
        assert!(done.iter().all(|count| *count > 0) && failed[1] > 0);
    }
}
