//! Read-only access to a running machine for API threads.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, RwLock, RwLockWriteGuard};
use std::time::{Instant, SystemTime};

use api::{BalloonStatsResponse, DeviceNode, ReclaimStats, ReportingStatus, VmCounters};
use machine::memory::Zone;
use machine::pc::{BarView, PVPANIC_ID, Plugged};
use machine::pci::Bdf;
use machine::serial::Output;
use machine::threads::DeviceKind;
use serde_json::{Value, json};
use virtio_devices::Unpoisoned;
use virtio_devices::balloon::{BalloonHandle, StatsError};
use virtio_devices::mem::MemHandle;
use virtio_devices::pci::Bar;
use virtio_devices::reclaim::{ResidencyError, ResidencyProbe};
use virtio_devices::{Counters, VirtioDevice};

use super::reclaim_report::{self, ConfiguredRam};
use super::reporting;
use crate::own_memory;
use crate::reporting_policy::GuestPolicy;

/// Reasons why figures are unavailable.
#[derive(Debug, thiserror::Error)]
pub enum BalloonStatsError {
    /// The configuration has no balloon.
    #[error("Missing virtio-balloon, can't proceed as expected")]
    MissingBalloon,
    /// The guest sent no statistics.
    #[error("The guest has not sent its memory statistics")]
    NoAnswer(#[source] StatsError),
    /// The machine was shut down between request and response.
    #[error("VM is not running")]
    MachineGone,
    /// The page tables cannot be read.
    #[error("Cannot measure the residency of guest memory")]
    Residency(#[source] ResidencyError),
}

/// The source of one device's counters.
pub(super) enum CounterSource {
    Balloon(BalloonHandle),
    Device(Arc<Mutex<dyn VirtioDevice>>),
    /// A console, and what follows its queue.
    DeviceAndOutput(Arc<Mutex<dyn VirtioDevice>>, Output),
    /// A device without a queue.
    Output(Output),
}

/// The counter of output that is lost.
const DROPPED: &str = "tx_dropped_bytes";

impl CounterSource {
    fn read(&self) -> Counters {
        match self {
            Self::Balloon(balloon) => balloon.counters(),
            Self::Device(device) => device.lock().unpoisoned().counters(),
            Self::DeviceAndOutput(device, output) => {
                let mut counters = device.lock().unpoisoned().counters();
                *counters.entry(DROPPED).or_default() += output.dropped_bytes();
                counters
            }
            Self::Output(output) => Counters::from([(DROPPED, output.dropped_bytes())]),
        }
    }
}

/// The parts that an observer reads; created once when the machine is built.
pub(super) struct Observed {
    pub(super) zones: Vec<Zone>,
    pub(super) residency: ResidencyProbe,
    pub(super) balloon: Option<BalloonHandle>,
    pub(super) mem: Option<MemHandle>,
    pub(super) counters: Vec<(String, CounterSource)>,
}

impl Observed {
    fn ram(&self) -> ConfiguredRam<'_> {
        ConfiguredRam {
            zones: &self.zones,
            plugged_bytes: self.mem.as_ref().map_or(0, MemHandle::plugged_bytes),
            obtainable_bytes: self.mem.as_ref().map_or(0, MemHandle::obtainable_bytes),
        }
    }
}

/// Data that is read without waiting for measurements; the lock is held for microseconds. Functions are dropped only
/// after their BARs have been removed here.
#[derive(Default)]
struct Published {
    /// RAM except for what the guest plugs through virtio-mem.
    ram_bytes: u64,
    device_tree: BTreeMap<String, DeviceNode>,
    /// By the name of the node that has them.
    bars: BTreeMap<String, BarView>,
    balloon: Option<BalloonHandle>,
    mem: Option<MemHandle>,
}

fn function_id(id: &str) -> String {
    format!("_virtio-pci-{id}")
}

/// A BAR in upstream's form.
fn resource(bar: &Bar) -> Value {
    json!({"PciBar": {
        "index": bar.index,
        "base": bar.address,
        "size": bar.size_bytes,
        "type_": if bar.is_64bit { "Mmio64" } else { "Mmio32" },
        "prefetchable": false,
    }})
}

/// The node with the BARs of a device.
fn bar_node(plugged: &Plugged) -> String {
    match plugged.kind {
        DeviceKind::Assigned => plugged.id.clone(),
        _ => function_id(&plugged.id),
    }
}

/// A virtio device has two nodes, as in upstream: the PCI function and, below it, the device.
fn nodes(plugged: &Plugged) -> Vec<(String, DeviceNode)> {
    let id = &plugged.id;
    if plugged.kind == DeviceKind::Assigned {
        return vec![function_node(id, plugged.bdf)];
    }
    let function_id = function_id(id);
    let function = DeviceNode {
        id: function_id.clone(),
        children: vec![id.clone()],
        pci_bdf: Some(plugged.bdf.to_string()),
        ..DeviceNode::default()
    };
    let device = DeviceNode {
        id: id.clone(),
        parent: Some(function_id.clone()),
        pci_bdf: Some(plugged.bdf.to_string()),
        ..DeviceNode::default()
    };
    vec![(function_id, function), (id.clone(), device)]
}

/// A device that is a PCI function itself.
fn function_node(id: &str, bdf: Bdf) -> (String, DeviceNode) {
    let node = DeviceNode {
        id: id.to_owned(),
        pci_bdf: Some(bdf.to_string()),
        ..DeviceNode::default()
    };
    (node.id.clone(), node)
}

/// Read-only access to a machine from any thread; never waits for the control thread.
pub trait MachineObserver: std::fmt::Debug + Send + Sync {
    /// RAM at boot plus hot-plugged memory, minus the balloon's size as reported by the guest. O(1).
    fn memory_actual_size_bytes(&self) -> u64;

