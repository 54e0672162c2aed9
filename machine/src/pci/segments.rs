//! The PCI segments of a machine: one [`PciBus`] each, with its own configuration space and address windows.

use std::ops::Range;
use std::sync::Arc;

use ::state::{StateError, require};
use virtio_devices::pci::PciFunction;

use super::state::PART;
use super::{Bdf, DoorbellBackend, MemoryWindows, PciBus, PciBusState, PciError, Place, SlotState};
use crate::bus::Bus;

/// The maximum number of segments, as in upstream.
pub const SEGMENT_COUNT_MAX: u16 = 96;
/// The 32-bit window is divided into multiples of this, and the 64-bit window into multiples of [`GRANULE_64BIT`].
const GRANULE_32BIT: u64 = 4 << 10;
const GRANULE_64BIT: u64 = 4 << 30;

/// The share of a segment in each of the two windows, relative to the other segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentWeights {
    /// In the 32-bit window; not 0.
    pub mmio32: u32,
    /// In the 64-bit window; not 0.
    pub mmio64: u32,
}

impl Default for SegmentWeights {
    fn default() -> Self {
        Self {
            mmio32: 1,
            mmio64: 1,
        }
    }
}

/// All segments.
#[derive(Debug)]
pub struct PciSegments {
    buses: Vec<Arc<PciBus>>,
}

impl PciSegments {
    /// One segment for each item of `weights`, by which they share the two windows. BARs are mapped on `mmio`.
    ///
    /// # Errors
    /// A window is empty.
    pub fn new(
        weights: &[SegmentWeights],
        mmio: &Arc<Bus>,
        mmio32: &Range<u64>,
        mmio64: &Range<u64>,
        doorbells: &Arc<dyn DoorbellBackend>,
    ) -> Result<Self, PciError> {
        let weights32 = weights.iter().map(|it| it.mmio32);
        let weights64 = weights.iter().map(|it| it.mmio64);
        let windows32 = shares(mmio32, weights32, GRANULE_32BIT);
        let windows64 = shares(mmio64, weights64, GRANULE_64BIT);
        let buses = (0..).zip(windows32.zip(windows64));
        let buses = buses.map(|(segment, (mmio32, mmio64))| {
            let windows = MemoryWindows::new(mmio32, mmio64)?;
            let bus = PciBus::new(segment, mmio, windows, Arc::clone(doorbells));
            Ok(Arc::new(bus))
        });
        Ok(Self {
            buses: buses.collect::<Result<_, PciError>>()?,
        })
    }

    /// The bus of each segment, in order.
    pub fn buses(&self) -> &[Arc<PciBus>] {
        &self.buses
    }

    /// As [`PciBus::reserve`]; segments that do not exist are ignored.
    pub fn reserve(&self, places: impl IntoIterator<Item = Bdf>) {
        for place in places {
            if let Ok(bus) = self.bus(place.segment) {
                bus.reserve([place.slot]);
            }
        }
    }

    /// As [`PciBus::add`].
    ///
    /// # Errors
    /// As for [`PciBus::add`], or the segment does not exist.
    pub fn add(&self, function: Arc<dyn PciFunction>, place: Place) -> Result<Bdf, PciError> {
        let Place { segment, slot } = place;
        self.bus(segment)?.add(function, slot)
    }

    /// As [`PciBus::remove`].
    pub fn remove(&self, bdf: Bdf) -> Option<Arc<dyn PciFunction>> {
        self.bus(bdf.segment).ok()?.remove(bdf.slot)
    }

    /// Every function with its address.
    pub fn functions(&self) -> Vec<(Bdf, Arc<dyn PciFunction>)> {
        self.buses.iter().flat_map(|bus| bus.functions()).collect()
    }

    /// The functions and their slots. `config_address`: the address register of the two ports.
    pub fn state(&self, config_address: u32) -> PciBusState {
        PciBusState {
            config_address,
            segments: self.buses.iter().map(|bus| bus.state()).collect(),
        }
    }

    /// Restores which slots are reserved.
    ///
    /// # Errors
    /// The state has another number of segments.
    pub fn restore_reserved(&self, state: &PciBusState) -> Result<(), StateError> {
        let (own, saved) = (self.buses.len(), state.segments.len());
        require(own == saved, PART, "segments", || {
            format!("are {saved}, the configuration has {own}")
        })?;
        for (bus, saved) in self.buses.iter().zip(&state.segments) {
            bus.restore_reserved(saved.reserved);
        }
        Ok(())
    }

    /// As [`PciBus::add_restored`].
    ///
    /// # Errors
    /// As for [`PciBus::add_restored`], or the segment does not exist.
    pub fn add_restored(
        &self,
        function: Arc<dyn PciFunction>,
        segment: u16,
        state: &SlotState,
    ) -> Result<Bdf, StateError> {
        let bus = self.bus(segment).map_err(|_| {
            let reason = format!("has a function on segment {segment}, which does not exist");
            StateError::invalid(PART, "segments", reason)
        })?;
        bus.add_restored(function, state)
    }

    /// The bus of a segment.
    ///
    /// # Errors
    /// The segment does not exist.
    pub fn bus(&self, segment: u16) -> Result<&Arc<PciBus>, PciError> {
        let bus = self.buses.get(usize::from(segment));
        bus.ok_or(PciError::NoSuchSegment {
            segment,
            count: self.buses.len(),
        })
    }
}

