//! Interrupts: from a device's line or vector to a vCPU's local APIC.
//!
//! The local APICs are in the kernel, the I/O APIC is in the VMM ("split irqchip", Documentation/virt/kvm/api.rst
//! §7.5). Every interrupt reaches the guest as a message-signalled one:
//!
//! ```text
//! legacy device ─ IrqLine ─► Ioapic ── KVM_SIGNAL_MSI ─────────────► local APIC
//! virtio-pci ─── FunctionVectors ─ eventfd ─ irqfd ─ GSI ─ route ──► local APIC
//! ```
//!
//! KVM's routing table translates a GSI (a number) into a message. GSIs 0–23 are the pins of the I/O APIC; the others
//! are allocated to MSI-X vectors.

mod ioapic;
mod kvm;
mod router;
mod vectors;

use std::io;

use virtio_devices::pci::MsiMessage;
use vmm_sys_util::eventfd::EventFd;

pub use ioapic::{Ioapic, IoapicState, IrqLine};
pub use router::{GSI_COUNT_MAX, GsiRouter};
pub use vectors::FunctionVectors;

/// Pins of the I/O APIC, GSI 0–23.
pub const IOAPIC_PIN_COUNT: u8 = 24;

/// One entry of the routing table: an interrupt on `gsi` is delivered as `message`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Global system interrupt.
    pub gsi: u32,
    /// The message to the local APICs.
    pub message: MsiMessage,
}

/// The hypervisor's part of interrupt delivery. Called from any thread; every method is one system call.
pub trait InterruptBackend: Send + Sync {
    /// Replaces the whole routing table.
    ///
    /// # Errors
    /// The host rejected it; the old table stays.
    fn set_routes(&self, routes: &[Route]) -> io::Result<()>;
    /// Connects `event`: a write to it raises `gsi` from now on.
    ///
    /// # Errors
    /// The host rejected it.
    fn register_irqfd(&self, event: &EventFd, gsi: u32) -> io::Result<()>;
    /// Undoes [`InterruptBackend::register_irqfd`].
    ///
    /// # Errors
    /// The host rejected it.
    fn unregister_irqfd(&self, event: &EventFd, gsi: u32) -> io::Result<()>;
    /// Delivers one message now.
    ///
    /// # Errors
    /// The host rejected it, for example because of an invalid vector from the guest.
    fn signal_msi(&self, message: MsiMessage) -> io::Result<()>;
}

#[cfg(any(test, fuzzing))]
pub(crate) mod fake {
    //! A fake hypervisor that only records calls.

    use super::*;
    use std::collections::BTreeMap;
    use std::os::fd::AsRawFd;
    use std::sync::Mutex;

    use virtio_devices::Unpoisoned;

    #[derive(Debug, Default)]
    pub(crate) struct Notes {
        pub(crate) tables: Vec<Vec<Route>>,
        /// GSI by eventfd.
        pub(crate) irqfds: BTreeMap<i32, u32>,
        pub(crate) messages: Vec<MsiMessage>,
        pub(crate) refuse: bool,
    }

    #[derive(Debug, Default)]
    pub(crate) struct FakeBackend(pub(crate) Mutex<Notes>);

    impl FakeBackend {
        pub(crate) fn notes(&self) -> std::sync::MutexGuard<'_, Notes> {
            self.0.lock().unpoisoned()
        }

        pub(crate) fn check(notes: &Notes) -> io::Result<()> {
            if notes.refuse {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            Ok(())
        }
    }

    impl InterruptBackend for FakeBackend {
        fn set_routes(&self, routes: &[Route]) -> io::Result<()> {
            let mut notes = self.notes();
            Self::check(&notes)?;
            notes.tables.push(routes.to_vec());
            Ok(())
        }

        fn register_irqfd(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
            let mut notes = self.notes();
            Self::check(&notes)?;
            assert!(notes.irqfds.insert(event.as_raw_fd(), gsi).is_none());
            Ok(())
        }

        fn unregister_irqfd(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
            let mut notes = self.notes();
            assert_eq!(notes.irqfds.remove(&event.as_raw_fd()), Some(gsi));
            Ok(())
        }

        fn signal_msi(&self, message: MsiMessage) -> io::Result<()> {
            let mut notes = self.notes();
            Self::check(&notes)?;
            notes.messages.push(message);
            Ok(())
        }
    }
}
