//! The source of a zone's pages.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use super::layout::PAGE_BYTES;

/// Name of private anonymous memory.
pub(super) const ANONYMOUS: &str = "anonymous-private";
/// Name of shared anonymous memory.
pub(super) const MEMFD: &str = "memfd-shared";

/// The source of a zone's pages, opened and checked.
#[derive(Debug)]
pub(super) struct Source {
    /// `None` for private anonymous memory.
    pub(super) file: Option<Arc<File>>,
    /// Mapped shared; otherwise private.
    pub(super) shared: bool,
    /// Size of the pages.
    pub(super) page_bytes: u64,
    /// Its kind, as named in statistics.
    pub(super) name: &'static str,
}

impl Source {
    pub(super) fn anonymous() -> Self {
        Self {
            file: None,
            shared: false,
            page_bytes: PAGE_BYTES,
            name: ANONYMOUS,
        }
    }

    /// `file`, with the size of its huge pages in `huge_page_bytes` if it has any.
    pub(super) fn file(file: File, shared: bool, huge_page_bytes: Option<u64>) -> Self {
        Self {
            file: Some(Arc::new(file)),
            shared,
            page_bytes: huge_page_bytes.unwrap_or(PAGE_BYTES),
            name: match (huge_page_bytes, shared) {
                (Some(_), true) => "hugetlb-shared",
                (Some(_), false) => "hugetlb-private",
                (None, true) => "file-shared",
                (None, false) => "file-private",
            },
        }
    }

    /// A memory file, with the size of its huge pages in `huge_page_bytes` if it has any.
    pub(super) fn memfd(file: File, huge_page_bytes: Option<u64>) -> Self {
        let source = Self::file(file, true, huge_page_bytes);
        match huge_page_bytes {
            Some(_) => source,
            None => Self {
                name: MEMFD,
                ..source
            },
        }
    }

    pub(super) fn is_hugetlb(&self) -> bool {
        self.page_bytes > PAGE_BYTES
    }

    /// What its file has on its file system.
    pub(super) fn allocated_bytes(&self) -> u64 {
        let metadata = self.file.as_ref().and_then(|file| file.metadata().ok());
        metadata.map_or(0, |it| it.blocks().saturating_mul(512))
    }

    /// Whether both use the same file and one of them writes to it.
    pub(super) fn conflicts(&self, other: &Self) -> bool {
        self.is_same_file(other) && (self.shared || other.shared)
    }

    /// Whether both use the same file.
    pub(super) fn is_same_file(&self, other: &Self) -> bool {
        let file = |source: &Self| source.file.as_ref().and_then(|file| file.metadata().ok());
        let (Some(first), Some(second)) = (file(self), file(other)) else {
            return false;
        };
        (first.dev(), first.ino()) == (second.dev(), second.ino())
    }
}