    /// Counters by device. Takes microseconds.
    fn counters(&self) -> VmCounters;

    /// A fresh statistics sample from the guest; waits for it until `deadline`.
    ///
    /// # Errors
    /// No balloon, or no response in time.
    fn balloon_stats(&self, deadline: Instant) -> Result<BalloonStatsResponse, BalloonStatsError>;

    /// Statistics of returned memory. Measures residency, which takes a few milliseconds.
    ///
    /// # Errors
    /// The page tables cannot be read.
    fn reclaim_stats(&self) -> Result<ReclaimStats, BalloonStatsError>;

    /// The figures of the balloon alone: those of residency are 0. Takes microseconds.
    ///
    /// # Errors
    /// The machine no longer exists.
    fn balloon_figures(&self) -> Result<ReclaimStats, BalloonStatsError>;

    /// The guest's status of the reporting policy. O(1), and never blocks.
    fn reporting_policy(&self) -> GuestPolicy;

    /// The state of reporting. Waits until `deadline` for a pause that was requested. If the guest has not confirmed it
    /// by then, its reports are completed without discarding.
    ///
    /// # Errors
    /// No balloon, or no machine.
    fn reporting(&self, deadline: Instant) -> Result<ReportingStatus, BalloonStatsError>;

    /// Devices by id with their PCI addresses.
    fn device_tree(&self) -> BTreeMap<String, DeviceNode>;
}

/// A handle on the figures of one machine. It is cheap to clone. After the machine has ended, it returns no figures.
///
/// The observed parts own guest RAM, image files and taps. A machine that ends releases all of them even if handles
/// remain, because the next machine may need the same files immediately.
#[derive(Clone)]
pub(super) struct VmObserver {
    published: Arc<RwLock<Published>>,
    observed: Arc<RwLock<Option<Observed>>>,
}

virtio_devices::debug_fields!(VmObserver {});

/// The machine's own handle, which releases everything when it is dropped.
#[derive(Debug)]
pub(super) struct OwnObserver(VmObserver);

impl OwnObserver {
    /// `pvpanic`: where the device is that reports panics, and its BARs, if there is one.
    pub(super) fn new(
        observed: Observed,
        ram_bytes: u64,
        devices: &[Plugged],
        pvpanic: Option<&(Bdf, BarView)>,
    ) -> Self {
        let functions = devices.iter();
        let functions = functions.map(|it| (bar_node(it), it.bar_view()));
        let others = pvpanic.map(|(_, bars)| (PVPANIC_ID.to_owned(), bars.clone()));
        Self(VmObserver {
            published: Arc::new(RwLock::new(Published {
                ram_bytes,
                device_tree: devices
                    .iter()
                    .flat_map(nodes)
                    .chain(pvpanic.map(|(bdf, _)| function_node(PVPANIC_ID, *bdf)))
                    .collect(),
                bars: functions.chain(others).collect(),
                balloon: observed.balloon.clone(),
                mem: observed.mem.clone(),
            })),
            observed: Arc::new(RwLock::new(Some(observed))),
        })
    }

