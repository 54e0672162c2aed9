//! Device hot-plug, as the registers show it. The host acts when it reads `READY …` on the serial port.

use crate::balloon::{Balloon, DATA, DEFLATE, DEVICE_BALLOON, INFLATE};
use crate::console;
use crate::memory::{map_high, read, write};
use crate::pci::Function;
use crate::report::Report;
use crate::virtio::Device;

/// Address of the ACPI root pointer.
const RSDP: u64 = 0xa0000;
const DEVICE_BLOCK: u16 = 2;
const BALLOON_FRAMES: u32 = 16;
/// The host's balloon target, by which it confirms an observation.
const HOST_IS_DONE_FRAMES: u32 = 1;

pub const SLOTS_UP: u64 = 0x0;
pub const SLOTS_DOWN: u64 = 0x4;
const EJECT: u64 = 0x8;
const SEGMENT: u64 = 0xc;

/// From the PCI hot-plug controller to that of processors.
const PROCESSORS: u64 = 0x1000;
const PROCESSOR_STATUS: u64 = 4;
/// In a processor's status: it is present; it was added; its removal is requested; it is released.
pub const PRESENT: u8 = 1;
pub const ADDED: u8 = 2;
pub const LEAVES: u8 = 4;
const RELEASED: u8 = 8;

/// The PCI hot-plug controller.
pub struct Controller {
    registers: u64,
    segment: u16,
}

impl Controller {
    /// Finds it, and selects a segment. Its address is in the DSDT: `OperationRegion (PCST, SystemMemory, address, …)`.
    pub fn find(segment: u16) -> Option<Controller> {
        let xsdt: u64 = read(RSDP + 24);
        // The FADT is the first table, and names the DSDT.
        let fadt: u64 = unaligned(xsdt + 36);
        let dsdt: u64 = unaligned(fadt + 140);
        let bytes: u32 = unaligned(dsdt + 4);
        // Name, space 0 (memory), then a constant of eight bytes.
        let region = *b"PCST\x00\x0e";
        let at = (dsdt..dsdt + u64::from(bytes))
            .find(|at| (*at..).zip(region).all(|(at, byte)| read::<u8>(at) == byte))?;
        let address: u64 = unaligned(at + region.len() as u64);
        let registers = map_high(address);
        write(registers + SEGMENT, u32::from(segment));
        Some(Controller { registers, segment })
    }

    /// The slots that are named in this register.
    pub fn slots(&self, register: u64) -> impl Iterator<Item = Function> {
        let slots: u32 = read(self.registers + register);
        let segment = self.segment;
        (0..32)
            .filter(move |slot| slots & 1 << slot != 0)
            .map(move |slot| Function { segment, slot })
    }

    /// The status of a processor.
    pub fn processor_status(&self, processor: u32) -> u8 {
        let registers = self.registers + PROCESSORS;
        write(registers, processor);
        read(registers + PROCESSOR_STATUS)
    }

    /// Releases a processor whose removal is requested, and takes note of one that was added.
    pub fn release_processor(&self, processor: u32) {
        let registers = self.registers + PROCESSORS;
        let status = self.processor_status(processor);
        if status & ADDED != 0 {
            write(registers + PROCESSOR_STATUS, ADDED);
        }
        if status & LEAVES != 0 {
            write(registers + PROCESSOR_STATUS, LEAVES);
            write(registers + PROCESSOR_STATUS, RELEASED);
        }
    }

    /// Waits until a slot is named in this register.
    fn wait(&self, register: u64) -> Function {
        loop {
            let slots: u32 = read(self.registers + register);
            if slots != 0 {
                let slot = slots.trailing_zeros() as u8;
                let segment = self.segment;
                return Function { segment, slot };
            }
        }
    }

    pub fn eject(&self, function: Function) {
        write(self.registers + EJECT, 1u32 << function.slot);
    }
}

