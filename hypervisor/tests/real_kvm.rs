//! Runs a few bytes of real mode code on this host's `/dev/kvm`.
//!
//! The tests are skipped without a usable KVM.

mod guest;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guest::{FilePage, Guest, Page, kvm};
use hypervisor::{Error, IoAddress, Kvm, MsiMessage, VmExit, kick};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

fn guest(code: &[u8]) -> Option<Guest> {
    let vm = kvm()?.create_vm().expect("a machine");
    let guest = Guest::new(vm, Page::with(code));
    guest.start();
    Some(guest)
}

#[test]
fn open_missing_device_is_told_apart() {
    let error = Kvm::open_at(Path::new("/nonexistent/kvm")).expect_err("no such device");
    assert!(matches!(error, Error::DeviceMissing { .. }), "{error:?}");
}

#[test]
fn open_other_device_is_told_apart() {
    let error = Kvm::open_at(Path::new("/dev/null")).expect_err("not KVM");
    assert!(matches!(error, Error::NotKvm { .. }), "{error:?}");
}

#[test]
fn run_port_access_carries_data_both_ways() {
    // mov al,0x5a; out 0x10,al; in al,0x11; out 0x12,al; hlt
    let code = [0xb0, 0x5a, 0xe6, 0x10, 0xe4, 0x11, 0xe6, 0x12, 0xf4];
    let Some(mut guest) = guest(&code) else {
        return;
    };
    assert_eq!(
        guest.vcpu.run().expect("run"),
        VmExit::IoOut {
            port: 0x10,
            size: 1,
            data: &[0x5a]
        }
    );
    match guest.vcpu.run().expect("run") {
        VmExit::IoIn {
            port: 0x11, data, ..
        } => data.fill(0xa5),
        other => panic!("{other:?}"),
    }
    guest.vcpu.set_immediate_exit(true);
    assert_eq!(guest.vcpu.run().expect("run"), VmExit::Interrupted);
    guest.vcpu.set_immediate_exit(false);
    assert_eq!(guest.vcpu.regs().expect("regs").rax & 0xff, 0xa5);
    assert_eq!(
        guest.vcpu.run().expect("run"),
        VmExit::IoOut {
            port: 0x12,
            size: 1,
            data: &[0xa5]
        }
    );
    assert_eq!(guest.vcpu.run().expect("run"), VmExit::Hlt);
}

#[test]
fn run_string_port_access_tells_the_size_of_one() {
    // mov si,0x1000; mov cx,3; mov dx,0x20; rep outsw; hlt
    let code = [
        0xbe, 0x00, 0x10, 0xb9, 0x03, 0x00, 0xba, 0x20, 0x00, 0xf3, 0x6f, 0xf4,
    ];
    let Some(mut guest) = guest(&code) else {
        return;
    };
    let mut bytes = Vec::new();
    loop {
        match guest.vcpu.run().expect("run") {
            VmExit::IoOut { port, size, data } => {
                assert_eq!((port, size), (0x20, 2));
                bytes.extend_from_slice(data);
            }
            VmExit::Hlt => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(bytes, code[..6]);
}

#[test]
fn run_access_without_memory_is_mmio() {
    // mov byte [0x3000],0x77; mov al,[0x3001]; hlt
    let code = [0xc6, 0x06, 0x00, 0x30, 0x77, 0xa0, 0x01, 0x30, 0xf4];
    let Some(mut guest) = guest(&code) else {
        return;
    };
    assert_eq!(
        guest.vcpu.run().expect("run"),
        VmExit::MmioWrite {
            address: 0x3000,
            data: &[0x77]
        }
    );
    match guest.vcpu.run().expect("run") {
        VmExit::MmioRead {
            address: 0x3001,
            data,
        } => data.fill(0x33),
        other => panic!("{other:?}"),
    }
    assert_eq!(guest.vcpu.run().expect("run"), VmExit::Hlt);
    assert_eq!(guest.vcpu.regs().expect("regs").rax & 0xff, 0x33);
}

#[test]
fn ioeventfd_write_rings_without_leaving_the_guest() {
    // mov byte [0x3000],1; hlt
    let Some(mut guest) = guest(&[0xc6, 0x06, 0x00, 0x30, 0x01, 0xf4]) else {
        return;
    };
    let event = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let address = IoAddress::Mmio(0x3000);
    guest
        .vm
        .register_ioeventfd(&event, address, None)
        .expect("registered");
    assert_eq!(guest.vcpu.run().expect("run"), VmExit::Hlt);
    assert_eq!(event.read().expect("rung"), 1);
    guest
        .vm
        .unregister_ioeventfd(&event, address, None)
        .expect("unregistered");
}

#[test]
fn kick_endless_guest_leaves_and_flag_is_seen() {
    // jmp $
    let Some(mut guest) = guest(&[0xeb, 0xfe]) else {
        return;
    };
    kick::install_handler().expect("handler");
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&stop);
    let thread = std::thread::spawn(move || {
        kick::with_kicks(&mut guest.vcpu, |vcpu| {
            loop {
                vcpu.set_immediate_exit(false);
                if seen.load(Ordering::SeqCst) {
                    break;
                }
                assert_eq!(vcpu.run().expect("run"), VmExit::Interrupted);
            }
        });
    });
    stop.store(true, Ordering::SeqCst);
    // One kick must suffice, whether the thread is before, in or after KVM_RUN. If the thread has not armed itself yet,
    // it finds the flag without a kick.
    kick::kick(&thread);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !thread.is_finished() {
        assert!(Instant::now() < deadline, "the vCPU never left the guest");
        std::thread::yield_now();
    }
    thread.join().expect("no panic");
}

/// The guest reads from a file that has no page there, as on a full file system.
#[test]
fn run_access_to_memory_that_the_host_lacks_is_told_and_can_be_repeated() {
    // mov al,[0x3000]; hlt
    let Some(mut guest) = guest(&[0xa0, 0x00, 0x30, 0xf4]) else {
        return;
    };
    let page = FilePage::new();
    page.attach(&guest.vm, 0x3000);
    for _ in 0..2 {
        match guest.vcpu.run().expect("run") {
            VmExit::MemoryUnavailable => {}
            // This KVM emulates every instruction; its emulator has no other exit for missing memory.
            VmExit::MmioRead {
                address: 0x3000, ..
            } => return,
            other => panic!("{other:?}"),
        }
    }
    page.file.write_all_at(&[0x5a; 4096], 0).expect("room");
    assert_eq!(guest.vcpu.run().expect("run"), VmExit::Hlt);
    assert_eq!(guest.vcpu.regs().expect("regs").rax & 0xff, 0x5a);
}

#[test]
fn split_irqchip_takes_routes_and_messages() {
    let Some(kvm) = kvm() else { return };
    let vm = kvm.create_vm().expect("a machine");
    vm.enable_split_irqchip(24).expect("split irqchip");
    let _vcpu = vm.create_vcpu(0).expect("a vCPU");
    let msi = MsiMessage {
        address: 0xfee0_0000,
        data: 0x30,
    };
    vm.set_gsi_routing(&[hypervisor::GsiRoute { gsi: 24, msi }])
        .expect("routes");
    let event = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    vm.register_irqfd(&event, 24).expect("irqfd");
    vm.unregister_irqfd(&event, 24).expect("irqfd");
    // The APIC is still software-disabled, so the message is blocked, not an error.
    vm.signal_msi(msi).expect("message");
    assert!(matches!(
        vm.set_gsi_routing(&vec![hypervisor::GsiRoute { gsi: 1, msi }; 5000]),
        Err(Error::TooManyRoutes { count: 5000 })
    ));
}
