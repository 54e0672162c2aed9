//! Tests the command line syntax of every section.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use super::super::*;
use crate::options::OptionError;
use crate::{error_chain, error_line};

#[test]
fn balloon_option_reads_every_key() {
    let balloon = BalloonConfig::parse(
        "size=2G,deflate_on_oom=on,free_page_reporting=true,free_page_hinting=on,reporting_policy=on,device_init=on,stats_poll_ms=500,iommu=off,id=b,pci_segment=1,pci_device_id=8",
    )
    .unwrap();
    let expected = BalloonConfig {
        size: 2 << 30,
        deflate_on_oom: true,
        free_page_reporting: true,
        free_page_hinting: true,
        reporting_policy: true,
        device_init: true,
        stats_poll_ms: 500,
        iommu: false,
        id: Some("b".to_owned()),
        pci_segment: 1,
        pci_device_id: Some(8),
    };
    assert_eq!(balloon, expected);
    assert_eq!(BalloonConfig::parse("").unwrap(), BalloonConfig::default());
    assert!(BalloonConfig::parse("size=1Q").is_err());
    assert!(BalloonConfig::parse("pci_device_id=256").is_err());
    assert!(BalloonConfig::parse("statistics=on").is_err());
}

#[test]
fn memory_option_reads_sizes_toggles_and_zones() {
    let memory = MemoryConfig::parse(
        "size=4G,shared=on,thp=off,hotplug_method=virtio-mem,hotplug_size=1T",
        NO_ZONES,
    )
    .unwrap();
    assert_eq!(
        (memory.size, memory.shared, memory.thp),
        (4 << 30, true, false)
    );
    assert_eq!(
        (memory.hotplug_method, memory.hotplug_size),
        (HotplugMethod::VirtioMem, Some(1 << 40))
    );
    assert_eq!(memory.zones, None);
    assert_eq!(
        MemoryConfig::parse("", NO_ZONES).unwrap(),
        MemoryConfig::default()
    );

    let memory = MemoryConfig::parse(
        "size=0",
        &["id=a,size=1G,host_numa_node=1", "id=b,file=/dev/shm"],
    )
    .unwrap();
    let zones = memory.zones.unwrap();
    assert_eq!(
        (zones[0].id.as_str(), zones[0].size, zones[0].host_numa_node),
        ("a", 1 << 30, Some(1))
    );
    assert_eq!(
        (zones[1].size, zones[1].file.clone()),
        (DEFAULT_MEMORY_BYTES, Some(PathBuf::from("/dev/shm")))
    );

    let error = MemoryConfig::parse("size=0", &["size=1G"]).unwrap_err();
    assert_eq!(
        error_chain(&error),
        [
            "Error parsing --memory-zone",
            "parameter \"id\" is required"
        ]
    );
}

const NO_ZONES: &[&str] = &[];

#[test]
fn cpus_option_max_follows_boot() {
    assert_eq!(CpusConfig::parse("").unwrap(), CpusConfig::default());
    let cpus = CpusConfig::parse("boot=4").unwrap();
    assert_eq!((cpus.boot_vcpus, cpus.max_vcpus), (4, 4));
    let cpus = CpusConfig::parse("boot=2,max=8,topology=2:2:1:2,affinity=[0@[1,2],1@3],features=amx,nested=off,core_scheduling=off").unwrap();
    assert_eq!(
        (
            cpus.boot_vcpus,
            cpus.max_vcpus,
            cpus.features.amx,
            cpus.nested
        ),
        (2, 8, true, false)
    );
    let topology = CpuTopology {
        threads_per_core: 2,
        cores_per_die: 2,
        dies_per_package: 1,
        packages: 2,
    };
    assert_eq!(cpus.topology, Some(topology));
    let pins = |vcpu, host_cpus: &[usize]| CpuAffinity {
        vcpu,
        host_cpus: host_cpus.to_vec(),
    };
    assert_eq!(cpus.affinity, Some(vec![pins(0, &[1, 2]), pins(1, &[3])]));
    assert_eq!(cpus.core_scheduling, CoreScheduling::Off);
    for text in [
        "boot=x",
        "boot=-1",
        "topology=1:2",
        "topology=1:2:3:4:5",
        "features=avx",
        "core_scheduling=on",
        "profile=p",
    ] {
        assert!(CpusConfig::parse(text).is_err(), "{text}");
    }
}

