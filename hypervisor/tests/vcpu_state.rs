//! Saves a vCPU of this host's `/dev/kvm` in the middle of a program and continues it in another machine.
//!
//! The tests are skipped without a usable KVM.

mod guest;

use guest::{Guest, Page, kvm};
use hypervisor::{Kvm, Vcpu, VcpuState, VmExit};
use state::{Saved, StateError};

/// A machine with `page` and a vCPU in its reset state.
fn machine(kvm: &Kvm, page: Box<Page>) -> Guest {
    let vm = kvm.create_vm().expect("a machine");
    vm.enable_split_irqchip(24).expect("split irqchip");
    Guest::new(vm, page)
}

/// A vCPU at the start of `code` in real mode.
fn guest(kvm: &Kvm, code: &[u8]) -> Guest {
    let guest = machine(kvm, Page::with(code));
    let cpuid = kvm.supported_cpuid().expect("cpuid");
    guest.vcpu.set_cpuid(&cpuid).expect("cpuid");
    guest.start();
    guest
}

/// Counts from 1 on port 0x10, keeping the counter in a register and in memory.
const COUNTER: [u8; 15] = [
    0x31, 0xc0, // xor ax,ax
    0x40, // again: inc ax
    0xa3, 0x00, 0x18, // mov [0x1800],ax
    0xe6, 0x10, // out 0x10,al
    0x8b, 0x1e, 0x00, 0x18, // mov bx,[0x1800]
    0xeb, 0xf4, // jmp again
    0xf4, // hlt
];

fn expect_count(vcpu: &mut Vcpu, expected: u8) {
    match vcpu.run().expect("run") {
        VmExit::IoOut { port, data, .. } => assert_eq!((port, data), (0x10, &[expected][..])),
        other => panic!("{other:?}"),
    }
}

fn settle(vcpu: &mut Vcpu) {
    vcpu.set_immediate_exit(true);
    assert_eq!(vcpu.run().expect("run"), VmExit::Interrupted);
    vcpu.set_immediate_exit(false);
}

#[test]
fn vcpu_saved_in_mid_run_goes_on_in_another_machine_twice() {
    let Some(kvm) = kvm() else { return };
    let indices = kvm.msr_indices().expect("list");
    let mut guest = guest(&kvm, &COUNTER);
    for count in 1..=5 {
        expect_count(&mut guest.vcpu, count);
    }
    for count in 6..=7 {
        settle(&mut guest.vcpu);
        let state = guest.vcpu.state(&indices).expect("state");
        let text = serde_json::to_string(&Saved::of(&state)).expect("JSON");
        let page = guest.page;
        drop(guest.vcpu);
        let saved: Saved = serde_json::from_str(&text).expect("JSON");
        let read: VcpuState = saved.read().expect("the version just written");
        assert_eq!(read, state);
        guest = machine(&kvm, page);
        guest.vcpu.restore(&read).expect("restored");
        let again = guest.vcpu.state(&indices).expect("state");
        assert_eq!(comparable(&again), comparable(&state));
        expect_count(&mut guest.vcpu, count);
    }
}

const MSR_TSC: u32 = 0x10;

/// `state` without the fields that change with time.
fn comparable(state: &VcpuState) -> VcpuState {
    let mut state = state.clone();
    state.msrs.retain(|msr| msr.index != MSR_TSC);
    state
}

#[test]
fn time_stamp_counter_moves_by_its_frequency() {
    let Some(kvm) = kvm() else { return };
    let mut guest = guest(&kvm, &COUNTER);
    settle(&mut guest.vcpu);
    let state = guest.vcpu.state(&kvm.msr_indices().expect("list"));
    let mut state = state.expect("state");
    let tsc = |state: &VcpuState| {
        let mut msrs = state.msrs.iter();
        msrs.find(|msr| msr.index == MSR_TSC).expect("TSC").data
    };
    let before = tsc(&state);
    state.tsc_khz = Some(2_000_000);
    state.move_tsc(1_000_000_000);
    assert_eq!(tsc(&state), before.wrapping_add(2_000_000_000));
    assert_eq!(state.ns_until(before), Some(-1_000_000_000));
    state.move_tsc(-1_000_000_500);
    assert_eq!(tsc(&state), before.wrapping_sub(1000));
    state.tsc_khz = None;
    assert_eq!(state.ns_until(before), None);
    state.move_tsc(i64::MAX);
    assert_eq!(tsc(&state), before.wrapping_sub(1000));
}

