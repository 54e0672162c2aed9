//! The command line, and conversion to a configuration.

use std::path::PathBuf;

use api::config::{
    BalloonConfig, ConsoleConfig, CpusConfig, DebugConsoleConfig, DeviceConfig, DiskConfig,
    FsConfig, GenericVhostUserConfig, JailConfig, LandlockConfig, MemoryConfig, MemoryZoneConfig,
    NetConfig, NumaConfig, PathOrFd, PayloadConfig, PciSegmentConfig, PlatformConfig, PmemConfig,
    RateLimitGroupConfig, ResourceLimitsConfig, RngConfig, RtcConfig, SerialConfig, VsockConfig,
};
use api::options::{OptionError, parse_bytes};
use api::{RestoreConfig, VmConfig};
use clap::{ArgAction, ArgGroup, Parser, ValueEnum};
use vmm::seccomp::SeccompMode;

/// Run a virtual machine, controlled by options and a REST API.
#[derive(Debug, Parser)]
#[command(
    name = "cloud-hypervisor",
    // For the manual page. The flag itself is declared below, as in upstream.
    version = concat!("v", env!("CARGO_PKG_VERSION")),
    arg_required_else_help = true,
    disable_version_flag = true,
    after_help = "Exit status: 0 the VM was shut down or the VMM stopped (API, SIGTERM, SIGINT), 1 error, 2 usage error, 159 \
                  a system call that seccomp does not allow.\n\n--generate-docs DIR, as the only option, writes \
                  manual pages and completions to DIR.\n\nExamples:\n  \
                  cloud-hypervisor --api-socket path=/run/vm.sock --kernel vmlinuz --disk path=root.raw \
                  --cmdline \"root=/dev/vda\" --memory size=1G --balloon size=0,free_page_reporting=on\n  \
                  cloud-hypervisor --api-socket path=/run/vm.sock --restore source_url=file:///var/lib/vm/saved,resume=true",
    group = ArgGroup::new("payload").args(["kernel", "firmware"]).multiple(true)
)]
pub(crate) struct Arguments {
    #[arg(long, value_name = "api-socket", help = PathOrFd::API_SOCKET_SYNTAX)]
    pub(crate) api_socket: Option<String>,

    #[arg(long, requires = "payload", help = BalloonConfig::syntax())]
    balloon: Option<String>,

    /// Kernel command line
    #[arg(long, requires = "payload", allow_hyphen_values = true)]
    cmdline: Option<String>,

    #[arg(long, requires = "payload", help = with_default(&ConsoleConfig::syntax(), "tty"))]
    console: Option<String>,

    #[arg(long, requires = "payload", help = with_default(&CpusConfig::syntax(), "boot=1"))]
    cpus: Option<String>,

    #[arg(long, value_name = "debug-console", requires = "payload", help = with_default(&DebugConsoleConfig::syntax(), "off"))]
    debug_console: Option<String>,

    #[arg(long, requires = "payload", num_args = 1.., action = ArgAction::Append, help = DeviceConfig::syntax())]
    device: Vec<String>,

    #[arg(long, requires = "payload", num_args = 1.., action = ArgAction::Append, help = DiskConfig::syntax())]
    disk: Vec<String>,

    #[arg(long, value_name = "event-monitor", help = PathOrFd::EVENT_MONITOR_SYNTAX)]
    pub(crate) event_monitor: Option<String>,

    /// Path to firmware, loaded as the architecture requires
    #[arg(long)]
    firmware: Option<PathBuf>,

    #[arg(long, requires = "payload", num_args = 1.., action = ArgAction::Append, help = FsConfig::syntax())]
    fs: Vec<String>,

    #[arg(long, requires = "payload", num_args = 1.., action = ArgAction::Append, help = GenericVhostUserConfig::syntax())]
    generic_vhost_user: Vec<String>,

    /// Run as this group (name or number) [default: the user's group]
    #[arg(long, requires = "user")]
    pub(crate) group: Option<String>,

