//! Files that contain secrets: tokens, passwords and keys, which other programs create with their own modes.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Maximum length of a secret: it must fit into the head of a request, together with all other headers.
pub(crate) const SECRET_BYTES_MAX: u64 = 4096;
/// Mode bits of a file that any user can read or write.
const OTHERS: u32 = 0o006;

/// Reads a file that contains a secret.
///
/// # Errors
/// The file cannot be read, is empty, or exceeds the maximum length.
pub(crate) fn read_secret(path: &Path) -> io::Result<String> {
    warn_if_exposed(path);
    let mut text = String::new();
    File::open(path)?
        .take(SECRET_BYTES_MAX + 1)
        .read_to_string(&mut text)?;
    if text.len() as u64 > SECRET_BYTES_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let text = text.trim();
    if text.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(text.to_owned())
}

/// Logs a warning if any user can access the file. The file is used nevertheless: in a container, its folder may
/// protect it.
pub(crate) fn warn_if_exposed(path: &Path) {
    if is_exposed(path) {
        log::warn!(
            "every user of this machine can read or change {}: chmod o-rw",
            path.display()
        );
    }
}

/// Whether any user can read or write a file. If it cannot be inspected, reading it fails later.
fn is_exposed(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & OTHERS != 0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn file_that_everybody_may_read_or_write_is_no_secret() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("token");
        fs::write(&path, "secret\n").unwrap();
        for (mode, exposed) in [
            (0o600, false),
            (0o640, false),
            (0o660, false),
            (0o644, true),
            (0o602, true),
        ] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(is_exposed(&path), exposed, "{mode:o}");
        }
        assert!(!is_exposed(&folder.path().join("nothing")));
    }

    #[test]
    fn secret_is_the_text_without_what_surrounds_it_and_has_a_bound() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("password");
        let read = |text: &str| {
            fs::write(&path, text).unwrap();
            read_secret(&path).map_err(|error| error.kind())
        };
        assert_eq!(read(" se cret\n"), Ok("se cret".to_owned()));
        assert_eq!(read("\n"), Err(io::ErrorKind::UnexpectedEof));
        let most = "x".repeat(4096);
        assert_eq!(read(&most), Ok(most.clone()));
        // A truncated password is useless.
        let error = read(&format!("{most}x"));
        assert_eq!(error, Err(io::ErrorKind::FileTooLarge));
        // A device has no size and no end of file.
        let error = read_secret(Path::new("/dev/zero")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    }
}
