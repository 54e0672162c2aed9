//! Contents of block devices and files, written and verified by pattern.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};

use crate::pattern;

/// Words per read or write: 256 KiB, large enough for several segments of one request.
const CHUNK_WORDS: usize = 32 * 1024;

/// Writes `bytes` (rounded down to words) of the stream `seed` and flushes to the device.
pub(crate) fn fill(path: &str, bytes: u64, seed: u64) -> Result<(), String> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(|error| format!("opening {path}: {error}"))?;
    let mut words = vec![0u64; CHUNK_WORDS];
    for (first, count) in chunks(bytes) {
        pattern::fill(&mut words[..count], seed, first);
        let raw: Vec<u8> = words[..count]
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect();
        file.write_all(&raw)
            .map_err(|error| format!("writing {path} at byte {}: {error}", first * 8))?;
    }
    file.sync_all()
        .map_err(|error| format!("flushing {path}: {error}"))
}

/// Compares `bytes` of `path` with the stream; the error contains the first wrong byte.
pub(crate) fn verify(path: &str, bytes: u64, seed: u64) -> Result<(), String> {
    let mut file = File::open(path).map_err(|error| format!("opening {path}: {error}"))?;
    let mut raw = vec![0u8; CHUNK_WORDS * 8];
    for (first, count) in chunks(bytes) {
        file.read_exact(&mut raw[..count * 8])
            .map_err(|error| format!("reading {path} at byte {}: {error}", first * 8))?;
        let words: Vec<u64> = raw[..count * 8]
            .chunks_exact(8)
            .map(|c| u64::from_le_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]]))
            .collect();
        if let Some(word) = pattern::first_difference(&words, seed, first) {
            return Err(format!("{path}: wrong contents at byte {}", word * 8));
        }
    }
    Ok(())
}

/// Splits a length into (first word, words) pieces of at most a chunk.
fn chunks(bytes: u64) -> impl Iterator<Item = (u64, usize)> {
    let words = bytes / 8;
    (0..words).step_by(CHUNK_WORDS).map(move |first| {
        let left = usize::try_from(words - first).unwrap_or(usize::MAX);
        (first, left.min(CHUNK_WORDS))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_filled_verifies_and_one_changed_byte_is_found() {
        let path = std::env::temp_dir().join(format!("guest-disk-{}", std::process::id()));
        let name = path.to_str().unwrap();
        let bytes = (CHUNK_WORDS * 8 + 4096) as u64;
        fill(name, bytes, 11).unwrap();
        verify(name, bytes, 11).unwrap();
        let mut raw = std::fs::read(&path).unwrap();
        raw[CHUNK_WORDS * 8 + 17] ^= 1;
        std::fs::write(&path, raw).unwrap();
        let wrong = verify(name, bytes, 11).unwrap_err();
        std::fs::remove_file(&path).unwrap();
        assert!(
            wrong.ends_with(&format!("byte {}", CHUNK_WORDS * 8 + 16)),
            "{wrong}"
        );
    }
}
