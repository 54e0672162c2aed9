//! Tests what a confined process cannot do. All options for it need root.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::{Vmm, output, program, stderr};

/// A user and group without an entry or with one that owns nothing.
const NOBODY: u32 = 65534;
pub(super) const AS_NOBODY: [&str; 4] = ["--user", "65534", "--group", "65534"];

pub(super) fn is_root() -> bool {
    let root = fs::metadata("/proc/self").unwrap().uid() == 0;
    if !root {
        test_skip::skip("changing the user and the root folder needs root");
    }
    root
}

/// An empty folder that `NOBODY` owns.
pub(super) fn folder_of_nobody() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    chown(folder.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    folder
}

/// A folder with a file that the VMM must not open, and one that the jail shows.
fn files() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(folder.path().join("secret"), "text").unwrap();
    fs::set_permissions(
        folder.path().join("secret"),
        fs::Permissions::from_mode(0o600),
    )
    .unwrap();
    fs::create_dir(folder.path().join("shown")).unwrap();
    fs::write(folder.path().join("shown/inside"), "text").unwrap();
    folder
}

impl Vmm {
    /// The process id, which in a jail is not that of the process that was started.
    pub(super) fn pid(&self) -> u32 {
        let answer = self.response("GET", "vmm.ping", "").unwrap();
        let (_, rest) = answer.split_once("\"pid\":").unwrap();
        let end = rest.find(|it: char| !it.is_ascii_digit()).unwrap();
        rest[..end].parse().unwrap()
    }

    fn proc(&self, name: &str) -> PathBuf {
        Path::new("/proc").join(self.pid().to_string()).join(name)
    }

    fn proc_text(&self, name: &str) -> String {
        fs::read_to_string(self.proc(name)).unwrap()
    }

    /// Creates and boots a VM that cannot boot, and returns why.
    fn boot_error(&self, config: &str) -> String {
        let created = self.response("PUT", "vm.create", config).unwrap();
        assert!(created.starts_with("HTTP/1.1 204"), "{config}: {created}");
        let answer = self.response("PUT", "vm.boot", "").unwrap();
        assert!(!answer.starts_with("HTTP/1.1 20"), "{config}: {answer}");
        let deleted = self.response("PUT", "vm.delete", "").unwrap();
        assert!(deleted.starts_with("HTTP/1.1 204"), "{deleted}");
        answer
    }

    fn shut_down(self) -> Vec<String> {
        self.request("PUT", "vmm.shutdown").unwrap();
        let (status, text, left) = self.wait();
        assert_eq!((status, text.as_str()), (Some(0), ""));
        left
    }
}

fn kernel(path: &Path) -> String {
    format!(
        r#"{{"payload": {{"kernel": "{}"}}, "console": {{"mode": "Off"}}}}"#,
        path.display()
    )
}

/// The value of `key` in a status file, with single blanks.
pub(super) fn field(status: &str, key: &str) -> String {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(key))
        .unwrap();
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn user_gets_no_capability_no_group_and_no_new_privileges_in_any_thread() {
    if !is_root() {
        return;
    }
    let vmm = Vmm::start_in(folder_of_nobody(), program().args(AS_NOBODY));
    let mut threads = 0;
    for thread in fs::read_dir(vmm.proc("task")).unwrap() {
        threads += 1;
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        for key in ["Uid:", "Gid:"] {
            assert_eq!(field(&status, key), "65534 65534 65534 65534", "{status}");
        }
        assert_eq!(field(&status, "Groups:"), "", "{status}");
        for key in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(field(&status, key), "0000000000000000", "{status}");
        }
        assert_eq!(field(&status, "NoNewPrivs:"), "1", "{status}");
    }
    assert!(threads >= 4, "{threads}");
    for name in ["s", "s.lock"] {
        let owner = fs::metadata(vmm.dir.path().join(name)).unwrap();
        assert_eq!((owner.uid(), owner.gid()), (NOBODY, NOBODY), "{name}");
    }
    assert!(vmm.shut_down().is_empty());
}

