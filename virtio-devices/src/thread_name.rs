//! Names of worker threads.

/// Maximum length of a Linux thread's name.
const THREAD_NAME_BYTES: usize = 15;

/// The thread's name: a device id with a suffix that distinguishes the device's threads. The id is truncated if
/// necessary so that the suffix fits.
pub(crate) fn thread_name(id: &str, suffix: &str) -> String {
    let room = THREAD_NAME_BYTES.saturating_sub(suffix.len());
    let mut end = id.len().min(room);
    while !id.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{suffix}", &id[..end])
}
