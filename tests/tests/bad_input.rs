//! Tests bad input on the command line and on the API socket. Each input causes one clear chain of errors and exit
//! status 1 or 4xx, and leaves nothing behind.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::bare_metal::{self, kvm_opens};
use integration_tests::ended::Ended;
use integration_tests::literal_client::{Answer, read_answer};
use integration_tests::paths;
use integration_tests::vmm::{PROCESS_DEADLINE, Vmm};
use integration_tests::wait::wait_for;
use serde_json::{Value, json};
use tempfile::TempDir;
use test_skip::skip;

/// A folder of files to boot from, most of them invalid.
struct Files {
    folder: TempDir,
}

/// The file at `/dev/kvm` for a program.
#[derive(Debug, Clone, Copy)]
enum KvmDevice {
    /// This machine's own device, if there is one.
    Own,
    /// A file that is not KVM.
    Hidden,
}

pub(crate) const HIDE_KVM: &str = "mount --bind /dev/null /dev/kvm && exec \"$@\"";

impl KvmDevice {
    /// Without KVM: errors that must be detected before KVM is opened are still detected.
    fn none() -> Self {
        let hidden = Command::new("unshare")
            .args(["--mount", "sh", "-c", HIDE_KVM, "sh", "true"])
            .output();
        match hidden {
            Ok(output) if output.status.success() => Self::Hidden,
            // There is no device to hide, or no mount namespace can be created.
            _ => Self::Own,
        }
    }
}

impl Files {
    fn new() -> Result<Files> {
        let folder = tempfile::Builder::new().prefix("bad-input-").tempdir()?;
        let put = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes);
        let kernel = fs::read(bare_metal::image()?)?;
        put("kernel", &kernel)?;
        put("truncated", &kernel[..5000])?;
        put("cut-in-its-header", &kernel[..40])?;
        put("no-note", &without_note(&kernel)?)?;
        put("text", &b"no kernel ".repeat(1000))?;
        put("empty", b"")?;
        put("disk", &[0; 1 << 16])?;
        let large = fs::File::create(folder.path().join("large"))?;
        large.set_len(1 << 30)?;
        fs::create_dir(folder.path().join("folder"))?;
        let made = Command::new("mkfifo")
            .arg(folder.path().join("fifo"))
            .status()?;
        ensure!(made.success(), "mkfifo");
        Ok(Files { folder })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn names(&self) -> Result<BTreeSet<String>> {
        names(self.folder.path())
    }

    /// Runs the VMM in this folder with an API socket until it exits, with `kvm` as `/dev/kvm`.
    fn run(&self, kvm: KvmDevice, arguments: &str) -> Result<Ended> {
        let program = paths::program("cloud-hypervisor")?;
        let mut command = match kvm {
            KvmDevice::Own => Command::new(program),
            KvmDevice::Hidden => {
                let mut command = Command::new("unshare");
                command.args(["--mount", "sh", "-c", HIDE_KVM, "sh"]);
                command.arg(program);
                command
            }
        };
        Ended::run(
            command
                .current_dir(self.folder.path())
                .args(["--api-socket", "api.sock", "--console", "off"])
                .args(arguments.split_whitespace()),
        )
    }
}

fn names(folder: &Path) -> Result<BTreeSet<String>> {
    fs::read_dir(folder)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// The kernel with a changed owner name in its note.
fn without_note(kernel: &[u8]) -> Result<Vec<u8>> {
    let mut other = kernel.to_vec();
    let at = kernel
        .windows(8)
        .position(|bytes| bytes == b"\x12\0\0\0Xen\0")
        .context("the kernel has no PVH note")?;
    other[at + 4..at + 7].copy_from_slice(b"Nex");
    Ok(other)
}

/// Arguments, and texts that the chain must have in this order.
type Case<'a> = (&'a str, &'a [&'a str]);

