//! All vCPUs of a machine: creation, set-up, start, pause and stop.

use std::collections::BTreeMap;
use std::mem;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use api::config::CpusConfig;
use hypervisor::bindings::CpuId;
use hypervisor::{Kvm, Vm, kick};
use virtio_devices::worker::{HOST_CPUS_MAX, pin};

use super::core_scheduling::CoreCookies;
use super::cpuid::{CpuidOptions, GuestCpuid, msr_indices, supported_cpuid};
use super::gate::{Gate, Wanted};
use super::run::{VcpuCell, VcpusContext, vcpu_thread};
use super::stall::{StallClock, StallWatch};
use super::{CpuError, ExitCounters, Topology, registers};
use crate::boot::EntryPoint;
use crate::memory::layout::{KVM_IDENTITY_MAP_START, KVM_TSS_START};

/// Maximum time for vCPU threads to leave the guest. A handler that takes longer is defective.
const STAND_STILL_DEADLINE: Duration = Duration::from_secs(5);
/// The highest APIC id without the extension. 255 is the broadcast id.
const APIC_ID_MAX: u32 = 254;
/// The highest APIC id with the extension: an MSI has space for bits 0–14.
const APIC_ID_MAX_EXTENDED: u32 = (1 << 15) - 1;

/// The vCPUs of one machine. Used only by the control thread; dropping stops them.
#[derive(Debug)]
pub struct Vcpus {
    pub(super) vm: Arc<Vm>,
    config: CpusConfig,
    topology: Topology,
    cpuid: GuestCpuid,
    pub(super) cells: Vec<Arc<VcpuCell>>,
    pub(super) gate: Arc<Gate>,
    /// By the index of the vCPU; none for a vCPU that the guest has ejected.
    threads: BTreeMap<u32, JoinHandle<()>>,
    context: VcpusContext,
    cores: Arc<CoreCookies>,
    pub(super) kvmclock_ctrl: bool,
    /// Host-dependent parts of a vCPU's state.
    pub(super) msr_indices: Vec<u32>,
    /// By the index of the vCPU, if memory may run out.
    stall_watches: Vec<(u32, StallWatch)>,
    stall_clock: StallClock,
}

impl Vcpus {
    /// Checks everything that does not depend on the host.
    ///
    /// # Errors
    /// Invalid numbers, or a setting that is not supported.
    pub fn check(config: &CpusConfig) -> Result<Topology, CpuError> {
        check_affinity(config)?;
        Topology::new(config)
    }

    /// Checks everything that can be checked without creating anything.
    ///
    /// # Errors
    /// As [`Vcpus::check`], or KVM does not support that many vCPUs.
    pub fn validate(kvm: &Kvm, config: &CpusConfig) -> Result<Topology, CpuError> {
        let limit = kvm.max_vcpus();
        let (boot, max) = (config.boot_vcpus, config.max_vcpus);
        if boot == 0 || boot > max || max as usize > limit {
            return Err(CpuError::VcpuCount { boot, max, limit });
        }
        let topology = Self::check(config)?;
        let apic_id = topology.apic_id(max - 1);
        let limit = if kvm.supports_x2apic_api() {
            APIC_ID_MAX_EXTENDED
        } else {
            APIC_ID_MAX
        };
        if apic_id > limit {
            return Err(CpuError::ApicId { apic_id, limit });
        }
        Ok(topology)
    }

