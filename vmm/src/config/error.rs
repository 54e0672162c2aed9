//! Reasons for which a configuration cannot boot.

use std::path::PathBuf;

use machine::boot::SmbiosError;
use machine::pci::{Bdf, SLOT_COUNT};

/// The problem and its section.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValidationError {
    /// There is no payload to boot.
    #[error("No kernel or firmware is given")]
    PayloadMissing,
    /// Firmware and kernel (or initramfs, or command line) exclude each other.
    #[error("Firmware cannot be given together with kernel, initramfs or cmdline")]
    FirmwareAndKernel,
    /// An initramfs without the kernel that could use it.
    #[error("An initramfs is given without a kernel")]
    InitramfsWithoutKernel,
    /// A setting of upstream that this VMM does not support.
    #[error("{what} is not supported")]
    Unsupported {
        /// The section, or section and field.
        what: String,
    },
    /// The `memory` section.
    #[error("Invalid memory configuration")]
    Memory(#[source] MemoryFault),
    /// The `numa` section.
    #[error("Invalid NUMA configuration")]
    Numa(#[source] NumaFault),
    /// The `cpus` section.
    #[error("Invalid CPU configuration")]
    Cpus(#[source] CpusFault),
    /// The `platform` section.
    #[error("Invalid platform configuration")]
    Platform(#[source] SmbiosError),
    /// The `balloon` section.
    #[error(
        "A balloon of {balloon_bytes} bytes leaves the guest none of its {ram_bytes} bytes of RAM"
    )]
    BalloonLargerThanRam {
        /// The requested size of the balloon.
        balloon_bytes: u64,
        /// The guest's RAM.
        ram_bytes: u64,
    },
    /// The `balloon` section's `reporting_policy`.
    #[error("reporting_policy=on requires free_page_reporting=on")]
    PolicyWithoutReporting,
    /// The `balloon` section's `device_init`.
    #[error("device_init=on requires free_page_reporting=on")]
    DeviceInitWithoutReporting,
    /// The `balloon` section's `stats_poll_ms`.
    #[error("stats_poll_ms must be 0 or at least {least_ms}; got {poll_ms}")]
    StatsPollTooOften {
        /// The requested value.
        poll_ms: u64,
        /// The minimum.
        least_ms: u64,
    },
    /// One device.
    #[error("Invalid configuration of {device}")]
    Device {
        /// The device by its id, or by section and position.
        device: String,
        /// The reason.
        #[source]
        fault: DeviceFault,
    },
    /// Two devices with the same name.
    #[error("Identifier {id} is not unique")]
    IdentifierNotUnique {
        /// The name.
        id: String,
    },
    /// Names with two underscores belong to the VMM.
    #[error(
        "Identifier {id:?} is invalid: it must not be empty, start with __ or contain control characters"
    )]
    InvalidIdentifier {
        /// The name.
        id: String,
    },
    /// One image for two disks, at least one of which is writable.
    #[error("Disk image {} is used by two disks, of which at least one is writable", path.display())]
    DuplicateDiskPath {
        /// The image.
        path: PathBuf,
    },
    /// One device for two guests' devices.
    #[error("Device {} is assigned twice", path.display())]
    DuplicateDevicePath {
        /// Its folder.
        path: PathBuf,
    },
    /// More devices than slots.
    #[error("{count} devices exceed the {max} slots of PCI segment {segment}")]
    TooManyDevices {
        /// The segment.
        segment: u16,
        /// Devices.
        count: usize,
        /// Slots.
        max: usize,
    },
    /// A segment that does not exist, or that of the IOMMU.
    #[error(
        "iommu_segments of --platform must be between 1 and num_pci_segments - 1 ({}); got {segment}",
        count - 1
    )]
    IommuSegment {
        /// The segment.
        segment: u16,
        /// The number of segments.
        count: u16,
    },
    /// A width that no driver can use.
    #[error("iommu_address_width must be between {min} and {max} bits; got {bits}")]
    IommuAddressWidth {
        /// The width.
        bits: u8,
        /// The minimum.
        min: u8,
        /// The maximum.
        max: u8,
    },
    /// One PCI slot for two devices.
    #[error("Valid PCI device identifier but already used: {} (on PCI segment {})", place.slot, place.segment)]
    DuplicatePciSlot {
        /// The slot.
        place: Bdf,
    },
    /// More PCI segments than there are, or none.
    #[error("num_pci_segments must be between 1 and {max}; got {count}")]
    PciSegmentCount {
        /// The requested number.
        count: u16,
        /// The maximum.
        max: u16,
    },
    /// A share of a PCI segment in the windows of addresses that it cannot have.
    #[error("--pci-segment {segment}: {fault}")]
    PciSegment {
        /// The segment.
        segment: u16,
        /// What is wrong.
        fault: SegmentFault,
    },
    /// Rules that would have no effect.
    #[error("landlock_rules are given without landlock_enable")]
    LandlockRulesWithoutLandlock,
    /// Access other than reading and writing.
    #[error("The access of the Landlock rule for {} must be r, w or rw; got {access:?}", path.display())]
    LandlockAccess {
        /// The rule's path.
        path: PathBuf,
        /// The requested access.
        access: String,
    },
}

