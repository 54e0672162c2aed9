//! Tests the pid namespace of a jail, and the process outside of it that waits for the VMM. They need root.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::confinement::{AS_NOBODY, field, folder_of_nobody, is_root};
use super::{PATIENCE, Vmm, expect_clean_end_during_the_start, program, signal};

/// Anonymous memory of the waiter's own. The rest, such as relocated data, it shares with the VMM.
const PRIVATE_KIB_MAX: u64 = 512;

fn jailed() -> Vmm {
    Vmm::start_in(folder_of_nobody(), program().args(AS_NOBODY).arg("--jail"))
}

fn proc(pid: u32, name: &str) -> PathBuf {
    Path::new("/proc").join(pid.to_string()).join(name)
}

fn status_of(pid: u32) -> String {
    fs::read_to_string(proc(pid, "status")).unwrap()
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether the process has ended, even if its parent has not yet waited for it.
fn has_ended(pid: u32) -> bool {
    let status = fs::read_to_string(proc(pid, "status"));
    status.is_err() || field(&status.unwrap_or_default(), "State:").starts_with('Z')
}

fn is_stopped(pid: u32) -> bool {
    field(&status_of(pid), "State:").starts_with('T')
}

#[test]
fn jail_has_a_pid_namespace_whose_first_process_is_the_vmm() {
    if !is_root() {
        return;
    }
    let vmm = jailed();
    let (outside, waiter) = (vmm.pid(), vmm.child.id());
    assert_ne!(outside, waiter);
    let status = status_of(outside);
    assert_eq!(field(&status, "PPid:"), waiter.to_string());
    let ids = field(&status, "NSpid:");
    assert!(ids.ends_with(&format!("{outside} 1")), "{ids}");
    let shown = fs::read_dir(proc(outside, "root/proc")).unwrap();
    let mut shown: Vec<_> = shown.map(|it| it.unwrap().file_name()).collect();
    shown.sort();
    assert_eq!(shown, ["1", "self", "thread-self"]);
    let log = vmm.response("GET", "vmm.ping", "").unwrap();
    assert!(log.contains(&format!("\"pid\":{outside},")), "{log}");
}

#[test]
fn waiter_has_no_rights_no_files_and_little_memory() {
    if !is_root() {
        return;
    }
    let vmm = jailed();
    let waiter = vmm.child.id();
    let status = status_of(waiter);
    for (key, value) in [
        // As `api::WAITER_NAME`, by which the fleet agent finds it.
        ("Name:", "vmm-waiter"),
        ("Uid:", "65534 65534 65534 65534"),
        ("Groups:", ""),
        ("CapPrm:", "0000000000000000"),
        ("CapBnd:", "0000000000000000"),
        ("NoNewPrivs:", "1"),
        ("Seccomp:", "2"),
        ("Threads:", "1"),
    ] {
        assert_eq!(field(&status, key), value, "{status}");
    }
    assert!(!proc(waiter, "root/etc").exists());
    let files = || fs::read_dir(proc(waiter, "fd")).unwrap().flatten();
    // It closes its files while the VMM already runs.
    wait_for("the waiter keeps files open", || files().count() == 1);
    let link = fs::read_link(files().next().unwrap().path()).unwrap();
    assert!(link.to_str().unwrap().starts_with("pipe:"), "{link:?}");
    let memory = fs::read_to_string(proc(waiter, "smaps_rollup")).unwrap();
    let private = field(&memory, "Private_Dirty:");
    let kib: u64 = private.trim_end_matches(" kB").parse().unwrap();
    println!("{memory}");
    // Debug builds have larger data.
    assert!(kib <= PRIVATE_KIB_MAX || cfg!(debug_assertions), "{memory}");
}

#[test]
fn signals_to_the_waiter_end_the_vmm_cleanly() {
    if !is_root() {
        return;
    }
    for name in ["-TERM", "-INT"] {
        let vmm = jailed();
        vmm.signal(name);
        let (status, text, left) = vmm.wait();
        assert_eq!((status, text.as_str()), (Some(0), ""), "{name}");
        assert!(left.is_empty(), "{name}: {left:?}");
    }
    // To the VMM itself they do the same.
    let vmm = jailed();
    signal(vmm.pid(), "-TERM");
    let (status, text, left) = vmm.wait();
    assert_eq!((status, text.as_str()), (Some(0), ""));
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn program_that_is_still_starting_in_a_jail_ends_cleanly_on_a_signal() {
    if is_root() {
        expect_clean_end_during_the_start("--jail");
        expect_clean_end_during_the_start("--jail --kernel /bin/true --console off --serial off");
    }
}

#[test]
fn waiter_that_is_killed_leaves_no_vmm_behind() {
    if !is_root() {
        return;
    }
    for (name, number) in [
        ("-KILL", libc::SIGKILL),
        ("-HUP", libc::SIGHUP),
        ("-USR1", libc::SIGUSR1),
        // Not handled at all.
        ("-VTALRM", libc::SIGVTALRM),
        ("-RTMIN", libc::SIGRTMIN()),
    ] {
        let vmm = jailed();
        let pid = vmm.pid();
        vmm.signal(name);
        let (status, ..) = vmm.wait_for_status();
        assert_eq!(status.signal(), Some(number), "{name}");
        wait_for(name, || has_ended(pid));
    }
}

#[test]
fn vmm_that_is_killed_or_aborts_ends_the_waiter_by_the_same_signal() {
    if !is_root() {
        return;
    }
    for (name, number) in [("-KILL", libc::SIGKILL), ("-ABRT", libc::SIGABRT)] {
        let vmm = jailed();
        signal(vmm.pid(), name);
        let (status, ..) = vmm.wait_for_status();
        assert_eq!(status.signal(), Some(number), "{name}");
    }
}

#[test]
fn failures_inside_the_jail_have_their_status_and_message() {
    if !is_root() {
        return;
    }
    let output = super::output("--jail --api-socket /nonexistent/s");
    assert_eq!(output.status.code(), Some(1));
    let text = super::stderr(&output);
    assert!(text.contains("/nonexistent/s"), "{text}");
    assert_eq!(text.matches("chain of errors").count(), 1, "{text}");
}

#[test]
fn job_control_stops_and_continues_the_vmm() {
    if !is_root() {
        return;
    }
    let vmm = jailed();
    let (pid, waiter) = (vmm.pid(), vmm.child.id());
    vmm.signal("-TSTP");
    wait_for("the VMM runs", || is_stopped(pid) && is_stopped(waiter));
    vmm.signal("-CONT");
    wait_for("the VMM is stopped", || !is_stopped(pid));
    vmm.signal("-TERM");
    assert_eq!(vmm.wait().0, Some(0));
}

#[test]
fn signal_that_the_caller_ignores_ends_nothing() {
    if !is_root() {
        return;
    }
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "trap '' HUP CHLD; exec \"$@\"", "sh"]);
    command.arg(program().get_program());
    command.args(AS_NOBODY).arg("--jail");
    let vmm = Vmm::start_in(folder_of_nobody(), &mut command);
    vmm.signal("-HUP");
    assert!(vmm.request("GET", "vmm.ping").is_some());
    // The signals are handled in this order.
    vmm.signal("-TERM");
    assert_eq!(vmm.wait().0, Some(0));
}