/// None of this may depend on KVM.
fn each_ends_in_one_chain(cases: &[Case<'_>]) -> Result<()> {
    each_ends_with(KvmDevice::none(), cases)
}

fn each_ends_with(kvm: KvmDevice, cases: &[Case<'_>]) -> Result<()> {
    let files = Files::new()?;
    let before = files.names()?;
    for (arguments, texts) in cases {
        let chain = files
            .run(kvm, arguments)
            .and_then(|ended| ended.chain("Cloud Hypervisor"))
            .with_context(|| (*arguments).to_owned())?;
        let mut links = chain.iter();
        for text in *texts {
            ensure!(
                links.any(|link| link.contains(text)),
                "{arguments}: no {text:?} in {chain:?}"
            );
        }
        ensure!(files.names()? == before, "{arguments}: {:?}", files.names());
    }
    Ok(())
}

const PAYLOAD: &str = "Cannot load the payload";

#[test]
fn bad_payload_ends_in_one_chain() -> Result<()> {
    each_ends_in_one_chain(&[
        ("--kernel no-note", &[PAYLOAD, "no-note has no PVH header"]),
        (
            "--kernel truncated",
            &[PAYLOAD, "truncated is truncated: 5000 bytes"],
        ),
        ("--kernel cut-in-its-header", &[PAYLOAD, "is truncated"]),
        (
            "--kernel text",
            &[PAYLOAD, "neither a 64-bit ELF image nor a bzImage"],
        ),
        (
            "--kernel empty",
            &[PAYLOAD, "neither a 64-bit ELF image nor a bzImage"],
        ),
        ("--kernel folder", &[PAYLOAD, "not a regular file"]),
        ("--kernel fifo", &[PAYLOAD, "not a regular file"]),
        (
            "--kernel missing",
            &[PAYLOAD, "Cannot open missing", "No such file"],
        ),
        (
            "--firmware missing",
            &[PAYLOAD, "Cannot open missing", "No such file"],
        ),
        (
            "--kernel kernel --initramfs missing",
            &["Cannot open missing", "No such file"],
        ),
        ("--kernel kernel --initramfs fifo", &["not a regular file"]),
        (
            "--kernel kernel --initramfs large",
            &["large has 1073741824 bytes"],
        ),
        (
            "--kernel kernel --firmware kernel",
            &["Firmware cannot be given together"],
        ),
    ])
}

#[test]
fn bad_sizes_end_in_one_chain() -> Result<()> {
    const MEMORY: &str = "Invalid memory configuration";
    each_ends_in_one_chain(&[
        ("--kernel kernel --memory size=0", &[MEMORY, "size is 0"]),
        ("--kernel kernel --memory size=64K", &[MEMORY, "less than"]),
        (
            "--kernel kernel --memory size=536870913",
            &[MEMORY, "not a multiple of 4096"],
        ),
        (
            "--kernel kernel --memory size=70368744177664",
            &[MEMORY, "does not fit"],
        ),
        (
            "--kernel kernel --memory size=18446744073709547520",
            &[MEMORY, "does not fit"],
        ),
        (
            "--kernel kernel --memory size=18446744073709551616",
            &["--memory", "64 bits"],
        ),
        (
            "--kernel kernel --memory size=17179869184G",
            &["--memory", "64 bits"],
        ),
        ("--kernel kernel --memory size=-1", &["--memory", "size"]),
        ("--kernel kernel --memory size=much", &["--memory", "size"]),
        (
            "--kernel kernel --balloon size=512M",
            &["leaves the guest none of its"],
        ),
        (
            "--kernel kernel --cpus boot=0",
            &["Invalid CPU configuration"],
        ),
        (
            "--kernel kernel --cpus boot=100000",
            &["Invalid CPU configuration"],
        ),
        (
            "--kernel kernel --cpus boot=2,max=1",
            &["Invalid CPU configuration"],
        ),
        (
            "--kernel kernel --cpus affinity=[0@[9999]]",
            &["Cannot pin vCPU 0 to host CPU 9999"],
        ),
        (
            "--kernel kernel --disk path=disk,image_type=raw,queue_size=3",
            &["queue_size must be a power of two between 2 and 1024; got 3"],
        ),
        (
            "--kernel kernel --disk path=disk,image_type=raw,num_queues=0",
            &["num_queues must be between 1 and 1 (at most one per vCPU); got 0"],
        ),
        (
            "--kernel kernel --net num_queues=1",
            &[
                "num_queues must be between 2 and 3 (at most one pair per vCPU, and a control queue); got 1",
            ],
        ),
        (
            "--kernel kernel --net num_queues=4",
            &[
                "num_queues must be between 2 and 3 (at most one pair per vCPU, and a control queue); got 4",
            ],
        ),
        ("--kernel kernel --net mtu=5", &["MTU of 5"]),
    ])
}

#[test]
fn ram_that_kvm_refuses_ends_in_one_chain() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    // More than any host has, and more than KVM accepts in one slot.
    let arguments = "--kernel kernel --memory size=30000G";
    each_ends_with(
        KvmDevice::Own,
        &[(arguments, &["Cannot create guest memory"])],
    )
}

#[test]
fn bad_zones_end_in_one_chain() -> Result<()> {
    const ZONES: &str = "--kernel kernel --memory size=0 --memory-zone";
    const MEMORY: &str = "Invalid memory configuration";
    const MAKE: &[&str] = &["Cannot create guest memory", "memory zone a"];
    let zones = |zones: &str| format!("{ZONES} {zones}");
    let cannot_make = |reason| [MAKE, &[reason]].concat();
    each_ends_in_one_chain(&[
        (
            "--kernel kernel --memory-zone id=a,size=1G",
            &[MEMORY, "must be 0 when zones"],
        ),
        (&zones("size=1G"), &["--memory-zone", "\"id\""]),
        (
            &zones("id=a,size=1G,hotplug_size=1G"),
            &[
                MEMORY,
                "zone a",
                "hotplug_size of a zone requires hotplug_method=virtio-mem",
            ],
        ),
        (
            &zones("id=a,size=1000"),
            &[MEMORY, "zone a", "not a multiple"],
        ),
        (
            &zones("id=a,size=512M id=a,size=512M"),
            &["a is not unique"],
        ),
        (
            &zones("id=a,size=1G,hugepage_size=2M"),
            &[MEMORY, "zone a", "requires hugepages=on"],
        ),
        (
            &zones("id=a,size=1G --numa guest_numa_id=0,memory_zones=[b]"),
            &["Invalid NUMA configuration", "zone \"b\""],
        ),
        // Errors that only the host can detect.
        (
            &zones("id=a,size=512M,file=none"),
            &cannot_make("Cannot open none"),
        ),
        (
            &zones("id=a,size=512M,file=disk,shared=on"),
            &cannot_make("disk of 65536 bytes is too small"),
        ),
        (
            &zones("id=a,size=512M,file=fifo"),
            &cannot_make("neither a file nor a directory"),
        ),
        (
            &zones("id=a,size=512M,file=/dev/null,shared=on"),
            &cannot_make("neither a file nor a directory"),
        ),
        (
            &zones("id=a,size=512M,file=folder,hugepages=on"),
            &cannot_make("not on a file system of huge pages"),
        ),
        (
            &zones("id=a,size=512M,host_numa_node=1000"),
            &cannot_make("NUMA node 1000"),
        ),
        (&zones("id=a,size=1T,hugepages=on,hugepage_size=2M"), MAKE),
        (
            &zones("id=a,size=512M,file=large,shared=on id=b,size=512M,file=large"),
            &["Cannot create guest memory", "zones a and b"],
        ),
    ])
}

#[test]
fn bad_devices_end_in_one_chain() -> Result<()> {
    const DISK: &str = "--kernel kernel --disk path=disk,image_type=raw";
    let with_disk = |more: &str| format!("{DISK}{more}");
    each_ends_in_one_chain(&[
        (
            &with_disk(",id=a path=text,id=a"),
            &["Identifier a is not unique"],
        ),
        (
            &with_disk(",id=a --net id=a"),
            &["Identifier a is not unique"],
        ),
        (&with_disk(",id=__a"), &["Identifier \"__a\" is invalid"]),
        (
            &with_disk(" path=disk,image_type=raw"),
            &["used by two disks"],
        ),
        (
            &with_disk(",pci_device_id=5 --balloon size=0,pci_device_id=5"),
            &["Valid PCI device identifier but already used: 5"],
        ),
        (
            &with_disk(",pci_device_id=32"),
            &["Given PCI device ID (32) is out of the supported range of 0..32"],
        ),
        (
            "--kernel kernel --disk path=missing,image_type=raw",
            &["_disk0", "missing", "No such"],
        ),
        (
            "--kernel kernel --disk path=folder,image_type=raw",
            &["_disk0", "folder"],
        ),
        (
            "--kernel kernel --disk path=fifo,image_type=raw",
            &["_disk0", "fifo"],
        ),
        (
            "--kernel kernel --device path=missing",
            &["_vfio", "missing is not the folder", "No such"],
        ),
        (
            "--kernel kernel --disk readonly=on",
            &["A path is required"],
        ),
        (
            "--kernel kernel --rng src=missing",
            &["entropy source missing", "No such file"],
        ),
        (
            "--kernel kernel --net tap=a-name-that-is-too-long",
            &["_net0", "a-name-that-is-too-long"],
        ),
        ("--kernel kernel --net tap=lo", &["_net0", "lo"]),
        ("--kernel kernel --net fd=[77]", &["_net0", "descriptor 77"]),
        (
            "--kernel kernel --net ip=300.0.0.1",
            &["--net", "300.0.0.1"],
        ),
        (
            "--kernel kernel --net mac=01:00:00:00:00:00",
            &["01:00:00:00:00:00"],
        ),
        (
            "--kernel kernel --serial file=missing/serial",
            &["__serial", "No such file"],
        ),
        (
            "--kernel kernel --serial file=folder",
            &["__serial", "folder"],
        ),
        (
            "--kernel kernel --serial tty --event-monitor path=missing/e",
            &["missing/e", "No such"],
        ),
        ("--kernel kernel --event-monitor fd=77", &["descriptor 77"]),
        (
            "--kernel kernel --log-file missing/log",
            &["log file", "No such file"],
        ),
    ])
}

#[test]
fn unknown_keys_of_every_option_end_in_one_chain() -> Result<()> {
    for option in [
        "cpus",
        "memory",
        "disk",
        "net",
        "balloon",
        "rng",
        "serial",
        "platform",
        "event-monitor",
    ] {
        let arguments = format!("--kernel kernel --{option} colour=red");
        let known = format!("--{option}");
        each_ends_in_one_chain(&[(&arguments, &[&known, "\"colour\""])])
            .with_context(|| arguments.clone())?;
    }
    Ok(())
}

/// The tap is created and the threads are started before the boot fails.
#[test]
fn boot_that_fails_late_leaves_no_tap_behind() -> Result<()> {
    if !Path::new("/dev/net/tun").exists() {
        skip("no /dev/net/tun");
        return Ok(());
    }
    let name = format!("bad{}", std::process::id());
    let arguments = format!("--kernel truncated --net tap={name} --cpus boot=2");
    each_ends_in_one_chain(&[(&arguments, &[PAYLOAD, "is truncated"])])?;
    ensure!(!Path::new("/sys/class/net").join(&name).exists(), "{name}");
    Ok(())
}

#[test]
fn usage_errors_and_help_print_what_is_expected() -> Result<()> {
    let files = Files::new()?;
    let program = paths::program("cloud-hypervisor")?;
    let run = |arguments: &[&str]| Ended::run(Command::new(&program).args(arguments));
    let help = run(&["--help"])?;
    for option in [
        "api-socket",
        "balloon",
        "cmdline",
        "console",
        "cpus",
        "disk",
        "event-monitor",
        "firmware",
        "initramfs",
        "kernel",
        "log-file",
        "memory",
        "net",
        "no-shutdown",
        "platform",
        "rng",
        "seccomp",
        "serial",
        "version",
    ] {
        ensure!(help.output()?.contains(&format!("--{option}")), "{option}");
    }
    let nothing = run(&[])?;
    ensure!(
        nothing.stderr.contains("Usage: cloud-hypervisor"),
        "{nothing:?}"
    );
    ensure!(nothing.code == Some(2), "{nothing:?}");
    for arguments in [
        &["--colour", "red"][..],
        &["--kernel"],
        &["--balloon", "size=0"],
        &["--seccomp", "maybe", "--kernel", "x"],
        &["kernel"],
    ] {
        let refused = run(arguments)?;
        ensure!(refused.code == Some(2), "{refused:?}");
        ensure!(refused.stderr.starts_with("error: "), "{refused:?}");
    }
    let version = run(&["--version"])?;
    ensure!(
        version.output()?.starts_with("cloud-hypervisor v"),
        "{version:?}"
    );
    ensure!(
        version.stdout.contains("\nMigration Protocol Versions: "),
        "{version:?}"
    );
    ensure!(!files.path("api.sock").exists(), "no option made a socket");
    Ok(())
}

#[test]
fn socket_in_use_is_refused_and_its_owner_goes_on() -> Result<()> {
    let mut vmm = Vmm::start(&[])?;
    let second = Ended::run(
        Command::new(paths::program("cloud-hypervisor")?)
            .arg("--api-socket")
            .arg(vmm.socket()),
    )?;
    let chain = second.chain("Cloud Hypervisor")?;
    ensure!(chain[0].contains("in use by another process"), "{chain:?}");
    vmm.get("vmm.ping")?;
    vmm.put("vmm.shutdown", None)?;
    vmm.expect_clean_exit(PROCESS_DEADLINE)?;
    let left = names(vmm.folder())?;
    ensure!(left.iter().all(|name| name.starts_with("std")), "{left:?}");
    Ok(())
}

#[test]
fn bad_configurations_over_the_api_are_refused_at_boot_and_leave_nothing() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let files = Files::new()?;
    let kernel = files.path("kernel");
    let disk = files.path("disk");
    let with = |section: &str, value: Value| {
        let mut config = json!({ "payload": { "kernel": kernel }, "console": { "mode": "Off" } });
        config[section] = value;
        config
    };
    let cases = [
        (400, with("payload", json!({}))),
        (400, with("memory", json!({ "size": 0 }))),
        (400, with("memory", json!({ "size": u64::MAX }))),
        (400, with("balloon", json!({ "size": u64::MAX }))),
        (
            400,
            with("cpus", json!({ "boot_vcpus": 0, "max_vcpus": 0 })),
        ),
        (
            409,
            with(
                "disks",
                json!([{ "path": disk, "id": "a" }, { "path": kernel, "id": "a" }]),
            ),
        ),
        (400, with("net", json!([{ "fds": [77] }]))),
        (
            500,
            with("disks", json!([{ "path": files.path("missing") }])),
        ),
        (
            500,
            with("payload", json!({ "kernel": files.path("no-note") })),
        ),
        (
            500,
            with("payload", json!({ "kernel": files.path("truncated") })),
        ),
    ];
    let mut vmm = Vmm::start(&[])?;
    // A thread has its creator's name until it has run for the first time.
    let before = wait_for("the name of the control thread", PROCESS_DEADLINE, || {
        let now = vmm.possessions()?;
        Ok(now.1.contains("vmm").then_some(now))
    })?;
    for (status, config) in cases {
        vmm.put("vm.create", Some(&config.to_string()))?;
        for _ in 0..2 {
            let answer = vmm.request("PUT", "vm.boot", None)?;
            ensure!(answer.status == status, "{config}: {answer:?}");
            expect_error_chain(&answer)?;
        }
        vmm.put("vm.delete", None)?;
        // Ended threads disappear from the list with a delay.
        wait_for("threads and descriptors gone", PROCESS_DEADLINE, || {
            Ok((vmm.possessions()? == before).then_some(()))
        })
        .with_context(|| format!("{config}: {before:?}, {:?}", vmm.possessions()))?;
    }
    let good = with(
        "payload",
        json!({ "kernel": kernel, "cmdline": "scenario=spin" }),
    );
    vmm.put("vm.create", Some(&good.to_string()))?;
    vmm.put("vm.boot", None)?;
    vmm.put("vmm.shutdown", None)?;
    vmm.expect_clean_exit(PROCESS_DEADLINE)
}

