//! The VM generation identifier ("Virtual Machine Generation ID", Microsoft, 2012).
//!
//! ```text
//! boot:     16 random bytes ─► guest RAM at GENERATION_ID_START
//! restore:  16 other bytes  ─► the same address; GED_._EVT ─► Notify(VGEN) ─► the guest reads them again
//! ```
//! Two guests that were restored from one snapshot have random number generators in the same state. A changed identifier
//! makes a guest reseed them.

use acpi_tables::Aml;
use acpi_tables::aml::{Device, Name, Package, Path, ZERO};
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::AcpiError;
use crate::memory::layout;
use crate::random::random_id;

/// The device that the guest is notified about.
pub(super) const DEVICE: &str = "\\_SB_.VGEN";
/// Notification that the identifier has changed.
pub(super) const CHANGED: u8 = 0x80;

const _: () = assert!(layout::GENERATION_ID_START.is_multiple_of(8));

/// The ACPI device that gives the guest the address of the identifier.
pub(super) fn device(aml: &mut Vec<u8>) {
    let address = layout::GENERATION_ID_START;
    let (low, high) = (address as u32, (address >> 32) as u32);
    Device::new(
        Path::new("_SB_.VGEN"),
        vec![
            // Linux looks for the first name, Windows for the second.
            &Name::new(Path::new("_HID"), &"VMGENCTR"),
            &Name::new(Path::new("_CID"), &"VM_Gen_Counter"),
            &Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("ADDR"), &Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(aml);
}

/// Writes a new identifier to guest memory.
///
/// # Errors
/// The host has no random numbers yet, or there is no guest RAM at the address.
pub fn renew_generation_id<M: GuestMemory>(memory: &M) -> Result<(), AcpiError> {
    let id = random_id().map_err(AcpiError::Random)?;
    let address = layout::GENERATION_ID_START;
    memory
        .write_slice(&id, GuestAddress(address))
        .map_err(|source| AcpiError::Write { address, source })
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    const BYTES: usize = 16;

    #[test]
    fn generation_id_is_new_each_time_and_fills_its_place_alone() {
        let memory =
            GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 2 << 20)]).expect("memory");
        let read = || {
            let mut bytes = [0; BYTES + 2];
            let before = GuestAddress(layout::GENERATION_ID_START - 1);
            memory.read_slice(&mut bytes, before).expect("it is RAM");
            bytes
        };
        assert_eq!(read(), [0; BYTES + 2]);
        let mut seen = Vec::new();
        for _ in 0..3 {
            renew_generation_id(&memory).expect("random numbers");
            let bytes = read();
            assert_eq!((bytes[0], bytes[BYTES + 1]), (0, 0));
            assert!(!seen.contains(&bytes), "{bytes:?}");
            seen.push(bytes);
        }
        let small = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4096)]).expect("memory");
        assert!(matches!(
            renew_generation_id(&small),
            Err(AcpiError::Write { .. })
        ));
    }
}