/// The guest compares this counter with its clock, which is set from the same time.
#[test]
fn time_stamp_counter_goes_on_from_the_moment_at_which_the_time_is_asked_for() {
    const PASSED_NS: i64 = 5_000_000_000;
    let Some(kvm) = kvm() else { return };
    let mut first = guest(&kvm, &COUNTER);
    expect_count(&mut first.vcpu, 1);
    settle(&mut first.vcpu);
    let indices = kvm.msr_indices().expect("list");
    let state = first.vcpu.state(&indices).expect("saved");
    let Ok(khz) = first.vcpu.tsc_khz() else {
        test_skip::skip("KVM tells no frequency of the time stamp counter");
        return;
    };
    let mut later = state;
    later.set_tsc(0);
    let second = machine(&kvm, Page::with(&COUNTER));
    second.vcpu.restore(&later).expect("restored");
    let ticks = |ns: u128| u64::try_from(ns * u128::from(khz) / 1_000_000).expect("ticks");
    if second.vcpu.tsc().expect("read") > ticks(3_600_000_000_000) {
        test_skip::skip("this KVM does not set the time stamp counter");
        return;
    }
    let asked = std::cell::Cell::new(None);
    let restored = second.vcpu.restore_after(&later, &|| {
        asked.set(Some(std::time::Instant::now()));
        PASSED_NS
    });
    restored.expect("restored");
    let counted = second.vcpu.tsc().expect("read");
    let since = asked.get().expect("the time was asked for").elapsed();
    let passed = ticks(PASSED_NS.unsigned_abs().into());
    // Emulated counters and clocks differ by a little.
    let latest = passed + ticks(since.as_nanos()) * 2 + ticks(1_000_000);
    assert!(
        (passed..=latest).contains(&counted),
        "{passed} {counted} {latest}"
    );
}

#[test]
fn clock_of_the_machine_is_a_state() {
    let Some(kvm) = kvm() else { return };
    let vm = kvm.create_vm().expect("a machine");
    let clock: hypervisor::ClockState = vm.clock().expect("clock").into();
    let read: hypervisor::ClockState = Saved::of(&clock).read().expect("the version just written");
    assert_eq!(read, clock);
    let later = hypervisor::ClockState {
        clock_ns: clock.clock_ns + 1_000_000_000_000,
        ..clock
    };
    vm.set_clock(&later.into()).expect("set");
    let now: hypervisor::ClockState = vm.clock().expect("clock").into();
    assert!(now.clock_ns >= later.clock_ns);
}

#[test]
fn tile_data_of_amx_goes_on_in_another_machine() {
    const XTILEDATA: u32 = 18;
    const XSTATE_BV: usize = 512;
    let Some(kvm) = kvm() else { return };
    let has_tiles = |kvm: &Kvm| {
        let cpuid = kvm.supported_cpuid().expect("cpuid");
        let mut leaves = cpuid.as_slice().iter();
        leaves.any(|leaf| leaf.function == 7 && leaf.index == 0 && leaf.edx & 1 << 24 != 0)
    };
    if kvm.request_amx().is_err() || !has_tiles(&kvm) {
        return test_skip::skip("this host has no AMX for guests");
    }
    let indices = kvm.msr_indices().expect("list");
    let mut guest = guest(&kvm, &COUNTER);
    settle(&mut guest.vcpu);
    let mut state = guest.vcpu.state(&indices).expect("state");
    let mut leaves = state.cpuid.iter();
    let tiles = leaves.find(|leaf| leaf.function == 0xd && leaf.index == XTILEDATA);
    let (bytes, start) = tiles
        .map(|leaf| (leaf.eax as usize, leaf.ebx as usize))
        .expect("size");
    assert!(
        start + bytes > state.xsave.0.len(),
        "zeros at the end are left out"
    );
    state.xcrs[0].value |= 3 << 17 | 3;
    state.xsave.0.resize(start, 0);
    state
        .xsave
        .0
        .extend((0..bytes).map(|at| (at % 251 + 1) as u8));
    state.xsave.0[XSTATE_BV + 2] |= 1 << (XTILEDATA - 16);
    let mut moved = machine(&kvm, guest.page);
    drop(guest.vcpu);
    moved.vcpu.restore(&state).expect("restored");
    expect_count(&mut moved.vcpu, 1);
    settle(&mut moved.vcpu);
    let again = moved.vcpu.state(&indices).expect("state");
    assert_eq!(again.xsave.0[start..], state.xsave.0[start..]);

    state.xsave.0.resize(1 << 20, 0);
    let error = moved.vcpu.restore(&state).expect_err("too large");
    assert!(error.to_string().contains("xsave"), "{error}");
}

/// `wrmsr` of 1 to HV_X64_MSR_SCONTROL, then a count of 1, as `COUNTER` does.
const ENABLE_SYNIC: [u8; 21] = [
    0x66, 0xb9, 0x80, 0x00, 0x00, 0x40, // mov ecx,0x40000080
    0x66, 0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax,1
    0x66, 0x31, 0xd2, // xor edx,edx
    0x0f, 0x30, // wrmsr
    0xe6, 0x10, // out 0x10,al
    0xeb, 0xfc, // jmp to the out
];