fn expect_error_chain(answer: &Answer) -> Result<()> {
    let body = answer.json()?;
    let links = body.as_array().context("the body is no array")?;
    ensure!(
        links.len() > 1 && links.iter().all(Value::is_string) && links[0] == "Error from API",
        "{answer:?}"
    );
    Ok(())
}

/// Writes `bytes`, and reads one response.
fn raw(vmm: &Vmm, bytes: &[u8]) -> Result<Answer> {
    let mut stream = UnixStream::connect(vmm.socket())?;
    stream.set_read_timeout(Some(PROCESS_DEADLINE))?;
    stream.write_all(bytes)?;
    read_answer(&mut stream)
}

#[test]
fn requests_that_make_no_sense_are_refused_and_harm_nobody() -> Result<()> {
    let vmm = Vmm::start(&[])?;
    for body in [
        "",
        "{",
        "nonsense",
        "[]",
        "null",
        "\"\\ud800\"",
        "{\"payload\":7}",
        "{}{}",
    ] {
        let answer = vmm.request("PUT", "vm.create", Some(body))?;
        ensure!(answer.status == 400, "{body}: {answer:?}");
    }
    let answer = vmm.request("PUT", "vm.create", Some("{"))?;
    ensure!(
        answer.json()?[0] == "Failed to deserialize JSON",
        "{answer:?}"
    );
    for text in [
        "nonsense\r\n\r\n",
        "GET /api/v1/vmm.ping\r\n\r\n",
        "GET /api/v1/vmm.ping HTTP/9.9\r\n\r\n",
        "PATCH /api/v1/vmm.ping HTTP/1.1\r\n\r\n",
        "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
        "\0\0\0\0\r\n\r\n",
    ] {
        let answer = raw(&vmm, text.as_bytes())?;
        ensure!(answer.status == 400, "{text:?}: {answer:?}");
    }
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(100_000));
    let answer = raw(&vmm, long.as_bytes())?;
    ensure!((400..500).contains(&answer.status), "{answer:?}");
    vmm.get("vmm.ping")?;
    Ok(())
}