#[test]
fn user_opens_no_file_of_root_and_the_error_names_it() {
    if !is_root() {
        return;
    }
    let files = files();
    let secret = files.path().join("secret");
    let vmm = Vmm::start_in(folder_of_nobody(), program().args(AS_NOBODY));
    let error = vmm.boot_error(&kernel(&secret));
    assert!(error.contains("Permission denied"), "{error}");
    assert!(error.contains(secret.to_str().unwrap()), "{error}");
    drop(vmm);
    // Without the option, the same file is opened.
    let vmm = Vmm::start(&[]);
    let error = vmm.boot_error(&kernel(&secret));
    assert!(!error.contains("Permission denied"), "{error}");
}

#[test]
fn user_is_not_traced_by_its_other_processes() {
    if !is_root() {
        return;
    }
    let reads = |path: &Path| {
        let mut cat = Command::new("cat");
        cat.uid(NOBODY).gid(NOBODY).arg(path);
        cat.output().unwrap().status.success()
    };
    assert!(reads(Path::new("/proc/self/maps")));
    let vmm = Vmm::start_in(folder_of_nobody(), program().args(AS_NOBODY));
    assert!(!reads(&vmm.proc("maps")));
    // Every user may read the figures of the process, and an agent that is root the rest.
    assert!(reads(&vmm.proc("status")));
    assert!(vmm.proc_text("smaps_rollup").contains("Rss:"));
}

#[test]
fn jail_shows_the_paths_that_options_name_and_nothing_else() {
    if !is_root() {
        return;
    }
    let files = files();
    let vmm = Vmm::start_in(
        folder_of_nobody(),
        program()
            .args(AS_NOBODY)
            .args(["-v", "--log-file"])
            .arg(files.path().join("log"))
            // Relative paths keep working.
            .current_dir(files.path())
            .args(["--jail", "path=shown"]),
    );
    let root = vmm.proc("root");
    let within = |path: &Path| root.join(path.strip_prefix("/").unwrap());
    assert!(within(&files.path().join("shown/inside")).exists());
    assert!(!within(&files.path().join("secret")).exists());
    assert!(within(vmm.dir.path()).join("s").exists());
    assert!(within(Path::new("/dev/kvm")).exists() == Path::new("/dev/kvm").exists());
    for path in ["/etc", "/usr", "/root", "/sys", "/dev/mem"] {
        assert!(!within(Path::new(path)).exists(), "{path}");
    }

    let mounts = vmm.proc_text("mountinfo");
    let mount = |path: &str| {
        let mut lines = mounts.lines();
        let line = lines.find(|line| line.split(' ').nth(4) == Some(path));
        line.unwrap_or_else(|| panic!("{path}: {mounts}"))
    };
    let options = |path: &str| mount(path).split(' ').nth(5).unwrap().to_owned();
    for path in ["/", files.path().join("shown").to_str().unwrap()] {
        assert!(options(path).starts_with("ro,nosuid"), "{mounts}");
    }
    assert!(
        options(vmm.dir.path().to_str().unwrap()).starts_with("rw,nosuid"),
        "{mounts}"
    );
    assert!(mount("/proc").contains("hidepid=ptraceable"), "{mounts}");
    let own = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!own.contains(files.path().to_str().unwrap()), "{own}");

    let secret = files.path().join("secret");
    let error = vmm.boot_error(&kernel(&secret));
    assert!(error.starts_with("HTTP/1.1 400"), "{error}");
    let advice = format!("--jail path={},access=r", secret.display());
    assert!(
        error.contains("outside the jail") && error.contains(&advice),
        "{error}"
    );
    for path in [files.path().join("shown/inside"), "shown/inside".into()] {
        let error = vmm.boot_error(&kernel(&path));
        assert!(!error.contains("outside the jail"), "{error}");
        assert!(!error.contains("No such file"), "{error}");
    }
    let inside = files.path().join("shown/inside");
    let pty = format!(
        r#"{{"payload":{{"kernel":"{}"}},"console":{{"mode":"Pty"}}}}"#,
        inside.display()
    );
    let error = vmm.boot_error(&pty);
    assert!(error.starts_with("HTTP/1.1 400"), "{error}");
    assert!(
        error.contains("No pseudo-terminal opens in the jail"),
        "{error}"
    );
    assert!(vmm.shut_down().is_empty());
    let log = fs::read_to_string(files.path().join("log")).unwrap();
    assert!(log.contains("API request: VmBoot"), "{log}");
}

