//! One pass over RAM, whose pages go to files.

use std::cell::RefCell;

use machine::memory::{
    ContentError, ContentFiles, GuestMemory, PageRun, Pages, WrittenPages, Zone,
};

use super::{Progress, SnapshotError};

/// Writes all pages that hold data, or those in `written`, and clears the others of them.
///
/// # Errors
/// RAM cannot be read, a file cannot be written, or `is_cancelled` returned true.
pub(super) fn write_pass(
    memory: &GuestMemory,
    written: Option<&WrittenPages>,
    content: &mut ContentFiles,
    progress: &Progress,
    is_cancelled: impl Fn() -> bool,
) -> Result<(), SnapshotError> {
    let sizes: Vec<u64> = memory.zones().iter().map(Zone::bytes).collect();
    let content = RefCell::new(content);
    let send = |pages: Pages<'_>| {
        if is_cancelled() {
            return Err(Failure(SnapshotError::Cancelled));
        }
        content.borrow_mut().write(pages)?;
        let before: u64 = sizes[..pages.zone as usize].iter().sum();
        progress.reach(before + pages.offset);
        Ok(())
    };
    let clear = |run: PageRun| content.borrow_mut().clear(run).map_err(Failure::from);
    memory
        .send_content(written, send, clear)
        .map_err(|Failure(error)| error)?;
    progress.reach(sizes.iter().sum());
    Ok(())
}

/// An error of a pass.
struct Failure(SnapshotError);

impl From<ContentError> for Failure {
    fn from(error: ContentError) -> Self {
        Self(SnapshotError::Content(error))
    }
}
