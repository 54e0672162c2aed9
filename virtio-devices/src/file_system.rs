//! The file system of a file, as far as it decides how the file is used.
#![allow(unsafe_code)]
// UNSAFETY: `fstatfs` has no safe wrapper among our dependencies.

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

/// Page size of a file or directory on hugetlbfs; `None` on any other file system.
#[must_use]
pub fn huge_page_bytes(file: &File) -> Option<u64> {
    let stat = statfs(file)?;
    (stat.f_type == libc::HUGETLBFS_MAGIC).then(|| u64::try_from(stat.f_bsize).ok())?
}

/// Whether a regular file exists in memory alone, so that its blocks are pages: on tmpfs, hugetlbfs, or a memfd. Of a device,
/// this is where its node is, which is usually in memory.
#[must_use]
pub fn is_in_memory(file: &File) -> bool {
    let kind = statfs(file).map(|stat| stat.f_type);
    matches!(kind, Some(libc::TMPFS_MAGIC | libc::HUGETLBFS_MAGIC))
}

fn statfs(file: &File) -> Option<libc::statfs> {
    let mut stat = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the descriptor is open and `stat` is large enough for what the kernel writes.
    let ret = unsafe { libc::fstatfs(file.as_raw_fd(), stat.as_mut_ptr()) };
    // SAFETY: the kernel has filled it, because it returned zero.
    (ret == 0).then(|| unsafe { stat.assume_init() })
}
