//! Back ends of other projects. `cargo xtask test-tools` installs them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use test_skip::skip;

/// A program; if it is not installed, the test is skipped.
pub(super) fn program(name: &str) -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    let own = target.join(name).join("bin");
    let installed = std::env::var_os("PATH").unwrap_or_default();
    let found = [own]
        .into_iter()
        .chain(std::env::split_paths(&installed))
        .map(|folder| folder.join(name))
        .find(|path| path.is_file());
    if found.is_none() {
        skip(format!("{name} is not installed"));
    }
    found
}

/// A process; killed when it is dropped.
pub(super) struct Process(Child);

impl Process {
    pub(super) fn start(command: &mut Command) -> Self {
        // Some programs end with their input.
        let command = command.stdin(Stdio::piped());
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Self(child.unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // SIGKILL.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}
