//! Tests that the unchanged requests of Cloud Hypervisor's adopters (`tests/adopters/`) boot a guest.

use std::cell::OnceCell;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use api::Client;
use integration_tests::MIB;
use integration_tests::adopters::{Conversation, Request};
use integration_tests::descriptors::{inherit, open_tap, open_terminal};
use integration_tests::huge_pages::ReservedHugePages;
use integration_tests::linux::{BOOT_DEADLINE, Guest, Machine};
use integration_tests::literal_client::{Answer, read_answer};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::serial::Serial;
use integration_tests::vmm::{PROCESS_DEADLINE, Vmm};
use integration_tests::wait::wait_for;
use integration_tests::{paths, shared, tests};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::back_end::{self, BackEnd};
use crate::debian::reporting_gives_back;
use crate::pmem::root_image;
use crate::shared_folder::{self, VIRTIOFSD};
use crate::vhost_user_disk::{self, STORAGE_DAEMON};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        kata_go_boots_grows_and_gets_a_disk,
        kata_rust_boots_and_gets_its_devices_later,
        hypeman_boots_and_grows_by_virtio_mem,
        kuasar_boots_from_persistent_memory,
        libvirt_boots_with_events_in_a_fifo,
        microvm_nix_boots_from_its_command_line,
        microvm_nix_shares_a_folder_and_is_notified,
        cocoon_boots_with_a_balloon_of_a_quarter,
        ubicloud_boots_with_a_vhost_user_disk,
        ubicloud_boots_on_huge_pages_of_1_gib,
        cocoon_boots_qcow2_with_backing_files,
        cubesandbox_boots_with_both_consoles_on_one_terminal,
    ]
}

const GUEST_DEADLINE: Duration = Duration::from_secs(120);
/// The port of the agent.
const AGENT_PORT: u32 = 1024;

/// How the test talks to the guest.
#[derive(Clone, Copy)]
enum Agent {
    /// Over this vsock socket.
    Vsock(&'static str),
    /// Over this socket of a serial port.
    Serial(&'static str),
    /// Over the pseudo-terminal of the console.
    ConsolePty,
    /// Over the terminal of the VMM.
    Terminal,
}

impl Agent {
    fn script(self) -> String {
        match self {
            Self::Vsock(_) => format!("guest-mem serve vsock {AGENT_PORT}"),
            Self::ConsolePty => "guest-mem serve /dev/hvc0".to_owned(),
            Self::Serial(_) | Self::Terminal => "guest-mem serve /dev/ttyS0".to_owned(),
        }
    }
}

struct Adopter {
    conversation: &'static str,
    agent: Agent,
    /// Files in its folder, with their sizes in MiB.
    files: &'static [(&'static str, u64)],
    /// The socket of virtiofsd.
    shared_folder: Option<&'static str>,
}

/// A booted guest and what it needs.
struct Booted {
    guest: Guest,
    place: TempDir,
    virtiofsd: Option<BackEnd>,
    /// The guest could not read the shared folder.
    folder_unread: bool,
    _tap: Option<File>,
}

impl Adopter {
    fn boot(&self, tap: Option<File>) -> Result<Booted> {
        self.boot_in(tempfile::tempdir()?, tap, |_, _| Ok(()))
    }

    /// Sends everything, with `place` as its folder; `created` is called after each request.
    fn boot_in(
        &self,
        place: TempDir,
        tap: Option<File>,
        created: impl Fn(&Vmm, &Request) -> Result<()>,
    ) -> Result<Booted> {
        shared::end_idle();
        for (name, mebibytes) in self.files {
            File::create_new(place.path().join(name))?.set_len(mebibytes * MIB)?;
        }
        let virtiofsd = self.start_virtiofsd(place.path())?;
        let script = self.agent.script();
        let conversation = read(self.conversation, &script, place.path(), tap.as_ref())?;
        let arguments: Vec<&str> = conversation.arguments.iter().map(String::as_str).collect();
        let (master, terminal) = open_terminal()?;
        let terminal = File::options().read(true).write(true).open(terminal)?;
        let (input, output) = (terminal.try_clone()?, terminal.try_clone()?);
        let mut vmm = Vmm::spawn_with(&arguments, |command| {
            if matches!(self.agent, Agent::Terminal) {
                command
                    .stdin(Stdio::from(input))
                    .stdout(Stdio::from(output));
            }
        })?;
        vmm.wait_api()?;
        for request in &conversation.requests {
            let answer = send(&vmm, request)?;
            ensure!(
                matches!(answer.status, 200 | 204),
                "{}: {answer:?}",
                request.endpoint
            );
            created(&vmm, request)?;
        }
        let serial = match self.agent {
            Agent::Vsock(name) => {
                let stream = wait_for("agent in the guest", BOOT_DEADLINE, || {
                    connect(&place.path().join(name))
                })
                .with_context(|| vmm.last_words())?;
                Serial::over(OwnedFd::from(stream).into())
            }
            Agent::Serial(name) => Serial::connect(&place.path().join(name), BOOT_DEADLINE)?,
            Agent::ConsolePty => Serial::open(&console_path(&vmm)?)?,
            Agent::Terminal => Serial::over(master),
        };
        let mut guest = Guest { vmm, serial };
        guest.wait_serving()?;
        Ok(Booted {
            guest,
            place,
            virtiofsd,
            folder_unread: false,
            _tap: tap,
        })
    }

