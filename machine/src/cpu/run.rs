//! The main loop of a vCPU thread.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use hypervisor::{SystemEvent, Vcpu, VmExit, kick};
use virtio_devices::Unpoisoned;

use super::core_scheduling::CoreCookies;
use super::counters::{ExitCounters, count};
use super::gate::Gate;
use super::thread_number::ThreadNumber;
use super::{ExceptionPath, GuestEvent, VmExitHandler};
use crate::threads::{MachineThread, MachineThreadStart};

/// Maximum number of exits served after a pause is requested, so that the instruction that caused the last exit
/// completes. An access that crosses a page needs two. A guest that repeats a port access endlessly is stopped in the
/// middle of it, which is harmless: the next run continues there.
const DRAIN_EXITS_MAX: u32 = 16;

/// The targets that vCPU threads call.
#[derive(Clone)]
pub struct VcpusContext {
    /// The buses.
    pub handler: Arc<dyn VmExitHandler>,
    /// Called with the event that ends the machine, on the vCPU's thread. Must not block.
    pub events: Arc<dyn Fn(GuestEvent) + Send + Sync>,
    /// Called first on every vCPU thread.
    pub thread_start: MachineThreadStart,
}

virtio_devices::debug_fields!(VcpusContext {});

/// One vCPU and the data it shares with other threads.
#[derive(Debug)]
pub(super) struct VcpuCell {
    pub(super) index: u32,
    pub(super) apic_id: u32,
    /// Locked by the vCPU's thread while it may be in the guest, otherwise by the control thread.
    vcpu: Mutex<Vcpu>,
    /// The guest has released the vCPU: its thread ends. Set before a kick.
    pub(super) leaves: AtomicBool,
    /// A non-maskable interrupt is requested. Set before a kick; the vCPU's thread delivers it.
    pub(super) nmi_requested: AtomicBool,
    pub(super) counters: Arc<ExitCounters>,
    pub(super) thread: ThreadNumber,
}

impl VcpuCell {
    pub(super) fn new(index: u32, apic_id: u32, vcpu: Vcpu) -> Self {
        Self {
            index,
            apic_id,
            vcpu: Mutex::new(vcpu),
            leaves: AtomicBool::new(false),
            nmi_requested: AtomicBool::new(false),
            counters: Arc::default(),
            thread: ThreadNumber::default(),
        }
    }

    /// Delivers a requested non-maskable interrupt.
    ///
    /// A vCPU that the guest has not started gets none: it could not handle the interrupt, and KVM would wake its
    /// thread endlessly.
    pub(super) fn deliver_nmi(&self, vcpu: &Vcpu) {
        if !self.nmi_requested.swap(false, Ordering::AcqRel) {
            return;
        }
        let delivered = vcpu.has_started().and_then(|started| match started {
            true => vcpu.nmi(),
            false => Ok(()),
        });
        if let Err(error) = delivered {
            log::error!("vCPU {}: {error}", self.index);
        }
    }

    /// The vCPU. If a thread panicked, the kernel's registers are still valid, so a poisoned lock does not prevent
    /// reading them.
    pub(super) fn lock(&self) -> MutexGuard<'_, Vcpu> {
        self.vcpu.lock().unpoisoned()
    }

    pub(super) fn thread_name(&self) -> String {
        format!("vcpu{}", self.index)
    }
}

/// The reason why the inner loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The gate closed, or the vCPU is removed.
    GateClosed,
    /// The vCPU will not run again.
    Over(GuestEvent),
}

/// Marks the thread as ended and, if it unwinds, as failed.
struct ThreadGuard<'a> {
    gate: &'a Gate,
    cores: &'a CoreCookies,
    context: &'a VcpusContext,
}

impl Drop for ThreadGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            (self.context.events)(GuestEvent::Failed);
        }
        self.cores.leave();
        self.gate.remove_thread();
    }
}

/// Body of the thread `vcpuN`.
pub(super) fn vcpu_thread(
    cell: &VcpuCell,
    gate: &Gate,
    context: &VcpusContext,
    cores: &CoreCookies,
) {
    let _guard = ThreadGuard {
        gate,
        cores,
        context,
    };
    (context.thread_start)(MachineThread::Vcpu);
    let _number = cell.thread.set();
    cores.take();
    while let Some(pass) = gate.enter(&cell.leaves) {
        let mut vcpu = cell.lock();
        let outcome = kick::with_kicks(&mut vcpu, |vcpu| run_guest(vcpu, cell, gate, context));
        drop(vcpu);
        if let Outcome::Over(event) = outcome {
            let changes = gate.changes();
            // Before the pass is returned: a thread that waits for the pause then finds every event reported.
            (context.events)(event);
            drop(pass);
            match event {
                GuestEvent::MemoryUnavailable { .. } => gate.wait_for_change(changes, &cell.leaves),
                _ => {
                    gate.wait_for_stop(&cell.leaves);
                    return;
                }
            }
        }
    }
}

