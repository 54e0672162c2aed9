//! Records the order in which the first machine touched its RAM after a restore on demand. The file is in the folder of
//! the snapshot.
//!
//! The file is only a hint. If it is missing or damaged, RAM is loaded in the order of addresses.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use machine::memory::on_demand::TOUCHED_MAX;
use machine::random::random_id;
use serde::{Deserialize, Serialize};
use state::Bytes;

use super::read::read;
use super::state_file::checksum_line;

const TOUCHED: &str = "touched.json";
/// Pages that earlier programs have recorded.
const EARLIER_MAX: usize = 1 << 16;
/// Four bytes for each page in base 64, the id of the snapshot, and the checksum.
const BYTES_MAX: u64 = EARLIER_MAX as u64 * 4 * 4 / 3 + 512;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Touched {
    /// The id of the snapshot.
    snapshot: Option<String>,
    /// Numbers of the guest's pages, of 4 bytes each, the lowest first.
    pages: Bytes,
}

/// The order in the folder of the snapshot with this id, if there is a valid one.
pub(super) fn read_order(folder: &Path, snapshot: Option<&str>) -> Option<Vec<u32>> {
    let path = folder.join(TOUCHED);
    if !path.exists() {
        return None;
    }
    let text = read(&path, BYTES_MAX);
    let text = text.map_err(|error| log::warn!("{}", api::error_line(&error)));
    let order = parse(&text.ok()?, snapshot);
    if order.is_none() {
        log::warn!("{} is not the order of this snapshot", path.display());
    }
    order
}

fn parse(text: &str, snapshot: Option<&str>) -> Option<Vec<u32>> {
    let line = text.split_inclusive('\n').next()?;
    if text[line.len()..] != checksum_line(crc32fast::hash(line.as_bytes())) {
        return None;
    }
    let Touched {
        snapshot: found,
        pages: Bytes(bytes),
    } = serde_json::from_str(line).ok()?;
    let numbers = bytes.chunks_exact(4);
    let is_valid = found.as_deref() == snapshot
        && numbers.remainder().is_empty()
        && numbers.len() <= EARLIER_MAX;
    let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
    is_valid.then(|| numbers.take(TOUCHED_MAX).map(number).collect())
}

/// The order with further pages that were demanded although the `known` ones had been loaded. None if these are few: an
/// earlier machine that hardly ran has recorded too little, others enough.
pub(super) fn extended(known: &[u32], demanded: &[u32]) -> Option<Vec<u32>> {
    if demanded.len() <= known.len() {
        return None;
    }
    let is_known: HashSet<&u32> = known.iter().collect();
    let new = demanded.iter().filter(|page| !is_known.contains(page));
    let order = known.iter().chain(new).take(TOUCHED_MAX);
    Some(order.copied().collect())
}

/// Writes the order into the folder of the snapshot with this id: all of it, or nothing.
///
/// # Errors
/// The folder cannot be written.
pub(super) fn write_order(folder: &Path, snapshot: Option<&str>, pages: &[u32]) -> io::Result<()> {
    let touched = Touched {
        snapshot: snapshot.map(str::to_owned),
        pages: Bytes(pages.iter().flat_map(|page| page.to_le_bytes()).collect()),
    };
    let mut text = serde_json::to_string(&touched).expect("plain data is always JSON") + "\n";
    text += &checksum_line(crc32fast::hash(text.as_bytes()));
    // Several machines from this snapshot may write at the same time.
    let id: String = random_id()?.iter().map(|it| format!("{it:02x}")).collect();
    let partial = folder.join(format!("{TOUCHED}.{id}"));
    let mut options = File::options();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&partial)?;
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&partial, folder.join(TOUCHED)));
    if written.is_err() {
        // It stays if even that fails; no reader uses it.
        fs::remove_file(&partial).ok();
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_comes_back_only_for_its_snapshot_and_only_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let pages = [7, 0, u32::MAX, 512];
        let read = |id| read_order(folder.path(), id);
        assert_eq!(read(Some("a")), None);
        write_order(folder.path(), Some("a"), &pages).expect("written");
        assert_eq!(read(Some("a")).as_deref(), Some(&pages[..]));
        assert_eq!((read(Some("b")), read(None)), (None, None));
        assert_eq!(folder.path().read_dir().expect("a folder").count(), 1);
        let path = folder.path().join(TOUCHED);
        let text = fs::read(&path).expect("a file");
        for end in 0..text.len() {
            fs::write(&path, &text[..end]).expect("written");
            assert_eq!(read(Some("a")), None, "{end} bytes");
            let mut flipped = text.clone();
            flipped[end] ^= 1 << (end % 8);
            fs::write(&path, flipped).expect("written");
            assert_eq!(read(Some("a")), None, "byte {end}");
        }
        write_order(folder.path(), None, &[]).expect("replaced");
        assert_eq!(read(None), Some(Vec::new()));
        fs::remove_file(&path).expect("removed");
        let many = vec![1; TOUCHED_MAX];
        write_order(folder.path(), None, &many).expect("written");
        assert_eq!(read(None), Some(many.clone()));
        write_order(folder.path(), None, &vec![1; EARLIER_MAX]).expect("written");
        assert_eq!(
            read(None),
            Some(many),
            "the first ones of an earlier record"
        );
    }

    #[test]
    fn record_of_a_machine_that_hardly_ran_is_extended_and_a_good_one_stays() {
        assert_eq!(extended(&[], &[]), None);
        assert_eq!(extended(&[], &[7, 3]), Some(vec![7, 3]));
        assert_eq!(extended(&[7], &[3, 7, 9]), Some(vec![7, 3, 9]));
        assert_eq!(extended(&[7, 3], &[9, 1]), None);
        let many: Vec<u32> = (1..=TOUCHED_MAX as u32).collect();
        assert_eq!(extended(&[0], &many).map(|it| it.len()), Some(TOUCHED_MAX));
    }
}