    pub(super) fn handle(&self) -> VmObserver {
        self.0.clone()
    }

    /// Adds a new device. Waits for reads in progress, as dropping does.
    pub(super) fn add(
        &self,
        plugged: &Plugged,
        counters: Option<CounterSource>,
        balloon: Option<BalloonHandle>,
    ) {
        {
            let mut published = self.0.write_published();
            published.device_tree.extend(nodes(plugged));
            let bars = plugged.bar_view();
            published.bars.insert(bar_node(plugged), bars);
            if balloon.is_some() {
                published.balloon.clone_from(&balloon);
            }
        }
        self.change(|observed| {
            let counters = counters.map(|counters| (plugged.id.clone(), counters));
            observed.counters.extend(counters);
            if balloon.is_some() {
                observed.balloon = balloon;
            }
        });
    }

    /// Adds RAM of the running guest.
    pub(super) fn add_zone(&self, zone: Zone) {
        self.0.write_published().ram_bytes += zone.bytes();
        self.change(|observed| observed.zones.push(zone));
    }

    /// Removes and drops a device. Waits for reads in progress, as dropping does.
    pub(super) fn remove(&self, id: &str, is_balloon: bool) {
        let mut gone = Vec::new();
        self.change(|observed| {
            let (go, stay) = std::mem::take(&mut observed.counters)
                .into_iter()
                .partition(|(known, _)| known == id);
            (gone, observed.counters) = (go, stay);
            if is_balloon {
                observed.balloon = None;
            }
        });
        // Dropped without the lock, because closing a disk may take time.
        drop(gone);
        let mut published = self.0.write_published();
        published.bars.remove(id);
        let node = published.device_tree.remove(id);
        if let Some(parent) = node.and_then(|node| node.parent) {
            published.device_tree.remove(&parent);
            published.bars.remove(&parent);
        }
        if is_balloon {
            published.balloon = None;
        }
    }

    /// Returns when nobody looks at the functions of the machine any more. Called before they are dropped.
    pub(super) fn forget_bars(&self) {
        self.0.write_published().bars.clear();
    }

    fn change(&self, change: impl FnOnce(&mut Observed)) {
        let observed = self.0.observed.write();
        let mut observed = observed.unpoisoned();
        if let Some(observed) = &mut *observed {
            change(observed);
        }
    }
}

impl Drop for OwnObserver {
    /// Waits for reads in progress, the longest of which measures residency and takes milliseconds. None of them waits
    /// for the guest.
    fn drop(&mut self) {
        let mut observed = self.0.observed.write().unpoisoned();
        drop(observed.take());
        let mut published = self.0.write_published();
        (published.balloon, published.mem) = (None, None);
    }
}

impl VmObserver {
    /// Calls `read` on the machine, which cannot end meanwhile; `None` if it has ended.
    fn look<T>(&self, read: impl FnOnce(&Observed) -> T) -> Option<T> {
        let observed = self.observed.read().unpoisoned();
        observed.as_ref().map(read)
    }

    fn write_published(&self) -> RwLockWriteGuard<'_, Published> {
        self.published.write().unpoisoned()
    }
}

impl MachineObserver for VmObserver {
    fn memory_actual_size_bytes(&self) -> u64 {
        let published = self.published.read().unpoisoned();
        let balloon = published.balloon.as_ref();
        let ballooned_bytes = balloon.map_or(0, BalloonHandle::actual_bytes);
        let plugged_bytes = published.mem.as_ref().map_or(0, MemHandle::plugged_bytes);
        let ram_bytes = published.ram_bytes.saturating_add(plugged_bytes);
        ram_bytes.saturating_sub(ballooned_bytes)
    }