    fn start_virtiofsd(&self, place: &Path) -> Result<Option<BackEnd>> {
        let (Some(socket), Some(program)) = (self.shared_folder, back_end::program(VIRTIOFSD))
        else {
            return Ok(None);
        };
        let folder = place.join("shared");
        fs::create_dir(&folder)?;
        fs::write(folder.join("greeting"), "from the host")?;
        shared_folder::start(&program, &place.join(socket), &folder).map(Some)
    }
}

/// The conversation in `text`, of a guest that runs `script`.
fn read(text: &str, script: &str, place: &Path, tap: Option<&File>) -> Result<Conversation> {
    let kernel = paths::guest("vmlinux")?;
    let initramfs = paths::guest_initramfs(&kernel)?;
    let here = format!("{}/", place.display());
    let tap = tap.map(inherit).transpose()?.map(|fd| fd.to_string());
    let machine = Machine {
        script,
        // Adopters' kernels use added memory at once; Debian's wait for a program of the guest.
        command_line: "memhp_default_state=online",
        ..Machine::default()
    };
    let replacements = [
        ("@/", here.as_str()),
        ("@kernel", &kernel.to_string_lossy()),
        ("@initramfs", &initramfs.to_string_lossy()),
        ("@cmdline", &machine.full_command_line()),
        ("@tap", tap.as_deref().unwrap_or_default()),
    ];
    Conversation::read(text, &replacements)
}

fn send(vmm: &Vmm, request: &Request) -> Result<Answer> {
    let Request {
        method,
        endpoint,
        body,
    } = request;
    if method != "CHUNKED" {
        return vmm.request(method, endpoint, body.as_deref());
    }
    let mut stream = UnixStream::connect(vmm.socket())?;
    stream.set_read_timeout(Some(PROCESS_DEADLINE))?;
    write!(
        stream,
        "PUT /api/v1/{endpoint} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\
         Expect: 100-continue\r\n\r\n"
    )?;
    let mut invitation = String::new();
    while !invitation.ends_with("\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        invitation.push(char::from(byte[0]));
    }
    ensure!(invitation.starts_with("HTTP/1.1 100"), "{invitation:?}");
    stream.write_all(b"0\r\n\r\n")?;
    read_answer(&mut stream)
}

/// Connects to the agent; `None` if the VMM or the guest does not listen yet.
fn connect(socket: &Path) -> Result<Option<UnixStream>> {
    let Ok(mut stream) = UnixStream::connect(socket) else {
        return Ok(None);
    };
    stream.set_read_timeout(Some(GUEST_DEADLINE))?;
    writeln!(stream, "CONNECT {AGENT_PORT}")?;
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(1) if byte[0] == b'\n' => break,
            Ok(1) => line.push(byte[0]),
            _ => return Ok(None),
        }
    }
    ensure!(
        line.starts_with(b"OK "),
        "{:?}",
        String::from_utf8_lossy(&line)
    );
    stream.set_nonblocking(true)?;
    Ok(Some(stream))
}

fn console_path(vmm: &Vmm) -> Result<PathBuf> {
    wait_for("path of the console", PROCESS_DEADLINE, || {
        let answer = vmm.request("GET", "vm.info", None)?;
        if answer.status != 200 {
            return Ok(None);
        }
        let path = &answer.json()?["config"]["console"]["file"];
        Ok(path.as_str().map(PathBuf::from))
    })
}

fn put(guest: &Guest, endpoint: &str, body: &Value) -> Result<Answer> {
    guest.vmm.put(endpoint, Some(&body.to_string()))
}

fn state(vmm: &Vmm) -> Result<String> {
    let info = vmm.get("vm.info")?;
    Ok(info["state"].as_str().unwrap_or_default().to_owned())
}

