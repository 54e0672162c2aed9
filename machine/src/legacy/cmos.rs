//! The real-time clock and its 128 bytes of RAM (Motorola MC146818A).
//!
//! The time is the host's, in UTC, and cannot be set. The size of RAM is in the bytes from which firmware has read it
//! since the PC AT.

use std::sync::{Mutex, MutexGuard};
use std::time::SystemTime;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::Offset;
use serde::{Deserialize, Serialize};
use state::{Bytes, Part, StateError, parts, require};
use virtio_devices::Unpoisoned;

use crate::bus::BusDevice;

const PART: Part = parts::CMOS;

const RAM_BYTES: usize = 128;
/// Bit 7 of the index port masks NMIs, which are never sent.
const INDEX_MASK: u8 = 0x7f;

// Clock registers.
const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const DAY_OF_WEEK: u8 = 0x06;
const DAY_OF_MONTH: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
/// RAM byte that holds the century; the FADT contains its index.
pub const CMOS_CENTURY: u8 = 0x32;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;

/// 32.768 kHz time base, 1024 Hz periodic rate, no update in progress.
const STATUS_A_RESET: u8 = 0x26;
const STATUS_B_BINARY: u8 = 1 << 2;
const STATUS_B_24_HOURS: u8 = 1 << 1;
/// RAM and time are valid: the battery is fine.
const STATUS_D_VALID: u8 = 1 << 7;
const HOURS_PM: u8 = 1 << 7;

// Memory size in units of 64 KiB: above 16 MiB, and above 4 GiB.
const ABOVE_16_MIB: u8 = 0x34;
const ABOVE_4_GIB: u8 = 0x5b;
const MEMORY_UNIT_SHIFT: u32 = 16;
const MIB_16: u64 = 16 << 20;

/// The saved state of clock and RAM. The time is the host's, so it is not part of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CmosState {
    /// Index register.
    pub index: u8,
    /// The RAM, with clock registers as they were written.
    pub ram: Bytes,
}

impl state::State for CmosState {
    const PART: Part = PART;
}

struct State {
    index: u8,
    ram: [u8; RAM_BYTES],
}

/// Ports 0x70 (index) and 0x71 (data).
pub struct Cmos {
    state: Mutex<State>,
}

virtio_devices::debug_fields!(Cmos {});

impl Cmos {
    /// A clock in a machine with these amounts of RAM below and above 4 GiB.
    #[must_use]
    pub fn new(low_ram_bytes: u64, high_ram_bytes: u64) -> Self {
        let mut ram = [0; RAM_BYTES];
        let low = low_ram_bytes.saturating_sub(MIB_16) >> MEMORY_UNIT_SHIFT;
        let low = u16::try_from(low).unwrap_or(u16::MAX);
        ram[usize::from(ABOVE_16_MIB)..][..2].copy_from_slice(&low.to_le_bytes());
        // Three bytes can represent up to 1 TiB.
        let high = (high_ram_bytes >> MEMORY_UNIT_SHIFT).min(0xff_ffff);
        ram[usize::from(ABOVE_4_GIB)..][..3].copy_from_slice(&high.to_le_bytes()[..3]);
        ram[usize::from(STATUS_A)] = STATUS_A_RESET;
        ram[usize::from(STATUS_B)] = STATUS_B_24_HOURS;
        Self {
            state: Mutex::new(State { index: 0, ram }),
        }
    }

    /// The values that the guest has written, and the memory size.
    pub fn state(&self) -> CmosState {
        let state = self.lock();
        CmosState {
            index: state.index,
            ram: Bytes(state.ram.to_vec()),
        }
    }

    /// Restores the chip from which `saved` was taken.
    ///
    /// # Errors
    /// A different size of RAM, or an index outside of it.
    pub fn restore(&self, saved: &CmosState) -> Result<(), StateError> {
        let ram = <[u8; RAM_BYTES]>::try_from(saved.ram.0.as_slice()).map_err(|_wrong_length| {
            let reason = format!("has {} bytes instead of {RAM_BYTES}", saved.ram.0.len());
            StateError::invalid(PART, "ram", reason)
        })?;
        require(saved.index <= INDEX_MASK, PART, "index", || {
            format!("{:#x} is outside of RAM", saved.index)
        })?;
        *self.lock() = State {
            index: saved.index,
            ram,
        };
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unpoisoned()
    }
}

impl State {
    fn read(&self, now: SystemTime) -> u8 {
        let clock = utc(now);
        let status_b = self.ram[usize::from(STATUS_B)];
        let encode = |value: i8| encode(value as u8, status_b);
        match self.index {
            SECONDS => encode(clock.second()),
            MINUTES => encode(clock.minute()),
            HOURS if status_b & STATUS_B_24_HOURS != 0 => encode(clock.hour()),
            HOURS => {
                let pm = if clock.hour() >= 12 { HOURS_PM } else { 0 };
                encode((clock.hour() + 11) % 12 + 1) | pm
            }
            DAY_OF_WEEK => encode(clock.weekday().to_sunday_one_offset()),
            DAY_OF_MONTH => encode(clock.day()),
            MONTH => encode(clock.month()),
            YEAR => encode((clock.year() % 100) as i8),
            CMOS_CENTURY => encode((clock.year() / 100) as i8),
            // No interrupt is ever pending.
            STATUS_C => 0,
            STATUS_D => STATUS_D_VALID,
            index => self.ram[usize::from(index)],
        }
    }
}

