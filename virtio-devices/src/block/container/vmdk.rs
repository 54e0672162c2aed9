//! Flat VMDKs, which can only be read: a text file, the descriptor, names files whose contents follow one another on the
//! disk.
//!
//! imago has a reader of its own, which rejects descriptors with keys that it does not know, as VMware writes them. It
//! also opens any path that a descriptor names. Here the files are opened by the caller, and are in the folder of the
//! descriptor.

#![allow(unsafe_code)]
// UNSAFETY: implements unsafe methods of a trait by safe ones of the opened files.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use imago::file::File as ImagoFile;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageExt as _};

use super::error::{ContainerError, VmdkError};
use super::inspect::inspect;
use crate::block::image_file::{file_bytes, read_up_to, signature};
use crate::block::{BlockError, ImageFormat, SECTOR_BYTES, format};

/// Maximum number of files of one disk, each of which stays open. VMware's have 2 GiB.
const EXTENTS_MAX: usize = 256;
/// The longest name of a file that Linux file systems have (`NAME_MAX`).
const NAME_BYTES_MAX: usize = 255;
/// Enough for so many extents with such names.
const DESCRIPTOR_BYTES_MAX: u64 = 128 << 10;
/// At the front of a sparse extent, in which a descriptor may be embedded.
const SPARSE_MAGIC: &[u8] = b"KDMV";
const VERSIONS: std::ops::RangeInclusive<u32> = 1..=3;
/// The content identifier of a parent that does not exist.
const NO_PARENT: &str = "ffffffff";

/// A part of the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Extent {
    /// Its bytes of the disk.
    disk: Range<u64>,
    /// The file that has them, from this byte on; zeroes without a file.
    file: Option<(PathBuf, u64)>,
}

/// Reads the descriptor at `path`: the parts of the disk, in their order and without gaps.
pub(super) fn extents(path: &Path) -> Result<Vec<Extent>, BlockError> {
    let folder = path.parent().unwrap_or(Path::new(""));
    inspect(path, |file| {
        let text = read_text(file)?;
        Ok(text.and_then(|text| Ok(parse(&text, folder)?)))
    })
}

fn read_text(file: &File) -> io::Result<Result<String, ContainerError>> {
    let bytes = file_bytes(file)?;
    let (front, _) = signature(file, bytes)?;
    if front.starts_with(SPARSE_MAGIC) {
        return Ok(Err(VmdkError::NotFlat.into()));
    }
    if format::detect(&front) != ImageFormat::Vmdk {
        return Ok(Err(ContainerError::OtherFormat(ImageFormat::Vmdk)));
    }
    if bytes > DESCRIPTOR_BYTES_MAX {
        let max = DESCRIPTOR_BYTES_MAX;
        return Ok(Err(VmdkError::TooLong { bytes, max }.into()));
    }
    let mut text = vec![0; bytes as usize];
    let filled = read_up_to(file, &mut text, 0)?;
    // QEMU pads it to a whole sector.
    let padding = text[..filled].iter().rev().take_while(|byte| **byte == 0);
    text.truncate(filled - padding.count());
    Ok(String::from_utf8(text).map_err(|_| VmdkError::NotText.into()))
}

fn parse(text: &str, folder: &Path) -> Result<Vec<Extent>, VmdkError> {
    let mut extents: Vec<Extent> = Vec::new();
    let mut version = None;
    for (index, line) in text.lines().enumerate() {
        let damaged = || VmdkError::Line(index + 1);
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let access = line.split_whitespace().next().unwrap_or_default();
        if matches!(access, "RW" | "RDONLY" | "NOACCESS") {
            if extents.len() == EXTENTS_MAX {
                return Err(VmdkError::TooManyExtents { max: EXTENTS_MAX });
            }
            let start = extents.last().map_or(0, |before| before.disk.end);
            extents.push(parse_extent(line, start, folder)?.ok_or_else(damaged)?);
            continue;
        }
        let (key, value) = line.split_once('=').ok_or_else(damaged)?;
        let value = value.trim().trim_matches('"');
        match key.trim() {
            "version" => version = Some(value.parse::<u32>().map_err(|_| damaged())?),
            "parentCID" if !value.eq_ignore_ascii_case(NO_PARENT) => {
                return Err(VmdkError::Parent);
            }
            "parentFileNameHint" => return Err(VmdkError::Parent),
            _ => {}
        }
    }
    match version {
        Some(version) if VERSIONS.contains(&version) => {}
        Some(version) => return Err(VmdkError::Version(version)),
        None => return Err(VmdkError::NoVersion),
    }
    match extents.is_empty() {
        true => Err(VmdkError::NoExtents),
        false => Ok(extents),
    }
}

