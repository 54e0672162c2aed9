//! The fuzz targets, and what each is for.

/// A target.
#[derive(Debug)]
pub(super) struct Target {
    /// Name of its program.
    pub(super) name: &'static str,
    /// Files and folders (with `/` at the end) that the target is to execute.
    pub(super) subject: &'static [&'static str],
    /// Files in these folders that it cannot reach, because a host and not a guest or client decides what they do, and
    /// those for which another target is.
    pub(super) except: &'static [&'static str],
}

const fn target(
    name: &'static str,
    subject: &'static [&'static str],
    except: &'static [&'static str],
) -> Target {
    Target {
        name,
        subject,
        except,
    }
}

pub(super) const TARGETS: &[Target] = &[
    target(
        "back_end",
        &[
            "virtio-devices/src/vhost_user/profile.rs",
            "virtio-devices/src/vhost_user/rings.rs",
            "virtio-devices/src/vhost_user/session.rs",
        ],
        &[],
    ),
    target(
        "balloon",
        &["virtio-devices/src/balloon/"],
        &[
            "virtio-devices/src/balloon/fuzz.rs",
            "virtio-devices/src/balloon/state.rs",
        ],
    ),
    target(
        "boot",
        &["machine/src/boot/"],
        &["machine/src/boot/smbios.rs"],
    ),
    target(
        "devices",
        &[
            "virtio-devices/src/block/",
            "virtio-devices/src/console/",
            "virtio-devices/src/iommu/",
            "virtio-devices/src/mem/",
            "virtio-devices/src/net/",
            "virtio-devices/src/pmem.rs",
            "virtio-devices/src/queue/",
            "virtio-devices/src/rng.rs",
            "virtio-devices/src/vsock/",
            "virtio-devices/src/watchdog.rs",
        ],
        &[
            "virtio-devices/src/block/any_image.rs",
            "virtio-devices/src/block/container/",
            "virtio-devices/src/block/disk_sys.rs",
            "virtio-devices/src/block/engine/calls.rs",
            "virtio-devices/src/block/image.rs",
            "virtio-devices/src/block/image_file.rs",
            "virtio-devices/src/block/resize.rs",
            "virtio-devices/src/console/endpoint.rs",
            "virtio-devices/src/mem/handle.rs",
            // When an interface announces itself depends only on restores.
            "virtio-devices/src/net/announce.rs",
            "virtio-devices/src/net/params.rs",
            "virtio-devices/src/net/tap.rs",
            "virtio-devices/src/net/tap_sys.rs",
            "virtio-devices/src/net/tap_watch.rs",
        ],
    ),
    target(
        "discard",
        &[
            "virtio-devices/src/dma_mapped.rs",
            "virtio-devices/src/reclaim/",
        ],
        &[
            "virtio-devices/src/reclaim/any_claims.rs",
            "virtio-devices/src/reclaim/guarded_ram.rs",
            "virtio-devices/src/reclaim/overlay.rs",
            "virtio-devices/src/reclaim/switch.rs",
        ],
    ),
    target(
        "fleet",
        &[
            "fleet/src/config/",
            "fleet/src/planner/",
            "fleet/src/sample/reading.rs",
            "fleet/src/store/etcd_wire.rs",
        ],
        &[],
    ),
    target(
        "http",
        &[
            "vmm/src/api/body.rs",
            "vmm/src/api/http/framing.rs",
            "vmm/src/config/",
        ],
        &[],
    ),
    target(
        "image",
        &[
            "virtio-devices/src/block/container/",
            "virtio-devices/src/block/engine/calls.rs",
            "virtio-devices/src/block/engine/sync.rs",
            "virtio-devices/src/block/format.rs",
            "virtio-devices/src/block/image.rs",
        ],
        &[],
    ),
    target(
        "legacy",
        &[
            "machine/src/cpu/hotplug.rs",
            "machine/src/interrupt/ioapic.rs",
            "machine/src/legacy/",
            "machine/src/memory/hotplug.rs",
            "machine/src/serial/uart.rs",
        ],
        &[],
    ),
    target(
        "migration",
        &["vmm/src/migration/receive.rs", "vmm/src/migration/wire.rs"],
        &[],
    ),
    target("options", &["api/src/config/", "api/src/options/"], &[]),
    target(
        "pci",
        &["machine/src/bus.rs", "machine/src/pci/"],
        &["machine/src/pci/fake_doorbells.rs"],
    ),
    target(
        "registers",
        &["virtio-devices/src/pci/", "virtio-devices/src/transport/"],
        &[
            "virtio-devices/src/transport/saving.rs",
            "virtio-devices/src/transport/state.rs",
        ],
    ),
    target(
        "saved_state",
        &[
            "state/src/",
            "virtio-devices/src/balloon/state.rs",
            "virtio-devices/src/transport/saving.rs",
            "virtio-devices/src/transport/state.rs",
        ],
        &["state/src/testing.rs"],
    ),
    target(
        "snapshot",
        &[
            "machine/src/memory/layers.rs",
            "machine/src/memory/load.rs",
            "vmm/src/snapshot/chain.rs",
            "vmm/src/snapshot/merge.rs",
            "vmm/src/snapshot/saved_files.rs",
            "vmm/src/snapshot/state_file.rs",
        ],
        &[],
    ),
];

impl Target {
    /// Whether it is to execute the file, whose path is relative to the workspace.
    pub(super) fn is_for(&self, file: &str) -> bool {
        let names = |paths: &[&str]| {
            let mut paths = paths.iter();
            paths.any(|path| file == *path || path.ends_with('/') && file.starts_with(path))
        };
        names(self.subject) && !names(self.except)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paths;

    #[test]
    fn every_file_that_a_target_is_for_or_cannot_reach_exists() {
        for target in TARGETS {
            for path in target.subject.iter().chain(target.except) {
                assert!(
                    paths::workspace().join(path).exists(),
                    "{}: {path}",
                    target.name
                );
            }
            for path in target.except {
                assert!(!target.is_for(path), "{path}");
            }
        }
    }

    #[test]
    fn every_program_is_a_target_or_the_canary() {
        let folder = paths::workspace().join("fuzz/fuzz_targets");
        let mut programs: Vec<_> = std::fs::read_dir(folder)
            .expect("a folder")
            .filter_map(|entry| Some(entry.ok()?.path().file_stem()?.to_str()?.to_owned()))
            .filter(|name| name != super::super::CANARY)
            .collect();
        programs.sort();
        let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
        assert_eq!(programs, names);
    }
}