impl Booted {
    /// The guest reads what the host shares. Without a program that shares it, the test ends as skipped.
    fn check_shared_folder(&mut self, tag: &str) -> Result<()> {
        if self.virtiofsd.is_none() {
            self.folder_unread = true;
            return Ok(());
        }
        // A folder added to a running guest takes its time to be known there.
        let text = self.guest.shell_until(&format!(
            "mkdir -p /mnt && mount -t virtiofs {tag} /mnt && cat /mnt/greeting"
        ))?;
        ensure!(text.contains("from the host"), "{text}");
        self.guest.shell("umount /mnt").map(drop)
    }

    /// For an adopter without a balloon.
    fn add_balloon(&mut self) -> Result<()> {
        let balloon = json!({"size": 0, "free_page_reporting": true});
        put(&self.guest, "vm.add-balloon", &balloon)?;
        wait_for("the first report", GUEST_DEADLINE, || {
            let stats = self.guest.vmm.get("vm.reclaim-stats")?;
            let reported = stats["report"]["discarded_bytes"].as_u64();
            Ok((reported > Some(0)).then_some(()))
        })
    }

    /// Memory goes back through the balloon.
    fn reclaim_and_end(mut self) -> Result<Outcome> {
        reporting_gives_back(&mut self.guest)?;
        self.end()
    }

    fn end(mut self) -> Result<Outcome> {
        self.guest.vmm.put("vm.shutdown", None)?;
        self.guest.vmm.put("vmm.shutdown", None)?;
        self.guest.vmm.expect_clean_exit(PROCESS_DEADLINE)?;
        drop(self.place);
        if self.folder_unread {
            let reason = "all but the shared folder passed: virtiofsd is not installed: run `cargo xtask test-tools`";
            return Ok(Outcome::Skipped(reason.to_owned()));
        }
        Ok(Outcome::Passed)
    }
}

/// As Kata reads it: bus 0, two digits of the device, function 0.
fn slot_of(answer: &Answer) -> Result<(String, u8)> {
    let body = answer.json()?;
    let id = body["id"].as_str().context("no id")?.to_owned();
    let bdf = body["bdf"].as_str().unwrap_or_default();
    let slot = bdf
        .strip_prefix("0000:00:")
        .and_then(|it| it.strip_suffix(".0"));
    let slot = slot
        .filter(|it| it.len() == 2)
        .with_context(|| bdf.to_owned())?;
    Ok((id, u8::from_str_radix(slot, 16)?))
}

/// Kata has its interfaces before the guest boots, by descriptor.
fn add_net(vmm: &Vmm, tap: &File) -> Result<()> {
    let net = json!({
        "ip": "192.168.249.1", "mask": "255.255.255.0", "mac": "02:00:00:00:00:07", "num_queues": 2,
        "queue_size": 256, "vhost_mode": "Client", "offload_tso": true, "offload_ufo": true, "offload_csum": true,
    });
    let client = Client::new(vmm.socket());
    client.put_with_fds("vm.add-net", Some(&net.to_string()), &[tap.as_raw_fd()])?;
    Ok(())
}