    fn counters(&self) -> VmCounters {
        self.look(|observed| {
            observed
                .counters
                .iter()
                .map(|(id, source)| (id.clone(), source.read()))
                .filter(|(_, counters)| !counters.is_empty())
                .map(|(id, counters)| {
                    let named = counters
                        .into_iter()
                        .map(|(name, value)| (name.to_owned(), value))
                        .collect();
                    (id, named)
                })
                .collect()
        })
        .unwrap_or_default()
    }

    fn balloon_stats(&self, deadline: Instant) -> Result<BalloonStatsResponse, BalloonStatsError> {
        // The lock is released before the wait for the guest.
        let balloon = self
            .look(|observed| observed.balloon.clone())
            .ok_or(BalloonStatsError::MachineGone)?
            .ok_or(BalloonStatsError::MissingBalloon)?;
        let sample = balloon
            .request_stats(deadline)
            .map_err(BalloonStatsError::NoAnswer)?;
        let age = sample.taken.elapsed();
        let since_epoch = SystemTime::now()
            .checked_sub(age)
            .and_then(|taken| taken.duration_since(SystemTime::UNIX_EPOCH).ok())
            .unwrap_or_default();
        Ok(BalloonStatsResponse {
            balloon_actual: balloon.actual_bytes(),
            last_update: reclaim_report::millis(since_epoch),
            age_ms: Some(reclaim_report::millis(age)),
            stats: sample.stats,
        })
    }

    fn reclaim_stats(&self) -> Result<ReclaimStats, BalloonStatsError> {
        self.look(|observed| {
            let residency = observed
                .residency
                .sample()
                .map_err(BalloonStatsError::Residency)?;
            let balloon = observed.balloon.as_ref().map(BalloonHandle::snapshot);
            let ram = observed.ram();
            // Without it, the other figures are still right.
            let own = own_memory::read(ram.is_without_files()).ok();
            Ok(reclaim_report::reclaim_stats(
                Some(&residency),
                own.as_ref(),
                &ram,
                balloon.as_ref(),
            ))
        })
        .unwrap_or(Err(BalloonStatsError::MachineGone))
    }

    fn balloon_figures(&self) -> Result<ReclaimStats, BalloonStatsError> {
        self.look(|observed| {
            let balloon = observed.balloon.as_ref().map(BalloonHandle::snapshot);
            reclaim_report::reclaim_stats(None, None, &observed.ram(), balloon.as_ref())
        })
        .ok_or(BalloonStatsError::MachineGone)
    }

    fn reporting_policy(&self) -> GuestPolicy {
        // If the lock is held, the machine is ending and counts as gone.
        let Ok(observed) = self.observed.try_read() else {
            return GuestPolicy::NoMachine;
        };
        match observed.as_ref().map(|observed| &observed.balloon) {
            None => GuestPolicy::NoMachine,
            Some(None) => GuestPolicy::NoBalloon,
            Some(Some(balloon)) => GuestPolicy::Balloon(balloon.reporting_policy()),
        }
    }

    fn reporting(&self, deadline: Instant) -> Result<ReportingStatus, BalloonStatsError> {
        // The lock is released before the wait for the guest.
        let balloon = self
            .look(|observed| observed.balloon.clone())
            .ok_or(BalloonStatsError::MachineGone)?
            .ok_or(BalloonStatsError::MissingBalloon)?;
        let pause = balloon.wait_for_pause(deadline);
        Ok(reporting::status(
            balloon.reporting(),
            pause,
            balloon.report_now_status(),
        ))
    }