#[test]
fn disk_option_reads_image_queues_and_limits() {
    let disk = DiskConfig::parse("path=/d.img,readonly=on,num_queues=4,queue_size=256,image_type=raw,serial=s,queue_affinity=[0@[1-2]]").unwrap();
    assert_eq!(disk.path, Some(PathBuf::from("/d.img")));
    assert_eq!(
        (disk.readonly, disk.num_queues, disk.queue_size),
        (true, 4, 256)
    );
    assert_eq!((disk.image_type, disk.sparse), (Some(ImageType::Raw), true));
    assert_eq!(disk.queue_affinity.unwrap()[0].host_cpus, [1, 2]);

    let disk =
        DiskConfig::parse("path=/d,bw_size=10M,bw_one_time_burst=1kib,bw_refill_time=9").unwrap();
    let bandwidth = disk.rate_limiter_config.unwrap().bandwidth.unwrap();
    assert_eq!(
        (bandwidth.size, bandwidth.one_time_burst),
        (10 << 20, Some(1024))
    );
    assert!(DiskConfig::parse("path=/d,ops_size=10M,ops_refill_time=9").is_err());
    let disk = DiskConfig::parse("path=/d,bw_size=1000,bw_refill_time=100,ops_size=5").unwrap();
    let bandwidth = TokenBucket {
        size: 1000,
        one_time_burst: None,
        refill_time: 100,
    };
    assert_eq!(
        disk.rate_limiter_config,
        Some(RateLimiterConfig {
            bandwidth: Some(bandwidth),
            ops: None
        })
    );

    assert_eq!(
        DiskConfig::parse("path=/d").unwrap(),
        DiskConfig {
            path: Some("/d".into()),
            ..Default::default()
        }
    );
    for text in [
        "path=/d,image_type=iso",
        "queue_size=65536",
        "readonly=maybe",
        "/d",
    ] {
        assert!(DiskConfig::parse(text).is_err(), "{text}");
    }
}

#[test]
fn net_option_reads_addresses_and_descriptors() {
    let net = NetConfig::parse(
        "tap=t0,ip=10.0.0.1,mask=255.255.255.0,mac=12:34:56:78:90:ab,mtu=1400,offload_tso=off",
    )
    .unwrap();
    assert_eq!(
        (net.tap.as_deref(), net.ip, net.mtu),
        (Some("t0"), "10.0.0.1".parse().ok(), Some(1400))
    );
    assert_eq!(
        (net.mac.0[5], net.offload_tso, net.offload_csum),
        (0xab, false, true)
    );
    assert_eq!(
        NetConfig::parse("fd=[3,4],num_queues=4").unwrap().fds,
        Some(vec![3, 4])
    );
    assert_eq!(NetConfig::parse("fd=7").unwrap().fds, Some(vec![7]));
    for text in [
        "ip=1.2.3",
        "mac=zz",
        "mtu=70000",
        "fd=[4294967296]",
        "vhost_mode=peer",
    ] {
        assert!(NetConfig::parse(text).is_err(), "{text}");
    }
}

#[test]
fn console_options_take_exactly_one_output() {
    for (text, mode) in [
        ("off", ConsoleOutputMode::Off),
        ("null", ConsoleOutputMode::Null),
        ("pty", ConsoleOutputMode::Pty),
        ("tty", ConsoleOutputMode::Tty),
        ("file=/x", ConsoleOutputMode::File),
        ("socket=/x", ConsoleOutputMode::Socket),
    ] {
        assert_eq!(SerialConfig::parse(text).unwrap().mode, mode);
        assert_eq!(
            ConsoleConfig::parse(&format!("{text},iommu=on"))
                .unwrap()
                .mode,
            mode
        );
    }
    assert_eq!(
        SerialConfig::parse("file=/x").unwrap().file,
        Some("/x".into())
    );
    for text in [
        "",
        "tty,off",
        "tty,file=/x",
        "file=",
        "stdout",
        "iommu=on",
        "tty=on",
    ] {
        assert!(SerialConfig::parse(text).is_err(), "{text}");
    }
}

#[test]
fn debug_console_option_reads_hexadecimal_ports() {
    let console = DebugConsoleConfig::parse("file=/x,iobase=0x402").unwrap();
    assert_eq!(
        (console.mode, console.iobase),
        (ConsoleOutputMode::File, Some(0x402))
    );
    assert_eq!(
        DebugConsoleConfig::parse("off").unwrap(),
        DebugConsoleConfig::default()
    );
    assert_eq!(
        DebugConsoleConfig::parse("null").unwrap().mode,
        ConsoleOutputMode::Null
    );
    assert!(DebugConsoleConfig::parse("socket=/x").is_err());
    assert!(DebugConsoleConfig::parse("tty,iobase=0x10000").is_err());
}

#[test]
fn rng_and_platform_options_read_their_keys() {
    assert_eq!(RngConfig::parse("").unwrap(), RngConfig::default());
    assert_eq!(
        RngConfig::parse("src=/dev/random").unwrap().src,
        PathBuf::from("/dev/random")
    );
    assert_eq!(
        PlatformConfig::parse("").unwrap(),
        PlatformConfig::default()
    );
    let platform =
        PlatformConfig::parse("serial_number=s,oem_strings=[\"a,b\",c],iommu_segments=[0-2]")
            .unwrap();
    assert_eq!(platform.system_serial_number.as_deref(), Some("s"));
    assert_eq!(
        platform.oem_strings,
        Some(vec!["a,b".to_owned(), "c".to_owned()])
    );
    assert_eq!(platform.iommu_segments, Some(vec![0, 1, 2]));
}

