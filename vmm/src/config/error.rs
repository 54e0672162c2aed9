//! Reasons for which a configuration cannot boot.

use std::path::PathBuf;

use machine::boot::SmbiosError;

/// The problem and its section.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValidationError {
    /// Nothing to boot.
    #[error("No kernel or firmware is given")]
    PayloadMissing,
    /// Firmware and kernel (or initramfs, or command line) exclude each other.
    #[error("Firmware cannot be given together with kernel, initramfs or cmdline")]
    FirmwareAndKernel,
    /// An initramfs without the kernel that could use it.
    #[error("An initramfs is given without a kernel")]
    InitramfsWithoutKernel,
    /// A part of upstream's configuration that this VMM does not support.
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
        "Ballooning {balloon_bytes} bytes of {ram_bytes} bytes of RAM leaves the guest nothing"
    )]
    BalloonLargerThanRam {
        /// The requested size of the balloon.
        balloon_bytes: u64,
        /// The guest's RAM.
        ram_bytes: u64,
    },
    /// The `balloon` section's `reporting_policy`.
    #[error("reporting_policy of the balloon needs free_page_reporting")]
    PolicyWithoutReporting,
    /// The `balloon` section's `stats_poll_ms`.
    #[error("Statistics every {poll_ms} ms are too often: 0, or at least {least_ms} ms")]
    StatsPollTooOften {
        /// The requested value.
        poll_ms: u64,
        /// The accepted values.
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
        "Identifier {id:?} is invalid: it must not be empty nor start with __ nor hold control characters"
    )]
    InvalidIdentifier {
        /// The name.
        id: String,
    },
    /// One image for two disks, at least one of which is writable.
    #[error("Disk image {} is used by two disks and not read-only in both", path.display())]
    DuplicateDiskPath {
        /// The image.
        path: PathBuf,
    },
    /// More devices than slots.
    #[error("{count} devices do not fit the PCI bus, which has {max} slots")]
    TooManyDevices {
        /// Devices.
        count: usize,
        /// Slots.
        max: usize,
    },
    /// One PCI slot for two devices.
    #[error("PCI slot {slot} is given to two devices")]
    DuplicatePciSlot {
        /// The slot.
        slot: u8,
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
    /// No RAM at all.
    #[error("The size is 0")]
    Zero,
    /// KSM merges private memory only.
    #[error("memory must not be both mergeable and shared: KSM merges private memory only")]
    MergeableShared,
    /// RAM is described twice.
    #[error("The size must be 0 where zones are given, and is {bytes}")]
    SizeAndZones {
        /// The size.
        bytes: u64,
    },
    /// A setting for all of RAM, although zones have their own.
    #[error("shared, hugepages or hugepage_size is given for all of RAM but not for each zone")]
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
    #[error("There is no NUMA node {node} on any host")]
    HostNumaNode {
        /// The node.
        node: u32,
    },
    /// A NUMA policy for pages that other users share.
    #[error("host_numa_node cannot be given for a file that is shared")]
    HostNumaNodeOfSharedFile,
    /// Less than the boot structures and a payload need.
    #[error("The size {bytes} is less than {min_bytes} bytes")]
    TooSmall {
        /// RAM.
        bytes: u64,
        /// The least.
        min_bytes: u64,
    },
    /// Not whole pages.
    #[error("The size {bytes} is no multiple of {page_bytes} bytes")]
    NotWholePages {
        /// RAM.
        bytes: u64,
        /// The page size of its backing.
        page_bytes: u64,
    },
    /// A size that is not a multiple of its granularity.
    #[error("{field} {bytes} is no multiple of {unit_bytes} bytes")]
    HotplugNotWhole {
        /// The setting.
        field: &'static str,
        /// Its value.
        bytes: u64,
        /// The required granularity.
        unit_bytes: u64,
    },
    /// More hot-plugged memory than the maximum.
    #[error("hotplugged_size {added_bytes} is more than hotplug_size, {room_bytes}")]
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
    #[error("hugepage_size is given without hugepages")]
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
    #[error("Node {node} has memory zone {zone:?}, which does not exist")]
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
    #[error("Node {node} has vCPU {vcpu}, the last one is {last}")]
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
    /// A distance to a node that does not exist.
    #[error("Node {node} has a distance to node {destination}, which does not exist")]
    UnknownDestination {
        /// The node.
        node: u32,
        /// The other node.
        destination: u32,
    },
    /// A distance that ACPI does not allow.
    #[error(
        "Distance {distance} from node {node} to node {destination}: 10 to itself, 11 to 255 to another"
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
    #[error("1 <= boot_vcpus ({boot}) <= max_vcpus ({max}) <= {limit} does not hold")]
    Count {
        /// vCPUs at boot.
        boot: u32,
        /// The maximum number of vCPUs.
        max: u32,
        /// The limit.
        limit: u32,
    },
    /// The topology does not describe the vCPUs.
    #[error("The topology describes {product} vCPUs, max_vcpus is {max}")]
    Topology {
        /// Threads × cores × dies × packages.
        product: u64,
        /// The maximum number of vCPUs.
        max: u32,
    },
    /// An address width that no x86-64 processor has.
    #[error("max_phys_bits {bits} is not within {min}..={max}")]
    PhysBits {
        /// The width.
        bits: u8,
        /// The minimum.
        min: u8,
        /// The maximum.
        max: u8,
    },
    /// An affinity for a vCPU that does not exist.
    #[error("Affinity is given for vCPU {vcpu}, the last one is {last}")]
    AffinityOfUnknownVcpu {
        /// The index.
        vcpu: u32,
        /// The highest index.
        last: u32,
    },
    /// Two affinities for one vCPU.
    #[error("Affinity of vCPU {vcpu} is given twice")]
    AffinityTwice {
        /// The index.
        vcpu: u32,
    },
    /// An affinity without host CPUs.
    #[error("Affinity of vCPU {vcpu} names no host CPU")]
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
    /// A path to which no socket can be bound.
    #[error("socket must be a path of 1 to {max} bytes; got {bytes} bytes")]
    SocketPath {
        /// Its length.
        bytes: usize,
        /// The maximum.
        max: usize,
    },
    /// No image.
    #[error("A path is required")]
    PathMissing,
    /// A queue size that virtio forbids.
    #[error("Queue size {size} is no power of two within {min}..={max}")]
    QueueSize {
        /// Entries.
        size: u16,
        /// The minimum.
        min: u16,
        /// The maximum.
        max: u16,
    },
    /// Too few or too many queues.
    #[error("{count} queues are not within {min}..={max}")]
    QueueCount {
        /// Queues.
        count: usize,
        /// The minimum.
        min: usize,
        /// Most: one, or one pair, for each vCPU.
        max: usize,
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
    #[error("{mac} is no address of a single station")]
    Mac {
        /// The address.
        mac: String,
    },
    /// The number of descriptors differs from the number of queue pairs.
    #[error("{fds} file descriptors are given for {pairs} queue pairs")]
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
    /// Slots 1 to 31 exist.
    #[error("PCI slot {slot} is not within 1..=31")]
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
    /// A mode that needs a path.
    #[error("This mode needs a path")]
    ConsolePathMissing,
}