    /// Path to initramfs image
    #[arg(long, requires = "payload")]
    initramfs: Option<PathBuf>,

    // Without a value, the jail shows only the paths that other options name.
    #[arg(long, num_args = 0.., action = ArgAction::Append, help = JailConfig::syntax())]
    jail: Option<Vec<String>>,

    /// Path to kernel to load: a vmlinux with a PVH entry point, or a bzImage
    #[arg(long)]
    kernel: Option<PathBuf>,

    /// Restrict the VMM to files that its options name; needs Landlock in the kernel
    #[arg(long, requires = "payload")]
    landlock: bool,

    #[arg(long, value_name = "landlock-rules", requires = "landlock", num_args = 1.., action = ArgAction::Append, help = LandlockConfig::syntax())]
    landlock_rules: Vec<String>,

    /// Log file [default: standard error]
    #[arg(long, value_name = "log-file")]
    pub(crate) log_file: Option<PathBuf>,

    /// Size up to which the log file grows; further lines are left out and counted [default: unlimited]
    #[arg(long, value_name = "size", requires = "log_file", value_parser = parse_bytes)]
    pub(crate) log_file_bytes_max: Option<u64>,

    #[arg(long, requires = "payload", help = with_default(&MemoryConfig::syntax(), "size=512M"))]
    memory: Option<String>,

    #[arg(long, value_name = "memory-zone", requires = "payload", num_args = 1.., action = ArgAction::Append, help = MemoryZoneConfig::syntax())]
    memory_zone: Vec<String>,

    #[arg(long, requires = "payload", num_args = 1.., action = ArgAction::Append, help = NetConfig::syntax())]
    net: Vec<String>,

    /// Keep running after the guest powers off; the API can boot it again
    #[arg(long)]
    pub(crate) no_shutdown: bool,

    #[arg(long, requires = "payload", num_args = 1.., action = ArgAction::Append, help = NumaConfig::syntax())]
    numa: Vec<String>,

    #[arg(long, value_name = "pci-segment", requires = "payload", num_args = 1.., action = ArgAction::Append, help = PciSegmentConfig::syntax())]
    pci_segment: Vec<String>,

    #[arg(long, requires = "payload", help = PlatformConfig::syntax())]
    platform: Option<String>,

    #[arg(long, requires = "payload", num_args = 1.., action = ArgAction::Append, help = PmemConfig::syntax())]
    pmem: Vec<String>,

    /// Add a pvpanic device: a guest that panics is reported on the event monitor
    #[arg(long, requires = "payload")]
    pvpanic: bool,

    #[arg(long, value_name = "rate-limit-group", requires = "payload", num_args = 1.., action = ArgAction::Append, help = RateLimitGroupConfig::syntax())]
    rate_limit_group: Vec<String>,

    #[arg(long, value_name = "resource-limits", help = ResourceLimitsConfig::syntax())]
    resource_limits: Option<String>,

    #[arg(long, conflicts_with = "payload", help = RestoreConfig::syntax())]
    restore: Option<String>,

    #[arg(long, requires = "payload", help = with_default(&RngConfig::syntax(), "src=/dev/urandom"))]
    rng: Option<String>,

    #[arg(long, requires = "payload", num_args = 0..=1, default_missing_value = "", help = RtcConfig::syntax())]
    rtc: Option<String>,

    /// Action on a system call that the seccomp filter does not allow
    #[arg(long, value_enum, default_value = "true")]
    pub(crate) seccomp: SeccompArgument,

    #[arg(long, requires = "payload", help = with_default(&SerialConfig::syntax(), "null"))]
    serial: Option<String>,

    /// Run as this user (name or number), without capabilities, once the log file is open
    #[arg(long)]
    pub(crate) user: Option<String>,

    /// Log more: -v info, -vv debug, -vvv trace
    #[arg(short, action = ArgAction::Count)]
    pub(crate) v: u8,

    /// Print version
    #[arg(short = 'V', long)]
    pub(crate) version: bool,