/// `RW 4192256 FLAT "disk-f001.vmdk" 0`, `RW 2048 VMFS "disk-flat.vmdk"` or `RW 2048 ZERO`, with numbers of sectors; `None`
/// for anything else. FLAT and VMFS differ in the file system on which VMware creates them.
fn parse_extent(line: &str, start: u64, folder: &Path) -> Result<Option<Extent>, VmdkError> {
    let (head, named) = match line.split_once('"') {
        Some((head, rest)) => (head, rest.rsplit_once('"')),
        None => (line, None),
    };
    let words: Vec<&str> = head.split_whitespace().collect();
    let &[access, sectors, kind] = words.as_slice() else {
        return Ok(None);
    };
    if !matches!(kind, "FLAT" | "VMFS" | "ZERO") || access == "NOACCESS" {
        return Err(VmdkError::NotFlat);
    }
    let bytes = |sectors: &str| sectors.parse::<u64>().ok()?.checked_mul(SECTOR_BYTES);
    let end = bytes(sectors)
        .filter(|bytes| *bytes > 0)
        .and_then(|bytes| start.checked_add(bytes))
        .filter(|end| i64::try_from(*end).is_ok());
    let Some(end) = end else {
        return Ok(None);
    };
    let file = match (kind, named) {
        ("ZERO", None) => None,
        (_, Some((name, offset))) if kind != "ZERO" => {
            if name.len() > NAME_BYTES_MAX {
                return Ok(None);
            }
            let is_path = name.contains('/') || matches!(name, "" | "." | "..");
            if is_path || name.contains(char::is_control) {
                return Err(VmdkError::ExtentName(name.to_owned()));
            }
            let offset = offset.trim();
            let offset = if offset.is_empty() { "0" } else { offset };
            let Some(offset) = bytes(offset).filter(|it| it.checked_add(end - start).is_some())
            else {
                return Ok(None);
            };
            Some((folder.join(name), offset))
        }
        _ => return Ok(None),
    };
    Ok(Some(Extent {
        disk: start..end,
        file,
    }))
}

impl Extent {
    pub(super) fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|(path, _)| path.as_path())
    }

    /// Whether `file`, at its path, is a regular file that has all of its bytes.
    pub(super) fn check(&self, file: &File) -> Result<(), BlockError> {
        let Some((path, offset)) = &self.file else {
            return Ok(());
        };
        let is_file = file.metadata().map(|stat| stat.is_file());
        if !is_file.map_err(|source| BlockError::Inspect {
            path: path.clone(),
            source,
        })? {
            return Err(BlockError::Container {
                path: path.clone(),
                source: ContainerError::NotAFile,
            });
        }
        let actual = file_bytes(file).map_err(|source| BlockError::Inspect {
            path: path.clone(),
            source,
        })?;
        let needed = offset + (self.disk.end - self.disk.start);
        match actual >= needed {
            true => Ok(()),
            false => Err(BlockError::Container {
                path: path.clone(),
                source: VmdkError::ExtentTooShort { needed, actual }.into(),
            }),
        }
    }
}

/// The opened files, as one.
#[derive(Debug)]
pub(super) struct FlatVmdk {
    parts: Vec<Part>,
    helper: CommonStorageHelper,
}

#[derive(Debug)]
struct Part {
    disk: Range<u64>,
    /// Zeroes without a file.
    file: Option<Data>,
}

#[derive(Debug)]
struct Data {
    file: ImagoFile,
    /// The same file, for its size: imago reads zeroes behind the end of a file.
    size: File,
    /// Where the part begins in the file.
    start: u64,
}

impl Data {
    fn read(&self, into: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let start = self.start + offset;
        if self.size.metadata()?.len() < start + into.len() {
            return Err(io::Error::other("an extent has become shorter"));
        }
        self.file.readv(into, start)
    }
}

impl FlatVmdk {
    /// `files`: of each extent that has one, twice.
    pub(super) fn new(extents: Vec<Extent>, files: Vec<(ImagoFile, File)>) -> Self {
        let mut files = files.into_iter();
        let parts = extents.into_iter().map(|extent| Part {
            disk: extent.disk,
            file: extent.file.map(|(_, start)| {
                let (file, size) = files.next().expect("each extent's file is opened");
                Data { file, size, start }
            }),
        });
        Self {
            parts: parts.collect(),
            helper: CommonStorageHelper::default(),
        }
    }
}