/// Runs the guest until the gate closes or the vCPU is lost.
fn run_guest(vcpu: &mut Vcpu, cell: &VcpuCell, gate: &Gate, context: &VcpusContext) -> Outcome {
    let mut drained = 0;
    loop {
        // This order matters. A kick after the flag is cleared sets it again; before an earlier kick the gate was
        // already closed.
        vcpu.set_immediate_exit(false);
        cell.deliver_nmi(vcpu);
        let leaving = !gate.is_open() || cell.leaves.load(Ordering::SeqCst);
        if leaving {
            vcpu.set_immediate_exit(true);
            drained += 1;
        }
        let step = match vcpu.run() {
            Ok(VmExit::MemoryUnavailable) => {
                Step::Over(GuestEvent::MemoryUnavailable { vcpu: cell.index })
            }
            Ok(exit) => handle(exit, context.handler.as_ref(), &cell.counters),
            Err(error) => Step::Lost(error.to_string()),
        };
        match step {
            Step::Interrupted if leaving => return Outcome::GateClosed,
            Step::Interrupted | Step::GoOn if drained >= DRAIN_EXITS_MAX => {
                return Outcome::GateClosed;
            }
            Step::Interrupted | Step::GoOn => {}
            Step::TripleFault => {
                let event = caused_by_missing_ram(vcpu, cell, context).unwrap_or(GuestEvent::Reset);
                log_stop(vcpu, cell, event);
                return Outcome::Over(event);
            }
            Step::Over(event) => {
                log_stop(vcpu, cell, event);
                return Outcome::Over(event);
            }
            Step::Lost(reason) => {
                // Logged once: this vCPU never runs again.
                let rip = vcpu.regs().map_or(0, |regs| regs.rip);
                log::error!("vCPU {} stopped at {rip:#x}: {reason}", cell.index);
                let event =
                    caused_by_missing_ram(vcpu, cell, context).unwrap_or(GuestEvent::Failed);
                return Outcome::Over(event);
            }
        }
    }
}

/// After a triple fault, or an instruction that KVM could not emulate: without its cause in the host, the VM would only
/// repeat it, or end without a reason.
fn caused_by_missing_ram(
    vcpu: &Vcpu,
    cell: &VcpuCell,
    context: &VcpusContext,
) -> Option<GuestEvent> {
    let lacks_ram = ExceptionPath::of(vcpu).is_ok_and(|path| context.handler.lacks_ram(&path));
    lacks_ram.then_some(GuestEvent::MemoryUnavailable { vcpu: cell.index })
}

/// Logged once per boot or pause: a triple fault leaves no trace on the guest's console.
fn log_stop(vcpu: &Vcpu, cell: &VcpuCell, event: GuestEvent) {
    let rip = vcpu.regs().map_or(0, |regs| regs.rip);
    log::warn!("vCPU {} stops at {rip:#x}: {event:?}", cell.index);
}

/// The action after an exit.
enum Step {
    GoOn,
    Interrupted,
    TripleFault,
    Over(GuestEvent),
    /// KVM failed; the text gives the reason.
    Lost(String),
}

fn handle(exit: VmExit<'_>, handler: &dyn VmExitHandler, counters: &ExitCounters) -> Step {
    match exit {
        VmExit::IoIn { port, size, data } => {
            count(&counters.pio_in);
            for access in data.chunks_mut(usize::from(size)) {
                handler.pio_read(port, access);
            }
        }
        VmExit::IoOut { port, size, data } => {
            count(&counters.pio_out);
            for access in data.chunks(usize::from(size)) {
                handler.pio_write(port, access);
            }
        }
        VmExit::MmioRead { address, data } => {
            count(&counters.mmio_read);
            handler.mmio_read(address, data);
        }
        VmExit::MmioWrite { address, data } => {
            count(&counters.mmio_write);
            handler.mmio_write(address, data);
        }
        VmExit::IoapicEoi(vector) => {
            count(&counters.ioapic_eoi);
            handler.ioapic_eoi(vector);
        }
        VmExit::Hyperv => {}
        VmExit::Interrupted => {
            count(&counters.interrupted);
            return Step::Interrupted;
        }
        VmExit::Shutdown => return Step::TripleFault,
        VmExit::SystemEvent(SystemEvent::Reset) => return Step::Over(GuestEvent::Reset),
        VmExit::SystemEvent(SystemEvent::Shutdown) => return Step::Over(GuestEvent::Shutdown),
        other @ (VmExit::SystemEvent(_)
        | VmExit::Hlt
        | VmExit::InternalError { .. }
        | VmExit::FailEntry { .. }
        | VmExit::MemoryFault { .. }
        | VmExit::MemoryUnavailable
        | VmExit::Unknown(_)) => return Step::Lost(format!("{other:x?}")),
    }
    Step::GoOn
}