fn kata_go_boots_grows_and_gets_a_disk() -> Result<Outcome> {
    let adopter = Adopter {
        conversation: include_str!("../../../adopters/kata-go"),
        agent: Agent::Terminal,
        files: &[("image.img", 16), ("data.img", 16)],
        shared_folder: Some("virtiofsd.sock"),
    };
    let tap = open_tap("vm-kata")?;
    let handed = tap.try_clone()?;
    let mut booted = adopter.boot_in(tempfile::tempdir()?, Some(tap), |vmm, request| {
        if request.endpoint == "vm.create" {
            ensure!(state(vmm)? == "Created", "{}", state(vmm)?);
            add_net(vmm, &handed)?;
        }
        Ok(())
    })?;
    let guest = &mut booted.guest;
    ensure!(state(&guest.vmm)? == "Running", "{}", state(&guest.vmm)?);
    let text = guest.shell(
        "cat /sys/block/vda/ro; ls /sys/bus/pci/devices; cat /sys/class/net/eth0/address; \
         grep -c ^processor /proc/cpuinfo",
    )?;
    for wanted in ["0001:00:00.0", "02:00:00:00:00:07"] {
        ensure!(text.contains(wanted), "no {wanted}: {text}");
    }
    // A read-only disk and one processor.
    ensure!(
        text.lines().filter(|it| it.trim() == "1").count() == 2,
        "{text}"
    );

    put(guest, "vm.resize", &json!({"desired_vcpus": 2}))?;
    let before = guest.memory_bytes("total")?;
    put(guest, "vm.resize", &json!({"desired_ram": 2304 * MIB}))?;
    let info = guest.vmm.get("vm.info")?;
    let config = &info["config"];
    ensure!(
        config["cpus"]["boot_vcpus"] == 2
            && config["memory"]["size"] == 2304 * MIB
            && config["memory"]["hotplug_size"] == 16_u64 << 30
            && info["memory_actual_size"] == 2304 * MIB,
        "{info:#}"
    );
    wait_for("more memory in the guest", GUEST_DEADLINE, || {
        let total = guest.memory_bytes("total")?;
        Ok((total > before + 200 * MIB).then_some(()))
    })?;
    let disk = json!({
        "path": booted.place.path().join("data.img"), "readonly": false, "iommu": false, "num_queues": 1,
        "queue_size": 1024, "vhost_user": false, "image_type": "Raw", "backing_files": false, "sparse": true,
    });
    let (id, slot) = slot_of(&put(guest, "vm.add-disk", &disk)?)?;
    let block = format!("/sys/bus/pci/devices/0000:00:{slot:02x}.0/virtio*/block/vdb");
    guest.shell_until(&format!("[ -e {block} ]"))?;
    guest.command("disk-fill /dev/vdb 8M 7")?;
    guest.command("disk-verify /dev/vdb 8M 7")?;
    put(guest, "vm.remove-device", &json!({"id": id}))?;
    booted.check_shared_folder("kataShared")?;
    booted.reclaim_and_end()
}

/// Adds the devices of this runtime one after the other; all of them have an answer of the same form.
fn kata_rust_boots_and_gets_its_devices_later() -> Result<Outcome> {
    let adopter = Adopter {
        conversation: include_str!("../../../adopters/kata-rust"),
        agent: Agent::Terminal,
        files: &[("image.img", 16), ("data.img", 16)],
        shared_folder: Some("virtiofsd.sock"),
    };
    let tap = open_tap("vm-katars")?;
    let handed = tap.try_clone()?;
    let mut booted = adopter.boot_in(tempfile::tempdir()?, Some(tap), |vmm, request| {
        if request.endpoint == "vm.create" {
            add_net(vmm, &handed)?;
        }
        Ok(())
    })?;
    let folder = booted.place.path().to_owned();
    let guest = &mut booted.guest;
    let config = guest.vmm.get("vm.info")?["config"].clone();
    ensure!(
        config["cpus"]["max_phys_bits"] == 46 && config["disks"][0]["num_queues"] == 1,
        "{config:#}"
    );
    let address = guest.shell("cat /sys/class/net/eth0/address")?;
    ensure!(address.contains("02:00:00:00:00:07"), "{address}");

    let resize = json!({"desired_vcpus": null, "desired_ram": 2304 * MIB, "desired_balloon": null});
    let before = guest.memory_bytes("total")?;
    put(guest, "vm.resize", &resize)?;
    wait_for("more memory in the guest", GUEST_DEADLINE, || {
        let total = guest.memory_bytes("total")?;
        Ok((total > before + 200 * MIB).then_some(()))
    })?;

    let disk = json!({"path": folder.join("data.img"), "readonly": false, "direct": false, "image_type": "Raw"});
    let (id, _) = slot_of(&put(guest, "vm.add-disk", &disk)?)?;
    guest.shell_until("[ -b /dev/vdb ]")?;
    guest.command("disk-fill /dev/vdb 8M 7")?;
    guest.command("disk-verify /dev/vdb 8M 7")?;
    put(guest, "vm.remove-device", &json!({"id": id}))?;

    let vsock = json!({"cid": 3, "socket": folder.join("ch-vm.sock"), "iommu": false, "id": null, "pci_segment": 0});
    slot_of(&put(guest, "vm.add-vsock", &vsock)?)?;
    guest.shell_until("[ -e /sys/bus/virtio/drivers/vmw_vsock_virtio_transport/virtio* ]")?;
    guest.shell(&format!(
        "{} > /dev/null 2>&1 < /dev/null &",
        Agent::Vsock("").script()
    ))?;
    let agent = wait_for("agent in the guest", GUEST_DEADLINE, || {
        connect(&folder.join("ch-vm.sock"))
    })?;
    let mut agent = Serial::over(OwnedFd::from(agent).into());
    agent.send("ping")?;
    agent.expect_answer("ping", GUEST_DEADLINE)?;
    drop(agent);

    let fs = |segment: u16| {
        json!({
            "tag": "kataShared", "socket": folder.join("virtiofsd.sock"), "num_queues": 1, "queue_size": 1024,
            "pci_segment": segment,
        })
    };
    // This runtime names segment 1 although its VM has one segment: rejected by name, as upstream does.
    let refused = booted
        .guest
        .vmm
        .request("PUT", "vm.add-fs", Some(&fs(1).to_string()))?;
    let causes = refused.json()?.to_string();
    ensure!(
        refused.status == 400 && causes.contains("segment"),
        "{refused:?}"
    );
    if booted.virtiofsd.is_some() {
        slot_of(&put(&booted.guest, "vm.add-fs", &fs(0))?)?;
    }
    booted.check_shared_folder("kataShared")?;
    booted.reclaim_and_end()
}