    /// Creates the vCPUs that run at boot. `vm` must have its interrupt chip already.
    ///
    /// # Errors
    /// As [`Vcpus::validate`], or KVM refuses.
    pub fn new(
        kvm: &Kvm,
        vm: &Arc<Vm>,
        config: &CpusConfig,
        context: VcpusContext,
    ) -> Result<Self, CpuError> {
        let topology = Self::validate(kvm, config)?;
        let supported = supported_cpuid(kvm, config)?;
        kick::install_handler().map_err(CpuError::Prepare)?;
        prepare_vm(vm, topology.apic_id(config.max_vcpus - 1)).map_err(CpuError::Prepare)?;
        let cells = (0..config.boot_vcpus)
            .map(|index| create(vm, &topology, config, index))
            .collect::<Result<Vec<_>, CpuError>>()?;
        // A host whose counter is not stable reports no frequency, so the guest gets none either.
        let tsc_khz = cells[0].lock().tsc_khz().ok();
        let options = CpuidOptions::of(config, topology, &supported, tsc_khz);
        let mut vcpus = Self {
            vm: Arc::clone(vm),
            config: config.clone(),
            topology,
            cpuid: GuestCpuid::new(supported.as_slice(), &options),
            cells,
            gate: Arc::new(Gate::new()),
            threads: BTreeMap::new(),
            context,
            cores: Arc::new(CoreCookies::new(config.core_scheduling)?),
            kvmclock_ctrl: kvm.supports_kvmclock_ctrl(),
            msr_indices: msr_indices(kvm, config)?,
            stall_watches: Vec::new(),
            stall_clock: StallClock::default(),
        };
        for vcpu in 0..config.boot_vcpus {
            vcpus.watch(vcpu);
        }
        Ok(vcpus)
    }

    /// Before the vCPU runs for the first time. Memory that the host may fail to provide can be added later.
    fn watch(&mut self, vcpu: u32) {
        if let Some(stats) = self.cells[vcpu as usize].lock().fault_stats() {
            self.stall_watches.push((vcpu, StallWatch::new(stats)));
        }
    }

    /// A vCPU that waits endlessly for memory. To be called at [`super::STALL_CHECK_INTERVAL`] while the vCPUs run.
    pub fn stalled(&mut self) -> Option<u32> {
        if !self.stall_clock.is_due(Instant::now()) {
            return None;
        }
        let mut stalled = None;
        for (vcpu, watch) in &mut self.stall_watches {
            if watch.is_stalled() {
                stalled = stalled.or(Some(*vcpu));
            }
        }
        stalled
    }

    pub(super) fn config(&self) -> &CpusConfig {
        &self.config
    }

    /// The CPUID that KVM makes of what the first vCPU is offered, and the frequency of its time stamp counter. Both are
    /// visible only on a vCPU, which gets this CPUID.
    pub(super) fn provided_cpuid(&self) -> Result<(CpuId, Option<u32>), CpuError> {
        let cell = &self.cells[0];
        let offered = self.cpuid.of_vcpu(cell.apic_id)?;
        let vcpu = cell.lock();
        let cpuid = vcpu.set_cpuid(&offered).and_then(|()| vcpu.cpuid());
        let cpuid = cpuid.map_err(vcpu_error(cell.index, "examine"))?;
        Ok((cpuid, vcpu.tsc_khz().ok()))
    }

    /// The topology that the guest sees; the MADT lists the same APIC ids.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Exit counters of each vCPU; the caller may keep them.
    pub fn counters(&self) -> Vec<Arc<ExitCounters>> {
        self.cells
            .iter()
            .map(|cell| Arc::clone(&cell.counters))
            .collect()
    }

    /// Sets the initial state of all vCPUs; the first starts at `entry`.
    ///
    /// # Errors
    /// KVM rejected a register.
    pub fn configure(&self, entry: EntryPoint) -> Result<(), CpuError> {
        for cell in &self.cells {
            self.set_up(cell)?;
        }
        let first = &self.cells[0];
        registers::set_entry(&first.lock(), entry).map_err(vcpu_error(first.index, "set up"))
    }

    fn set_up(&self, cell: &VcpuCell) -> Result<(), CpuError> {
        let cpuid = self.cpuid.of_vcpu(cell.apic_id)?;
        let vcpu = cell.lock();
        vcpu.set_cpuid(&cpuid)
            .and_then(|()| registers::set_common(&vcpu))
            .map_err(vcpu_error(cell.index, "set up"))
    }

    /// Starts the threads and lets them run.
    ///
    /// # Errors
    /// A thread could not be started or pinned; all threads started so far are stopped again.
    pub fn start(&mut self) -> Result<(), CpuError> {
        let started = self.start_threads();
        if started.is_ok() {
            self.gate.set(Wanted::Running);
        } else if let Err(error) = self.stop() {
            log::error!("{error}");
        }
        started
    }

