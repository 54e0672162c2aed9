//! Read-only access to a running machine for API threads.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock, RwLockWriteGuard};
use std::time::{Instant, SystemTime};

use api::{BalloonStatsResponse, DeviceNode, ReclaimStats, ReportingStatus, VmCounters};
use machine::memory::Zone;
use machine::pc::{FunctionView, PVPANIC_ID, Plugged};
use machine::pci::Bdf;
use machine::serial::Output;
use machine::threads::DeviceKind;
use serde_json::{Value, json};
use virtio_devices::Unpoisoned;
use virtio_devices::balloon::{BalloonHandle, StatsError};
use virtio_devices::mem::MemHandle;
use virtio_devices::pci::Bar;
use virtio_devices::reclaim::{ResidencyError, ResidencyProbe};

use super::reclaim_report::{self, ConfiguredRam};
use crate::own_memory;
use crate::reporting_policy::{GuestPolicy, requests};

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

/// The counter of output that is lost.
const DROPPED: &str = "tx_dropped_bytes";
/// The counter of clients of a console's socket that could not be accepted.
const REFUSED: &str = "connections_refused";

/// The parts that an observer reads; created once when the machine is built.
pub(super) struct Observed {
    pub(super) zones: Vec<Zone>,
    pub(super) residency: ResidencyProbe,
    pub(super) balloon: Option<BalloonHandle>,
    /// By the zone that grows.
    pub(super) mems: BTreeMap<String, MemHandle>,
    /// The part behind the queue of a console, or a device without a queue, by the device's identifier.
    pub(super) outputs: Vec<(String, Output)>,
}

impl Observed {
    fn ram(&self) -> ConfiguredRam<'_> {
        ConfiguredRam {
            zones: &self.zones,
            plugged_bytes: {
                let mems = self.mems.iter();
                mems.map(|(id, mem)| (id.as_str(), mem.plugged_bytes()))
                    .collect()
            },
            obtainable_bytes: self.mems.values().map(MemHandle::obtainable_bytes).sum(),
        }
    }
}

/// Data that is read without waiting for measurements; the lock is held for microseconds. Functions are dropped only
/// after they have been removed here.
#[derive(Default)]
struct Published {
    /// RAM except for what the guest plugs through virtio-mem.
    ram_bytes: u64,
    device_tree: BTreeMap<String, DeviceNode>,
    /// By the name of the node that has their BARs.
    functions: BTreeMap<String, FunctionView>,
    balloon: Option<BalloonHandle>,
    mems: BTreeMap<String, MemHandle>,
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
    /// `pvpanic`: where the device is that reports panics, and its function, if there is one.
    pub(super) fn new(
        observed: Observed,
        ram_bytes: u64,
        devices: &[Plugged],
        pvpanic: Option<&(Bdf, FunctionView)>,
    ) -> Self {
        let functions = devices.iter();
        let functions = functions.map(|it| (bar_node(it), it.view()));
        let others = pvpanic.map(|(_, view)| (PVPANIC_ID.to_owned(), view.clone()));
        Self(VmObserver {
            published: Arc::new(RwLock::new(Published {
                ram_bytes,
                device_tree: devices
                    .iter()
                    .flat_map(nodes)
                    .chain(pvpanic.map(|(bdf, _)| function_node(PVPANIC_ID, *bdf)))
                    .collect(),
                functions: functions.chain(others).collect(),
                balloon: observed.balloon.clone(),
                mems: observed.mems.clone(),
            })),
            observed: Arc::new(RwLock::new(Some(observed))),
        })
    }

    pub(super) fn handle(&self) -> VmObserver {
        self.0.clone()
    }

    /// Adds a new device. Waits for reads in progress, as dropping does.
    pub(super) fn add(&self, plugged: &Plugged, balloon: Option<BalloonHandle>) {
        {
            let mut published = self.0.write_published();
            published.device_tree.extend(nodes(plugged));
            let function = plugged.view();
            published.functions.insert(bar_node(plugged), function);
            if balloon.is_some() {
                published.balloon.clone_from(&balloon);
            }
        }
        if balloon.is_some() {
            self.change(|observed| observed.balloon = balloon);
        }
    }

    /// Adds RAM of the running guest.
    pub(super) fn add_zone(&self, zone: Zone) {
        self.0.write_published().ram_bytes += zone.bytes();
        self.change(|observed| observed.zones.push(zone));
    }

    /// Removes a device, which may be dropped then. Waits for reads in progress, as dropping does.
    pub(super) fn remove(&self, id: &str, is_balloon: bool) {
        if is_balloon {
            self.change(|observed| observed.balloon = None);
        }
        let mut published = self.0.write_published();
        published.functions.remove(id);
        let node = published.device_tree.remove(id);
        if let Some(parent) = node.and_then(|node| node.parent) {
            published.device_tree.remove(&parent);
            published.functions.remove(&parent);
        }
        if is_balloon {
            published.balloon = None;
        }
    }

