//! Cloud Hypervisor's names in a configuration (v54, `vmm/src/vm_config.rs` and its OpenAPI file).
//!
//! Tools written for Cloud Hypervisor must find its names here. Additional names are allowed. A missing name is an
//! error, and so is a field that is optional in upstream but required here.

/// Fields of each section.
pub(crate) const FIELDS: &[(&str, &str)] = &[
    (
        "VmConfig",
        "cpus memory payload rate_limit_groups disks net rng balloon generic_vhost_user fs pmem serial console \
         debug_console devices user_devices vdpa vsock numa iommu watchdog pvpanic pci_segments platform tpm rtc \
         landlock_enable landlock_rules",
    ),
    ("LandlockConfig", "path access"),
    ("PayloadConfig", "firmware kernel cmdline initramfs"),
    (
        "CpusConfig",
        "boot_vcpus max_vcpus topology kvm_hyperv max_phys_bits affinity features nested core_scheduling",
    ),
    (
        "CpuTopology",
        "threads_per_core cores_per_die dies_per_package packages",
    ),
    ("CpuAffinity", "vcpu host_cpus"),
    ("CpuFeatures", "amx"),
    (
        "MemoryConfig",
        "size hotplug_size hotplugged_size mergeable hotplug_method shared hugepages hugepage_size prefault \
         reserve thp zones",
    ),
    (
        "MemoryZoneConfig",
        "id size file mergeable shared hugepages hugepage_size host_numa_node hotplug_size hotplugged_size prefault \
         reserve",
    ),
    (
        "DiskConfig",
        "path readonly direct iommu num_queues queue_size vhost_user vhost_socket rate_limit_group \
         rate_limiter_config id pci_segment pci_device_id serial queue_affinity backing_files sparse image_type \
         lock_granularity disable_io_uring disable_aio",
    ),
    ("VirtQueueAffinity", "queue_index host_cpus"),
    (
        "NetConfig",
        "tap ip mask mac host_mac mtu iommu num_queues queue_size vhost_user vhost_socket vhost_mode id fds \
         rate_limiter_config pci_segment pci_device_id offload_tso offload_ufo offload_csum",
    ),
    ("RateLimitGroupConfig", "id rate_limiter_config"),
    ("RateLimiterConfig", "bandwidth ops"),
    ("TokenBucket", "size one_time_burst refill_time"),
    ("RngConfig", "src iommu id pci_segment pci_device_id"),
    ("RtcConfig", "iommu id pci_segment pci_device_id"),
    (
        "BalloonConfig",
        "size deflate_on_oom free_page_reporting iommu id pci_segment pci_device_id",
    ),
    (
        "GenericVhostUserConfig",
        "device_type socket queue_sizes id pci_segment pci_device_id",
    ),
    (
        "FsConfig",
        "tag socket num_queues queue_size id pci_segment pci_device_id",
    ),
    (
        "PmemConfig",
        "file size iommu discard_writes id pci_segment pci_device_id",
    ),
    (
        "VsockConfig",
        "cid socket iommu id pci_segment pci_device_id",
    ),
    (
        "DeviceConfig",
        "path iommu pci_segment pci_device_id id x_nv_gpudirect_clique",
    ),
    ("SerialConfig", "file mode socket"),
    (
        "ConsoleConfig",
        "file mode socket iommu id pci_segment pci_device_id",
    ),
    ("DebugConsoleConfig", "file mode iobase"),
    (
        "NumaConfig",
        "guest_numa_id cpus distances memory_zones pci_segments device_id",
    ),
    ("NumaDistance", "destination distance"),
    (
        "PciSegmentConfig",
        "pci_segment mmio32_aperture_weight mmio64_aperture_weight",
    ),
    (
        "PlatformConfig",
        "num_pci_segments iommu_segments iommu_address_width_bits system_serial_number system_uuid oem_strings \
         system_manufacturer system_product_name system_version system_family system_sku_number chassis_asset_tag \
         iommufd vfio_p2p_dma",
    ),
];

/// Required fields, in the order of the schema.
pub(crate) const REQUIRED: &[(&str, &str)] = &[
    ("CpusConfig", "boot_vcpus max_vcpus"),
    ("MemoryConfig", "size"),
    ("MemoryZoneConfig", "id size"),
    ("PciSegmentConfig", "pci_segment"),
    ("RateLimitGroupConfig", "id"),
    ("TokenBucket", "size refill_time"),
    ("RngConfig", "src"),
    ("BalloonConfig", "size"),
    ("FsConfig", "tag socket"),
    ("GenericVhostUserConfig", "device_type socket queue_sizes"),
    ("PmemConfig", "file"),
    ("DeviceConfig", "path"),
    ("VsockConfig", "cid socket"),
    ("SerialConfig", "mode"),
    ("ConsoleConfig", "mode"),
    ("DebugConsoleConfig", "mode"),
    ("NumaConfig", "guest_numa_id"),
    ("NumaDistance", "destination distance"),
];

/// Words of the enumerations.
pub(crate) const WORDS: &[(&str, &str)] = &[
    ("HotplugMethod", "Acpi VirtioMem"),
    ("CoreSchedulingMode", "Vm Vcpu Off"),
    ("ConsoleMode", "Off Pty Tty File Socket Null"),
    ("ImageType", "FlatVmdk FixedVhd Qcow2 Raw Vhdx Unknown"),
    ("LockGranularity", "ByteRange Full"),
    ("VhostMode", "Client Server"),
];