    #[arg(long, requires = "payload", help = VsockConfig::syntax())]
    vsock: Option<String>,

    /// Add a watchdog, which resets a guest that stops pinging it for 20 s
    #[arg(long, requires = "payload")]
    watchdog: bool,
}

/// Value of `--seccomp`.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum SeccompArgument {
    /// End the process with a message
    True,
    /// Install no filters
    False,
    /// Write a record to the kernel log and continue
    Log,
    /// Fail the call
    Errno,
}

impl From<SeccompArgument> for SeccompMode {
    fn from(argument: SeccompArgument) -> Self {
        match argument {
            SeccompArgument::True => Self::Trap,
            SeccompArgument::False => Self::Off,
            SeccompArgument::Log => Self::Log,
            SeccompArgument::Errno => Self::Errno,
        }
    }
}

impl Arguments {
    /// The snapshot to restore at the start, if any.
    ///
    /// # Errors
    /// The option cannot be parsed.
    pub(crate) fn restore_config(&self) -> Result<Option<RestoreConfig>, OptionError> {
        read(&self.restore, RestoreConfig::parse)
    }

    /// The paths that `--jail` shows in addition to those of other options; `None` without a jail.
    ///
    /// # Errors
    /// A value cannot be parsed.
    pub(crate) fn jail(&self) -> Result<Option<Vec<JailConfig>>, OptionError> {
        let parsed = |texts: &Vec<String>| texts.iter().map(|it| JailConfig::parse(it)).collect();
        self.jail.as_ref().map(parsed).transpose()
    }

    /// The limits of the process.
    ///
    /// # Errors
    /// The option cannot be parsed.
    pub(crate) fn resource_limits(&self) -> Result<ResourceLimitsConfig, OptionError> {
        Ok(read(&self.resource_limits, ResourceLimitsConfig::parse)?.unwrap_or_default())
    }

    /// The VM to boot at the start; `None` if the VMM serves only the API.
    ///
    /// # Errors
    /// An option cannot be parsed.
    pub(crate) fn vm_config(&self) -> Result<Option<VmConfig>, OptionError> {
        if self.kernel.is_none() && self.firmware.is_none() {
            return Ok(None);
        }
        let defaults = VmConfig::default();
        let memory = self.memory.as_deref().unwrap_or_default();
        Ok(Some(VmConfig {
            cpus: read(&self.cpus, CpusConfig::parse)?.unwrap_or_default(),
            memory: MemoryConfig::parse(memory, &self.memory_zone)?,
            payload: Some(PayloadConfig {
                firmware: self.firmware.clone(),
                kernel: self.kernel.clone(),
                cmdline: self.cmdline.clone(),
                initramfs: self.initramfs.clone(),
            }),
            rate_limit_groups: read_all(&self.rate_limit_group, RateLimitGroupConfig::parse)?,
            disks: read_all(&self.disk, DiskConfig::parse)?,
            net: read_all(&self.net, NetConfig::parse)?,
            rng: read(&self.rng, RngConfig::parse)?.unwrap_or_default(),
            balloon: read(&self.balloon, BalloonConfig::parse)?,
            serial: read(&self.serial, SerialConfig::parse)?.unwrap_or_default(),
            console: read(&self.console, ConsoleConfig::parse)?.unwrap_or_default(),
            debug_console: read(&self.debug_console, DebugConsoleConfig::parse)?
                .unwrap_or_default(),
            numa: read_all(&self.numa, NumaConfig::parse)?,
            platform: read(&self.platform, PlatformConfig::parse)?,
            pci_segments: read_all(&self.pci_segment, PciSegmentConfig::parse)?,
            fs: read_all(&self.fs, FsConfig::parse)?,
            generic_vhost_user: read_all(&self.generic_vhost_user, GenericVhostUserConfig::parse)?,
            devices: read_all(&self.device, DeviceConfig::parse)?,
            pmem: read_all(&self.pmem, PmemConfig::parse)?,
            vsock: read(&self.vsock, VsockConfig::parse)?,
            watchdog: self.watchdog,
            rtc: read(&self.rtc, RtcConfig::parse)?,
            landlock_enable: self.landlock,
            landlock_rules: read_all(&self.landlock_rules, LandlockConfig::parse)?,
            pvpanic: self.pvpanic,
            ..defaults
        }))
    }
}

