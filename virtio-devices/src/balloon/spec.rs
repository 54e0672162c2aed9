//! The balloon's own feature bits and constants (virtio 1.2 §5.5.3, §5.5.6; include/uapi/linux/virtio_balloon.h).

/// Virtio device id.
pub const VIRTIO_ID_BALLOON: u32 = 5;

/// The driver may reuse ballooned pages only after the device has completed the request.
pub const VIRTIO_BALLOON_F_MUST_TELL_HOST: u64 = 1 << 0;
/// Statistics queue.
pub const VIRTIO_BALLOON_F_STATS_VQ: u64 = 1 << 1;
/// The guest takes pages back automatically before it runs out of memory.
pub const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// Free page hinting queue.
pub const VIRTIO_BALLOON_F_FREE_PAGE_HINT: u64 = 1 << 3;
/// The guest reports the value with which it fills free pages.
pub const VIRTIO_BALLOON_F_PAGE_POISON: u64 = 1 << 4;
/// Free page reporting queue.
pub const VIRTIO_BALLOON_F_REPORTING: u64 = 1 << 5;
/// The used length of a reported chain is the number of its first bytes that the device has initialized. Proposed for
/// the standard (<https://github.com/oasis-tcs/virtio-spec/issues/244>), which may still assign another bit.
pub const VIRTIO_BALLOON_F_DEVICE_INIT_REPORTED: u64 = 1 << 6;
/// Modern device, from the common feature bits (virtio 1.2 §6).
pub const VIRTIO_F_VERSION_1: u64 = 1 << 32;

/// `free_page_hint_cmd_id`: send no hints.
pub const VIRTIO_BALLOON_CMD_ID_STOP: u32 = 0;
/// `free_page_hint_cmd_id`: take the hinted blocks back.
pub const VIRTIO_BALLOON_CMD_ID_DONE: u32 = 1;

/// Page frame numbers count pages of 4 KiB, independent of the guest's page size.
pub const VIRTIO_BALLOON_PFN_SHIFT: u32 = 12;
/// Bytes of one such page.
pub const VIRTIO_BALLOON_PAGE_BYTES: u64 = 1 << VIRTIO_BALLOON_PFN_SHIFT;