fn unaligned<T: Copy>(address: u64) -> T {
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    let to = &raw mut value as u64;
    for at in 0..size_of::<T>() as u64 {
        write(to + at, read::<u8>(address + at));
    }
    // SAFETY: all its bytes have been written, and every type used here is a number.
    unsafe { value.assume_init() }
}

/// A disk and a balloon are added on a segment; the guest releases the balloon on request, and nothing else.
pub fn scenario(segment: u16, report: &mut Report) {
    let Some(controller) = Controller::find(segment) else {
        report.fail("hotplug_controller_found", format_args!("not in the DSDT"));
        return;
    };
    report.pass("hotplug_controller_found");
    disk_comes_and_stays(&controller, report);
    let Some(mut balloon) = balloon_comes(&controller, report) else {
        return;
    };
    balloon_is_kept_while_inflated(&mut balloon);
    balloon_goes(&controller, balloon, report);
}

fn disk_comes_and_stays(controller: &Controller, report: &mut Report) {
    let segment = controller.segment;
    let before = Function::all_of(segment).count();
    console::line(format_args!("READY disk"));
    let function = controller.wait(SLOTS_UP);
    report.check(
        "hotplug_disk_is_in_its_slot",
        Function::all_of(segment).count() == before + 1
            && function.device() == 0x1040 + DEVICE_BLOCK,
        format_args!("slot {} has {:#x}", function.slot, function.device()),
    );
    controller.eject(function);
    report.check(
        "hotplug_disk_ejected_unasked_stays",
        function.device() == 0x1040 + DEVICE_BLOCK,
        format_args!("slot {} has {:#x}", function.slot, function.device()),
    );
}

fn balloon_comes(controller: &Controller, report: &mut Report) -> Option<Balloon> {
    console::line(format_args!("READY balloon"));
    let function = controller.wait(SLOTS_UP);
    let balloon = (function.device() == 0x1040 + DEVICE_BALLOON)
        .then(|| Device::probe(function))
        .and_then(Balloon::start_on);
    let Some(mut balloon) = balloon else {
        report.fail(
            "hotplug_balloon_starts",
            format_args!("slot {} has {:#x}", function.slot, function.device()),
        );
        return None;
    };
    balloon.device.driver_ok();
    let mut frames = [0; BALLOON_FRAMES as usize];
    for (frame, number) in frames.iter_mut().zip(0..) {
        *frame = (DATA / 4096) as u32 + number;
        write(DATA + u64::from(number) * 4096, 0x5a5a_5a5au32);
    }
    let answer = balloon.move_frames(INFLATE, &frames);
    report.check(
        "hotplug_balloon_inflates",
        answer.is_some() && read::<u32>(DATA) == 0,
        format_args!("{answer:?}, {:#x} is left", read::<u32>(DATA)),
    );
    write(balloon.device.config + 4, BALLOON_FRAMES);
    Some(balloon)
}

fn balloon_is_kept_while_inflated(balloon: &mut Balloon) {
    console::line(format_args!("READY inflated"));
    while read::<u32>(balloon.device.config) != HOST_IS_DONE_FRAMES {}
    balloon.move_frames(DEFLATE, &[(DATA / 4096) as u32]);
    write(balloon.device.config + 4, 0u32);
    console::line(format_args!("READY deflated"));
}

fn balloon_goes(controller: &Controller, balloon: Balloon, report: &mut Report) {
    let function = controller.wait(SLOTS_DOWN);
    report.check(
        "hotplug_balloon_is_asked_to_go_and_still_there",
        function.slot == balloon.device.function.slot
            && function.device() == 0x1040 + DEVICE_BALLOON,
        format_args!("slot {} has {:#x}", function.slot, function.device()),
    );
    controller.eject(function);
    report.check(
        "hotplug_balloon_is_gone_at_once",
        function.vendor() == 0xffff && read::<u32>(balloon.device.common) == u32::MAX,
        format_args!("slot {} has {:#x}", function.slot, function.device()),
    );
    controller.eject(function);
}
