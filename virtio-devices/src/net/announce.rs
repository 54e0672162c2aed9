//! Announces a restored interface, which another host may have served before.
//!
//! For minutes, a switch sends frames for the guest to the port from which the guest's last frame came. The guest does
//! not know that it has moved, and may send nothing. Therefore, the device sends RARP requests (RFC 903) on the guest's
//! behalf. They update the tables of switches, and require nothing from other hosts.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use super::frame_io::HEADER_BYTES;
use super::tap::Tap;

/// Several, because frames can be lost, or a switch may not forward them yet.
const ROUNDS: u8 = 5;
const INTERVAL: Duration = Duration::from_millis(100);
/// The shortest frame, without checksum.
const FRAME_BYTES: usize = 60;
/// Hardware type Ethernet, protocol IPv4, lengths of their addresses, and request 3: who has this hardware address.
const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 3];

/// Sends the announcements of one interface.
pub(super) struct Announcer {
    mac: [u8; 6],
    timer: TimerFd,
    left: u8,
}

impl Announcer {
    /// # Errors
    /// No descriptor is left.
    pub(super) fn new(mac: [u8; 6]) -> io::Result<Self> {
        Ok(Self {
            mac,
            timer: TimerFd::new()?,
            left: 0,
        })
    }

    /// Sends the first announcement. The others follow when the timer is readable.
    pub(super) fn start(&mut self, tap: &Tap) {
        self.left = ROUNDS;
        self.next(tap);
    }

    /// Sends the next announcement, if there is one.
    pub(super) fn next(&mut self, tap: &Tap) {
        let Some(left) = self.left.checked_sub(1) else {
            return self.stop();
        };
        self.left = left;
        // A tap that is full or down may accept the next one.
        if let Err(error) = tap.send(&frame(self.mac)) {
            log::debug!("{}: announcement: {error}", tap.name());
        }
        if left == 0 {
            return self.stop();
        }
        if let Err(error) = self.timer.reset(INTERVAL, None) {
            // Cannot fail on a timer with a valid time.
            log::error!("timer of announcements: {error}");
            self.left = 0;
        }
    }

    /// Sends no more. The timer's descriptor is not readable afterwards.
    pub(super) fn stop(&mut self) {
        self.left = 0;
        if let Err(error) = self.timer.clear() {
            // As above.
            log::error!("timer of announcements: {error}");
        }
    }
}

impl AsRawFd for Announcer {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

/// A request to all, with the header that the tap expects.
fn frame(mac: [u8; 6]) -> [u8; HEADER_BYTES + FRAME_BYTES] {
    let mut frame = [0; HEADER_BYTES + FRAME_BYTES];
    let mut at = HEADER_BYTES;
    let parts: [&[u8]; 7] = [
        &[0xff; 6],
        &mac,
        // RARP.
        &[0x80, 0x35],
        &REQUEST,
        &mac,
        // The sender's address, which it does not know.
        &[0; 4],
        &mac,
    ];
    for part in parts {
        frame[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    frame
}