#[test]
fn body_of_five_mebibytes_is_refused_and_one_of_three_is_read() -> Result<()> {
    let vmm = Vmm::start(&[])?;
    let padded = |bytes: usize| format!("{{\"payload\":{{}},\"pad\":\"{}\"}}", "x".repeat(bytes));
    let answer = vmm.request("PUT", "vm.create", Some(&padded(5 << 20)))?;
    ensure!((400..500).contains(&answer.status), "{}", answer.status);
    vmm.put("vm.create", Some(&padded(3 << 20)))?;
    // The memory used for that has been freed.
    let peak = vmm.resident_bytes()?;
    ensure!(peak < 16 << 20, "{peak}");
    Ok(())
}

/// The body may have 4 MiB, and the process may grow by a few times that: parsing must not multiply memory use.
#[test]
fn body_of_many_small_values_does_not_grow_the_vmm() -> Result<()> {
    let vmm = Vmm::start(&[])?;
    let list = |value: &str, count: usize| vec![value; count].join(",");
    let disks = |disk: &str, count| format!("{{\"disks\":[{}]}}", list(disk, count));
    let affinity = |lists, count| {
        let cpus = format!("{{\"vcpu\":0,\"host_cpus\":[{}]}}", list("0", count));
        let pins = list(&cpus, lists);
        format!("{{\"cpus\":{{\"boot_vcpus\":1,\"max_vcpus\":1,\"affinity\":[{pins}]}}}}")
    };
    for body in [
        disks("{}", 1_390_000),
        disks("[]", 1_390_000),
        disks("{\"path\":\"\"}", 320_000),
        affinity(1, 2_000_000),
    ] {
        ensure!(body.len() <= 4 << 20, "{}", body.len());
        let answer = vmm.request("PUT", "vm.create", Some(&body))?;
        ensure!(answer.status == 400, "{answer:?}");
        let cause = answer.json()?[1].to_string();
        ensure!(cause.contains("the body has more than"), "{cause}");
    }
    // The maximum that is accepted. The second one is rejected only because a configuration already exists.
    vmm.put("vm.create", Some(&disks("{\"path\":\"/d\"}", 8192)))?;
    let answer = vmm.request("PUT", "vm.create", Some(&affinity(31, 8192)))?;
    ensure!(answer.status == 500, "{answer:?}");
    let peak = vmm.peak_resident_bytes()?;
    ensure!(peak < 40 << 20, "{peak}");
    Ok(())
}