#[test]
fn guest_enables_the_interrupt_controller_of_hyperv() {
    let Some(kvm) = kvm() else { return };
    if !kvm.supports_hyperv_synic() {
        return test_skip::skip("this KVM has no Hyper-V");
    }
    let mut guest = machine(&kvm, Page::with(&ENABLE_SYNIC));
    guest.vcpu.enable_hyperv_synic().expect("enabled");
    guest.vcpu.set_cpuid(&hyperv_cpuid(&kvm)).expect("cpuid");
    guest.start();
    assert_eq!(guest.vcpu.run().expect("run"), VmExit::Hyperv);
    expect_count(&mut guest.vcpu, 1);
}

/// KVM's CPUID behind the two leaves that tell KVM that the guest knows Hyper-V, and that it may use the controller.
fn hyperv_cpuid(kvm: &Kvm) -> hypervisor::bindings::CpuId {
    let mut leaves = kvm.supported_cpuid().expect("cpuid").as_slice().to_vec();
    leaves.retain(|leaf| !(0x4000_0000..0x4000_0100).contains(&leaf.function));
    for (function, eax) in [
        (0x4000_0001, u32::from_le_bytes(*b"Hv#1")),
        (0x4000_0003, 1 << 2),
    ] {
        leaves.push(hypervisor::bindings::kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        });
    }
    hypervisor::bindings::CpuId::from_entries(&leaves).expect("few leaves")
}

#[test]
fn interrupt_sources_and_timers_of_hyperv_go_on_in_another_machine() {
    const SINT2: u32 = 0x4000_0092;
    const STIMER3_COUNT: u32 = 0x4000_00b7;
    let Some(kvm) = kvm() else { return };
    if !kvm.supports_hyperv_synic() {
        return test_skip::skip("this KVM has no Hyper-V");
    }
    let mut indices = kvm.msr_indices().expect("list");
    indices.extend(hypervisor::HYPERV_MSRS);
    let mut page = Page::with(&COUNTER);
    let mut saved: Option<VcpuState> = None;
    for count in 1..=2 {
        let mut guest = machine(&kvm, page);
        guest.vcpu.enable_hyperv_synic().expect("enabled");
        if let Some(state) = &saved {
            guest.vcpu.restore(state).expect("restored");
        } else {
            guest
                .vcpu
                .set_cpuid(&kvm.supported_cpuid().expect("cpuid"))
                .expect("cpuid");
            guest.start();
        }
        expect_count(&mut guest.vcpu, count);
        settle(&mut guest.vcpu);
        let mut state = guest.vcpu.state(&indices).expect("state");
        let mut registers = state.msrs.iter_mut();
        for (index, data) in [(SINT2, 0x1_0033), (STIMER3_COUNT, 77)] {
            let register = registers.find(|msr| msr.index == index).expect("saved");
            assert_eq!(
                register.data == data,
                count == 2,
                "{index:#x}: {:#x}",
                register.data
            );
            register.data = data;
        }
        saved = Some(state);
        page = guest.page;
    }
}

#[test]
fn damaged_states_are_refused_by_name_or_run() {
    let Some(kvm) = kvm() else { return };
    let indices = kvm.msr_indices().expect("list");
    let mut guest = guest(&kvm, &COUNTER);
    expect_count(&mut guest.vcpu, 1);
    settle(&mut guest.vcpu);
    let mut state = guest.vcpu.state(&indices).expect("state");
    // Damaging one element of each list suffices, and restoring takes time.
    state.cpuid.truncate(2);
    state.msrs.truncate(2);
    let saved = Saved::of(&state);
    let vm = kvm.create_vm().expect("a machine");
    vm.enable_split_irqchip(24).expect("split irqchip");
    let vcpu = vm.create_vcpu(0).expect("a vCPU");
    let mut refused = 0;
    let count = state::testing::damage(&saved, |damaged| {
        let outcome = damaged
            .read::<VcpuState>()
            .and_then(|state| vcpu.restore(&state));
        if let Err(error) = outcome {
            refused += 1;
            assert!(error.to_string().contains("vcpu"), "{error}");
        }
    });
    assert!(count > 1000 && refused > count / 4, "{refused} of {count}");
}

#[test]
fn lengths_that_cannot_be_are_refused_by_field() {
    let Some(kvm) = kvm() else { return };
    let guest = guest(&kvm, &COUNTER);
    let state = guest
        .vcpu
        .state(&kvm.msr_indices().expect("list"))
        .expect("state");
    let refused = |change: fn(&mut VcpuState), field: &str| {
        let mut state = state.clone();
        change(&mut state);
        match guest.vcpu.restore(&state) {
            Err(StateError::Invalid { field: named, .. }) => assert_eq!(named, field),
            other => panic!("{field}: {other:?}"),
        }
    };
    refused(|state| state.xsave.0.truncate(4095), "xsave");
    refused(|state| state.lapic.0.push(0), "lapic");
    refused(|state| state.xcrs = vec![state.xcrs[0]; 17], "xcrs");
    refused(|state| state.cpuid = vec![state.cpuid[0]; 500], "cpuid");
    refused(|state| state.msrs = vec![state.msrs[0]; 5000], "msrs");
    refused(
        |state| state.nested = Some(state::Bytes(vec![0xff; 64])),
        "nested",
    );
}
