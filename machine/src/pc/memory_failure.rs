//! RAM that the host fails to provide.

use super::Pc;
use crate::memory::{MemoryFailure, MemoryFault};

impl Pc {
    /// Whether [`Pc::memory_failure`] must be called at [`crate::cpu::STALL_CHECK_INTERVAL`] while the machine runs.
    pub fn may_run_out_of_memory(&self) -> bool {
        self.memory.may_run_out() || self.faults.covers_devices()
    }

    /// The memory that the host has failed to provide since the last call. A vCPU that waits for it runs again after a
    /// pause and a resume.
    pub fn memory_failure(&mut self) -> Option<MemoryFailure> {
        let fault = self.faults.take().or_else(|| {
            let vcpu = self
                .may_run_out_of_memory()
                .then(|| self.vcpus.stalled())??;
            Some(MemoryFault::Vcpu { vcpu })
        })?;
        Some(self.faults.explain(fault, self.memory.zones()))
    }
}
