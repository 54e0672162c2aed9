//! Tests whether this machine's KVM boots Linux.
//!
//! Even if `/dev/kvm` and every capability exist, KVM may emulate each instruction of an ordinary guest, a thousand
//! times slower. The probe therefore runs two guests with time limits. The first is a loop of four million
//! instructions. If that is fast, the test kernel follows, under our own VMM. The result is valid until the next boot
//! of the machine.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use kvm_ioctls::{Kvm, VcpuExit};

use super::guest_memory::GuestPage;
use crate::guest::Artefacts;
use crate::paths;

const DEVICE: &str = "/dev/kvm";
/// Iterations of the loop, of two instructions each.
const LOOP_TURNS: u32 = 2_000_000;
/// Maximum duration: a processor takes a few milliseconds, nested or not; emulation took one second in practice.
const LOOP_MAX: Duration = Duration::from_millis(250);
/// Time limit for a KVM that neither runs nor fails.
const LOOP_HANGS: Duration = Duration::from_secs(10);
/// Time limit from the start of our VMM to the guest's init; about one second if it works.
const BOOT_MAX: Duration = Duration::from_secs(30);

/// First output of the guest's init.
const INIT_MARKER: &str = "guest: init";

/// Runs the probe, or returns the result of an earlier one since the machine booted.
pub(crate) fn kvm_boots_linux(artefacts: &Artefacts, vmm: &Path) -> Result<bool> {
    let memory = Memory::open()?;
    if let Some(verdict) = memory.verdict() {
        return Ok(verdict);
    }
    if !runs_code(&memory)? {
        return Ok(false);
    }
    if let Err(reason) = try_linux(artefacts, vmm) {
        // Not stored, because the cause may be our VMM, which changes.
        eprintln!("testbed: this machine's KVM is not used: {reason:#}");
        return Ok(false);
    }
    memory.remember(true)?;
    Ok(true)
}

/// Whether it is known already, without a kernel and a VMM, that this machine's KVM does not boot
/// Linux.
pub(crate) fn is_emulation_certain() -> Result<bool> {
    let memory = Memory::open()?;
    match memory.verdict() {
        Some(verdict) => Ok(!verdict),
        None => Ok(!runs_code(&memory)?),
    }
}

fn runs_code(memory: &Memory) -> Result<bool> {
    let Err(reason) = try_loop() else {
        return Ok(true);
    };
    eprintln!(
        "testbed: this machine's KVM is not used: {reason:#}; guests run in an emulated host"
    );
    // A missing or inaccessible device may become available later.
    if Path::new(DEVICE).exists() && !is_denied(&reason) {
        memory.remember(false)?;
    }
    Ok(false)
}

fn is_denied(reason: &anyhow::Error) -> bool {
    reason.chain().any(|cause| {
        cause
            .downcast_ref::<kvm_ioctls::Error>()
            .is_some_and(|error| error.errno() == libc::EACCES)
    })
}

/// The stored result of an earlier probe, valid until the machine boots again.
struct Memory {
    path: PathBuf,
    boot_id: String,
}

impl Memory {
    fn open() -> Result<Self> {
        let boot_id =
            fs::read_to_string("/proc/sys/kernel/random/boot_id").context("the boot id")?;
        Ok(Self {
            path: paths::cache()?.join("kvm-boots-linux"),
            boot_id: boot_id.trim().into(),
        })
    }

    fn text(&self, verdict: bool) -> String {
        format!("{} {verdict}\n", self.boot_id)
    }

    fn verdict(&self) -> Option<bool> {
        let old = fs::read_to_string(&self.path).ok()?;
        let verdict = [false, true].into_iter().find(|v| old == self.text(*v))?;
        // KVM may disappear: a container without the device shares the boot and the cache.
        (!verdict || Path::new(DEVICE).exists()).then_some(verdict)
    }

    fn remember(&self, verdict: bool) -> Result<()> {
        fs::write(&self.path, self.text(verdict))
            .with_context(|| format!("writing {}", self.path.display()))
    }
}

/// Runs the loop on a separate thread, because a hanging KVM cannot be interrupted.
fn try_loop() -> Result<()> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        // The receiver is dropped only after a timeout, when the result is no longer needed.
        sender.send(run_loop()).ok();
    });
    let took = match receiver.recv_timeout(LOOP_HANGS) {
        Ok(result) => result?,
        Err(_) => bail!("a small guest did not end in {} s", LOOP_HANGS.as_secs()),
    };
    if took > LOOP_MAX {
        bail!(
            "a small guest took {} ms for {} instructions, so KVM emulates them",
            took.as_millis(),
            2 * LOOP_TURNS
        );
    }
    Ok(())
}

/// Runs a counting loop in real mode and returns how long it took.
fn run_loop() -> Result<Duration> {
    let mut code = vec![0x66, 0xb9]; // mov ecx, LOOP_TURNS
    code.extend(LOOP_TURNS.to_le_bytes());
    code.extend([0x66, 0x49]); // dec ecx
    code.extend([0x75, 0xfc]); // jnz to the dec
    code.push(0xf4); // hlt

    let kvm = Kvm::new().map_err(|error| {
        let advice = match error.errno() {
            libc::EACCES => "opening /dev/kvm (add this user to the group kvm)",
            libc::ENOENT => "/dev/kvm does not exist",
            _ => "opening /dev/kvm",
        };
        anyhow::Error::new(error).context(advice)
    })?;
    let vm = kvm.create_vm().context("creating a VM")?;
    let page = GuestPage::new(&vm, &code)?;
    let mut vcpu = vm.create_vcpu(0).context("creating a vCPU")?;
    let mut sregs = vcpu.get_sregs().context("reading registers")?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs).context("setting registers")?;
    let mut regs = vcpu.get_regs().context("reading registers")?;
    regs.rip = page.address();
    regs.rflags = 2;
    vcpu.set_regs(&regs).context("setting registers")?;
    let started = Instant::now();
    match vcpu.run().context("running a small guest")? {
        VcpuExit::Hlt => Ok(started.elapsed()),
        other => bail!("a small guest ended with {other:?}"),
    }
}

/// Boots the test kernel until its init reports.
fn try_linux(artefacts: &Artefacts, vmm: &Path) -> Result<()> {
    let (kernel, initramfs) = artefacts.bootable().context("no kernel to try")?;
    let mut child = Command::new(vmm)
        .arg("--kernel")
        .arg(kernel)
        .arg("--initramfs")
        .arg(initramfs)
        .args(["--cmdline", "console=ttyS0 quiet panic=-1 guest.run=OgoK"])
        .args([
            "--memory",
            "size=512M",
            "--serial",
            "tty",
            "--console",
            "off",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("starting {}", vmm.display()))?;
    let stdout = child.stdout.take().context("the VMM's output is piped")?;
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let found = BufReader::new(stdout)
            .lines()
            .map_while(Result::ok)
            .any(|line| line.contains(INIT_MARKER));
        // The receiver is dropped only after a timeout, when the result is no longer needed.
        sender.send(found).ok();
    });
    let found = receiver.recv_timeout(BOOT_MAX);
    // It may have ended already.
    child.kill().ok();
    child.wait().context("waiting for the VMM")?;
    match found {
        Ok(true) => Ok(()),
        Ok(false) => bail!("the test kernel did not reach its init"),
        Err(_) => bail!(
            "the test kernel did not reach its init in {} s",
            BOOT_MAX.as_secs()
        ),
    }
}