#[test]
fn jail_creates_the_file_of_events_for_its_user() {
    if !is_root() {
        return;
    }
    let files = files();
    let events = files.path().join("events");
    let vmm = Vmm::start_in(
        folder_of_nobody(),
        program()
            .args(AS_NOBODY)
            .args(["--jail", "--event-monitor"])
            .arg(format!("path={}", events.display())),
    );
    assert!(vmm.shut_down().is_empty());
    let owner = fs::metadata(&events).unwrap();
    assert_eq!((owner.uid(), owner.mode() & 0o777), (NOBODY, 0o600));
    assert!(fs::read_to_string(&events).unwrap().contains("shutdown"));
}

#[test]
fn resource_limits_bind_the_process() {
    let limits = "open_files=300,file_size=1M,core_size=0";
    let vmm = Vmm::start(&["--resource-limits", limits]);
    let text = vmm.proc_text("limits");
    for (name, value) in [
        ("Max open files", "300 300 files"),
        ("Max file size", "1048576 1048576 bytes"),
        ("Max core file size", "0 0 bytes"),
    ] {
        assert_eq!(field(&text, name), value, "{text}");
    }
}

#[test]
fn confinement_that_is_not_possible_is_named() {
    if !is_root() {
        return;
    }
    for (line, reason) in [
        (
            "--user nobody-here",
            "/etc/passwd has no entry for \"nobody-here\"",
        ),
        (
            "--user 0 --group none-here",
            "/etc/group has no entry for \"none-here\"",
        ),
        ("--user 4294967294", "add --group"),
        ("--group 0", "--user <USER>"),
        ("--jail path=/", "cannot show the root folder"),
        ("--jail path=/tmp,access=w", "must be r or rw; got \"w\""),
        ("--jail access=r", "parameter \"path\" is required"),
        (
            "--resource-limits open_files=many",
            "invalid value \"many\" for parameter \"open_files\"",
        ),
    ] {
        let output = output(&format!("--api-socket /nonexistent/s {line}"));
        assert!(!output.status.success(), "{line}");
        assert!(
            stderr(&output).contains(reason),
            "{line}: {}",
            stderr(&output)
        );
    }
}

#[test]
fn confinement_without_privileges_is_refused() {
    if !is_root() {
        return;
    }
    // A place from which every user can start it.
    let folder = files();
    let copy = folder.path().join("program");
    // By another process: a file that a child of another test inherits open for writing cannot be executed.
    let mut copying = Command::new("cp");
    copying
        .arg(env!("CARGO_BIN_EXE_cloud-hypervisor"))
        .arg(&copy);
    assert!(copying.status().unwrap().success());
    for (arguments, reason) in [
        (&["--user", "0"][..], "needs CAP_SETUID and CAP_SETGID"),
        (&["--jail"][..], "--jail needs CAP_SYS_ADMIN"),
        (
            &["--resource-limits", "open_files=4000000000"][..],
            "the limit of open files",
        ),
    ] {
        let mut command = Command::new(&copy);
        command
            .args(["--api-socket", "/nonexistent/s"])
            .args(arguments);
        let output = command.uid(NOBODY).gid(NOBODY).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(stderr(&output).contains(reason), "{}", stderr(&output));
    }
    // The user that it is already needs no privilege.
    let mut command = Command::new(&copy);
    command.uid(NOBODY).gid(NOBODY).args(AS_NOBODY);
    let vmm = Vmm::start_in(folder_of_nobody(), &mut command);
    assert!(vmm.shut_down().is_empty());
}