/// As its helper: the size is settled once three readings in a row are equal.
fn settled_size(guest: &Guest) -> Result<u64> {
    let mut readings = (0, 0);
    wait_for("memory_actual_size to settle", GUEST_DEADLINE, || {
        let info = guest.vmm.get("vm.info")?;
        let size = info["memory_actual_size"].as_u64().context("no size")?;
        let count = if readings.0 == size {
            readings.1 + 1
        } else {
            1
        };
        readings = (size, count);
        Ok((size == 4096 * MIB && count == 3).then_some(size))
    })
}

fn hypeman_boots_and_grows_by_virtio_mem() -> Result<Outcome> {
    let adopter = Adopter {
        conversation: include_str!("../../../adopters/hypeman"),
        agent: Agent::Vsock("vsock.sock"),
        files: &[("rootfs", 16), ("overlay.raw", 16), ("config", 1)],
        shared_folder: None,
    };
    let mut booted = adopter.boot(None)?;
    let guest = &mut booted.guest;
    ensure!(settled_size(guest)? == 4096 * MIB);
    wait_for("the memory in the guest", GUEST_DEADLINE, || {
        let total = guest.memory_bytes("total")?;
        Ok((total > 3840 * MIB).then_some(()))
    })?;
    // To the first sector as well, without an image_type.
    guest.command("disk-fill /dev/vdb 8M 3")?;
    guest.command("disk-verify /dev/vdb 8M 3")?;
    let text = guest.shell("cat /sys/block/vda/ro /sys/class/net/eth0/address")?;
    ensure!(text.contains("02:00:00:00:00:09"), "{text}");
    booted.add_balloon()?;
    booted.reclaim_and_end()
}

fn kuasar_boots_from_persistent_memory() -> Result<Outcome> {
    let place = tempfile::tempdir()?;
    let initramfs = paths::guest_initramfs(&paths::guest("vmlinux")?)?;
    if root_image(place.path(), &initramfs)?.is_none() {
        let reason = "busybox or mke2fs is not installed";
        return Ok(Outcome::Skipped(reason.to_owned()));
    }
    let adopter = Adopter {
        conversation: include_str!("../../../adopters/kuasar"),
        agent: Agent::Vsock("task.vsock"),
        files: &[("layer.img", 16), ("blk.img", 16)],
        shared_folder: Some("virtiofs.sock"),
    };
    let tap = open_tap("vm-kuasar")?;
    let mut booted = adopter.boot_in(place, Some(tap), |_, _| Ok(()))?;
    let path = booted.place.path().join("blk.img");
    let guest = &mut booted.guest;
    let text = guest.shell("cat /proc/mounts /sys/class/net/eth0/address /sys/block/vda/ro")?;
    for wanted in ["/dev/root / ext4 ro", "02:00:00:00:00:0a"] {
        ensure!(text.contains(wanted), "no {wanted}: {text}");
    }
    let disk = json!({
        "path": path, "readonly": false, "direct": true, "vhost_user": false, "vhost_socket": null, "id": "blk1",
    });
    let (id, _) = slot_of(&put(guest, "vm.add-disk", &disk)?)?;
    guest.shell_until("[ -b /dev/vdb ]")?;
    guest.command("disk-fill /dev/vdb 8M 7")?;
    guest.command("disk-verify /dev/vdb 8M 7")?;
    put(guest, "vm.remove-device", &json!({"id": id}))?;
    booted.check_shared_folder("kuasar")?;
    booted.add_balloon()?;
    booted.reclaim_and_end()
}

