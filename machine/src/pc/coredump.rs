//! A core file of the guest (ELF64), for `crash` and other debuggers.
//!
//! ```text
//!   header │ program headers │ notes │ padding to a page │ RAM, zone after zone
//! ```
//! A `PT_LOAD` describes each range of RAM by its guest physical address. Pages that the host does not hold, and pages
//! of zeros, are holes in the file. Each vCPU has two notes: `CORE` with its registers in Linux's format, and `QEMU`
//! with its segments and control registers.

use std::fs::File;
use std::os::unix::fs::FileExt;

use hypervisor::{RegsState, SegmentState, VcpuState};

use super::{CoreError, Pc, PcError};
use crate::memory::Zone;
use crate::memory::layout::PAGE_BYTES;

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const READ_WRITE_EXECUTE: u32 = 7;

const NT_PRSTATUS: u32 = 1;
/// `struct elf_prstatus` of Linux on x86-64, and where the thread's number and its registers are.
const PRSTATUS_BYTES: usize = 336;
const PRSTATUS_PID_AT: usize = 32;
const PRSTATUS_REGS_AT: usize = 112;
/// The registers and segments of a vCPU as QEMU writes them.
const QEMU_STATE_BYTES: u32 = 440;
const QEMU_STATE_VERSION: u32 = 1;
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;

impl Pc {
    /// Writes a core file of the paused machine into `file`, which is empty.
    ///
    /// # Errors
    /// The machine is not paused, or RAM or the file cannot be accessed.
    pub fn write_core(&self, file: &File) -> Result<(), PcError> {
        let present = self.chassis.cpu_hotplug.present_vcpus();
        let states = self.vcpus.state(&present).map_err(PcError::Cpu)?.vcpus;
        let states = present.iter().zip(&states);
        let vcpus = states.map(|(vcpu, saved)| Ok((*vcpu, saved.state.read()?)));
        let vcpus: Vec<(u32, VcpuState)> =
            vcpus.collect::<Result<_, _>>().map_err(PcError::State)?;
        let (head, content_at) = head(&vcpus, self.memory.zones());
        self.write_parts(file, &head, content_at)
            .map_err(PcError::Core)
    }

    fn write_parts(&self, file: &File, head: &[u8], content_at: u64) -> Result<(), CoreError> {
        let zones = self.memory.zones();
        let bytes: u64 = zones.iter().map(Zone::bytes).sum();
        file.set_len(content_at + bytes).map_err(CoreError::File)?;
        let mut at = content_at;
        for zone in zones {
            let written = self.memory.write_zone(zone, file, at);
            written.map_err(CoreError::Content)?;
            at += zone.bytes();
        }
        // Last: a file without it is not a core file.
        file.write_all_at(head, 0).map_err(CoreError::File)?;
        file.sync_all().map_err(CoreError::File)
    }
}

