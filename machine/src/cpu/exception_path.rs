//! Looks in the host for the cause of a triple fault or a failed emulation. If page tables, code or exception handlers
//! are in RAM that the host cannot provide, KVM may treat them as absent. It can then neither deliver an exception nor
//! read the instruction to emulate.

use hypervisor::Vcpu;
use hypervisor::bindings::{kvm_regs, kvm_sregs};

const CR0_PAGING: u64 = 1 << 31;
const CR4_FIVE_LEVELS: u64 = 1 << 12;
const EFER_LONG_MODE: u64 = 1 << 10;

const ENTRY_PRESENT: u64 = 1;
const ENTRY_LARGE: u64 = 1 << 7;
const ENTRY_ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const ENTRY_BYTES: u64 = 8;
const INDEX_BITS: u32 = 9;
const PAGE_BITS: u32 = 12;
/// Entries of 1 GiB and of 2 MiB.
const LARGE_LEVELS: u32 = 2;

/// The RAM that a vCPU needs to run its next instruction or to deliver an exception.
#[derive(Debug)]
pub struct ExceptionPath {
    paging: Paging,
    /// The root of the page tables.
    root: u64,
    /// Linear addresses: code, stack, descriptor tables, task segment.
    needed: [u64; 5],
}

#[derive(Debug)]
enum Paging {
    Off,
    /// Without long mode. Only the root is looked at.
    ThirtyTwoBit,
    Long {
        levels: u32,
    },
}

impl ExceptionPath {
    pub(super) fn of(vcpu: &Vcpu) -> hypervisor::Result<Self> {
        Ok(Self::new(&vcpu.regs()?, &vcpu.sregs()?))
    }

    fn new(regs: &kvm_regs, sregs: &kvm_sregs) -> Self {
        let paging = match sregs.cr0 & CR0_PAGING != 0 {
            false => Paging::Off,
            true if sregs.efer & EFER_LONG_MODE == 0 => Paging::ThirtyTwoBit,
            true => Paging::Long {
                levels: if sregs.cr4 & CR4_FIVE_LEVELS == 0 {
                    4
                } else {
                    5
                },
            },
        };
        Self {
            paging,
            root: sregs.cr3 & ENTRY_ADDRESS,
            needed: [
                sregs.cs.base.wrapping_add(regs.rip),
                sregs.ss.base.wrapping_add(regs.rsp),
                sregs.idt.base,
                sregs.gdt.base,
                sregs.tr.base,
            ],
        }
    }

    /// Reads a word of each page through `read`, which returns `None` for an address without RAM. The values come from
    /// the guest: they only select what is read next.
    pub fn touch(&self, read: impl Fn(u64) -> Option<u64>) {
        for linear in self.needed {
            let page = match self.paging {
                Paging::Off => Some(linear),
                Paging::ThirtyTwoBit => Some(self.root),
                Paging::Long { levels } => self.translate(linear, levels, &read),
            };
            if let Some(address) = page {
                read(address / ENTRY_BYTES * ENTRY_BYTES);
            }
        }
    }

    fn translate(
        &self,
        linear: u64,
        levels: u32,
        read: &impl Fn(u64) -> Option<u64>,
    ) -> Option<u64> {
        let mut table = self.root;
        for level in (0..levels).rev() {
            let shift = PAGE_BITS + INDEX_BITS * level;
            let index = (linear >> shift) & ((1 << INDEX_BITS) - 1);
            let entry = read(table + index * ENTRY_BYTES)?;
            if entry & ENTRY_PRESENT == 0 {
                return None;
            }
            let is_page = level == 0 || level <= LARGE_LEVELS && entry & ENTRY_LARGE != 0;
            if is_page {
                let offset = (1 << shift) - 1;
                return Some(entry & ENTRY_ADDRESS & !offset | linear & offset);
            }
            table = entry & ENTRY_ADDRESS;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    use super::*;

    /// The addresses that are read if RAM holds `entries` and zeros below 64 KiB.
    fn touched(sregs: &kvm_sregs, rip: u64, entries: &[(u64, u64)]) -> Vec<u64> {
        let entries: BTreeMap<_, _> = entries.iter().copied().collect();
        let touched = RefCell::new(Vec::new());
        let regs = kvm_regs {
            rip,
            ..Default::default()
        };
        ExceptionPath::new(&regs, sregs).touch(|address| {
            let value = entries.get(&address).copied();
            let value = value.or((address < 0x10000).then_some(0));
            touched.borrow_mut().push(address);
            value
        });
        touched.into_inner()
    }

    fn sregs(cr0: u64, efer: u64, cr4: u64) -> kvm_sregs {
        let mut sregs = kvm_sregs {
            cr0,
            efer,
            cr4,
            cr3: 0x1018,
            ..Default::default()
        };
        // An address whose first table entry is absent.
        let elsewhere = 1 << 47;
        sregs.ss.base = elsewhere;
        (sregs.idt.base, sregs.gdt.base, sregs.tr.base) = (elsewhere, elsewhere, elsewhere);
        sregs
    }

    const PAGED: u64 = CR0_PAGING;
    const LONG: u64 = EFER_LONG_MODE;

    #[test]
    fn pages_of_four_levels_are_followed() {
        let linear = (1 << 39) | (2 << 30) | (3 << 21) | (4 << 12) | 0x567;
        let entries = [
            (0x1008, 0x2000 | 1),
            (0x2010, 0x3000 | 1),
            (0x3018, 0x4000 | 1),
            (0x4020, (1 << 63) | 0x5000 | 1),
        ];
        let all = touched(&sregs(PAGED, LONG, 0), linear, &entries);
        assert_eq!(all[..5], [0x1008, 0x2010, 0x3018, 0x4020, 0x5560]);
        assert_eq!(all[5..], [0x1800; 4], "the first table's absent entry");
    }

    #[test]
    fn large_page_and_five_levels_are_followed() {
        let linear = (5 << 48) | (1 << 39) | (2 << 30) | 0x0123_4568;
        let entries = [
            (0x1028, 0x2000 | 1),
            (0x2008, 0x3000 | 1),
            (0x3010, (7 << 30) | ENTRY_LARGE | 1),
        ];
        let all = touched(&sregs(PAGED, LONG, CR4_FIVE_LEVELS), linear, &entries);
        assert_eq!(all[..4], [0x1028, 0x2008, 0x3010, (7 << 30) | 0x0123_4568]);
    }

    #[test]
    fn tables_outside_of_ram_and_loops_end() {
        let outside = touched(&sregs(PAGED, LONG, 0), 0, &[(0x1000, ENTRY_ADDRESS | 1)]);
        assert_eq!(outside[..2], [0x1000, ENTRY_ADDRESS]);
        let to_itself = touched(&sregs(PAGED, LONG, 0), 0, &[(0x1000, 0x1000 | 1)]);
        assert_eq!(to_itself[..5], [0x1000; 5]);
        assert_eq!(to_itself.len(), 9);
    }

    #[test]
    fn without_long_mode_root_or_addresses_are_touched() {
        assert_eq!(touched(&sregs(PAGED, 0, 0), 0x77, &[]), [0x1000; 5]);
        let mut off = sregs(0, 0, 0);
        off.cs.base = 0xffff_0000;
        assert_eq!(touched(&off, 0xfff3, &[])[0], 0xffff_fff0);
    }
}