    /// Returns when no thread looks at the functions of the machine any more. Called before they are dropped.
    pub(super) fn forget_functions(&self) {
        self.0.write_published().functions.clear();
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
        (published.balloon, published.mems) = (None, BTreeMap::new());
    }
}

impl VmObserver {
    /// Calls `read` on the machine, which cannot end during the call; `None` if it has ended.
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
        let plugged_bytes = published.mems.values().map(MemHandle::plugged_bytes);
        let ram_bytes = plugged_bytes.fold(published.ram_bytes, u64::saturating_add);
        ram_bytes.saturating_sub(ballooned_bytes)
    }

    fn counters(&self) -> VmCounters {
        let mut all = VmCounters::new();
        // The lock keeps the functions: this thread must not be the one that drops one.
        let published = self.published.read().unpoisoned();
        for (id, counters) in published
            .functions
            .values()
            .filter_map(FunctionView::counters)
        {
            let named = counters.into_iter();
            let named = named.map(|(name, value)| (name.to_owned(), value));
            all.entry(id).or_default().extend(named);
        }
        drop(published);
        self.look(|observed| {
            for (id, output) in &observed.outputs {
                let counters = all.entry(id.clone()).or_default();
                *counters.entry(DROPPED.to_owned()).or_default() += output.dropped_bytes();
                if let Some(refused) = output.connections_refused() {
                    counters.insert(REFUSED.to_owned(), refused);
                }
            }
        });
        all.retain(|_, counters| !counters.is_empty());
        all
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
        Ok(requests::status(
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
            let function = published.functions.get(id);
            let bars = function.map_or(Vec::new(), FunctionView::bars);
            node.resources = bars.iter().map(resource).collect();
        }
        tree
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::OnceLock;

    use machine::serial::{Endpoint, EndpointMode, SerialManager};
    use virtio_devices::pci::{DoorbellRegister, PciFunction};
    use virtio_devices::{Counters, GuestRam};
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;

    /// A function that is looked at only while it cannot be dropped.
    #[derive(Default)]
    struct Function(OnceLock<Arc<RwLock<Published>>>);

    impl Function {
        fn assert_kept(&self) {
            assert!(self.0.get().unwrap().try_write().is_err());
        }
    }

    impl PciFunction for Function {
        fn id(&self) -> &str {
            PVPANIC_ID
        }

        fn bars(&self) -> Vec<Bar> {
            self.assert_kept();
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

        fn counters(&self) -> Counters {
            self.assert_kept();
            Counters::from([("resets", 1)])
        }

        fn with_doorbells(&self, _visit: &mut dyn FnMut(DoorbellRegister<'_>)) {}

        fn resume(&self) {}

        fn reset(&self) {}
    }

    /// The observer of a machine with one function.
    fn observer(function: &Arc<Function>) -> OwnObserver {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let manager = SerialManager::new(Arc::new(|_| {})).unwrap();
        let endpoint = Endpoint::open(&EndpointMode::Null, &manager).unwrap();
        let observed = Observed {
            zones: Vec::new(),
            residency: ResidencyProbe::new(GuestRam::new(ram)).unwrap(),
            balloon: None,
            mems: BTreeMap::new(),
            outputs: vec![("__serial".to_owned(), endpoint.output())],
        };
        let weak = Arc::downgrade(function);
        let place = Bdf {
            segment: 0,
            slot: 1,
        };
        let view = (place, FunctionView::new(weak));
        let own = OwnObserver::new(observed, 1 << 20, &[], Some(&view));
        let published = Arc::clone(&own.0.published);
        function.0.set(published).ok().unwrap();
        own
    }

    #[test]
    fn observer_of_a_machine_that_went_holds_nothing_of_it() {
        let function = Arc::default();
        let own = observer(&function);
        let handle = own.handle();
        assert_eq!(handle.counters()["__serial"][DROPPED], 0);
        assert!(handle.reclaim_stats().is_ok());
        assert_eq!(handle.balloon_figures().unwrap().configured_bytes, 0);
        own.forget_functions();

        drop(own);

        assert!(handle.counters().is_empty());
        assert!(matches!(
            handle.reclaim_stats(),
            Err(BalloonStatsError::MachineGone)
        ));
        assert!(handle.balloon_figures().is_err());
        assert_eq!(handle.memory_actual_size_bytes(), 1 << 20);
    }

    #[test]
    fn reader_of_functions_never_drops_one() {
        let function = Arc::default();
        let own = observer(&function);
        let handle = own.handle();
        let resources = || handle.device_tree()[PVPANIC_ID].resources.len();
        assert_eq!(resources(), 1);
        assert_eq!(handle.counters()[PVPANIC_ID]["resets"], 1);

        own.forget_functions();

        assert_eq!(resources(), 0);
        assert!(!handle.counters().contains_key(PVPANIC_ID));
        assert_eq!(Arc::strong_count(&function), 1);
    }
}
