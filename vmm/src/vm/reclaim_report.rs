//! `vm.reclaim-stats` and `vm.balloon-stats`, from the balloon's figures and the page tables.
//!
//! The device's types are not wire types; only this file converts between them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use api::{
    GuestSample, HintingStatus, LastBatch, LatencyBucket, LatencySummary, ReclaimPath,
    ReclaimStats, ReportingStatus, ZoneReporting, ZoneResidency,
};
use virtio_devices::balloon::{
    BalloonSnapshot, FREE_BLOCK_BYTES_MAX, LatencyHistogram, PathFigures,
};
use virtio_devices::reclaim::{RegionResidency, ResidencySample};

use machine::memory::{Zone, ZoneKind};

use crate::own_memory::OwnMemory;
use crate::reporting_policy::requests;

/// RAM that the guest has.
pub(super) struct ConfiguredRam<'a> {
    pub(super) zones: &'a [Zone],
    /// The plugged part of each zone for memory hot-plug, by the zone that grows.
    pub(super) plugged_bytes: BTreeMap<&'a str, u64>,
    /// Memory that the guest can take beyond them.
    pub(super) obtainable_bytes: u64,
}

impl ConfiguredRam<'_> {
    fn bytes_of(&self, zone: &Zone) -> u64 {
        match zone.kind {
            ZoneKind::VirtioMem => {
                let plugged = self.plugged_bytes.get(zone.configured_id());
                plugged.copied().unwrap_or(0)
            }
            ZoneKind::Boot | ZoneKind::Dimm => zone.bytes(),
        }
    }

    /// Whether none of it is in a file with a name.
    pub(super) fn is_without_files(&self) -> bool {
        let mut zones = self.zones.iter();
        zones.all(|zone| !zone.backing.starts_with("file-"))
    }

    fn bytes(&self) -> u64 {
        self.zones.iter().map(|zone| self.bytes_of(zone)).sum()
    }
}

/// Assembles the response. Without a balloon, the response has only figures of residency; without a sample of
/// residency, it has none of those.
pub(super) fn reclaim_stats(
    residency: Option<&ResidencySample>,
    own: Option<&OwnMemory>,
    ram: &ConfiguredRam<'_>,
    balloon: Option<&BalloonSnapshot>,
) -> ReclaimStats {
    let mut stats = ReclaimStats {
        backing: backing_name(ram.zones).to_owned(),
        reporting: requests::missing(),
        obtainable_bytes: Some(ram.obtainable_bytes),
        ..ReclaimStats::default()
    };
    if let Some(residency) = residency {
        // Unplugged memory does not count, so this may be less than the mapped size.
        stats.configured_bytes = ram.bytes();
        stats.resident_bytes = residency.resident_bytes;
        stats.reclaimed_bytes = ram.bytes().saturating_sub(residency.resident_bytes);
        stats.swapped_bytes = Some(residency.swapped_bytes);
        stats.residency_method = residency.method.name().to_owned();
        stats.resident_sample_us = residency.cost_us;
        stats.resident_age_ms = millis(residency.taken.elapsed());
    }
    if let Some(own) = own {
        stats.charged_bytes = own.bytes;
        stats.charged_method = own.method.to_owned();
        stats.uncharged_bytes = ram.bytes().saturating_sub(own.bytes);
    }
    if let Some(balloon) = balloon {
        stats.ballooned_bytes = balloon.actual_bytes;
        stats.balloon_target_bytes = balloon.target_bytes;
        stats.report = path(&balloon.report);
        stats.inflate = path(&balloon.inflate);
        stats.hint = path(&balloon.hint);
        stats.hinting = HintingStatus {
            state: balloon.hinting.phase.name().to_owned(),
            command_id: balloon.hinting.command_id,
            runs_requested: balloon.hinting.runs_requested,
            runs_completed: balloon.hinting.runs_completed,
        };
        // Without a sample, it is unknown which memory is absent.
        if residency.is_some() {
            stats.repopulated_bytes = repopulated_bytes(&stats);
            stats.repopulated_method = "discarded-minus-absent".to_owned();
        }
        stats.inhibited = balloon.inhibited.map(|reason| reason.name().to_owned());
        stats.reporting = requests::status(balloon.reporting, balloon.pause, balloon.report_now);
        stats.guest = balloon.stats.as_ref().map(|sample| GuestSample {
            stats: sample.stats,
            reporting: (!sample.reporting.is_empty()).then_some(sample.reporting),
            age_ms: millis(sample.taken.elapsed()),
        });
    }
    if let Some(residency) = residency {
        stats.zones = ram
            .zones
            .iter()
            .map(|zone| zone_residency(zone, ram.bytes_of(zone), residency, &stats.reporting))
            .collect();
    }
    stats
}