    pub(super) fn start_threads(&mut self) -> Result<(), CpuError> {
        for vcpu in 0..self.config.boot_vcpus {
            self.start_thread(vcpu)?;
        }
        Ok(())
    }

    /// Starts the thread of a vCPU that has none, and pins it. The thread passes the gate like all others.
    fn start_thread(&mut self, vcpu: u32) -> Result<(), CpuError> {
        let cell = &self.cells[vcpu as usize];
        cell.leaves.store(false, Ordering::SeqCst);
        cell.nmi_requested.store(false, Ordering::Release);
        self.gate.add_thread();
        let thread = thread::Builder::new().name(cell.thread_name()).spawn({
            let (cell, gate) = (Arc::clone(cell), Arc::clone(&self.gate));
            let (context, cores) = (self.context.clone(), Arc::clone(&self.cores));
            move || vcpu_thread(&cell, &gate, &context, &cores)
        });
        let thread = thread.map_err(|source| {
            self.gate.remove_thread();
            CpuError::Thread { vcpu, source }
        })?;
        let mut affinities = self.config.affinity.iter().flatten();
        let affinity = affinities.find(|affinity| affinity.vcpu == vcpu);
        let pinned = affinity.map_or(Ok(()), |affinity| pin(&thread, &affinity.host_cpus));
        self.threads.insert(vcpu, thread);
        pinned.map_err(|source| CpuError::Affinity { vcpu, source })
    }

    /// Adds these vCPUs to a started machine, paused or not. They wait for the guest to start them. All vCPUs with
    /// lower numbers must exist.
    ///
    /// # Errors
    /// KVM rejects a vCPU, or a thread cannot be started or pinned. None of the vCPUs is added then.
    pub fn add(&mut self, vcpus: Range<u32>) -> Result<(), CpuError> {
        for vcpu in vcpus.clone() {
            let added = self.add_one(vcpu);
            if added.is_err() {
                let begun: Vec<u32> = (vcpus.start..=vcpu).collect();
                self.remove(&begun)?;
            }
            added?;
        }
        Ok(())
    }

    fn add_one(&mut self, vcpu: u32) -> Result<(), CpuError> {
        // KVM cannot destroy a vCPU, so an ejected one still exists.
        if vcpu as usize == self.cells.len() {
            let cell = create(&self.vm, &self.topology, &self.config, vcpu)?;
            self.set_up(&cell)?;
            self.cells.push(cell);
            self.watch(vcpu);
        }
        self.start_thread(vcpu)
    }

    /// Ends the threads of vCPUs that the guest has released.
    ///
    /// # Errors
    /// [`CpuError::Stuck`]: threads that do not end are abandoned.
    pub fn remove(&mut self, vcpus: &[u32]) -> Result<(), CpuError> {
        let mut leaving = Vec::new();
        for vcpu in vcpus {
            if let Some(thread) = self.threads.remove(vcpu) {
                let cell = Arc::clone(&self.cells[*vcpu as usize]);
                cell.leaves.store(true, Ordering::SeqCst);
                kick::kick(&thread);
                leaving.push((cell, thread));
            }
        }
        self.gate.wake();
        let ended = self
            .gate
            .wait_ended(self.threads.len(), STAND_STILL_DEADLINE);
        for (cell, thread) in leaving {
            if ended.is_err() && !thread.is_finished() {
                continue;
            }
            join(thread);
            // The old register content must not run again if the vCPU is added again.
            cell.lock()
                .power_off()
                .map_err(vcpu_error(cell.index, "remove"))?;
        }
        ended.map_err(|stuck| stuck_error(stuck, STAND_STILL_DEADLINE))
    }

    /// Takes all vCPUs out of the guest. Its clock and time stamp counters advance. On an error the vCPUs continue to run.
    ///
    /// # Errors
    /// [`CpuError::Stuck`], or an error from KVM.
    pub fn pause(&mut self) -> Result<(), CpuError> {
        let paused = self.try_pause();
        if paused.is_err() {
            self.gate.set(Wanted::Running);
        }
        paused
    }