#[test]
fn empty_body_in_chunks_is_none_and_two_lengths_are_refused() -> Result<()> {
    let vmm = Vmm::start(&[])?;
    let head = "PUT /api/v1/vm.delete HTTP/1.1\r\nHost: x\r\n";
    let answer = raw(
        &vmm,
        format!("{head}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n").as_bytes(),
    )?;
    ensure!(answer.status == 204, "{answer:?}");
    for lengths in [
        "Content-Length: 0\r\nContent-Length: 1\r\n",
        "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n",
    ] {
        let answer = raw(&vmm, format!("{head}{lengths}\r\n0\r\n\r\n").as_bytes())?;
        ensure!(answer.status == 400, "{answer:?}");
    }
    Ok(())
}

#[test]
fn clients_that_stop_half_way_delay_nobody_and_are_dropped() -> Result<()> {
    const HALVES: &[&str] = &[
        "",
        "PUT /api",
        "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Le",
        "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 100\r\n\r\n{\"payload\":",
    ];
    let vmm = Vmm::start(&[])?;
    let mut halves = HALVES
        .iter()
        .map(|text| {
            let mut stream = UnixStream::connect(vmm.socket())?;
            stream.write_all(text.as_bytes())?;
            Ok(stream)
        })
        .collect::<Result<Vec<_>>>()?;
    let started = std::time::Instant::now();
    for _ in 0..20 {
        vmm.get("vmm.ping")?;
    }
    ensure!(started.elapsed() < Duration::from_secs(2), "{started:?}");
    // One client gives up, the others time out: each connection is closed, with or without a response.
    halves[3].shutdown(Shutdown::Write)?;
    for stream in &mut halves[1..] {
        stream.set_read_timeout(Some(PROCESS_DEADLINE))?;
        let mut farewell = String::new();
        stream.read_to_string(&mut farewell)?;
        ensure!(
            farewell.is_empty() || farewell.starts_with("HTTP/1.1 4"),
            "{farewell}"
        );
    }
    vmm.get("vmm.ping")?;
    Ok(())
}