fn backing_name(zones: &[Zone]) -> &'static str {
    let mut names = zones.iter().map(|zone| zone.backing);
    let first = names.next().unwrap_or_default();
    if names.all(|name| name == first) {
        first
    } else {
        "mixed"
    }
}

fn zone_residency(
    zone: &Zone,
    configured_bytes: u64,
    residency: &ResidencySample,
    reporting: &ReportingStatus,
) -> ZoneResidency {
    let regions = || {
        let all = residency.regions.iter();
        all.filter(|region| zone.holds(region.guest_start))
    };
    let sum = |bytes: fn(&RegionResidency) -> u64| regions().map(bytes).sum::<u64>();
    // A file may be larger than its zone.
    let resident_bytes = sum(|region| region.resident_bytes).min(zone.bytes());
    let too_large = zone.page_bytes > FREE_BLOCK_BYTES_MAX;
    ZoneResidency {
        id: zone.id.clone(),
        backing: zone.backing.to_owned(),
        page_bytes: zone.page_bytes,
        configured_bytes,
        resident_bytes,
        reclaimed_bytes: configured_bytes.saturating_sub(resident_bytes),
        swapped_bytes: sum(|region| region.swapped_bytes).min(zone.bytes()),
        reporting: if too_large {
            ZoneReporting {
                active: false,
                reason: Some(format!(
                    "inactive: its pages of {} bytes are larger than the blocks a guest reports, {FREE_BLOCK_BYTES_MAX} \
                     bytes at most",
                    zone.page_bytes
                )),
            }
        } else {
            ZoneReporting {
                active: reporting.active,
                reason: reporting.reason.clone(),
            }
        },
    }
}

/// Whole milliseconds of a duration that fits.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Memory that was discarded and is not present now. The field's documentation describes the limits of this figure.
fn repopulated_bytes(stats: &ReclaimStats) -> u64 {
    [&stats.report, &stats.inflate, &stats.hint]
        .into_iter()
        .fold(0_u64, |sum, path| sum.saturating_add(path.discarded_bytes))
        .saturating_sub(stats.reclaimed_bytes)
}

fn path(figures: &PathFigures) -> ReclaimPath {
    ReclaimPath {
        requested_bytes: figures.requested.bytes,
        requested_ranges: figures.requested.ranges,
        discarded_bytes: figures.discarded.bytes,
        discarded_partial_bytes: figures.partial_bytes,
        discarded_bytes_per_second: figures.rate.bytes_per_second(Instant::now()),
        discarded_ranges: figures.discarded.ranges,
        skipped_bytes: figures
            .skipped
            .iter()
            .filter(|(_, bytes)| *bytes > 0)
            .map(|(reason, bytes)| (reason.name().to_owned(), bytes))
            .collect(),
        failed_bytes: figures.failed.bytes,
        failed_ranges: figures.failed.ranges,
        batches: figures.batches,
        discard_syscalls: figures.syscalls,
        latency_us: latency(&figures.latency),
        last_batch: figures.last.map(|last| LastBatch {
            bytes: last.discarded.bytes,
            ranges: last.requested.ranges,
            latency_us: last.took_us,
            age_ms: millis(last.at.elapsed()),
        }),
    }
}

