//! The program as a process.

#![allow(clippy::unwrap_used)]

use std::process::Command;

#[test]
fn manual_pages_and_completions_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let status = Command::new(env!("CARGO_BIN_EXE_ch-remote"))
        .arg("--generate-docs")
        .arg(folder.path())
        .status()
        .unwrap();
    assert!(status.success());
    for (file, text) in [
        ("man/man1/ch-remote.1", r"api\-socket"),
        ("man/man1/ch-remote-reclaim-stats.1", "watch"),
        ("bash-completion/completions/ch-remote", "--balloon"),
        ("zsh/site-functions/_ch-remote", "--balloon"),
        ("fish/vendor_completions.d/ch-remote.fish", "-l balloon"),
    ] {
        let found = std::fs::read_to_string(folder.path().join(file)).unwrap();
        assert!(found.contains(text), "{file} lacks {text}");
    }
}