fn libvirt_boots_with_events_in_a_fifo() -> Result<Outcome> {
    let adopter = Adopter {
        conversation: include_str!("../../../adopters/libvirt"),
        agent: Agent::Serial("serial.sock"),
        files: &[("a.raw", 16)],
        shared_folder: None,
    };
    let place = tempfile::tempdir()?;
    let fifo = place.path().join("event-monitor-fifo");
    let made = Command::new("mkfifo").arg(&fifo).status()?;
    ensure!(made.success(), "mkfifo: {made}");
    // As the driver: only once the VMM runs.
    let reader = OnceCell::new();
    let mut booted = adopter.boot_in(place, None, |_, _| {
        if reader.get().is_none() {
            // The VMM has it open for writing, so this does not wait.
            reader.set(File::open(&fifo)?).ok();
        }
        Ok(())
    })?;
    let info = booted.guest.vmm.get("vm.info")?;
    let terminal = info["config"]["console"]["file"].as_str();
    ensure!(
        terminal.is_some_and(|it| it.starts_with("/dev/pts/")),
        "{info:#}"
    );
    let mut events = vec![0; 64 << 10];
    let mut reader = reader.get().context("no request was sent")?;
    let count = reader.read(&mut events)?;
    let events = String::from_utf8_lossy(&events[..count]).replace([' ', '\n'], "");
    for event in ["starting", "booting", "booted"] {
        ensure!(
            events.contains(&format!("\"event\":\"{event}\"")),
            "{events}"
        );
    }
    let text = (booted.guest)
        .shell("cat /sys/block/vda/ro; dd if=/dev/vda of=/dev/null bs=1M && echo read")?;
    ensure!(text.contains('1') && text.contains("read"), "{text}");
    booted.add_balloon()?;
    booted.reclaim_and_end()
}

fn microvm_nix_shares_a_folder_and_is_notified() -> Result<Outcome> {
    const NOTIFIED: &str = "guest-mem vsock connect 8888 --bytes 4K --seed 1";
    let adopter = Adopter {
        conversation: include_str!("../../../adopters/microvm-nix-shares"),
        agent: Agent::Terminal,
        files: &[],
        shared_folder: Some("vm-virtiofs-ro-store.sock"),
    };
    let place = tempfile::tempdir()?;
    // The unit that starts the VM listens where the guest's service manager reports that it is ready.
    let listener = UnixListener::bind(place.path().join("notify.vsock_8888"))?;
    let notified = thread::spawn(move || -> std::io::Result<usize> {
        let (mut stream, _) = listener.accept()?;
        let mut text = Vec::new();
        stream.read_to_end(&mut text)?;
        stream.write_all(&text)?;
        Ok(text.len())
    });
    let mut booted = adopter.boot_in(place, None, |_, _| Ok(()))?;
    let guest = &mut booted.guest;
    let text = guest.shell(NOTIFIED)?;
    ensure!(text.contains("ok vsock 4096 bytes"), "{text}");
    let count = notified.join().ok().context("the listener panicked")??;
    ensure!(count == 4096, "{count} bytes came");
    // Linux has no driver for this watchdog, but shows the device: 0x1040 and type 35.
    let text = guest.shell("cat /sys/bus/pci/devices/*/device")?;
    ensure!(text.contains("0x1063"), "{text}");
    booted.check_shared_folder("ro-store")?;
    booted.reclaim_and_end()
}

fn microvm_nix_boots_from_its_command_line() -> Result<Outcome> {
    let adopter = Adopter {
        conversation: include_str!("../../../adopters/microvm-nix"),
        agent: Agent::Terminal,
        files: &[("store.erofs", 16), ("v.img", 16)],
        shared_folder: None,
    };
    let mut booted = adopter.boot(None)?;
    let guest = &mut booted.guest;
    guest.command("disk-fill /dev/vdb 8M 3")?;
    guest.command("disk-verify /dev/vdb 8M 3")?;
    let text = guest.shell("cat /sys/class/net/eth0/address; ls /sys/class/net/eth0/queues")?;
    ensure!(
        text.contains("02:00:00:00:00:01") && text.contains("rx-1"),
        "{text}"
    );
    put(guest, "vm.resize", &json!({"desired_balloon": 64 * MIB}))?;
    put(guest, "vm.resize", &json!({"desired_balloon": 0}))?;
    booted.reclaim_and_end()
}