/// Parts of `window` in proportion to their weights. Each is its weight times a unit: a multiple of `granule`, or of the
/// largest smaller power of two that leaves none empty. The last part also gets the remainder.
fn shares(
    window: &Range<u64>,
    weights: impl ExactSizeIterator<Item = u32> + Clone,
    mut granule: u64,
) -> impl Iterator<Item = Range<u64>> {
    let (mut start, end) = (window.start, window.end);
    let sum: u64 = weights.clone().map(u64::from).sum();
    let most = (end - start) / sum.max(1);
    while granule > most && granule > 1 {
        granule /= 2;
    }
    let unit = most - most % granule;
    let last = weights.len().saturating_sub(1);
    weights.enumerate().map(move |(number, weight)| {
        let share = start..start + unit * u64::from(weight);
        start = share.end;
        share.start..if number == last { end } else { share.end }
    })
}

#[cfg(test)]
mod tests {
    use super::super::fake::{BAR_BYTES, FakeDoorbells, FakeFunction};
    use super::*;

    const MMIO32: Range<u64> = 0xc000_0000..0xe800_0000;
    const MMIO64: Range<u64> = 0x1_0000_0000..0x40_0000_0000;

    fn segments(count: usize) -> PciSegments {
        let doorbells: Arc<dyn DoorbellBackend> = Arc::new(FakeDoorbells::default());
        let weights = vec![SegmentWeights::default(); count];
        PciSegments::new(
            &weights,
            &Arc::new(Bus::new()),
            &MMIO32,
            &MMIO64,
            &doorbells,
        )
        .unwrap()
    }

    fn function(id: &str) -> Arc<FakeFunction> {
        Arc::new(FakeFunction::new(id))
    }

    #[test]
    fn windows_are_shared_without_a_gap_or_an_overlap() {
        let equal = |count| vec![1; count];
        for weights in [
            equal(1),
            equal(2),
            equal(3),
            equal(63),
            equal(SEGMENT_COUNT_MAX.into()),
            vec![3, 1, 2],
            vec![u32::from(u16::MAX); SEGMENT_COUNT_MAX.into()],
            [vec![1; 95], vec![u16::MAX.into()]].concat(),
        ] {
            for (window, granule) in [(&MMIO32, GRANULE_32BIT), (&MMIO64, GRANULE_64BIT)] {
                let parts: Vec<_> = shares(window, weights.iter().copied(), granule).collect();
                assert_eq!(parts.len(), weights.len());
                assert_eq!(parts[0].start, window.start);
                assert_eq!(parts.last().unwrap().end, window.end);
                assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
                assert!(parts.iter().all(|part| !part.is_empty()));
            }
        }
        let of = |window, weights: &[u32]| -> Vec<_> {
            shares(window, weights.iter().copied(), GRANULE_64BIT).collect()
        };
        assert_eq!(of(&MMIO64, &[1, 1])[0], 0x1_0000_0000..0x20_0000_0000);
        // 63 granules of 4 GiB: 15 for each unit of weight.
        let parts = of(&MMIO64, &[1, 3]);
        assert_eq!(parts[0], 0x1_0000_0000..0x10_0000_0000);
        assert_eq!(parts[1], 0x10_0000_0000..0x40_0000_0000);
        // The window has less than 4 GiB for each of 96 segments.
        let narrow = of(&(0..1 << 30), &[1; 96]);
        assert_eq!(narrow[1], 8 << 20..16 << 20);
    }

    #[test]
    fn functions_are_on_the_segment_that_they_ask_for_with_bars_in_its_window() {
        let segments = segments(2);
        let bdf = |segment, slot| {
            let place = Place { segment, slot };
            segments.add(function("_f"), place).unwrap()
        };
        assert_eq!(bdf(0, None).to_string(), "0000:00:01.0");
        // Only segment 0 has a host bridge in slot 0.
        assert_eq!(bdf(1, None).to_string(), "0001:00:00.0");
        assert_eq!(bdf(1, Some(1)).to_string(), "0001:00:01.0");
        let far = function("_far");
        let far_bdf = segments
            .add(
                far.clone(),
                Place {
                    segment: 1,
                    slot: Some(31),
                },
            )
            .unwrap();
        let address = far.bars()[0].address;
        assert_eq!(
            address,
            segments.buses()[1].windows().mmio64.end - 3 * BAR_BYTES
        );
        assert!(matches!(
            segments.add(
                function("_f"),
                Place {
                    segment: 2,
                    slot: None
                }
            ),
            Err(PciError::NoSuchSegment {
                segment: 2,
                count: 2
            })
        ));
        assert_eq!(segments.functions().len(), 5);
        assert_eq!(segments.remove(far_bdf).unwrap().id(), "_far");
        assert!(segments.remove(far_bdf).is_none());
        // In that segment, slot 0 belongs to a function, so it can be removed as well.
        assert!(
            segments
                .remove(Bdf {
                    segment: 1,
                    slot: 0
                })
                .is_some()
        );
        assert!(
            segments
                .remove(Bdf {
                    segment: 0,
                    slot: 0
                })
                .is_none()
        );
        assert!(
            segments
                .remove(Bdf {
                    segment: 2,
                    slot: 1
                })
                .is_none()
        );
    }

    #[test]
    fn segment_is_full_with_32_functions() {
        let segments = segments(2);
        let second = Place {
            segment: 1,
            slot: None,
        };
        for _ in 0..32 {
            segments.add(function("_f"), second).unwrap();
        }
        assert!(matches!(
            segments.add(function("_f"), second),
            Err(PciError::BusFull {
                segment: 1,
                count: 32
            })
        ));
        segments.add(function("_f"), Place::default()).unwrap();
    }
}