fn latency(histogram: &LatencyHistogram) -> LatencySummary {
    let buckets = histogram.buckets();
    LatencySummary {
        count: histogram.count(),
        p50: histogram.percentile_us(50),
        p99: histogram.percentile_us(99),
        max: histogram.max_us(),
        buckets: buckets
            .into_iter()
            .map(|bucket| LatencyBucket {
                le: bucket.le_us,
                count: bucket.count,
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zones_have_the_residency_of_their_regions() {
        let zone = |id: &str, ranges, page_bytes| Zone {
            id: id.to_owned(),
            ranges,
            backing: "hugetlb-shared",
            page_bytes,
            kind: ZoneKind::Boot,
        };
        let zones = [
            zone("a", vec![0..100, 1000..1100], 4096),
            zone("b", vec![1100..1200, 1200..1300], 1 << 30),
        ];
        let region = |guest_start, resident_bytes| RegionResidency {
            guest_start,
            bytes: 100,
            resident_bytes,
            swapped_bytes: 1,
        };
        let residency = ResidencySample {
            configured_bytes: 400,
            resident_bytes: 335,
            swapped_bytes: 4,
            taken: Instant::now(),
            cost_us: 1,
            method: virtio_devices::reclaim::ResidencyMethod::PagemapScan,
            // The last region belongs to a file that is larger than its zone.
            regions: [(0, 20), (1000, 15), (1100, 300), (1200, 0)]
                .map(|(start, resident)| region(start, resident))
                .into(),
        };
        let ram = ConfiguredRam {
            zones: &zones,
            plugged_bytes: BTreeMap::new(),
            obtainable_bytes: 7,
        };
        let stats = reclaim_stats(Some(&residency), None, &ram, None);
        let figures: Vec<_> = stats
            .zones
            .iter()
            .map(|zone| {
                (
                    zone.configured_bytes,
                    zone.resident_bytes,
                    zone.reclaimed_bytes,
                )
            })
            .collect();
        assert_eq!(figures, [(200, 35, 165), (200, 200, 0)]);
        assert_eq!(stats.backing, "hugetlb-shared");
        assert_eq!(stats.obtainable_bytes, Some(7));
        let reason = |at: usize| stats.zones[at].reporting.reason.clone().unwrap();
        assert!(reason(0).contains("no balloon"), "{}", reason(0));
        assert!(reason(1).contains("1073741824"), "{}", reason(1));
        assert!(reclaim_stats(None, None, &ram, None).zones.is_empty());
    }

    #[test]
    fn memory_that_is_not_plugged_is_neither_configured_nor_reclaimed() {
        let zone = |id: &str, range, kind| Zone {
            id: id.to_owned(),
            ranges: vec![range],
            backing: "anonymous-private",
            page_bytes: 4096,
            kind,
        };
        let zones = [
            zone("a", 0..100, ZoneKind::Boot),
            zone("b-hotplug", 1000..1400, ZoneKind::VirtioMem),
            zone("a-hotplug", 1400..1800, ZoneKind::VirtioMem),
        ];
        let figures = |plugged_bytes, resident_bytes| {
            let region = |guest_start, bytes, resident_bytes| RegionResidency {
                guest_start,
                bytes,
                resident_bytes,
                swapped_bytes: 0,
            };
            let residency = ResidencySample {
                configured_bytes: 900,
                resident_bytes: 60 + resident_bytes,
                swapped_bytes: 0,
                taken: Instant::now(),
                cost_us: 1,
                method: virtio_devices::reclaim::ResidencyMethod::PagemapScan,
                regions: [
                    region(0, 100, 60),
                    region(1000, 400, resident_bytes),
                    region(1400, 400, 0),
                ]
                .into(),
            };
            let ram = ConfiguredRam {
                zones: &zones,
                plugged_bytes: BTreeMap::from([("a", 0), ("b", plugged_bytes)]),
                obtainable_bytes: 0,
            };
            let own = OwnMemory {
                bytes: 60 + resident_bytes + 5,
                method: "process",
            };
            let stats = reclaim_stats(Some(&residency), Some(&own), &ram, None);
            assert_eq!(stats.charged_bytes, stats.resident_bytes + 5);
            assert_eq!(stats.charged_method, "process");
            let uncharged = stats.configured_bytes.saturating_sub(stats.charged_bytes);
            assert_eq!(stats.uncharged_bytes, uncharged);
            let zone = &stats.zones[1];
            let of_zone = (
                zone.configured_bytes,
                zone.resident_bytes,
                zone.reclaimed_bytes,
            );
            let of_all = (
                stats.configured_bytes,
                stats.resident_bytes,
                stats.reclaimed_bytes,
            );
            (of_all, of_zone)
        };
        assert_eq!(figures(0, 0), ((100, 60, 40), (0, 0, 0)));
        assert_eq!(figures(200, 50), ((300, 110, 190), (200, 50, 150)));
        // The figures reveal a guest that uses memory it has not plugged in.
        assert_eq!(figures(0, 70), ((100, 130, 0), (0, 70, 0)));
    }

    #[test]
    fn repopulated_is_what_was_discarded_and_is_not_absent() {
        let discarded = |discarded_bytes| ReclaimPath {
            discarded_bytes,
            ..ReclaimPath::default()
        };
        let mut stats = ReclaimStats {
            reclaimed_bytes: 50,
            report: discarded(40),
            inflate: discarded(30),
            hint: discarded(20),
            ..ReclaimStats::default()
        };
        assert_eq!(repopulated_bytes(&stats), 40);
        stats.reclaimed_bytes = 100;
        assert_eq!(repopulated_bytes(&stats), 0);
    }
}