fn cocoon_boots_with_a_balloon_of_a_quarter() -> Result<Outcome> {
    let adopter = Adopter {
        conversation: include_str!("../../../adopters/cocoon"),
        agent: Agent::ConsolePty,
        files: &[("l.erofs", 16), ("cow.raw", 16)],
        shared_folder: None,
    };
    let mut booted = adopter.boot(None)?;
    let guest = &mut booted.guest;
    wait_for("the balloon", GUEST_DEADLINE, || {
        let stats = guest.vmm.get("vm.reclaim-stats")?;
        Ok((stats["ballooned_bytes"] == 256 * MIB).then_some(()))
    })?;
    let text = guest.shell("cat /sys/block/vda/serial /sys/block/vdb/serial")?;
    ensure!(
        text.contains("layer0") && text.contains("cocoon-cow"),
        "{text}"
    );
    guest.command("disk-fill /dev/vdb 8M 3")?;
    guest.command("disk-verify /dev/vdb 8M 3")?;
    booted.reclaim_and_end()
}

fn ubicloud_boots_with_a_vhost_user_disk() -> Result<Outcome> {
    ubicloud_boots(include_str!("../../../adopters/ubicloud"), |guest| {
        reporting_gives_back(guest).map(drop)
    })
}

/// The guest cannot return parts of such a page, so nothing is discarded.
fn ubicloud_boots_on_huge_pages_of_1_gib() -> Result<Outcome> {
    let Some(_pool) = ReservedHugePages::of(1024 * MIB, 1)? else {
        let reason = "the host has no huge page of 1 GiB to give";
        return Ok(Outcome::Skipped(reason.into()));
    };
    let conversation = include_str!("../../../adopters/ubicloud-huge-pages");
    ubicloud_boots(conversation, |guest| {
        guest.command("alloc 200M seed=9")?;
        guest.command("verify")?;
        guest.command("free")?;
        let stats = guest.vmm.get("vm.reclaim-stats")?;
        let zone = &stats["zones"][0]["reporting"];
        ensure!(
            stats["report"]["discarded_bytes"] == 0
                && zone["reason"]
                    .as_str()
                    .is_some_and(|it| it.contains("1073741824")),
            "{stats:#}"
        );
        Ok(())
    })
}

/// Its serial port is a file, so the test talks to the guest through a vsock device, which it adds as it does the balloon.
fn ubicloud_boots(
    conversation: &str,
    reclaim: impl FnOnce(&mut Guest) -> Result<()>,
) -> Result<Outcome> {
    const SCRIPT: &str = "until guest-mem serve vsock 1024; do sleep 0.2; done";
    let Some(program) = back_end::program(STORAGE_DAEMON) else {
        return Ok(back_end::not_installed(STORAGE_DAEMON));
    };
    let place = tempfile::tempdir()?;
    let folder = place.path().to_owned();
    for name in ["cloudinit.img", "disk"] {
        File::create_new(folder.join(name))?.set_len(16 * MIB)?;
    }
    let daemon = vhost_user_disk::start(
        &program,
        &folder.join("disk"),
        &folder.join("vhost.sock"),
        2,
    )?;
    let conversation = read(conversation, SCRIPT, &folder, None)?;
    let arguments: Vec<&str> = conversation.arguments.iter().map(String::as_str).collect();
    shared::end_idle();
    let mut vmm = Vmm::spawn_with(&arguments, |_| ())?;
    vmm.wait_api()?;
    let vsock = json!({"cid": 3, "socket": folder.join("vsock.sock")});
    // The API answers before the machine of the command line is created.
    wait_for("a running guest", PROCESS_DEADLINE, || {
        let runs = state(&vmm).is_ok_and(|state| state == "Running");
        Ok(runs.then_some(()))
    })?;
    vmm.put("vm.add-vsock", Some(&vsock.to_string()))?;
    let stream = wait_for("agent in the guest", BOOT_DEADLINE, || {
        connect(&folder.join("vsock.sock"))
    })
    .with_context(|| vmm.last_words())?;
    let serial = Serial::over(OwnedFd::from(stream).into());
    let mut guest = Guest { vmm, serial };
    guest.wait_serving()?;

    let text = guest.shell(
        "cat /sys/class/net/eth0/address; ls /sys/class/net/eth0/queues; ls /sys/block/vda/mq",
    )?;
    for wanted in ["02:00:00:00:00:04", "rx-1"] {
        ensure!(text.contains(wanted), "no {wanted}: {text}");
    }
    ensure!(!text.contains("rx-2"), "{text}");
    for disk in ["/dev/vda", "/dev/vdb"] {
        guest.command(&format!("disk-fill {disk} 8M 3"))?;
        guest.shell("echo 3 > /proc/sys/vm/drop_caches")?;
        guest.command(&format!("disk-verify {disk} 8M 3"))?;
    }
    let mut booted = Booted {
        guest,
        place,
        virtiofsd: None,
        folder_unread: false,
        _tap: None,
    };
    put(
        &booted.guest,
        "vm.add-balloon",
        &json!({"size": 0, "free_page_reporting": true}),
    )?;
    booted
        .guest
        .shell_until("[ -e /sys/bus/virtio/drivers/virtio_balloon/virtio* ]")?;
    reclaim(&mut booted.guest)?;
    let outcome = booted.end();
    drop(daemon);
    outcome
}

