//! Tests the tables as a guest finds them, starting from the root pointer.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::memory::layout;
use crate::pci::{Bdf, SEGMENT_COUNT_MAX, WindowRanges};

type Memory = GuestMemoryMmap<()>;

fn memory(bytes: usize) -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), bytes)]).unwrap()
}

/// One of `count` segments.
fn segment(number: u64, count: u64) -> PciSegmentEntry {
    let mmio32_bytes = (0x2800_0000 / count) & !0xfff;
    let mmio64_bytes = 1 << 40;
    let mmio32 = 0xc000_0000 + number * mmio32_bytes;
    let mmio64 = 0x1_0000_0000 + number * mmio64_bytes;
    PciSegmentEntry {
        windows: WindowRanges {
            mmio32: mmio32..mmio32 + mmio32_bytes,
            mmio64: mmio64..mmio64 + mmio64_bytes,
        },
        domain: None,
    }
}

fn params(vcpus: u32) -> AcpiParams {
    AcpiParams {
        vcpus: (0..vcpus)
            .map(|apic_id| VcpuEntry {
                apic_id,
                enabled: apic_id == 0,
                domain: None,
            })
            .collect(),
        pci_segments: vec![segment(0, 1)],
        ged_address: 0x3fff_ffe0_0000,
        pci_hotplug_address: 0x3fff_ffe0_1000,
        cpu_hotplug_address: 0x3fff_ffe0_2000,
        memory_hotplug_address: None,
        has_serial: true,
        numa: Vec::new(),
        iommu: None,
    }
}