/// Errors in the memory configuration.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryFault {
    /// No RAM.
    #[error("The size is 0")]
    Zero,
    /// KSM merges private memory only.
    #[error("memory must not be both mergeable and shared: KSM merges private memory only")]
    MergeableShared,
    /// RAM is described twice.
    #[error("size must be 0 when zones are given; got {bytes}")]
    SizeAndZones {
        /// The size.
        bytes: u64,
    },
    /// A setting for all of RAM, although zones have their own.
    #[error("with zones, set shared, hugepages and hugepage_size for each zone")]
    KindBesideZones,
    /// One zone.
    #[error("Invalid memory zone {id}")]
    Zone {
        /// Its name.
        id: String,
        /// The reason.
        #[source]
        fault: Box<MemoryFault>,
    },
    /// A node number that no kernel supports.
    #[error("Host NUMA node {node} is out of range")]
    HostNumaNode {
        /// The node.
        node: u32,
    },
    /// A NUMA policy for pages that other users share.
    #[error("host_numa_node is not supported for shared files")]
    HostNumaNodeOfSharedFile,
    /// Less than the boot structures and a payload need.
    #[error("The size {bytes} is less than {min_bytes} bytes")]
    TooSmall {
        /// RAM.
        bytes: u64,
        /// The minimum.
        min_bytes: u64,
    },
    /// Not whole pages.
    #[error("The size {bytes} is not a multiple of {page_bytes} bytes")]
    NotWholePages {
        /// RAM.
        bytes: u64,
        /// The page size of its backing.
        page_bytes: u64,
    },
    /// A size that is not a multiple of its granularity.
    #[error("{field} must be a multiple of {unit_bytes} bytes; got {bytes}")]
    HotplugNotWhole {
        /// The setting.
        field: &'static str,
        /// Its value.
        bytes: u64,
        /// The required granularity.
        unit_bytes: u64,
    },
    /// Only virtio-mem has a target.
    #[error("hotplugged_size requires hotplug_method=virtio-mem")]
    HotpluggedByAcpi,
    /// Memory devices extend only RAM that is not divided.
    #[error("hotplug_size of a zone requires hotplug_method=virtio-mem")]
    ZoneGrowsByAcpi,
    /// Each zone grows on its own.
    #[error("hotplug_size and hotplugged_size must be settings of the zones, not of all of memory")]
    HotplugBesideZones,
    /// More hot-plugged memory than the maximum.
    #[error("hotplugged_size ({added_bytes}) must not exceed hotplug_size ({room_bytes})")]
    HotpluggedBeyondRoom {
        /// The amount at boot.
        added_bytes: u64,
        /// The maximum.
        room_bytes: u64,
    },
    /// More RAM than the address width covers.
    #[error("RAM of {bytes} bytes does not fit into {address_bits} address bits")]
    BeyondAddressSpace {
        /// RAM.
        bytes: u64,
        /// `cpus.max_phys_bits`.
        address_bits: u8,
    },
    /// Not a size of a huge page.
    #[error("Huge pages of {bytes} bytes do not exist")]
    HugePageSize {
        /// The size.
        bytes: u64,
    },
    /// A size of huge pages without huge pages.
    #[error("hugepage_size requires hugepages=on")]
    HugePageSizeWithoutHugePages,
}

