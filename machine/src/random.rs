//! Random numbers of the host's kernel.
#![allow(unsafe_code)]
// UNSAFETY: getrandom has no safe wrapper in libc.

use std::io;

const BYTES: usize = 16;

/// An identifier that nothing else has. getrandom returns so few bytes in one piece.
///
/// # Errors
/// The host has no random numbers yet.
pub fn random_id() -> io::Result<[u8; BYTES]> {
    let mut bytes = [0; BYTES];
    // SAFETY: the pointer and the length are those of an array that the kernel may write to.
    let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), BYTES, 0) };
    match usize::try_from(count) {
        Ok(BYTES) => Ok(bytes),
        Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}