/// Runs `qemu-img` in the folder.
fn qemu_img(folder: &Path, arguments: &str) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(arguments.split(' ')).current_dir(folder);
    let output = command.output().context("qemu-img")?;
    ensure!(output.status.success(), "qemu-img {arguments}: {output:?}");
    Ok(())
}

/// The second quarter of the image is in the base, compressed, and the rest of it nowhere.
fn cocoon_boots_qcow2_with_backing_files() -> Result<Outcome> {
    const BASE_SECTOR: usize = 8192;
    if Command::new("qemu-img").arg("--version").output().is_err() {
        let reason = "qemu-img is not installed: run `cargo xtask test-tools`";
        return Ok(Outcome::Skipped(reason.into()));
    }
    let adopter = Adopter {
        conversation: include_str!("../../../adopters/cocoon-cloud-image"),
        agent: Agent::Serial("console.sock"),
        files: &[("cidata.img", 1)],
        shared_folder: None,
    };
    let place = tempfile::tempdir()?;
    let folder = place.path();
    let mut raw = vec![0; 16 << 20];
    raw[BASE_SECTOR * 512..][..512].fill(b'b');
    fs::write(folder.join("base.raw"), raw)?;
    qemu_img(folder, "convert -c -O qcow2 base.raw base.qcow2")?;
    qemu_img(
        folder,
        "create -q -f qcow2 -F qcow2 -b base.qcow2 overlay.qcow2 64M",
    )?;
    let base = fs::read(folder.join("base.qcow2"))?;
    let mut booted = adopter.boot_in(place, None, |_, _| Ok(()))?;
    let guest = &mut booted.guest;
    let read_base = format!("dd if=/dev/vda bs=512 skip={BASE_SECTOR} count=1 2> /dev/null");
    let text = guest.shell(&format!(
        "cat /sys/block/vda/serial /sys/block/vda/size; {read_base}; echo"
    ))?;
    for wanted in ["cocoon-cow", "131072", &"b".repeat(512)] {
        ensure!(text.contains(wanted), "no {wanted}: {text}");
    }
    // Over the base, and beyond its end.
    guest.command("disk-fill /dev/vda 48M 3")?;
    guest.shell("echo 3 > /proc/sys/vm/drop_caches")?;
    guest.command("disk-verify /dev/vda 48M 3")?;
    reporting_gives_back(guest)?;
    let folder = booted.place.path().to_owned();
    booted.guest.vmm.put("vm.shutdown", None)?;
    qemu_img(&folder, "check overlay.qcow2")?;
    ensure!(
        fs::read(folder.join("base.qcow2"))? == base,
        "the base image has changed"
    );
    booted.guest.vmm.put("vmm.shutdown", None)?;
    booted.guest.vmm.expect_clean_exit(PROCESS_DEADLINE)?;
    Ok(Outcome::Passed)
}

fn cubesandbox_boots_with_both_consoles_on_one_terminal() -> Result<Outcome> {
    let adopter = Adopter {
        conversation: include_str!("../../../adopters/cubesandbox"),
        agent: Agent::Vsock("vsock.sock"),
        files: &[("root.img", 16), ("app.img", 16), ("disk.raw", 16)],
        shared_folder: Some("virtiofs.sock"),
    };
    let mut booted = adopter.boot(None)?;
    let guest = &mut booted.guest;
    let text = guest.shell("cat /sys/block/pmem0/size /sys/block/pmem1/size")?;
    ensure!(
        text.lines().filter(|line| line.trim() == "32768").count() == 2,
        "{text}"
    );
    guest.command("disk-fill /dev/vda 8M 3")?;
    guest.command("disk-verify /dev/vda 8M 3")?;
    guest.shell("echo seen on serial > /dev/ttyS0; echo seen on console > /dev/hvc0")?;
    wait_for("what the guest printed", GUEST_DEADLINE, || {
        let printed = guest.vmm.text("stdout");
        let both = printed.contains("seen on serial") && printed.contains("seen on console");
        Ok(both.then_some(()))
    })?;
    booted.check_shared_folder("cubeShared")?;
    booted.reclaim_and_end()
}
