//! Requests that change sizes and rate limits.

use api::config::{HotplugMethod, MemoryConfig};
use api::{VmConfig, VmResize, VmResizeDisk, VmResizeZone, VmUpdateRateLimiter};
use machine::memory::DEFAULT_ZONE_ID;

use super::error::LifecycleError;
use super::lifecycle::Lifecycle;
use crate::config;
use crate::events::EventKind;
use crate::vm::VmError;

impl Lifecycle {
    /// `vm.resize`: changes the stored configuration, or the running machine.
    ///
    /// # Errors
    /// There is no VM, or a size is invalid; in this case nothing has changed.
    pub fn resize(&mut self, resize: VmResize) -> Result<(), LifecycleError> {
        let config = self.config.as_mut().ok_or(LifecycleError::VmNotCreated)?;
        let Some(machine) = &mut self.machine else {
            *config = resized(config, &resize, false)?;
            return Ok(());
        };
        (self.context.events)(&EventKind::Resizing.into());
        // A size with which the VM could not boot is rejected before anything changes.
        let wanted = resized(config, &resize, true)?;
        let vcpus = wanted.cpus.boot_vcpus;
        let has_other_vcpus = vcpus != config.cpus.boot_vcpus;
        if has_other_vcpus {
            machine.settle_vcpus().map_err(LifecycleError::Machine)?;
        }
        // First the step that the host's memory or the sizes that KVM accepts can make impossible.
        if wanted.memory.total_bytes() != config.memory.total_bytes() {
            match wanted.memory.hotplug_method {
                // The snapshot that is being written has a file for each device of memory.
                HotplugMethod::Acpi if self.live_snapshot.is_some() => {
                    return Err(LifecycleError::Saving);
                }
                HotplugMethod::Acpi => machine.grow_memory(wanted.memory.size),
                HotplugMethod::VirtioMem => {
                    let added = wanted.memory.hotplugged_size.unwrap_or(0);
                    machine.resize_memory(DEFAULT_ZONE_ID, added)
                }
            }
            .map_err(LifecycleError::Machine)?;
            // The requested size is stored immediately: the guest may take time to comply, and a reboot uses the new
            // size.
            config.memory = wanted.memory;
            // It does not have the new memory.
            self.recorder = None;
        }
        if has_other_vcpus {
            machine
                .resize_vcpus(vcpus)
                .map_err(LifecycleError::Machine)?;
            // As for memory.
            config.cpus.boot_vcpus = vcpus;
        }
        if let Some(bytes) = resize.desired_balloon {
            machine
                .resize_balloon(bytes)
                .map_err(LifecycleError::Machine)?;
            config.balloon = wanted.balloon;
        }
        (self.context.events)(&EventKind::Resized.into());
        Ok(())
    }

    /// `vm.resize-zone`: as [`Lifecycle::resize`], for one zone of RAM.
    ///
    /// # Errors
    /// There is no VM, no such zone, or the zone cannot have this size; in this case nothing has changed.
    pub fn resize_zone(&mut self, resize: &VmResizeZone) -> Result<(), LifecycleError> {
        let config = self.config.as_mut().ok_or(LifecycleError::VmNotCreated)?;
        let mut wanted = config.clone();
        let added = resize_zone(&mut wanted.memory, resize, self.machine.is_some())?;
        config::validate_sizes(&wanted).map_err(LifecycleError::ConfigValidation)?;
        if wanted.memory == config.memory {
            return Ok(());
        }
        if let Some(machine) = &self.machine {
            let resized = machine.resize_memory(&resize.id, added);
            resized.map_err(LifecycleError::Machine)?;
        }
        config.memory = wanted.memory;
        Ok(())
    }

    /// `vm.resize-disk`
    ///
    /// # Errors
    /// There is no running machine, no such disk, the disk cannot have this size, or it is released.
    pub fn resize_disk(&mut self, resize: &VmResizeDisk) -> Result<(), LifecycleError> {
        if self.config.is_none() {
            return Err(LifecycleError::VmNotCreated);
        }
        self.check_disks()?;
        self.on_machine(|machine| machine.resize_disk(&resize.id, resize.desired_size))
    }