/// The help of an option that is in effect without being given.
fn with_default(syntax: &str, default: &str) -> String {
    format!("{syntax} [default: {default}]")
}

type Read<T> = fn(&str) -> Result<T, OptionError>;

fn read<T>(text: &Option<String>, parse: Read<T>) -> Result<Option<T>, OptionError> {
    text.as_deref().map(parse).transpose()
}

/// `None` instead of an empty list if the option is absent, because `vm.info` omits such a section.
fn read_all<T>(texts: &[String], parse: Read<T>) -> Result<Option<Vec<T>>, OptionError> {
    if texts.is_empty() {
        return Ok(None);
    }
    texts
        .iter()
        .map(|text| parse(text))
        .collect::<Result<_, _>>()
        .map(Some)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn parse(line: &str) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(
            ["cloud-hypervisor"]
                .into_iter()
                .chain(line.split_whitespace()),
        )
    }

    #[test]
    fn page_of_the_program_is_that_of_its_command_line() {
        use clap::CommandFactory;
        program_docs::expect_reference(Arguments::command());
    }

    #[test]
    fn defaults_in_the_help_are_those_of_the_configuration() {
        use clap::CommandFactory;
        let given = Arguments::command().get_arguments().fold(
            "--kernel /k".to_owned(),
            |line, argument| {
                let help = argument
                    .get_help()
                    .map(ToString::to_string)
                    .unwrap_or_default();
                let keys = help.contains('"');
                let default = help.split_once(" [default: ").filter(|_| keys);
                match (default, argument.get_long()) {
                    (Some((_, default)), Some(name)) => {
                        format!("{line} --{name} {}", default.trim_end_matches(']'))
                    }
                    _ => line,
                }
            },
        );
        assert_eq!(given.matches(" --").count(), 6, "{given}");
        let config = |line: &str| parse(line).unwrap().vm_config().unwrap();
        assert_eq!(config(&given), config("--kernel /k"));
    }

    #[test]
    fn commands_in_the_documentation_are_understood() {
        for command in test_docs::commands_of("cloud-hypervisor") {
            let has_kernel = command.words.iter().any(|word| word == "--kernel");
            // The missing part is the kernel option or its value.
            let omitted = if has_kernel {
                &["/k"][..]
            } else {
                &["--kernel", "/k"]
            };
            let arguments = Arguments::try_parse_from(command.filled_in(omitted))
                .unwrap_or_else(|error| panic!("{}: {error}", command.place));
            if let Err(error) = arguments.vm_config() {
                panic!("{}: {}", command.place, api::error_line(&error));
            }
        }
    }

    #[test]
    fn unit_runs_a_command_line_that_is_understood_on_a_socket_that_the_agent_finds() {
        let unit = include_str!("../../../fleet/systemd/cloud-hypervisor@.service");
        let agent = include_str!("../../../fleet/systemd/agent.toml");
        assert!(agent.contains("\"/run/ch/*/api.sock\""));
        let value = |key| {
            unit.lines()
                .find_map(|line| line.strip_prefix(key))
                .unwrap()
        };
        let command = value("ExecStart=")
            .replace("$VM_OPTIONS", value("#   VM_OPTIONS="))
            .replace("%i", "web");
        let arguments = Arguments::try_parse_from(command.split(' ')).unwrap();
        let socket = arguments.api_socket.as_deref();
        assert_eq!(socket, Some("/run/ch/web/api.sock"));
        let config = arguments.vm_config().unwrap().unwrap();
        assert!(config.balloon.unwrap().free_page_reporting);
    }

    #[test]
    fn arguments_are_consistent() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }

    #[test]
    fn arguments_full_command_line_makes_the_configuration() {
        let arguments = parse(
            "--api-socket /s --kernel /k --initramfs /i --cmdline console=ttyS0 --cpus boot=2,max=4 \
             --memory size=1G,shared=on --disk path=/a path=/b,readonly=on --disk path=/c --net tap=t0 \
             --balloon size=128M,free_page_reporting=on --serial tty --console off --rng src=/dev/random \
             --event-monitor path=/e --seccomp log --no-shutdown -vv --watchdog --rtc --pci-segment pci_segment=1,mmio64_aperture_weight=3 pci_segment=0 \
             --vsock cid=3,socket=/v --fs tag=a,socket=/a --fs tag=b,socket=/b,num_queues=2 --generic-vhost-user device_type=sound,socket=/g,queue_sizes=[64,32] --landlock --landlock-rules path=/d,access=rw path=/e,access=r \
             --device path=/sys/a path=/sys/b,id=b --pmem file=/m,size=2M,discard_writes=on --pvpanic --debug-console file=/d,iobase=0xe8 \
             --rate-limit-group id=g,bw_size=1000,bw_refill_time=100 id=h,ops_size=1,ops_refill_time=1",
        )
        .unwrap();
        let config = arguments.vm_config().unwrap().unwrap();
        assert_eq!(config.memory.size, 1 << 30);
        assert_eq!(config.cpus.max_vcpus, 4);
        assert_eq!(config.disks.unwrap().len(), 3);
        assert!(config.watchdog && config.landlock_enable);
        assert_eq!(config.rtc, Some(RtcConfig::default()));
        let segments = config.pci_segments.unwrap();
        assert_eq!((segments.len(), segments[0].pci_segment), (2, 1));
        let weights =
            |it: &PciSegmentConfig| (it.mmio32_aperture_weight, it.mmio64_aperture_weight);
        assert_eq!(weights(&segments[0]), (1, 3));
        let rules = config.landlock_rules.unwrap();
        assert_eq!(
            (rules[0].path.to_str(), rules[1].access.as_str()),
            (Some("/d"), "r")
        );
        assert!(config.pvpanic);
        assert_eq!(config.debug_console.iobase, Some(0xe8));
        assert_eq!(config.devices.unwrap()[1].id.as_deref(), Some("b"));
        let pmem = &config.pmem.unwrap()[0];
        assert_eq!((pmem.size, pmem.discard_writes), (Some(2 << 20), true));
        let groups = config.rate_limit_groups.unwrap();
        assert_eq!((groups.len(), groups[0].id.as_str()), (2, "g"));
        let limit = groups[0].rate_limiter_config.unwrap();
        assert_eq!(limit.bandwidth.unwrap().size, 1000);
        assert_eq!(config.vsock.unwrap().cid, 3);
        let generic = &config.generic_vhost_user.unwrap()[0];
        assert_eq!(generic.device_type.0, 25);
        assert_eq!(generic.queue_sizes, [64, 32]);
        let fs = config.fs.unwrap();
        assert_eq!(
            (fs[0].num_queues, fs[1].tag.as_str(), fs[1].num_queues),
            (1, "b", 2)
        );
        assert_eq!(config.balloon.unwrap().size, 128 << 20);
        assert_eq!(
            config.payload.unwrap().cmdline.as_deref(),
            Some("console=ttyS0")
        );
        assert_eq!(arguments.v, 2);
        assert!(arguments.no_shutdown);
        assert_eq!(SeccompMode::from(arguments.seccomp), SeccompMode::Log);
    }

    #[test]
    fn arguments_of_the_process_need_no_vm() {
        let arguments = parse(
            "--api-socket /s --user vm --group kvm --jail path=/a path=/b,access=rw --jail path=/c \
             --resource-limits open_files=4096,file_size=1G,core_size=0",
        )
        .unwrap();
        assert_eq!(arguments.user.as_deref(), Some("vm"));
        assert_eq!(arguments.group.as_deref(), Some("kvm"));
        let jail = arguments.jail().unwrap().unwrap();
        let access: Vec<_> = jail.iter().map(|path| path.access.as_str()).collect();
        assert_eq!(access, ["r", "rw", "r"]);
        let limits = arguments.resource_limits().unwrap();
        let limits = (limits.open_files, limits.file_size, limits.core_size);
        assert_eq!(limits, (Some(4096), Some(1 << 30), Some(0)));

        let alone = parse("--jail --api-socket /s").unwrap();
        assert_eq!(alone.jail().unwrap(), Some(Vec::new()));
        let without = parse("--api-socket /s").unwrap();
        assert_eq!(without.jail().unwrap(), None);
        assert_eq!(without.resource_limits().unwrap().open_files, None);
    }

    #[test]
    fn arguments_zones_and_nodes_make_the_configuration() {
        let arguments = parse(
            "--kernel /k --memory size=0 --memory-zone id=a,size=1G id=b,size=2G,file=/f,shared=on \
             --memory-zone id=c,hugepages=on,hugepage_size=2M,host_numa_node=1,prefault=on \
             --numa guest_numa_id=0,cpus=[0,2-3],memory_zones=[a,b],distances=[1@15] \
             --numa guest_numa_id=1,memory_zones=c",
        )
        .unwrap();
        let config = arguments.vm_config().unwrap().unwrap();
        let zones = config.memory.zones.unwrap();
        assert_eq!(config.memory.size, 0);
        assert_eq!(zones.len(), 3);
        assert!(zones[1].shared && zones[1].file.is_some());
        assert_eq!(zones[2].hugepage_size, Some(2 << 20));
        let nodes = config.numa.unwrap();
        assert_eq!(nodes[0].cpus.as_deref(), Some(&[0, 2, 3][..]));
        assert_eq!(nodes[0].distances.as_ref().unwrap()[0].distance, 15);
        assert_eq!(nodes[1].memory_zones.as_deref().unwrap(), ["c"]);
        for line in [
            "--memory-zone size=1G",
            "--numa cpus=[0]",
            "--numa guest_numa_id=0,distances=[1]",
            "--numa guest_numa_id=0,distances=[1@256]",
        ] {
            let arguments = parse(&format!("--kernel /k {line}")).unwrap();
            assert!(arguments.vm_config().is_err(), "{line}");
        }
    }

    #[test]
    fn arguments_options_of_a_vm_need_a_payload() {
        for line in [
            "--cpus boot=1",
            "--disk path=/a",
            "--api-socket /s --balloon size=0",
            "--cmdline x",
            "--kernel /k --landlock-rules path=/a,access=r",
            "--api-socket /s --landlock",
            "--api-socket /s --log-file-bytes-max 1M",
            "--kernel /k --restore source_url=file:///d",
            "--restore source_url=file:///d --cpus boot=1",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
        assert!(parse("--firmware /f --cpus boot=1").is_ok());
        let restore = parse("--restore source_url=file:///d,resume=on").unwrap();
        assert!(restore.vm_config().unwrap().is_none());
        assert!(restore.restore_config().unwrap().unwrap().resume);
        assert!(
            parse("--api-socket /s")
                .unwrap()
                .vm_config()
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn arguments_unknown_options_and_values_are_refused() {
        for line in [
            "--kernel /k --tpm socket=x",
            "--kernel /k --seccomp maybe",
            "--kernel",
            "",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
        for line in [
            "--kernel /k --balloon size=1G,colour=red",
            "--kernel /k --memory size=much",
            "--kernel /k --fs tag=a",
            "--kernel /k --fs socket=/s",
            "--kernel /k --generic-vhost-user device_type=teapot,socket=/s,queue_sizes=[64]",
            "--kernel /k --pmem size=2M",
            "--kernel /k --vsock cid=3",
            "--kernel /k --vsock socket=/s",
            "--kernel /k --vsock cid=4294967296,socket=/s",
            "--kernel /k --serial teletype",
        ] {
            assert!(parse(line).unwrap().vm_config().is_err(), "{line}");
        }
    }
}