fn bytes(memory: &Memory, address: u64, count: usize) -> Vec<u8> {
    let mut data = vec![0; count];
    memory.read_slice(&mut data, GuestAddress(address)).unwrap();
    data
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(data: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(data[at..at + 4].try_into().unwrap())
}

fn u64_at(data: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(data[at..at + 8].try_into().unwrap())
}

/// A table, delimited by its own length field; its checksum is verified.
fn table(memory: &Memory, address: u64) -> Vec<u8> {
    let header = bytes(memory, address, 36);
    let length = u32_at(&header, 4);
    assert!(address + u64::from(length) <= layout::ACPI_END);
    let table = bytes(memory, address, length as usize);
    assert_eq!(sum(&table), 0, "{:?}", &table[..4]);
    assert_eq!(&table[10..16], b"CLOUDH");
    table
}

/// The tables referenced by the root pointer, by signature; the DSDT last.
fn tables(memory: &Memory, rsdp: GuestAddress) -> Vec<(String, Vec<u8>)> {
    let rsdp = bytes(memory, rsdp.0, 36);
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!(sum(&rsdp[..20]), 0);
    assert_eq!(sum(&rsdp), 0);
    let xsdt = table(memory, u64_at(&rsdp, 24));
    let mut found: Vec<_> = xsdt[36..]
        .chunks(8)
        .map(|entry| table(memory, u64_at(entry, 0)))
        .collect();
    let dsdt = u64_at(&found[0], 140);
    found.push(table(memory, dsdt));
    found
        .into_iter()
        .map(|table| (String::from_utf8(table[..4].to_vec()).unwrap(), table))
        .collect()
}

#[test]
fn tables_are_reachable_from_the_root_pointer_and_sum_up() {
    let memory = memory(2 << 20);
    let rsdp = build(&params(2), &memory).unwrap();
    assert_eq!(rsdp, GuestAddress(0xa0000));
    let names: Vec<_> = tables(&memory, rsdp)
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(names, ["FACP", "APIC", "MCFG", "DSDT"]);
}

#[test]
fn fadt_names_reset_sleep_and_timer_registers() {
    let memory = memory(2 << 20);
    let rsdp = build(&params(1), &memory).unwrap();
    let (_, fadt) = &tables(&memory, rsdp)[0];
    assert_eq!(fadt.len(), 276);
    assert_eq!(fadt[8], 6);
    let flags = u32_at(fadt, 112);
    assert_eq!(
        flags & (1 << 20 | 1 << 10 | 1 << 8),
        1 << 20 | 1 << 10 | 1 << 8
    );
    // Space id, width, offset, access size, address.
    assert_eq!(fadt[116..120], [1, 8, 0, 1]);
    assert_eq!(u64_at(fadt, 120), 0x600);
    assert_eq!(fadt[128], 1);
    assert_eq!(fadt[208..212], [1, 32, 0, 3]);
    assert_eq!(u64_at(fadt, 212), 0x608);
    assert_eq!(u64_at(fadt, 248), 0x600);
    assert_eq!(u64_at(fadt, 260), 0x600);
}

#[test]
fn madt_lists_every_vcpu_the_io_apic_and_the_serial_interrupt() {
    let memory = memory(2 << 20);
    let rsdp = build(&params(300), &memory).unwrap();
    let (_, madt) = &tables(&memory, rsdp)[1];
    // Ids below 255 are those of local APICs; the rest are extended.
    let extended = 44 + 255 * 8;
    let rest = extended + 45 * 16;
    assert_eq!(madt.len(), rest + 12 + 10);
    let local = |index: usize| &madt[44 + index * 8..44 + (index + 1) * 8];
    assert_eq!(local(0), [0, 8, 0, 0, 1, 0, 0, 0]);
    assert_eq!(local(1), [0, 8, 1, 1, 2, 0, 0, 0]);
    assert_eq!(local(254), [0, 8, 254, 254, 2, 0, 0, 0]);
    assert_eq!(
        madt[extended..extended + 16],
        [9, 16, 0, 0, 255, 0, 0, 0, 2, 0, 0, 0, 255, 0, 0, 0]
    );
    assert_eq!(
        madt[rest - 16..rest],
        [9, 16, 0, 0, 0x2b, 1, 0, 0, 2, 0, 0, 0, 0x2b, 1, 0, 0]
    );
    let rest = &madt[rest..];
    assert_eq!(rest[..12], [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    assert_eq!(rest[12..], [2, 10, 0, 4, 4, 0, 0, 0, 0, 0]);
}

#[test]
fn mcfg_names_one_bus() {
    let memory = memory(2 << 20);
    let rsdp = build(&params(1), &memory).unwrap();
    let (_, mcfg) = &tables(&memory, rsdp)[2];
    assert_eq!(mcfg.len(), 60);
    assert_eq!(u64_at(mcfg, 44), 0xe800_0000);
    assert_eq!(mcfg[52..56], [0, 0, 0, 0]);
}

#[test]
fn srat_and_slit_tell_of_nodes_if_there_are_any() {
    let memory = memory(2 << 20);
    let node = |domain, apic_ids, ram, distances| NumaNode {
        domain,
        apic_ids,
        ram,
        hotplug: Vec::new(),
        distances,
    };
    let upper = 0x4000_0000..0xc000_0000;
    let numa = vec![
        node(
            0,
            vec![],
            vec![0..0x4000_0000, 0x1_0000_0000..0x1_8000_0000],
            vec![(2, 30)],
        ),
        NumaNode {
            hotplug: std::iter::once(0x2_0000_0000..0x2_4000_0000).collect(),
            ..node(2, vec![0x123], vec![upper], vec![])
        },
    ];
    let with_nodes = AcpiParams { numa, ..params(1) };
    let found = tables(&memory, build(&with_nodes, &memory).unwrap());
    let names: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["FACP", "APIC", "MCFG", "SRAT", "SLIT", "DSDT"]);

    let srat = &found[3].1;
    assert_eq!(srat.len(), 48 + 4 * 40 + 24);
    assert_eq!(u32_at(srat, 36), 1);
    let memory_of = |at: usize| {
        assert_eq!(srat[at..at + 2], [1, 40]);
        (
            u32_at(srat, at + 2),
            u64_at(srat, at + 8),
            u64_at(srat, at + 16),
            u32_at(srat, at + 28),
        )
    };
    assert_eq!(memory_of(48), (0, 0, 0x4000_0000, 1));
    assert_eq!(memory_of(88), (0, 0x1_0000_0000, 0x8000_0000, 1));
    assert_eq!(memory_of(152), (2, 0x4000_0000, 0x8000_0000, 1));
    // Enabled and hot-pluggable.
    assert_eq!(memory_of(192), (2, 0x2_0000_0000, 0x4000_0000, 3));
    let vcpu = &srat[128..152];
    assert_eq!((vcpu[0], vcpu[1]), (2, 24));
    assert_eq!(
        (u32_at(vcpu, 4), u32_at(vcpu, 8), u32_at(vcpu, 12)),
        (2, 0x123, 1)
    );

    let slit = &found[4].1;
    assert_eq!(u64_at(slit, 36), 3);
    assert_eq!(slit[44..], [10, 20, 30, 20, 10, 20, 30, 20, 10]);
}

#[test]
fn slit_of_the_highest_domain_fits() {
    let memory = memory(2 << 20);
    let numa = vec![NumaNode {
        domain: PROXIMITY_DOMAIN_MAX,
        apic_ids: vec![0],
        ram: Vec::new(),
        hotplug: Vec::new(),
        distances: Vec::new(),
    }];
    build(
        &AcpiParams {
            numa,
            ..params(254)
        },
        &memory,
    )
    .unwrap();
}

#[test]
fn dsdt_has_the_serial_port_only_if_the_machine_has() {
    let with = super::dsdt::dsdt(&params(1));
    let without = super::dsdt::dsdt(&AcpiParams {
        has_serial: false,
        ..params(1)
    });
    let names_com1 = |table: &[u8]| table.windows(4).any(|name| name == b"COM1");
    assert!(names_com1(&with));
    assert!(!names_com1(&without));
    for name in [
        b"PC00", b"MBRD", b"RTC_", b"PWRB", b"VGEN", b"GED_", b"_S5_", b"_EVT", b"_DSM", b"PHPR",
        b"S001", b"S031", b"_EJ0",
    ] {
        assert!(with.windows(4).any(|found| found == name), "{name:?}");
    }
}

#[test]
fn dsdt_has_the_generation_id_and_notifies_its_device_by_event() {
    let memory = memory(2 << 20);
    let rsdp = build(&params(1), &memory).unwrap();
    let found = tables(&memory, rsdp);
    let dsdt = &found.last().unwrap().1;
    let has = |bytes: &[u8]| dsdt.windows(bytes.len()).filter(|it| it == &bytes).count();
    assert_eq!(has(b"\x08_HID\x0dVMGENCTR\0"), 1);
    assert_eq!(has(b"\x08_CID\x0dVM_Gen_Counter\0"), 1);
    assert_eq!(has(b"\x08_DDN\x0dVM_Gen_Counter\0"), 1);
    // The address as a package of its lower and its upper half.
    assert_eq!(has(b"\x08ADDR\x12\x08\x02\x0c\x10\xf0\x0e\x00\x00"), 1);
    // If bit 4 of the event byte is set: Notify (\_SB.VGEN, 0x80).
    assert_eq!(
        has(b"\x7b\x60\x0a\x10\x61\xa0\x12\x93\x61\x0a\x10\x86\\\x2e_SB_VGEN\x0a\x80"),
        1
    );
    let id = bytes(&memory, 0xef010, 16);
    assert_ne!(id, [0; 16]);
    build(&params(1), &memory).unwrap();
    assert_ne!(bytes(&memory, 0xef010, 16), id);
}

#[test]
fn dsdt_has_a_device_for_each_vcpu_if_there_can_be_several() {
    let one = super::dsdt::dsdt(&params(1));
    let mut three = params(3);
    three.vcpus[1].apic_id = 300;
    three.vcpus[2].domain = Some(7);
    let three = super::dsdt::dsdt(&three);
    let count = |table: &[u8], bytes: &[u8]| {
        let found = table.windows(bytes.len()).filter(|it| it == &bytes);
        found.count()
    };
    for name in [b"PRES", b"CPUS", b"C000", b"CSCN"] {
        assert_eq!(count(&one, name), 0, "{name:?}");
    }
    // One name for the device and one in the notification.
    for name in [b"C000", b"C001", b"C002"] {
        assert_eq!(count(&three, name), 2, "{name:?}");
    }
    assert_eq!(count(&three, b"C003"), 0);
    // The entry is marked enabled whether or not the vCPU is present.
    let local = [0x11, 11, 0x0a, 8, 0, 8, 2, 2, 1, 0, 0, 0];
    let extended = [9, 16, 0, 0, 0x2c, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0];
    assert_eq!(count(&three, &local), 1);
    assert_eq!(count(&three, &extended), 1);
    assert_eq!(count(&three, b"_PXM"), 1);
    // Each PCI slot has one, and each vCPU except the first.
    assert_eq!(count(&three, b"_EJ0") - count(&one, b"_EJ0"), 2);
}

#[test]
fn dsdt_has_memory_devices_if_memory_can_be_added() {
    let without = super::dsdt::dsdt(&params(1));
    let with = super::dsdt::dsdt(&AcpiParams {
        memory_hotplug_address: Some(0x3fff_ffe0_3000),
        ..params(1)
    });
    let count = |table: &[u8], bytes: &[u8]| {
        let found = table.windows(bytes.len()).filter(|it| it == &bytes);
        found.count()
    };
    assert_eq!(count(&without, b"MHPC"), 0);
    // As a device, and in the event's method.
    assert_eq!(count(&with, b"MHPC"), 2);
    // As a device, and in the notification.
    for name in [b"M000", b"M007"] {
        assert_eq!(count(&with, name), 2, "{name:?}");
    }
    assert_eq!(count(&with, b"M008"), 0);
    // PNP0C80, one each.
    assert_eq!(count(&with, b"\x08_HID\x0c\x41\xd0\x0c\x80"), 8);
    // The fields lie where a descriptor of 64 bits has its minimum, maximum and length.
    for (at, name) in [(14, b"MMIN"), (22, b"MMAX"), (38, b"MLEN")] {
        let field = [&b"\x8fMR64\x0a"[..], &[at], name].concat();
        assert_eq!(count(&with, &field), 1, "{name:?}");
    }
    let descriptor = count(&with, &[0x8a, 43, 0, 0, 0b1100, 0b11]);
    let others = count(&without, &[0x8a, 43, 0, 0, 0b1100, 0b11]);
    assert_eq!(descriptor - others, 1);
    // Joined from two registers: MHBH << 32 | MHBL.
    let joined = [b"\x79MHBH\x0a\x20\x60", &b"\x7d\x60MHBL\x60"[..]].concat();
    assert_eq!(count(&with, &joined), 1);
}

#[test]
fn segments_are_in_mcfg_and_dsdt() {
    let memory = memory(2 << 20);
    let mut params = params(254);
    params.pci_segments = (0..SEGMENT_COUNT_MAX.into())
        .map(|number| segment(number, SEGMENT_COUNT_MAX.into()))
        .collect();
    params.pci_segments[1].domain = Some(5);
    let rsdp = build(&params, &memory).unwrap();
    let found = tables(&memory, rsdp);
    let (mcfg, dsdt) = (&found[2].1, &found[3].1);
    let entries: Vec<_> = mcfg[44..].chunks(16).collect();
    assert_eq!(entries.len(), usize::from(SEGMENT_COUNT_MAX));
    for (number, entry) in (0_u8..).zip(entries) {
        assert_eq!(u64_at(entry, 0), 0xe800_0000 + (u64::from(number) << 20));
        assert_eq!(entry[8..12], [number, 0, 0, 0]);
    }
    let count = |bytes: &[u8]| dsdt.windows(bytes.len()).filter(|it| it == &bytes).count();
    // One name for the device and one in the scan.
    for name in [b"PC00", b"PC01", b"PC5F"] {
        assert_eq!(count(name), 2, "{name:?}");
    }
    assert_eq!(count(b"\x08_SEG\x0a\x5f"), 1);
    assert_eq!(count(b"\x08_PXM\x0a\x05"), 1);
    assert_eq!(count(b"_PXM"), 1);
    // A device in each segment but the first, whose slot 0 has the bridge: a name, and a notification.
    assert_eq!(count(b"S000"), 2 * 95);
    assert_eq!(count(b"S031"), 2 * 96);
}

#[test]
fn too_many_vcpus_do_not_fit() {
    let memory = memory(2 << 20);
    assert!(matches!(
        build(&params(0xfff), &memory),
        Err(AcpiError::TooLarge { .. })
    ));
}

#[test]
fn missing_ram_is_an_error() {
    let memory = memory(0x1000);
    assert!(matches!(
        build(&params(1), &memory),
        Err(AcpiError::Write { .. })
    ));
}

/// Writes the tables to a directory for a disassembler:
/// `ACPI_DUMP=DIR cargo test -p machine acpi_dump -- --ignored`, then `iasl -d DIR/*.aml`.
#[test]
#[ignore = "writes files for inspection by hand"]
fn acpi_dump() {
    let directory = std::path::PathBuf::from(std::env::var_os("ACPI_DUMP").unwrap());
    let memory = memory(2 << 20);
    let rsdp = build(&params(2), &memory).unwrap();
    for (name, table) in tables(&memory, rsdp) {
        std::fs::write(directory.join(name).with_extension("aml"), table).unwrap();
    }
}

#[test]
fn viot_names_the_iommu_and_what_is_behind_it() {
    let memory = memory(2 << 20);
    let bdf = |segment, slot| Bdf { segment, slot };
    let iommu = IommuEntry {
        bdf: bdf(0, 7),
        // The second is part of a segment that is behind it as a whole.
        functions: vec![bdf(0, 3), bdf(2, 1)],
        segments: vec![2],
    };
    let with_iommu = AcpiParams {
        iommu: Some(iommu),
        ..params(1)
    };
    let found = tables(&memory, build(&with_iommu, &memory).unwrap());
    let (_, viot) = found.iter().find(|(name, _)| name == "VIOT").unwrap();
    let expected = [
        // Three nodes, the first at 48.
        3, 0, 48, 0, 0, 0, 0, 0, 0, 0, 0, 0, //
        // The IOMMU: a virtio device at 0000:00:07.0.
        3, 0, 16, 0, 0, 0, 0x38, 0, 0, 0, 0, 0, 0, 0, 0, 0, //
        // All 32 slots of segment 2, endpoints from 0x20000 on.
        1, 0, 24, 0, 0, 0, 2, 0, 2, 0, 2, 0, 0, 0, 0xf8, 0, 48, 0, 0, 0, 0, 0, 0, 0, //
        // 0000:00:03.0.
        1, 0, 24, 0, 0x18, 0, 0, 0, 0, 0, 0, 0, 0x18, 0, 0x18, 0, 48, 0, 0, 0, 0, 0, 0, 0,
    ];
    assert_eq!(viot[36..], expected);
    let without = tables(&memory, build(&params(1), &memory).unwrap());
    assert!(without.iter().all(|(name, _)| name != "VIOT"));
}
