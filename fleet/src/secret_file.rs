//! Files that hold a secret: tokens, passwords and keys of others' choice and with others' modes.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Longest secret: it has to fit into the head of a request, with everything else.
pub(crate) const SECRET_BYTES_MAX: u64 = 4096;
/// What everybody on the machine may do with a file that is no secret: read and write it.
const OTHERS: u32 = 0o006;

/// The text of a file that holds a secret.
///
/// # Errors
/// It cannot be read, holds nothing, or more than a secret can be.
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

/// Logs that a file is no secret. It is used all the same: in a container, its folder may be what protects it.
pub(crate) fn warn_if_exposed(path: &Path) {
    if is_exposed(path) {
        log::warn!(
            "every user of this machine can read or change {}: chmod o-rw",
            path.display()
        );
    }
}

/// Whether everybody may read or write a file. One that cannot be looked at fails when it is read.
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
        // Half of a password is none.
        let error = read(&format!("{most}x"));
        assert_eq!(error, Err(io::ErrorKind::FileTooLarge));
        // A device has no size and no end.
        let error = read_secret(Path::new("/dev/zero")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    }
}