/// Errors in the NUMA configuration.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NumaFault {
    /// A number that does not fit the distance table.
    #[error("Node {node} is above {max}")]
    NodeNumber {
        /// The node.
        node: u32,
        /// The highest number.
        max: u32,
    },
    /// Two nodes with the same number.
    #[error("Node {node} is described twice")]
    NodeTwice {
        /// The node.
        node: u32,
    },
    /// A zone that does not exist.
    #[error("Node {node} has unknown memory zone {zone:?}")]
    UnknownZone {
        /// The node.
        node: u32,
        /// The zone.
        zone: String,
    },
    /// A zone in two nodes.
    #[error("Memory zone {zone:?} belongs to nodes {first} and {second}")]
    ZoneReused {
        /// The zone.
        zone: String,
        /// A node.
        first: u32,
        /// Another one, or the same.
        second: u32,
    },
    /// A vCPU that does not exist.
    #[error("Node {node} has vCPU {vcpu}, but the last vCPU is {last}")]
    UnknownVcpu {
        /// The node.
        node: u32,
        /// The vCPU.
        vcpu: u32,
        /// The highest index.
        last: u32,
    },
    /// A vCPU in two nodes.
    #[error("vCPU {vcpu} belongs to nodes {first} and {second}")]
    VcpuReused {
        /// The vCPU.
        vcpu: u32,
        /// A node.
        first: u32,
        /// Another one, or the same.
        second: u32,
    },
    /// A PCI segment that the machine does not have.
    #[error("Node {node} has PCI segment {segment}, but the last PCI segment is {last}")]
    UnknownSegment {
        /// The node.
        node: u32,
        /// The segment.
        segment: u16,
        /// The highest number.
        last: u16,
    },
    /// One PCI segment in two nodes.
    #[error("PCI segment {segment} is in node {first} and in node {second}")]
    SegmentReused {
        /// The segment.
        segment: u16,
        /// A node.
        first: u32,
        /// Another one, or the same.
        second: u32,
    },
    /// A distance to a node that does not exist.
    #[error("Node {node} has a distance to unknown node {destination}")]
    UnknownDestination {
        /// The node.
        node: u32,
        /// The other node.
        destination: u32,
    },
    /// A distance that ACPI does not allow.
    #[error(
        "Distance from node {node} to node {destination} must be 10 for the same node and 11 to 255 otherwise; got {distance}"
    )]
    Distance {
        /// The node.
        node: u32,
        /// The other node.
        destination: u32,
        /// The distance.
        distance: u8,
    },
}

/// Errors in the vCPU configuration.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpusFault {
    /// Not 1 ≤ boot ≤ max ≤ limit.
    #[error(
        "cpus.boot must be between 1 and cpus.max, and cpus.max at most {limit}; got boot={boot} and max={max}"
    )]
    Count {
        /// vCPUs at boot.
        boot: u32,
        /// The maximum number of vCPUs.
        max: u32,
        /// The limit.
        limit: u32,
    },
    /// The topology does not describe the vCPUs.
    #[error("topology has {product} vCPUs, but the maximum number of vCPUs is {max}")]
    Topology {
        /// Threads × cores × dies × packages.
        product: u64,
        /// The maximum number of vCPUs.
        max: u32,
    },
    /// An address width that no x86-64 processor has.
    #[error("max_phys_bits must be between {min} and {max}; got {bits}")]
    PhysBits {
        /// The width.
        bits: u8,
        /// The minimum.
        min: u8,
        /// The maximum.
        max: u8,
    },
    /// An affinity for a vCPU that does not exist.
    #[error("affinity names vCPU {vcpu}, but the last vCPU is {last}")]
    AffinityOfUnknownVcpu {
        /// The index.
        vcpu: u32,
        /// The highest index.
        last: u32,
    },
    /// Two affinities for one vCPU.
    #[error("Affinity of vCPU {vcpu} is set twice")]
    AffinityTwice {
        /// The index.
        vcpu: u32,
    },
    /// An affinity without host CPUs.
    #[error("Affinity of vCPU {vcpu} lists no host CPU")]
    AffinityEmpty {
        /// The index.
        vcpu: u32,
    },
}