    /// `vm.update-rate-limiter`
    ///
    /// # Errors
    /// There is no VM, nothing of this name, or the limit is invalid; in this case nothing has changed.
    pub fn update_rate_limiter(
        &mut self,
        update: &VmUpdateRateLimiter,
    ) -> Result<(), LifecycleError> {
        let config = self.config.as_ref().ok_or(LifecycleError::VmNotCreated)?;
        let limit = update.rate_limiter_config;
        let wanted = config::with_rate_limit(config, &update.id, limit)
            .map_err(LifecycleError::RateLimiter)?;
        config::validate_rate_limits(&wanted).map_err(LifecycleError::ConfigValidation)?;
        if let Some(machine) = &self.machine {
            machine
                .set_rate_limit(&update.id, limit.as_ref())
                .map_err(LifecycleError::Machine)?;
        }
        self.config = Some(wanted);
        Ok(())
    }
}

/// The configuration with the requested sizes, with which the VM can boot.
fn resized(
    config: &VmConfig,
    resize: &VmResize,
    is_running: bool,
) -> Result<VmConfig, LifecycleError> {
    let mut wanted = config.clone();
    if let Some(desired) = resize.desired_vcpus {
        let max = config.cpus.max_vcpus;
        if !(1..=max).contains(&desired) {
            return Err(LifecycleError::VcpusOutOfRange { desired, max });
        }
        wanted.cpus.boot_vcpus = desired;
    }
    if let Some(desired) = resize.desired_ram
        && Some(desired) != config.memory.total_bytes()
    {
        wanted.memory = resized_memory(&config.memory, desired, is_running)?;
    }
    if let Some(bytes) = resize.desired_balloon {
        let missing = LifecycleError::Machine(VmError::MissingBalloon);
        wanted.balloon.as_mut().ok_or(missing)?.size = bytes;
    }
    config::validate_sizes(&wanted).map_err(LifecycleError::ConfigValidation)?;
    Ok(wanted)
}

/// The configuration of a guest that has `desired` bytes of RAM.
fn resized_memory(
    memory: &MemoryConfig,
    desired: u64,
    is_running: bool,
) -> Result<MemoryConfig, LifecycleError> {
    let has_zones = memory.zones.iter().flatten().next().is_some();
    let room = memory.room_bytes(HotplugMethod::VirtioMem);
    let mut resized = memory.clone();
    if room > 0 && !has_zones {
        let added = desired.checked_sub(memory.size);
        let added = added.filter(|added| *added <= room);
        let added = added.ok_or(LifecycleError::MemoryOutOfRange {
            desired,
            least: memory.size,
            most: memory.size.saturating_add(room),
        })?;
        resized.hotplugged_size = (added > 0).then_some(added);
    } else if !has_zones && (!is_running || memory.hotplug_method == HotplugMethod::Acpi) {
        // The size at boot. A running guest reaches a larger one by memory devices.
        resized.size = desired;
    } else {
        let current = memory.total_bytes().unwrap_or(memory.size);
        return Err(LifecycleError::MemoryHotplug { current, desired });
    }
    Ok(resized)
}

/// Gives a zone `desired_ram` bytes, and returns how many it plugs in.
fn resize_zone(
    memory: &mut MemoryConfig,
    resize: &VmResizeZone,
    is_running: bool,
) -> Result<u64, LifecycleError> {
    let method = memory.hotplug_method;
    let mut zones = memory.zones.iter_mut().flatten();
    let zone = zones.find(|zone| zone.id == resize.id);
    let zone = zone.ok_or_else(|| LifecycleError::NoSuchZone {
        id: resize.id.clone(),
    })?;
    let desired = resize.desired_ram;
    let room = zone.hotplug_size;
    let room = room.filter(|_| method == HotplugMethod::VirtioMem);
    let room = room.unwrap_or(0);
    if room == 0 && !is_running {
        zone.size = desired;
        return Ok(0);
    }
    let added = desired.checked_sub(zone.size);
    let added = added.filter(|added| *added <= room);
    let added = added.ok_or_else(|| LifecycleError::ZoneOutOfRange {
        id: resize.id.clone(),
        desired,
        least: zone.size,
        most: zone.size.saturating_add(room),
    })?;
    if zone.hotplugged_size.unwrap_or(0) != added {
        zone.hotplugged_size = (added > 0).then_some(added);
    }
    Ok(added)
}
