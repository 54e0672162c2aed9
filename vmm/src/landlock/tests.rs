//! Tests threads that try to access files outside their rules.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::*;
use crate::config::NewDevice;

/// A folder with files for each purpose; `None` where the kernel has no Landlock.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Option<Self> {
        if let Err(error) = Rules::of_observers().and_then(|rules| rules.ruleset()) {
            test_skip::skip(error);
            return None;
        }
        let files = Self(tempfile::tempdir().unwrap());
        for name in ["kernel", "disk", "readonly", "other", "extra/file"] {
            let path = files.path(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "text").unwrap();
        }
        fs::create_dir(files.path("sockets")).unwrap();
        Some(files)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn config(&self, rules: &Value) -> VmConfig {
        serde_json::from_value(json!({
            "payload": {"kernel": self.path("kernel")},
            "disks": [
                {"path": self.path("disk")},
                {"path": self.path("readonly"), "readonly": true},
            ],
            "serial": {"mode": "File", "file": self.path("serial")},
            "console": {"mode": "Socket", "socket": self.path("sockets/console")},
            "landlock_enable": true,
            "landlock_rules": rules,
        }))
        .unwrap()
    }
}

/// Runs `action` on a thread that `config` confines.
fn confined<T: Send>(config: &VmConfig, action: impl FnOnce(&Confinement) -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mut confinement = Confinement::default();
            confinement.admit(config).unwrap();
            action(&confinement)
        });
        thread.join().unwrap()
    })
}

fn is_denied<T>(result: io::Result<T>) -> bool {
    result.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
}

fn opens_to_write(path: PathBuf) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

#[test]
fn thread_reaches_what_its_configuration_names_and_nothing_else() {
    let Some(files) = Files::new() else { return };
    confined(&files.config(&json!([])), |_| {
        File::open(files.path("kernel")).unwrap();
        assert!(is_denied(opens_to_write(files.path("kernel"))));
        opens_to_write(files.path("disk"))
            .unwrap()
            .set_len(8)
            .unwrap();
        File::open(files.path("readonly")).unwrap();
        assert!(is_denied(opens_to_write(files.path("readonly"))));
        // The file was created for its rule, because only an existing file can have one.
        File::create(files.path("serial")).unwrap();
        File::open("/dev/urandom").unwrap();
        File::open("/proc/self/pagemap").unwrap();

        assert!(is_denied(File::open(files.path("other"))));
        assert!(is_denied(File::create(files.path("new"))));
        assert!(is_denied(fs::remove_file(files.path("disk"))));
        assert!(is_denied(fs::read_dir(files.0.path())));
        assert!(is_denied(File::open("/etc/passwd")));
        assert!(is_denied(fs::hard_link(
            files.path("other"),
            files.path("sockets/link")
        )));

        drop(UnixListener::bind(files.path("sockets/console")).unwrap());
        fs::remove_file(files.path("sockets/console")).unwrap();
        assert!(is_denied(File::create(files.path("sockets/file"))));
        assert!(is_denied(UnixListener::bind(files.path("elsewhere"))));
    });
    // Other threads are not confined.
    File::open(files.path("other")).unwrap();
}

#[test]
fn backing_files_may_be_read_if_the_disk_may_have_them() {
    let Some(files) = Files::new() else { return };
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "other"])
        .arg(files.path("overlay"))
        .output();
    if let Err(error) = made {
        test_skip::skip(format!("no qemu-img: {error}"));
        return;
    }
    // The guest of a raw disk may have written anything there.
    for (image_type, backing_files, allowed) in [
        ("Unknown", false, false),
        ("Unknown", true, true),
        ("Qcow2", true, true),
        ("Raw", true, false),
        ("FlatVmdk", true, false),
    ] {
        let mut config = files.config(&json!([]));
        let disk = json!({
            "path": files.path("overlay"),
            "image_type": image_type,
            "backing_files": backing_files,
        });
        config.disks = Some(vec![serde_json::from_value(disk).unwrap()]);
        confined(&config, |_| {
            assert_eq!(File::open(files.path("other")).is_ok(), allowed);
            assert!(is_denied(opens_to_write(files.path("other"))));
        });
    }
}

#[test]
fn threads_that_a_confined_one_starts_are_confined_too() {
    let Some(files) = Files::new() else { return };
    confined(&files.config(&json!([])), |_| {
        let other = files.path("other");
        let denied = std::thread::spawn(move || is_denied(File::open(other)));
        assert!(denied.join().unwrap());
    });
}

#[test]
fn rules_of_the_configuration_allow_what_they_say() {
    let Some(files) = Files::new() else { return };
    for (access, reads, writes) in [("r", true, false), ("w", false, true), ("rw", true, true)] {
        let rules = json!([{"path": files.path("extra"), "access": access}]);
        confined(&files.config(&rules), |_| {
            let file = files.path("extra/file");
            assert_eq!(File::open(&file).is_ok(), reads, "{access}");
            assert_eq!(
                File::options().write(true).open(&file).is_ok(),
                writes,
                "{access}"
            );
            assert!(is_denied(File::open(files.path("other"))), "{access}");
        });
    }
}

