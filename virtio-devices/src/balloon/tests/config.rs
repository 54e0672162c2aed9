//! Tests of features, configuration space, target and counters.

use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::rig::{RAM_BYTES, Rig};
use crate::balloon::spec::{
    VIRTIO_BALLOON_F_DEFLATE_ON_OOM, VIRTIO_BALLOON_F_MUST_TELL_HOST, VIRTIO_BALLOON_F_PAGE_POISON,
    VIRTIO_BALLOON_F_REPORTING, VIRTIO_BALLOON_F_STATS_VQ, VIRTIO_F_VERSION_1,
};
use crate::balloon::{Balloon, BalloonParams, ReportingState};
use crate::device::{GuestRam, VirtioDevice};

fn params(deflate_on_oom: bool, free_page_reporting: bool) -> BalloonParams {
    let ranges = [(GuestAddress(0), 1 << 20)];
    BalloonParams {
        ram: GuestRam::new(GuestMemoryMmap::from_ranges(&ranges).unwrap()),
        size_bytes: 3 << 12,
        deflate_on_oom,
        free_page_reporting,
        free_page_hinting: false,
        reporting_policy: false,
        device_init: false,
    }
}

#[test]
fn features_follow_the_configuration() {
    let always = VIRTIO_F_VERSION_1 | VIRTIO_BALLOON_F_MUST_TELL_HOST | VIRTIO_BALLOON_F_STATS_VQ;
    let reporting = VIRTIO_BALLOON_F_REPORTING | VIRTIO_BALLOON_F_PAGE_POISON;
    for (oom, report, features) in [
        (false, false, always),
        (true, false, always | VIRTIO_BALLOON_F_DEFLATE_ON_OOM),
        (false, true, always | reporting),
    ] {
        let (balloon, _) = Balloon::new(params(oom, report)).unwrap();
        assert_eq!(balloon.features(), features);
        assert_eq!(balloon.device_type(), 5);
    }
}

#[test]
fn reporting_over_memory_that_cannot_be_freed_is_not_offered() {
    // Shared with unknown users, and without a file to punch holes in.
    let params = params_over(libc::MAP_SHARED | libc::MAP_ANONYMOUS, None);
    let (balloon, handle) = Balloon::new(params).unwrap();
    assert_eq!(balloon.features() & VIRTIO_BALLOON_F_REPORTING, 0);
    assert_eq!(handle.reporting(), ReportingState::BackingUnsuitable);
}

#[test]
fn reporting_over_a_private_file_is_offered() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let params = params_over(libc::MAP_PRIVATE, Some(FileOffset::new(file, 0)));
    let (balloon, handle) = Balloon::new(params).unwrap();
    assert_ne!(balloon.features() & VIRTIO_BALLOON_F_REPORTING, 0);
    assert_eq!(handle.reporting(), ReportingState::DriverNotReady);
}

/// A balloon with reporting over one mapping of these flags.
fn params_over(flags: libc::c_int, file: Option<FileOffset>) -> BalloonParams {
    let mut region = vm_memory::mmap::MmapRegionBuilder::new(1 << 20)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags);
    if let Some(file) = file {
        region = region.with_file_offset(file);
    }
    let region = region.build().unwrap();
    let region = vm_memory::GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    BalloonParams {
        ram: GuestRam::new(GuestMemoryMmap::from_regions(vec![region]).unwrap()),
        ..params(false, true)
    }
}

#[test]
fn reporting_not_configured_is_told_so() {
    let (_, handle) = Balloon::new(params(false, false)).unwrap();
    assert_eq!(handle.reporting(), ReportingState::NotConfigured);
}

#[test]
fn target_reaches_the_driver_through_the_configuration_space() {
    let rig = Rig::new();
    let num_pages = || {
        let mut data = [0; 4];
        rig.balloon.read_config(0, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!(num_pages(), 0);
    rig.handle.set_target_bytes((5 << 12) + 4095);
    assert_eq!((num_pages(), rig.handle.target_bytes()), (5, 5 << 12));
    assert_eq!(rig.harness.interrupt.config_signals(), 1);
    // More pages than 32 bits can count: truncated, as in the compatible API.
    rig.handle.set_target_bytes((1 << 44) + (7 << 12));
    assert_eq!(num_pages(), 7);
}

#[test]
fn balloon_starts_with_the_size_it_was_given() {
    let (balloon, handle) = Balloon::new(params(false, false)).unwrap();
    let mut data = [0; 16];
    balloon.read_config(0, &mut data);
    assert_eq!(data[..4], 3_u32.to_le_bytes());
    assert_eq!((handle.target_bytes(), handle.actual_bytes()), (3 << 12, 0));
}

#[test]
fn actual_that_names_more_than_there_is_is_cut_and_counted() {
    let mut rig = Rig::new();
    rig.balloon.write_config(4, &100_u32.to_le_bytes());
    assert_eq!(rig.handle.actual_bytes(), 100 << 12);
    rig.balloon.write_config(4, &u32::MAX.to_le_bytes());
    assert_eq!(rig.handle.actual_bytes(), RAM_BYTES);
    assert_eq!(rig.snapshot().faults.actual_beyond_ram, 1);
    rig.balloon.reset();
    assert_eq!(rig.handle.actual_bytes(), 0);
}

#[test]
fn writes_that_hit_no_field_are_counted() {
    let mut rig = Rig::new();
    rig.balloon.write_config(0, &1_u32.to_le_bytes());
    rig.balloon.write_config(4, &[1]);
    rig.balloon.write_config(u64::MAX, &[1; 64]);
    assert_eq!(rig.handle.actual_bytes(), 0);
    assert_eq!(rig.snapshot().faults.config_writes_ignored, 3);
}

#[test]
fn queues_are_large_enough_for_linux_to_report() {
    let rig = Rig::new();
    let sizes = rig.balloon.queue_sizes();
    assert_eq!(sizes.len(), 5);
    assert!(sizes[2..].iter().all(|size| *size >= 32));
}

#[test]
fn handler_is_handed_out_once() {
    let (mut balloon, _) = Balloon::new(params(false, false)).unwrap();
    assert_eq!(balloon.take_handlers().len(), 1);
    assert_eq!(balloon.take_handlers().len(), 0);
}

#[test]
fn counters_carry_every_figure_under_a_name_of_its_own() {
    let rig = Rig::new();
    let counters = rig.balloon.counters();
    // 6 of the balloon, 25 for each of 3 paths, plus the faults.
    let faults = rig.snapshot().faults.iter().count();
    assert_eq!(counters.len(), 6 + 3 * 25 + faults);
    assert_eq!(counters["report_discarded_bytes"], 0);
}