/// A private `/dev` with the devices that a program needs, and a `kvm` created by the command `kvm`.
fn in_a_dev_where(kvm: &str, user: &str) -> Result<Option<Ended>> {
    let files = Files::new()?;
    let program = paths::program("cloud-hypervisor")?;
    // A folder and files that any user may read.
    fs::copy(program, files.path("program"))?;
    fs::set_permissions(files.folder.path(), fs::Permissions::from_mode(0o777))?;
    let script = format!(
        "set -e; mkdir dev; mount -t tmpfs dev dev; \
         for d in null zero urandom; do touch dev/$d; mount --bind /dev/$d dev/$d; done; \
         {kvm}; mount --move dev /dev; \
         exec {user} ./program --kernel kernel --console off --api-socket s"
    );
    let ended = Ended::run(
        Command::new("unshare")
            .args(["--mount", "sh", "-c", &script])
            .current_dir(files.folder.path()),
    )?;
    if ended.code != Some(1) {
        skip(format!("no mount namespace of one's own: {ended:?}"));
        return Ok(None);
    }
    ensure!(!files.path("s").exists() && !files.path("s.lock").exists());
    Ok(Some(ended))
}

#[test]
fn kvm_missing_refused_or_fake_ends_in_one_chain() -> Result<()> {
    const OTHER_USER: &str = "setpriv --reuid 65534 --regid 65534 --clear-groups";
    for (kvm, user, why) in [
        ("true", "", "No such file"),
        (
            "mknod -m 600 dev/kvm c 10 232",
            OTHER_USER,
            "Permission denied",
        ),
        ("ln -s null dev/kvm", "", "not a KVM device"),
    ] {
        let Some(ended) = in_a_dev_where(kvm, user)? else {
            return Ok(());
        };
        let chain = ended.chain("Cloud Hypervisor")?;
        ensure!(
            chain.iter().any(|link| link.contains("/dev/kvm")),
            "{kvm}: {chain:?}"
        );
        ensure!(
            chain.last().is_some_and(|link| link.contains(why)),
            "{kvm}: {chain:?}"
        );
    }
    Ok(())
}
