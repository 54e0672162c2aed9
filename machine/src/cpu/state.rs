//! The saved state of all vCPUs of a paused machine.

use ::state::{Part, Saved, State, StateError, parts, require};
use hypervisor::{ClockState, VcpuState};
use serde::{Deserialize, Serialize};

use super::CpuError;
use super::clock;
use super::gate::Wanted;
use super::vcpus::{Vcpus, vcpu_error};

const PART: Part = parts::VCPUS;

/// The vCPUs and the clock they share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpusState {
    /// A `ClockState`: the guest's clock when it was saved. The time stamp counters are of the same moment.
    pub clock: Saved,
    /// In the order of their index.
    pub vcpus: Vec<IndexedVcpuState>,
}

impl State for VcpusState {
    const PART: Part = PART;
}

/// One vCPU with its position in the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IndexedVcpuState {
    /// APIC id.
    pub apic_id: u32,
    /// A `VcpuState`.
    pub state: Saved,
}

impl Vcpus {
    /// The current state of these vCPUs, in this order. Each of them has been added.
    ///
    /// # Errors
    /// [`CpuError::NotPaused`], or KVM refused to read a part.
    pub fn state(&self, vcpus: &[u32]) -> Result<VcpusState, CpuError> {
        if !self.gate.is_paused() {
            return Err(CpuError::NotPaused);
        }
        let clock = clock::read(&self.vm).map_err(CpuError::Prepare)?;
        let cells = vcpus.iter().map(|vcpu| &self.cells[*vcpu as usize]);
        let vcpus = cells.map(|cell| {
            let vcpu = cell.lock();
            // An interrupt requested during the pause becomes part of the state.
            cell.deliver_nmi(&vcpu);
            let state = vcpu.state(&self.msr_indices);
            let mut state = state.map_err(vcpu_error(cell.index, "save"))?;
            // The counter advances during the pause.
            clock::read_tsc(&self.vm, &vcpu, &clock, &mut state)
                .map_err(vcpu_error(cell.index, "save"))?;
            Ok(IndexedVcpuState {
                apic_id: cell.apic_id,
                state: Saved::of(&state),
            })
        });
        Ok(VcpusState {
            clock: Saved::of(&clock),
            vcpus: vcpus.collect::<Result<_, CpuError>>()?,
        })
    }

    /// Replaces [`Vcpus::configure`] and [`Vcpus::start`]: sets the saved state and starts the threads. They are
    /// parked; [`Vcpus::resume`] lets them continue. For the guest, the time since the state was saved has passed: its
    /// clock and time stamp counters have advanced by it, and its watchdog knows that it did not run. Returns this time in
    /// nanoseconds.
    ///
    /// # Errors
    /// The state has another set of vCPUs, KVM rejects a register, or a thread cannot be started.
    pub fn restore(&mut self, state: &VcpusState) -> Result<u64, StateError> {
        let clock: ClockState = state.clock.read()?;
        let (saved, own) = (state.vcpus.len(), self.cells.len());
        require(saved == own, PART, "vcpus", || {
            format!("are {saved}, the machine has {own}")
        })?;
        let host = |error| StateError::host(PART, error);
        let mut first = None;
        for (cell, saved) in self.cells.iter().zip(&state.vcpus) {
            let (index, own) = (cell.index, cell.apic_id);
            require(saved.apic_id == own, PART, "vcpus", || {
                format!(
                    "has APIC id {} for vCPU {index}, which has {own}",
                    saved.apic_id
                )
            })?;
            let saved: VcpuState = saved.state.read()?;
            let vcpu = cell.lock();
            vcpu.restore_after(&saved, &|| clock::since(&clock))?;
            if self.kvmclock_ctrl {
                vcpu.kvmclock_ctrl().map_err(host)?;
            }
            first.get_or_insert(saved);
        }
        self.gate.set(Wanted::Paused);
        self.start_threads()
            .map_err(|error| StateError::host(PART, error))?;
        // Last, so that the time is that of the return.
        let passed_ns = match (&first, self.cells.first()) {
            (Some(first), Some(cell)) => clock::restore(&self.vm, &clock, &cell.lock(), first),
            _ => Ok(0),
        };
        passed_ns.map_err(host)
    }
}
