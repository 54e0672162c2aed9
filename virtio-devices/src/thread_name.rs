//! Names of worker threads.

/// Longest name a Linux thread can have.
const THREAD_NAME_BYTES: usize = 15;

/// A device id with a suffix that tells its threads apart; the id is cut so that
/// the suffix still fits.
pub(crate) fn thread_name(id: &str, suffix: &str) -> String {
    let room = THREAD_NAME_BYTES.saturating_sub(suffix.len());
    let mut end = id.len().min(room);
    while !id.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{suffix}", &id[..end])
}