/// Errors in the configuration of a device.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceFault {
    /// An address that no guest can have.
    #[error("cid must be between {min} and {max}; got {cid}")]
    Cid {
        /// The address.
        cid: u32,
        /// The minimum.
        min: u32,
        /// The maximum.
        max: u32,
    },
    /// Private guest memory, which a back end cannot access.
    #[error(
        "a vhost-user device needs shared guest memory: set shared=on in --memory (and in each --memory-zone)"
    )]
    MemoryPrivate,
    /// A vhost-user device without a back end.
    #[error("vhost_user=on needs socket=PATH")]
    SocketMissing,
    /// A socket without a use.
    #[error("socket and vhost_mode need vhost_user=on")]
    SocketWithoutVhostUser,
    /// A key for what only the back end can do.
    #[error("{key} cannot be set with vhost_user=on: configure it in the back end")]
    OfBackEnd {
        /// The key.
        key: &'static str,
    },
    /// A type of device that no other process can serve.
    #[error(
        "device_type must be a virtio device id from 1 to {max} that another process can serve (not balloon, iommu, mem or watchdog); got {device_type}"
    )]
    DeviceType {
        /// The device id.
        device_type: u32,
        /// The maximum.
        max: u32,
    },
    /// A name that a guest cannot mount.
    #[error("tag must have 1 to {max} bytes and no NUL; got {tag:?}")]
    Tag {
        /// The name.
        tag: String,
        /// The maximum.
        max: usize,
    },
    /// A path that is too long for a socket.
    #[error("socket must be a path of 1 to {max} bytes; got {bytes} bytes")]
    SocketPath {
        /// Its length.
        bytes: usize,
        /// The maximum.
        max: usize,
    },
    /// Not whole huge pages.
    #[error("size must be a positive multiple of {unit_bytes} bytes; got {bytes}")]
    PmemSize {
        /// The requested size.
        bytes: u64,
        /// The required granularity.
        unit_bytes: u64,
    },
    /// No image.
    #[error("A path is required")]
    PathMissing,
    /// A queue size that virtio forbids.
    #[error("queue_size must be a power of two between {min} and {max}; got {size}")]
    QueueSize {
        /// Entries.
        size: u16,
        /// The minimum.
        min: u16,
        /// The maximum.
        max: u16,
    },
    /// Too few or too many queues.
    #[error("num_queues must be between {min} and {max}{reason}; got {count}")]
    QueueCount {
        /// Queues.
        count: usize,
        /// The minimum.
        min: usize,
        /// The maximum.
        max: usize,
        /// The reason for the maximum in brackets, or an empty string.
        reason: &'static str,
    },
    /// A queue that the disk does not have.
    #[error("queue_affinity names queue {queue_index}, but num_queues is {num_queues}")]
    AffinityQueue {
        /// The queue.
        queue_index: u16,
        /// The number of queues, which are counted from 0.
        num_queues: usize,
    },
    /// Two sets of host CPUs for one queue.
    #[error("queue_affinity names queue {queue_index} twice")]
    AffinityTwice {
        /// The queue.
        queue_index: u16,
    },
    /// An affinity without host CPUs.
    #[error("queue_affinity needs a host CPU for queue {queue_index}")]
    AffinityEmpty {
        /// The queue.
        queue_index: u16,
    },
    /// A number that no host CPU has.
    #[error(
        "queue_affinity of queue {queue_index} must name host CPUs up to {max}; got {host_cpu}"
    )]
    AffinityHostCpu {
        /// The queue.
        queue_index: u16,
        /// The number.
        host_cpu: usize,
        /// The maximum.
        max: usize,
    },
    /// A refill time so long that the device would appear to have stopped.
    #[error("{bucket} refill_time must be at most {max_ms} ms (a day); got {refill_ms}")]
    RefillTime {
        /// `bandwidth` or `ops`.
        bucket: &'static str,
        /// The requested value.
        refill_ms: u64,
        /// The maximum.
        max_ms: u64,
    },
    /// Two limits for one disk.
    #[error("a disk in rate_limit_group {group:?} cannot have its own rate limit")]
    LimitBesideGroup {
        /// The group.
        group: String,
    },
    /// A group that does not exist.
    #[error("unknown rate_limit_group {group:?}: define it with --rate-limit-group id={group}")]
    UnknownLimitGroup {
        /// The group.
        group: String,
    },
    /// A group with an empty name, or one that is defined twice.
    #[error("the id of a rate limit group must not be empty and must be unique; got {group:?}")]
    LimitGroupId {
        /// The group.
        group: String,
    },
    /// An MTU below the minimum of IPv6.
    #[error("An MTU of {mtu} is below {min}")]
    Mtu {
        /// The MTU.
        mtu: u16,
        /// The minimum.
        min: u16,
    },
    /// An address that no interface can have.
    #[error("{mac} is not a unicast address")]
    Mac {
        /// The address.
        mac: String,
    },
    /// The number of descriptors differs from the number of queue pairs.
    #[error("{pairs} queue pairs need {pairs} file descriptors; got {fds}")]
    DescriptorCount {
        /// Descriptors.
        fds: usize,
        /// Pairs.
        pairs: usize,
    },
    /// Standard streams, or a number that came through JSON.
    #[error(
        "File descriptor {fd} cannot be a tap device: pass an open one with fd= on the command line"
    )]
    Descriptor {
        /// The number.
        fd: i32,
    },
    /// A segment that the machine does not have.
    #[error("pci_segment must be below num_pci_segments ({count}); got {segment}")]
    PciSegment {
        /// The segment.
        segment: u16,
        /// The number of segments.
        count: u16,
    },
    /// The guest would take it for a device behind the IOMMU.
    #[error(
        "PCI segment {segment} is in iommu_segments, so its devices need iommu=on, which not every device supports"
    )]
    OnIommuSegment {
        /// The segment.
        segment: u16,
    },
    /// Slots 0 to 31 exist.
    #[error("Given PCI device ID ({slot}) is out of the supported range of 0..{SLOT_COUNT}")]
    PciSlot {
        /// The slot.
        slot: u8,
    },
    /// An I/O port that another device has.
    #[error("iobase must be a free I/O port; {port:#x} belongs to another device")]
    PortInUse {
        /// The port.
        port: u16,
    },
    /// A limit for a file that does not exist.
    #[error("file_bytes_max needs the mode File")]
    ConsoleLimitWithoutFile,
    /// A mode that needs a path.
    #[error("This console mode needs a path")]
    ConsolePathMissing,
}

/// Reasons why a PCI segment cannot have its share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SegmentFault {
    /// There is no such segment.
    #[error("it must be below num_pci_segments ({count})")]
    Missing {
        /// The number of segments.
        count: u16,
    },
    /// Two shares.
    #[error("it is given twice")]
    Twice,
    /// None, or too much.
    #[error("{key} must be between 1 and {max}; got {weight}")]
    Weight {
        /// The key.
        key: &'static str,
        /// Its value.
        weight: u32,
        /// The maximum.
        max: u32,
    },
}