#[test]
fn devices_are_checked_as_the_kernel_would() {
    let Some(files) = Files::new() else { return };
    std::os::unix::fs::symlink(files.path("other"), files.path("extra/link")).unwrap();
    let rules = json!([{"path": files.path("extra"), "access": "r"}]);
    let disk = |name: &str, readonly: bool| {
        let disk = json!({"path": files.path(name), "readonly": readonly});
        NewDevice::Disk(serde_json::from_value(disk).unwrap())
    };
    let vsock = |name: &str| {
        let vsock = json!({"cid": 3, "socket": files.path(name)});
        NewDevice::Vsock(serde_json::from_value(vsock).unwrap())
    };
    let fs = |name: &str| {
        let fs = json!({"tag": "t", "socket": files.path(name)});
        NewDevice::Fs(serde_json::from_value(fs).unwrap())
    };
    let vhost_user_disk = |name: &str| {
        let disk = json!({"vhost_user": true, "vhost_socket": files.path(name)});
        NewDevice::Disk(serde_json::from_value(disk).unwrap())
    };
    let net = NewDevice::Net(serde_json::from_value(json!({})).unwrap());
    confined(&files.config(&rules), |confinement| {
        let checked = |device: &NewDevice| confinement.check(&of_device(device));
        for (device, allowed) in [
            (disk("extra/file", true), true),
            (disk("extra/file", false), false),
            (disk("other", true), false),
            (disk("extra/link", true), false),
            (disk("disk", false), true),
            (disk("extra/../other", true), false),
            (vsock("sockets/vsock"), true),
            (vsock("vsock"), false),
            (fs("sockets/fs"), true),
            (fs("fs"), false),
            (vhost_user_disk("sockets/disk"), true),
            (vhost_user_disk("socket"), false),
        ] {
            assert_eq!(checked(&device).is_ok(), allowed, "{device:?}");
        }
        let refused = checked(&vsock("vsock")).unwrap_err().to_string();
        assert!(refused.contains(",access=w)"), "{refused}");
        // There was no interface when the VM was created.
        let refused = checked(&net);
        assert_eq!(
            refused.is_ok(),
            !Path::new("/dev/net/tun").exists(),
            "{refused:?}"
        );
    });
}

#[test]
fn rule_for_a_path_that_is_not_there_is_named() {
    let Some(files) = Files::new() else { return };
    let rules = json!([{"path": files.path("missing"), "access": "r"}]);
    let error = Confinement::default()
        .admit(&files.config(&rules))
        .unwrap_err();
    let text = api::error_line(&error);
    assert!(text.contains("missing"), "{text}");
}

#[test]
fn layers_of_equal_rules_count_once_and_others_up_to_the_kernels_limit() {
    let Some(files) = Files::new() else { return };
    let plain = files.config(&json!([]));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut confinement = Confinement::default();
            for _ in 0..2 * LAYERS_MAX {
                confinement.admit(&plain).unwrap();
                confinement.forget_vm();
            }
            assert_eq!(confinement.layers.len(), 1);
            let mut narrower = plain.clone();
            for number in 1..LAYERS_MAX {
                let path = files.path("kernel");
                let rules: Vec<_> = (0..number)
                    .map(|_| json!({"path": path, "access": "r"}))
                    .collect();
                narrower = files.config(&json!(rules));
                confinement.admit(&narrower).unwrap();
                confinement.forget_vm();
            }
            let rule = api::config::LandlockConfig {
                path: files.path("disk"),
                access: "r".to_owned(),
            };
            narrower.landlock_rules.as_mut().unwrap().push(rule);
            assert!(matches!(
                confinement.admit(&narrower),
                Err(LandlockError::TooManyLayers { max: LAYERS_MAX })
            ));
            File::open(files.path("kernel")).unwrap();
        });
    });
}

#[test]
fn observers_read_figures_and_others_remove_their_socket_alone() {
    let Some(files) = Files::new() else { return };
    let socket = files.path("sockets/api");
    fs::write(&socket, "").unwrap();
    let start = confine_observers(Arc::new(|_| {})).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            start(ThreadKind::HttpServer);
            File::open("/proc/self/pagemap").unwrap();
            assert!(is_denied(File::open(files.path("kernel"))));
            assert!(is_denied(fs::remove_file(&socket)));
        });
        // The control thread is confined when a VM boots, by its rules.
        scope.spawn(|| {
            start(ThreadKind::Control);
            File::open(files.path("kernel")).unwrap();
        });
    });
    std::thread::scope(|scope| {
        scope.spawn(|| {
            confine_to_removal(Some(&socket)).unwrap();
            fs::remove_file(&socket).unwrap();
            assert!(is_denied(fs::remove_file(files.path("kernel"))));
            assert!(is_denied(File::open("/proc/self/pagemap")));
        });
    });
}

#[test]
fn kernel_without_landlock_is_a_named_error() {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
    // A seccomp filter that simulates such a kernel.
    let calls = [(libc::SYS_landlock_create_ruleset, Vec::new())].into();
    let missing = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let filter = SeccompFilter::new(calls, SeccompAction::Allow, missing, TargetArch::x86_64);
    let filter = BpfProgram::try_from(filter.unwrap()).unwrap();
    let config: VmConfig = serde_json::from_value(json!({"landlock_enable": true})).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            seccompiler::apply_filter(&filter).unwrap();
            let error = Confinement::default().admit(&config).unwrap_err();
            assert!(matches!(error, LandlockError::Unavailable(_)), "{error:?}");
            assert!(error.to_string().starts_with("Landlock is not available"));
            assert!(confine_observers(Arc::new(|_| {})).is_err());
        });
    });
}