#[test]
fn sockets_are_paths_or_descriptors() {
    let path = |text: &str| PathOrFd::Path(PathBuf::from(text));
    assert_eq!(
        PathOrFd::parse_api_socket("/run/ch.sock").unwrap(),
        path("/run/ch.sock")
    );
    assert_eq!(
        PathOrFd::parse_api_socket("path=/run/ch.sock").unwrap(),
        path("/run/ch.sock")
    );
    assert_eq!(PathOrFd::parse_api_socket("fd=5").unwrap(), PathOrFd::Fd(5));
    assert_eq!(
        PathOrFd::parse_event_monitor("path=/e").unwrap(),
        path("/e")
    );
    for text in ["", "fd=x", "fd=-1", "path=/a,fd=3", "path="] {
        assert!(PathOrFd::parse_api_socket(text).is_err(), "{text}");
        assert!(PathOrFd::parse_event_monitor(text).is_err(), "{text}");
    }
    assert!(PathOrFd::parse_event_monitor("/e").is_err());
}

#[test]
fn help_shows_the_keys_of_a_section_with_their_values() {
    assert_eq!(
        DiskConfig::syntax(),
        "Disk parameters \"path=<disk_image_path>,readonly=on|off,direct=on|off,iommu=on|off,\
         num_queues=<number_of_queues>,queue_size=<size_of_each_queue>,vhost_user=on|off,\
         socket=<vhost_user_socket_path>,rate_limit_group=<group_id>,bw_size=<bytes>,bw_one_time_burst=<bytes>,\
         bw_refill_time=<ms>,ops_size=<io_ops>,ops_one_time_burst=<io_ops>,ops_refill_time=<ms>,id=<device_id>,\
         pci_segment=<segment_id>,pci_device_id=<pci_slot>,serial=<serial_number>,\
         queue_affinity=<list_of_queue_indices_with_their_associated_cpuset>,backing_files=on|off,sparse=on|off,\
         image_type=vmdk|vhd|qcow2|raw|vhdx,lock_granularity=byte-range|full\""
    );
    assert_eq!(
        ConsoleConfig::syntax(),
        "Configure the virtio console: \"off|null|pty|tty|file=<path>|socket=<path>,file_bytes_max=<size>,iommu=on|off,\
         id=<device_id>,pci_segment=<segment_id>,pci_device_id=<pci_slot>\""
    );
    // Known only so that they can be rejected by name.
    for hidden in ["tdx", "sev_snp", "uuid"] {
        assert!(!PlatformConfig::syntax().contains(&format!(",{hidden}=")));
        assert!(PlatformConfig::parse(&format!("{hidden}=on")).is_ok());
    }
}

#[test]
fn unknown_key_lists_the_keys_of_the_help_only() {
    let known = |error: OptionError| {
        error_chain(&error)[1]
            .split_once("; known are ")
            .unwrap()
            .1
            .to_owned()
    };
    let disk = known(DiskConfig::parse("path=/d,xyzzy=1").unwrap_err());
    assert!(disk.starts_with("path, readonly, direct, iommu"), "{disk}");
    assert!(
        disk.ends_with("sparse, image_type, lock_granularity"),
        "{disk}"
    );
    let serial = known(SerialConfig::parse("xyzzy=1").unwrap_err());
    assert_eq!(serial, "file, socket, file_bytes_max, off, null, pty, tty");
}

#[test]
fn unknown_key_of_a_section_names_the_one_it_resembles() {
    let error = DiskConfig::parse("path=/d,read_only=on").unwrap_err();
    let text = error_line(&error);
    assert!(
        text.contains("unknown parameter \"read_only\" (did you mean \"readonly\"?)"),
        "{text}"
    );
    let error = CpusConfig::parse("profile=p").unwrap_err();
    assert!(error_chain(&error)[1].contains("not supported"));
}

#[test]
fn sections_parsed_from_options_survive_json() {
    let net = NetConfig::parse("tap=t0,ip=10.0.0.1,bw_size=1,bw_refill_time=2").unwrap();
    assert_eq!(
        serde_json::from_value::<NetConfig>(serde_json::to_value(&net).unwrap()).unwrap(),
        net
    );
    let disk =
        DiskConfig::parse("path=/d,image_type=vhd,queue_affinity=[0@[1-2]],lock_granularity=full")
            .unwrap();
    assert_eq!(
        serde_json::from_value::<DiskConfig>(serde_json::to_value(&disk).unwrap()).unwrap(),
        disk
    );
    let cpus = CpusConfig::parse("boot=2,topology=1:2:1:1,affinity=[0@[1,2]]").unwrap();
    assert_eq!(
        serde_json::from_value::<CpusConfig>(serde_json::to_value(&cpus).unwrap()).unwrap(),
        cpus
    );
}