    fn device_tree(&self) -> BTreeMap<String, DeviceNode> {
        let published = self.published.read().unpoisoned();
        let mut tree = published.device_tree.clone();
        for (id, node) in &mut tree {
            // The guest may have moved them. The lock keeps the function: this thread must not be the one that drops it.
            let bars = published.bars.get(id).map_or(Vec::new(), BarView::bars);
            node.resources = bars.iter().map(resource).collect();
        }
        tree
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use virtio_devices::pci::{DoorbellRegister, PciFunction};
    use virtio_devices::{GuestRam, QueueHandler};
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use state::{Saved, StateError};

    use super::*;

    struct Device;

    impl VirtioDevice for Device {
        fn device_type(&self) -> u32 {
            2
        }

        fn queue_sizes(&self) -> &[u16] {
            &[]
        }

        fn features(&self) -> u64 {
            0
        }

        fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

        fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
            Vec::new()
        }

        fn state(&self) -> Saved {
            unreachable!("the observer saves nothing")
        }

        fn restore(&mut self, _state: &Saved) -> Result<(), StateError> {
            unreachable!("the observer restores nothing")
        }

        fn counters(&self) -> Counters {
            Counters::from([("read_ops", 1)])
        }
    }

    #[test]
    fn observer_of_a_machine_that_went_holds_nothing_of_it() {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let device: Arc<Mutex<dyn VirtioDevice>> = Arc::new(Mutex::new(Device));
        let alive = Arc::downgrade(&device);
        let observed = Observed {
            zones: Vec::new(),
            residency: ResidencyProbe::new(GuestRam::new(ram)).unwrap(),
            balloon: None,
            mem: None,
            counters: vec![("_disk0".to_owned(), CounterSource::Device(device))],
        };
        let own = OwnObserver::new(observed, 1 << 20, &[], None);
        let handle = own.handle();
        assert_eq!(handle.counters()["_disk0"]["read_ops"], 1);
        assert!(handle.reclaim_stats().is_ok());
        assert_eq!(handle.balloon_figures().unwrap().configured_bytes, 0);

        drop(own);

        assert!(alive.upgrade().is_none());
        assert!(handle.counters().is_empty());
        assert!(matches!(
            handle.reclaim_stats(),
            Err(BalloonStatsError::MachineGone)
        ));
        assert!(handle.balloon_figures().is_err());
        assert_eq!(handle.memory_actual_size_bytes(), 1 << 20);
    }

    /// A function that is looked at only while it cannot be dropped.
    struct Function(std::sync::OnceLock<Arc<RwLock<Published>>>);

    impl PciFunction for Function {
        fn id(&self) -> &str {
            PVPANIC_ID
        }

        fn bars(&self) -> Vec<Bar> {
            assert!(self.0.get().unwrap().try_write().is_err());
            vec![Bar {
                index: 0,
                size_bytes: 4096,
                is_64bit: false,
                address: 0xe000_0000,
                decoded: true,
            }]
        }

        fn config_read(&self, _offset: u16, _data: &mut [u8]) {}

        fn config_write(&self, _offset: u16, _data: &[u8]) -> bool {
            false
        }

        fn set_bar_address(&self, _index: u8, _address: u64) {}

        fn bar_read(&self, _index: u8, _offset: u64, _data: &mut [u8]) {}

        fn bar_write(&self, _index: u8, _offset: u64, _data: &[u8]) {}

        fn with_doorbells(&self, _visit: &mut dyn FnMut(DoorbellRegister<'_>)) {}

        fn pause(&self) {}

        fn resume(&self) {}

        fn reset(&self) {}
    }

    #[test]
    fn reader_of_bars_never_drops_their_function() {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let observed = Observed {
            zones: Vec::new(),
            residency: ResidencyProbe::new(GuestRam::new(ram)).unwrap(),
            balloon: None,
            mem: None,
            counters: Vec::new(),
        };
        let function = Arc::new(Function(std::sync::OnceLock::new()));
        let weak = Arc::downgrade(&function);
        let place = Bdf {
            segment: 0,
            slot: 1,
        };
        let view = (place, BarView::new(weak));
        let own = OwnObserver::new(observed, 1 << 20, &[], Some(&view));
        let handle = own.handle();
        function.0.set(Arc::clone(&handle.published)).ok().unwrap();
        let resources = || handle.device_tree()[PVPANIC_ID].resources.len();
        assert_eq!(resources(), 1);

        own.forget_bars();

        assert_eq!(resources(), 0);
        assert_eq!(Arc::strong_count(&function), 1);
    }
}
