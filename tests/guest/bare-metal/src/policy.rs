//! A driver that supports a reporting policy (`guest-patches/README.md`): it reports one block repeatedly, follows the
//! host's policy, and never ends. The host controls it and checks the effect. A hostile driver writes noise to all
//! fields, and acknowledges settings that it does not apply.

use crate::balloon::{Balloon, DATA, DEVICE_BALLOON, F_REPORTING, F_STATS_VQ};
use crate::console;
use crate::memory::{read, write};
use crate::report::Report;
use crate::virtio::{Device, F_VERSION_1};

const F_REPORTING_POLICY: u64 = 1 << 56;
const BLOCK: u32 = 2 << 20;

const GENERATION: u64 = 0x10;
const HOST_FLAGS: u64 = 0x24;
const REPORT_NOW_ID: u64 = 0x30;
const GUEST_GENERATION: u64 = 0x34;
const GUEST_SETTINGS: u64 = 0x38;
const REPORT_NOW_DONE: u64 = 0x3c;
const END: u64 = 0x40;

const PAUSED: u32 = 1 << 0;
/// All settings except `report_again`.
const SETTINGS: u32 = 0x7f;

/// Bytes of noise that a hostile driver writes between two reports.
const NOISE_WRITES: u32 = 16;

pub fn scenario(lying: bool, report: &mut Report) -> ! {
    let Some(mut balloon) = start(report) else {
        report.done();
        crate::machine::halt_forever()
    };
    balloon.device.driver_ok();
    balloon.offer_entries(&[
        (4, 1 << 20),
        (0x8000, 2 << 20),
        (0x8001, 4 << 20),
        (0x8002, 7),
        (0x8003, 3),
        (0x8004, 1),
    ]);
    console::line(format_args!("READY"));
    let mut driver = Driver {
        balloon,
        generation: 0,
        report_now_id: 0,
        noise: 1,
    };
    loop {
        if lying {
            driver.lie();
        }
        driver.follow(lying);
    }
}

/// Accepts the policy if it is offered.
fn start(report: &mut Report) -> Option<Balloon> {
    let device = Device::find(DEVICE_BALLOON)?;
    let offered = device.offered_features() & F_REPORTING_POLICY;
    let balloon = Balloon::start_with(device, F_VERSION_1 | F_STATS_VQ | F_REPORTING | offered);
    report.check(
        "policy_balloon_starts",
        balloon.is_some(),
        format_args!("no FEATURES_OK"),
    );
    balloon
}

struct Driver {
    balloon: Balloon,
    /// Acknowledged last.
    generation: u32,
    /// Done last.
    report_now_id: u32,
    noise: u32,
}

impl Driver {
    fn field(&self, offset: u64) -> u32 {
        read(self.balloon.device.config + offset)
    }

    fn write(&self, offset: u64, word: u32) {
        write(self.balloon.device.config + offset, word);
    }

    /// One iteration, at the end of which nothing is in flight.
    fn follow(&mut self, lying: bool) {
        let generation = self.field(GENERATION);
        let flags = self.field(HOST_FLAGS);
        if flags & PAUSED == 0 || lying {
            self.balloon.report(&[(DATA, BLOCK)]);
        }
        let id = self.field(REPORT_NOW_ID);
        if id != self.report_now_id {
            self.balloon
                .report(&[(DATA, BLOCK), (DATA + 2 * u64::from(BLOCK), BLOCK)]);
            self.report_now_id = id;
            self.write(REPORT_NOW_DONE, id);
        }
        if generation != self.generation {
            self.generation = generation;
            self.write(GUEST_SETTINGS, SETTINGS);
            self.write(GUEST_GENERATION, generation);
        }
    }

    /// Noise after the standard fields and beyond the end, in every size; and acknowledgements of unknown requests.
    fn lie(&mut self) {
        for _ in 0..NOISE_WRITES {
            self.noise = self
                .noise
                .wrapping_mul(1_664_525)
                .wrapping_add(1_013_904_223);
            let offset = 0x10 + u64::from(self.noise >> 8) % (END + 0x20 - 0x10);
            let at = self.balloon.device.config + offset;
            match self.noise >> 30 {
                0 => write(at, self.noise as u8),
                1 => write(at, self.noise as u16),
                2 => write(at, self.noise),
                _ => write(at, u64::from(self.noise) << 32 | 1),
            }
        }
        for offset in [GUEST_GENERATION, REPORT_NOW_DONE, GUEST_SETTINGS] {
            self.write(offset, !self.noise | 1 << 31);
        }
    }
}