/// A value in the format that status register B selects: binary or BCD.
fn encode(value: u8, status_b: u8) -> u8 {
    if status_b & STATUS_B_BINARY != 0 {
        value
    } else {
        (value / 10) << 4 | (value % 10)
    }
}

impl BusDevice for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let state = self.lock();
        if let Some(byte) = data.first_mut() {
            *byte = if offset == 0 {
                state.index
            } else {
                state.read(SystemTime::now())
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else {
            return;
        };
        let mut state = self.lock();
        if offset == 0 {
            state.index = value & INDEX_MASK;
        } else {
            // Clock registers are stored in RAM as well, but never read from it.
            let index = usize::from(state.index);
            state.ram[index] = value;
        }
    }
}

/// The time in UTC. A host clock before 1970 is shown as 1970.
fn utc(now: SystemTime) -> DateTime {
    let now = Timestamp::try_from(now).unwrap_or_default();
    Offset::UTC.to_datetime(now.max(Timestamp::UNIX_EPOCH))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    fn read(cmos: &Cmos, index: u8) -> u8 {
        cmos.write(0, &[index]);
        let mut byte = [0];
        cmos.read(1, &mut byte);
        byte[0]
    }

    #[test]
    fn calendar_knows_leap_years_and_weekdays() {
        let date = |seconds| utc(UNIX_EPOCH + Duration::from_secs(seconds));
        let shown = |clock: DateTime| {
            let weekday = clock.weekday().to_sunday_one_offset();
            (clock.year(), clock.month(), clock.day(), weekday)
        };
        assert_eq!(shown(date(0)), (1970, 1, 1, 5));
        assert_eq!(shown(date(951_782_400)), (2000, 2, 29, 3));
        assert_eq!(shown(date(951_868_800)), (2000, 3, 1, 4));
        assert_eq!(shown(date(1_735_689_599)), (2024, 12, 31, 3));
        assert_eq!(shown(date(4_107_542_400)), (2100, 3, 1, 2));
        let clock = date(1_735_689_599);
        assert_eq!((clock.hour(), clock.minute(), clock.second()), (23, 59, 59));
    }

    #[test]
    fn time_comes_in_the_format_of_status_b() {
        let now = UNIX_EPOCH + Duration::from_secs(1_735_689_599);
        let mut state = State {
            index: HOURS,
            ram: [0; RAM_BYTES],
        };
        assert_eq!(state.read(now), 0x11 | HOURS_PM);
        state.ram[usize::from(STATUS_B)] = STATUS_B_24_HOURS;
        assert_eq!(state.read(now), 0x23);
        state.ram[usize::from(STATUS_B)] = STATUS_B_24_HOURS | STATUS_B_BINARY;
        assert_eq!(state.read(now), 23);
        state.index = CMOS_CENTURY;
        assert_eq!(state.read(now), 20);
    }

    #[test]
    fn midnight_and_noon_are_twelve_o_clock() {
        let mut state = State {
            index: HOURS,
            ram: [0; RAM_BYTES],
        };
        state.ram[usize::from(STATUS_B)] = STATUS_B_BINARY;
        assert_eq!(state.read(UNIX_EPOCH), 12);
        let noon = UNIX_EPOCH + Duration::from_secs(12 * 3_600);
        assert_eq!(state.read(noon), 12 | HOURS_PM);
    }

    #[test]
    fn memory_size_is_where_firmware_looks() {
        let cmos = Cmos::new(3 << 30, 3 << 30);
        assert_eq!(read(&cmos, 0x34), 0x00);
        assert_eq!(read(&cmos, 0x35), 0xbf);
        assert_eq!(
            [read(&cmos, 0x5b), read(&cmos, 0x5c), read(&cmos, 0x5d)],
            [0x00, 0xc0, 0x00]
        );
        let small = Cmos::new(8 << 20, 0);
        assert_eq!(read(&small, 0x35), 0);
    }

    #[test]
    fn ram_keeps_what_is_written_and_status_d_does_not() {
        let cmos = Cmos::new(1 << 30, 0);
        cmos.write(0, &[0x8f]);
        cmos.write(1, &[0x0a]);
        assert_eq!(read(&cmos, 0x0f), 0x0a);
        cmos.write(0, &[STATUS_D]);
        cmos.write(1, &[0]);
        assert_eq!(read(&cmos, STATUS_D), STATUS_D_VALID);
    }
}