    fn try_pause(&self) -> Result<(), CpuError> {
        self.gate.set(Wanted::Paused);
        self.kick_all();
        self.gate
            .wait_parked(STAND_STILL_DEADLINE)
            .map_err(|stuck| stuck_error(stuck, STAND_STILL_DEADLINE))?;
        if self.kvmclock_ctrl {
            for cell in &self.cells {
                cell.lock()
                    .kvmclock_ctrl()
                    .map_err(vcpu_error(cell.index, "pause"))?;
            }
        }
        Ok(())
    }

    /// Lets the vCPUs continue. For the guest, the time of the pause has passed.
    pub fn resume(&mut self) {
        self.gate.set(Wanted::Running);
    }

    /// Requests a non-maskable interrupt on every vCPU that the guest has started, and returns immediately.
    pub fn nmi(&self) {
        for vcpu in self.threads.keys() {
            let cell = &self.cells[*vcpu as usize];
            cell.nmi_requested.store(true, Ordering::Release);
        }
        self.kick_all();
    }

    /// Ends all threads. Idempotent.
    ///
    /// # Errors
    /// [`CpuError::Stuck`]: threads that do not end are abandoned.
    pub fn stop(&mut self) -> Result<(), CpuError> {
        self.gate.set(Wanted::Stopping);
        self.kick_all();
        let ended = self.gate.wait_ended(0, STAND_STILL_DEADLINE);
        for thread in mem::take(&mut self.threads).into_values() {
            // A thread that is not stuck only has to return; joining a stuck one would block.
            if ended.is_ok() || thread.is_finished() {
                join(thread);
            }
        }
        ended.map_err(|stuck| stuck_error(stuck, STAND_STILL_DEADLINE))
    }

    fn kick_all(&self) {
        self.threads.values().for_each(kick::kick);
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            log::error!("{error}");
        }
    }
}

fn create(
    vm: &Vm,
    topology: &Topology,
    config: &CpusConfig,
    index: u32,
) -> Result<Arc<VcpuCell>, CpuError> {
    let apic_id = topology.apic_id(index);
    let vcpu = vm.create_vcpu(apic_id).and_then(|vcpu| {
        if config.kvm_hyperv {
            vcpu.enable_hyperv_synic()?;
        }
        Ok(vcpu)
    });
    let vcpu = vcpu.map_err(vcpu_error(index, "create"))?;
    Ok(Arc::new(VcpuCell::new(index, apic_id, vcpu)))
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        log::error!("A vCPU thread panicked");
    }
}

/// Real mode support pages, and extended APIC ids if the machine has some.
fn prepare_vm(vm: &Vm, apic_id_max: u32) -> hypervisor::Result<()> {
    // Both are below 4 GiB.
    vm.set_identity_map_address(KVM_IDENTITY_MAP_START as u32)?;
    vm.set_tss_address(KVM_TSS_START as u32)?;
    if apic_id_max > APIC_ID_MAX {
        vm.enable_x2apic_api()?;
    }
    Ok(())
}

fn check_affinity(config: &CpusConfig) -> Result<(), CpuError> {
    for affinity in config.affinity.iter().flatten() {
        let vcpu = affinity.vcpu;
        let bad_cpu = affinity.host_cpus.iter().find(|cpu| **cpu >= HOST_CPUS_MAX);
        if vcpu >= config.max_vcpus || affinity.host_cpus.is_empty() || bad_cpu.is_some() {
            return Err(CpuError::AffinityRange {
                vcpu,
                host_cpu: bad_cpu.or(affinity.host_cpus.first()).copied(),
            });
        }
    }
    Ok(())
}

pub(super) fn vcpu_error(vcpu: u32, what: &'static str) -> impl Fn(hypervisor::Error) -> CpuError {
    move |source| CpuError::Vcpu { vcpu, what, source }
}

fn stuck_error(stuck: usize, deadline: Duration) -> CpuError {
    CpuError::Stuck {
        stuck,
        deadline_ms: deadline.as_millis(),
    }
}
