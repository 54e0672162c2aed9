//! Fuzz target: arbitrary accesses to the devices at fixed addresses: serial port, I/O APIC, clock, timers and ACPI
//! controllers.
#![no_main]

use libfuzzer_sys::fuzz_target;
use machine::fuzz::legacy::run;

fuzz_target!(|bytes: &[u8]| {
    let _seen = run(bytes);
});
