//! Interrupt messages, interrupt routes and doorbell addresses in KVM's format.

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, kvm_irq_routing_entry, kvm_msi};

/// Bits 5–11 of an MSI address: destination id bits 8–14, for guests that see `KVM_FEATURE_MSI_EXT_DEST_ID`
/// (Documentation/virt/kvm/x86/cpuid.rst).
const EXT_DEST_ID_MASK: u32 = 0x7f << 5;

/// One message signalled interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MsiMessage {
    /// Address the device writes to: low word 0xfee…, high word destination bits 8–31.
    pub address: u64,
    /// Value the device writes: vector, delivery mode, trigger mode.
    pub data: u32,
}

impl MsiMessage {
    /// Low and high address words, with an extended destination id moved to where KVM reads it. KVM reads bits 8–31 of
    /// the id from the high word only. A guest without interrupt remapping can set bits 8–14 through the low word
    /// alone.
    fn address_words(self) -> (u32, u32) {
        let low = self.address as u32;
        let high = (self.address >> 32) as u32;
        let ext_dest_id = (low & EXT_DEST_ID_MASK) >> 5;
        (low & !EXT_DEST_ID_MASK, high | (ext_dest_id << 8))
    }
}

impl From<MsiMessage> for kvm_msi {
    fn from(msi: MsiMessage) -> Self {
        let (address_lo, address_hi) = msi.address_words();
        Self {
            address_lo,
            address_hi,
            data: msi.data,
            ..Default::default()
        }
    }
}

/// An entry of the interrupt routing table. With the split interrupt chip every route ends in an MSI. Each pin of the
/// I/O APIC is routed as the message of its redirection entry, so that KVM knows which vectors need an
/// [`crate::VmExit::IoapicEoi`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GsiRoute {
    /// Global system interrupt, for which an irqfd is registered.
    pub gsi: u32,
    /// The message it is delivered as.
    pub msi: MsiMessage,
}

impl From<GsiRoute> for kvm_irq_routing_entry {
    fn from(route: GsiRoute) -> Self {
        let (address_lo, address_hi) = route.msi.address_words();
        let mut entry = Self {
            gsi: route.gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            ..Default::default()
        };
        entry.u.msi.address_lo = address_lo;
        entry.u.msi.address_hi = address_hi;
        entry.u.msi.data = route.msi.data;
        entry
    }
}

/// A guest address at which a write signals an eventfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoAddress {
    /// Guest physical address.
    Mmio(u64),
    /// I/O port.
    Pio(u64),
}

impl From<IoAddress> for kvm_ioctls::IoEventAddress {
    fn from(address: IoAddress) -> Self {
        match address {
            IoAddress::Mmio(address) => Self::Mmio(address),
            IoAddress::Pio(port) => Self::Pio(port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msi_plain_destination_is_passed_through() {
        let msi = kvm_msi::from(MsiMessage {
            address: 0xfee0_3000,
            data: 0x4041,
        });
        assert_eq!(msi.address_lo, 0xfee0_3000);
        assert_eq!(msi.address_hi, 0);
        assert_eq!(msi.data, 0x4041);
    }

    #[test]
    fn msi_extended_destination_moves_to_the_high_word() {
        // Destination 0x123: low byte in bits 12–19, bit 8 in address bit 5.
        let msi = kvm_msi::from(MsiMessage {
            address: 0xfee2_3020,
            data: 1,
        });
        assert_eq!(msi.address_lo, 0xfee2_3000);
        assert_eq!(msi.address_hi, 0x100);
    }

    #[test]
    fn msi_high_word_is_kept() {
        let msi = kvm_msi::from(MsiMessage {
            address: 0x0000_0100_fee2_3000,
            data: 1,
        });
        assert_eq!(msi.address_hi, 0x100);
    }
}
