//! Open taps that clients send with requests.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};

use api::VmConfig;

/// Taps by their numbers in the configuration. They stay open across reboots.
#[derive(Default)]
pub(super) struct Taps(BTreeMap<i32, OwnedFd>);

impl Taps {
    pub(super) fn keep(&mut self, fds: Vec<OwnedFd>) {
        self.0
            .extend(fds.into_iter().map(|fd| (fd.as_raw_fd(), fd)));
    }

    /// Closes the taps that no network interface of the configuration uses.
    pub(super) fn close_unnamed(&mut self, config: Option<&VmConfig>) {
        let nets = config.iter().flat_map(|config| &config.net).flatten();
        let named: Vec<i32> = nets.flat_map(|net| &net.fds).flatten().copied().collect();
        self.0.retain(|fd, _| named.contains(fd));
    }
}