impl fmt::Display for FlatVmdk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "flat VMDK of {} extents", self.parts.len())
    }
}

impl Storage for FlatVmdk {
    fn size(&self) -> io::Result<u64> {
        Ok(self.parts.last().map_or(0, |part| part.disk.end))
    }

    unsafe fn pure_readv(&self, mut into: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        let first = self.parts.partition_point(|part| part.disk.end <= offset);
        for Part { disk, file } in &self.parts[first..] {
            if into.is_empty() {
                return Ok(());
            }
            let bytes = (disk.end - offset).min(into.len());
            let (mut piece, rest) = into.split_at(bytes);
            into = rest;
            match file {
                Some(data) => data.read(piece, offset - disk.start)?,
                None => piece.fill(0),
            }
            offset = disk.end;
        }
        // Beyond the end, as in a file.
        into.fill(0);
        Ok(())
    }

    unsafe fn pure_writev(&self, _from: IoVector<'_>, _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(lines: &str) -> Result<Vec<Extent>, VmdkError> {
        parse(
            &format!("# Disk DescriptorFile\nversion=1\n{lines}"),
            Path::new("/images"),
        )
    }

    #[test]
    fn extents_follow_one_another() {
        let text = "encoding=\"windows-1252\"\r\nCID=12\r\nparentCID=FFFFFFFF\r\n\
                    RW 8 FLAT \"a disk.vmdk\" 2\r\nRW 2 ZERO\r\nRDONLY 1 VMFS \"b\"\r\n\
                    ddb.adapterType = \"ide\"\r\n";
        let file = |name: &str, offset| Some((Path::new("/images").join(name), offset));
        let expected = [
            (0..4096, file("a disk.vmdk", 1024)),
            (4096..5120, None),
            (5120..5632, file("b", 0)),
        ];
        let expected = expected.map(|(disk, file)| Extent { disk, file });
        assert_eq!(parsed(text).unwrap(), expected);
    }

    #[test]
    fn names_outside_the_folder_are_rejected() {
        for name in [
            "/etc/shadow",
            "../disk",
            "a/../../b",
            "..",
            ".",
            "",
            "a\0b",
            "\x1b[2J",
        ] {
            let line = format!("RW 8 FLAT \"{name}\" 0");
            assert_eq!(parsed(&line), Err(VmdkError::ExtentName(name.to_owned())));
        }
    }

    #[test]
    fn other_descriptors_are_rejected() {
        const FLAT: &str = "RW 8 FLAT \"a\" 0\n";
        for line in [
            "RW",
            "RW 8",
            "RW 8 FLAT",
            "RW 8 FLAT \"a",
            "RW x FLAT \"a\" 0",
            "RW 0 FLAT \"a\" 0",
            "RW 8 FLAT \"a\" -1",
            "RW 8 ZERO \"a\"",
            "RW 18014398509481984 ZERO",
            "RW 8 FLAT \"a\" 36028797018963967",
            "RW 36028797018963967 FLAT \"a\" 0",
            "a line without a value",
            "RW 8 VMFS",
        ] {
            assert_eq!(parsed(line), Err(VmdkError::Line(3)), "{line}");
        }
        let long = format!("RW 8 FLAT \"{}\" 0", "a".repeat(NAME_BYTES_MAX + 1));
        assert_eq!(parsed(&long), Err(VmdkError::Line(3)));
        // The sum of both is too large for a file.
        let sum = "RW 18014398509481982 ZERO\nRW 2 ZERO";
        assert_eq!(parsed(sum), Err(VmdkError::Line(4)));
        for line in ["RW 8 SPARSE \"a\"", "NOACCESS 8 FLAT \"a\" 0"] {
            assert_eq!(parsed(line), Err(VmdkError::NotFlat), "{line}");
        }
        for line in ["parentCID=1234abcd\n", "parentFileNameHint=\"x\"\n"] {
            assert_eq!(parsed(&format!("{line}{FLAT}")), Err(VmdkError::Parent));
        }
        assert_eq!(parsed("CID=1"), Err(VmdkError::NoExtents));
        assert_eq!(parse(FLAT, Path::new("")), Err(VmdkError::NoVersion));
        assert_eq!(
            parsed(&format!("version=4\n{FLAT}")),
            Err(VmdkError::Version(4))
        );
        assert_eq!(
            parsed(&FLAT.repeat(EXTENTS_MAX + 1)),
            Err(VmdkError::TooManyExtents { max: EXTENTS_MAX })
        );
    }
}