/// Everything before RAM, and where RAM begins.
fn head(vcpus: &[(u32, VcpuState)], zones: &[Zone]) -> (Vec<u8>, u64) {
    let notes = notes(vcpus);
    let ranges = zones.iter().flat_map(|zone| &zone.ranges);
    let loads = ranges.clone().count();
    let notes_at = HEADER_BYTES + (1 + loads) * PROGRAM_HEADER_BYTES;
    let content_at = ((notes_at + notes.len()) as u64).next_multiple_of(PAGE_BYTES);

    let mut head = Record::default();
    // Magic; 64 bits, little-endian, version 1; no operating system.
    head.raw(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    head.u16s(&[ET_CORE, EM_X86_64]).u32s(&[1]);
    // Entry, program headers, section headers.
    head.u64s(&[0, HEADER_BYTES as u64, 0]).u32s(&[0]);
    let count = u16::try_from(1 + loads).expect("there are few ranges of RAM");
    head.u16s(&[HEADER_BYTES as u16, PROGRAM_HEADER_BYTES as u16, count]);
    head.u16s(&[0, 0, 0]);
    let mut program_header = |kind, flags, offset: u64, address, bytes: u64| {
        head.u32s(&[kind, flags]);
        head.u64s(&[offset, 0, address, bytes, bytes, 0]);
    };
    program_header(PT_NOTE, 0, notes_at as u64, 0, notes.len() as u64);
    let mut at = content_at;
    for range in ranges {
        let bytes = range.end - range.start;
        program_header(PT_LOAD, READ_WRITE_EXECUTE, at, range.start, bytes);
        at += bytes;
    }
    head.raw(&notes);
    (head.0, content_at)
}

fn notes(vcpus: &[(u32, VcpuState)]) -> Vec<u8> {
    let mut notes = Record::default();
    for (index, vcpu) in vcpus {
        notes.note(*b"CORE\0", NT_PRSTATUS, &prstatus(*index, vcpu));
    }
    for (_, vcpu) in vcpus {
        notes.note(*b"QEMU\0", 0, &qemu_state(vcpu));
    }
    notes.0
}

fn prstatus(index: u32, vcpu: &VcpuState) -> Vec<u8> {
    let RegsState {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    } = vcpu.regs;
    let sregs = &vcpu.sregs;
    let selector = |segment: &SegmentState| u64::from(segment.selector);
    let mut status = Record::default();
    status.raw(&[0; PRSTATUS_PID_AT]).u32s(&[index]);
    status.raw(&[0; PRSTATUS_REGS_AT - PRSTATUS_PID_AT - 4]);
    // `struct user_regs_struct`. No system call is in progress.
    status.u64s(&[r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8]);
    status.u64s(&[rax, rcx, rdx, rsi, rdi, rax, rip]);
    status.u64s(&[selector(&sregs.cs), rflags, rsp, selector(&sregs.ss)]);
    status.u64s(&[sregs.fs.base, sregs.gs.base]);
    let data = [&sregs.ds, &sregs.es, &sregs.fs, &sregs.gs];
    status.u64s(&data.map(selector));
    // Floating point registers are not there.
    status.u64s(&[0]);
    assert_eq!(status.0.len(), PRSTATUS_BYTES);
    status.0
}

fn qemu_state(vcpu: &VcpuState) -> Vec<u8> {
    let (regs, sregs) = (&vcpu.regs, &vcpu.sregs);
    let mut state = Record::default();
    state.u32s(&[QEMU_STATE_VERSION, QEMU_STATE_BYTES]);
    state.u64s(&[regs.rax, regs.rbx, regs.rcx, regs.rdx]);
    state.u64s(&[regs.rsi, regs.rdi, regs.rsp, regs.rbp]);
    state.u64s(&[regs.r8, regs.r9, regs.r10, regs.r11]);
    state.u64s(&[regs.r12, regs.r13, regs.r14, regs.r15]);
    state.u64s(&[regs.rip, regs.rflags]);
    let segments = [&sregs.cs, &sregs.ds, &sregs.es, &sregs.fs, &sregs.gs];
    for segment in segments
        .into_iter()
        .chain([&sregs.ss, &sregs.ldt, &sregs.tr])
    {
        let flags = [
            (segment.type_, 8),
            (segment.s, 12),
            (segment.dpl, 13),
            (segment.present, 15),
            (segment.avl, 20),
            (segment.l, 21),
            (segment.db, 22),
            (segment.g, 23),
        ];
        let flags = flags.map(|(value, shift)| u32::from(value) << shift);
        let flags = flags.into_iter().fold(0, |all, it| all | it);
        state.u32s(&[u32::from(segment.selector), segment.limit, flags, 0]);
        state.u64s(&[segment.base]);
    }
    for table in [&sregs.gdt, &sregs.idt] {
        state.u32s(&[0, u32::from(table.limit), 0, 0]);
        state.u64s(&[table.base]);
    }
    // In the place of control register 1, which does not exist.
    state.u64s(&[sregs.cr0, sregs.cr8, sregs.cr2, sregs.cr3, sregs.cr4]);
    let mut msrs = vcpu.msrs.iter();
    let base = msrs.find(|msr| msr.index == MSR_KERNEL_GS_BASE);
    state.u64s(&[base.map_or(0, |msr| msr.data)]);
    assert_eq!(state.0.len(), QEMU_STATE_BYTES as usize);
    state.0
}

/// Little-endian fields, one after the other.
#[derive(Default)]
struct Record(Vec<u8>);

impl Record {
    fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn u16s(&mut self, values: &[u16]) -> &mut Self {
        self.0.extend(values.iter().flat_map(|it| it.to_le_bytes()));
        self
    }

    fn u32s(&mut self, values: &[u32]) -> &mut Self {
        self.0.extend(values.iter().flat_map(|it| it.to_le_bytes()));
        self
    }

    fn u64s(&mut self, values: &[u64]) -> &mut Self {
        self.0.extend(values.iter().flat_map(|it| it.to_le_bytes()));
        self
    }

    /// Name and description are padded to words.
    fn note(&mut self, name: [u8; 5], kind: u32, description: &[u8]) {
        self.u32s(&[name.len() as u32, description.len() as u32, kind]);
        for part in [&name[..], description] {
            self.raw(part);
            let padded = self.0.len().next_multiple_of(4);
            self.0.resize(padded, 0);
        }
    }
}
