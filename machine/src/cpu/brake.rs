//! Slows a guest down: keeps its vCPUs from running for a part of the time.
//!
//! This is not a pause: the guest's clock and the devices continue.

use std::sync::Arc;

use super::Vcpus;
use super::gate::Gate;
use super::run::VcpuCell;

/// Holds the vCPUs of one machine, from any thread. Dropping it releases them.
#[derive(Debug)]
pub struct VcpuBrake {
    gate: Arc<Gate>,
    cells: Vec<Arc<VcpuCell>>,
}

impl VcpuBrake {
    /// vCPUs leave the guest soon, and do not enter it again before [`VcpuBrake::release`]. Returns immediately.
    pub fn hold(&self) {
        self.gate.hold(true);
        self.cells.iter().for_each(|cell| cell.thread.kick());
    }

    /// Lets vCPUs run again, unless they are paused.
    pub fn release(&self) {
        self.gate.hold(false);
    }
}

impl Drop for VcpuBrake {
    fn drop(&mut self) {
        self.release();
    }
}

impl Vcpus {
    /// A brake for the present vCPUs. At most one may exist.
    pub fn brake(&self) -> VcpuBrake {
        VcpuBrake {
            gate: Arc::clone(&self.gate),
            cells: self.cells.clone(),
        }
    }
}
