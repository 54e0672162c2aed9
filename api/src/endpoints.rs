//! The table of all endpoints of the API.
//!
//! The server's routes and error messages, the client's calls and the commands of `ch-remote` are derived from this
//! table, as is the test of the OpenAPI file. The server matches on [`Endpoint`] without a catch-all arm, so a new row
//! does not compile until the server implements it. The comment of a row is the help text of its command, unless the
//! command also calls another endpoint. The help lists the commands in the order of the rows, those without arguments
//! first.

/// Prefix of every path.
pub const API_PREFIX: &str = "/api/v1/";

/// The methods of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// Reads state.
    Get,
    /// Performs an action.
    Put,
}

impl Method {
    /// The method's name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
        }
    }
}

/// The project that defined an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Cloud Hypervisor. Unknown keys in a body are ignored, as in upstream.
    Upstream,
    /// This project. Unknown keys in a body are rejected by name.
    Ours,
}

macro_rules! endpoints {
    ($(
        #[doc = $doc:literal]
        $variant:ident = $origin:ident $method:ident $name:literal,
            request $request:expr, response $response:expr, command $command:literal,
            failure $failure:literal;
    )*) => {
        /// One endpoint of the API.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Endpoint {
            $(#[doc = $doc] $variant,)*
        }

        impl Endpoint {
            /// Every endpoint.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// A one-sentence description.
            pub const fn about(self) -> &'static str {
                match self { $(Self::$variant => $doc.trim_ascii(),)* }
            }

            /// The project that defined it.
            pub const fn origin(self) -> Origin {
                match self { $(Self::$variant => Origin::$origin,)* }
            }

            /// Its method.
            pub const fn method(self) -> Method {
                match self { $(Self::$variant => Method::$method,)* }
            }

            /// The last part of its path, `vm.info`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The schema of the request body; `None` if a body is rejected.
            pub const fn request(self) -> Option<&'static str> {
                match self { $(Self::$variant => $request,)* }
            }

            /// The schema of the response body; `None` if the response has no body.
            pub const fn response(self) -> Option<&'static str> {
                match self { $(Self::$variant => $response,)* }
            }

            /// The command of `ch-remote` that calls it.
            pub const fn command(self) -> &'static str {
                match self { $(Self::$variant => $command,)* }
            }

            /// The error message on failure. The texts are upstream's, because users match on them.
            pub const fn failure(self) -> &'static str {
                match self { $(Self::$variant => $failure,)* }
            }
        }
    };
}

endpoints! {
    /// Check that the VMM responds, and show its version.
    VmmPing = Upstream Get "vmm.ping",
        request None, response Some("VmmPingResponse"), command "ping",
        failure "The VMM info is not available";
    /// End the VMM.
    VmmShutdown = Upstream Put "vmm.shutdown",
        request None, response None, command "shutdown-vmm",
        failure "The VMM could not shutdown";
    /// Store the configuration of a VM without booting it.
    VmCreate = Upstream Put "vm.create",
        request Some("VmConfig"), response None, command "create",
        failure "The VM could not be created";
    /// Boot the VM.
    VmBoot = Upstream Put "vm.boot",
        request None, response None, command "boot",
        failure "The VM could not boot";
    /// End the VM and delete its configuration.
    VmDelete = Upstream Put "vm.delete",
        request None, response None, command "delete",
        failure "The VM could not be deleted";
    /// Show the configuration and the state of the VM.
    VmInfo = Upstream Get "vm.info",
        request None, response Some("VmInfo"), command "info",
        failure "The VM info is not available";
    /// Show the counters of the VM's devices.
    VmCounters = Upstream Get "vm.counters",
        request None, response Some("VmCounters"), command "counters",
        failure "The VM counters are not available";
    /// Change the VM's vCPUs, RAM or balloon.
    VmResize = Upstream Put "vm.resize",
        request Some("VmResize"), response None, command "resize",
        failure "The VM could not be resized";
    /// Change the size of a memory zone.
    VmResizeZone = Upstream Put "vm.resize-zone",
        request Some("VmResizeZone"), response None, command "resize-zone",
        failure "The memory zone could not be resized";
    /// Change the size of a disk of a running VM.
    VmResizeDisk = Upstream Put "vm.resize-disk",
        request Some("VmResizeDisk"), response None, command "resize-disk",
        failure "The disk could not be resized";
    /// Change the rate limit of a disk, a network interface or a group.
    VmUpdateRateLimiter = Ours Put "vm.update-rate-limiter",
        request Some("VmUpdateRateLimiter"), response None, command "update-rate-limiter",
        failure "The rate limit could not be changed";
    /// Show the memory statistics that the guest reports.
    VmBalloonStats = Upstream Get "vm.balloon-stats",
        request None, response Some("BalloonStatsResponse"), command "balloon-stats",
        failure "The balloon statistics are not available";
    /// Add a disk to the VM.
    VmAddDisk = Upstream Put "vm.add-disk",
        request Some("DiskConfig"), response Some("PciDeviceInfo"), command "add-disk",
        failure "The disk could not be added to the VM";
    /// Add a network interface to the VM.
    VmAddNet = Upstream Put "vm.add-net",
        request Some("NetConfig"), response Some("PciDeviceInfo"), command "add-net",
        failure "The network device could not be added to the VM";
    /// Add a shared folder to the VM.
    VmAddFs = Upstream Put "vm.add-fs",
        request Some("FsConfig"), response Some("PciDeviceInfo"), command "add-fs",
        failure "The shared folder could not be added to the VM";
    /// Add a device that a vhost-user back end serves to the VM.
    VmAddGenericVhostUser = Upstream Put "vm.add-generic-vhost-user",
        request Some("GenericVhostUserConfig"), response Some("PciDeviceInfo"), command "add-generic-vhost-user",
        failure "The vhost-user device could not be added to the VM";
    /// Add a device of the host to the VM.
    VmAddDevice = Upstream Put "vm.add-device",
        request Some("DeviceConfig"), response Some("PciDeviceInfo"), command "add-device",
        failure "The device could not be added to the VM";
    /// Add persistent memory to the VM.
    VmAddPmem = Upstream Put "vm.add-pmem",
        request Some("PmemConfig"), response Some("PciDeviceInfo"), command "add-pmem",
        failure "The persistent memory device could not be added to the VM";
    /// Add the vsock device to the VM.
    VmAddVsock = Upstream Put "vm.add-vsock",
        request Some("VsockConfig"), response Some("PciDeviceInfo"), command "add-vsock",
        failure "The vsock device could not be added to the VM";
    /// Add the balloon to the VM.
    VmAddBalloon = Ours Put "vm.add-balloon",
        request Some("BalloonConfig"), response Some("PciDeviceInfo"), command "add-balloon",
        failure "The balloon could not be added to the VM";
    /// Save the VM to files.
    VmSnapshot = Upstream Put "vm.snapshot",
        request Some("VmSnapshotConfig"), response None, command "snapshot",
        failure "The VM could not be snapshotted";
    /// Merge a chain of snapshots into a new one.
    VmSnapshotMerge = Ours Put "vm.snapshot-merge",
        request Some("VmSnapshotMergeConfig"), response None, command "snapshot-merge",
        failure "The snapshots could not be merged";
    /// Write a core file of the guest.
    VmCoredump = Upstream Put "vm.coredump",
        request Some("VmCoredumpData"), response None, command "coredump",
        failure "The core file of the VM could not be written";
    /// Create a VM from saved files.
    VmRestore = Upstream Put "vm.restore",
        request Some("RestoreConfig"), response None, command "restore",
        failure "The VM could not be restored";
    /// Remove a device from the VM.
    VmRemoveDevice = Upstream Put "vm.remove-device",
        request Some("VmRemoveDevice"), response None, command "remove-device",
        failure "The device could not be removed from the VM";
    /// Show how much of the VM's memory returned to the host, and how.
    VmReclaimStats = Ours Get "vm.reclaim-stats",
        request None, response Some("ReclaimStats"), command "reclaim-stats",
        failure "The reclaim statistics are not available";
    /// Show alerts and the reporting policy.
    VmReclaimThresholds = Ours Get "vm.reclaim-thresholds",
        request None, response Some("ReclaimThresholds"), command "reclaim-thresholds",
        failure "The reclaim thresholds are not available";
    /// Change alerts and the reporting policy, all or nothing.
    VmSetReclaimThresholds = Ours Put "vm.reclaim-thresholds",
        request Some("ReclaimThresholdsChange"), response Some("ReclaimThresholds"), command "reclaim-thresholds",
        failure "The reclaim thresholds could not be changed";
    /// Start or stop a run of free page hinting.
    VmBalloonHinting = Ours Put "vm.balloon-hinting",
        request Some("VmBalloonHinting"), response None, command "balloon-hinting",
        failure "Free page hinting could not be started or stopped";
    /// Pause or resume free page reporting, or request a full report.
    VmBalloonReporting = Ours Put "vm.balloon-reporting",
        request Some("VmBalloonReporting"), response Some("ReportingStatus"), command "balloon-reporting",
        failure "Free page reporting could not be controlled";
    /// Stop the VM's vCPUs.
    VmPause = Upstream Put "vm.pause",
        request None, response None, command "pause",
        failure "The VM could not be paused";
    /// Resume the vCPUs of a paused VM.
    VmResume = Upstream Put "vm.resume",
        request None, response None, command "resume",
        failure "The VM could not resume";
    /// End the VM and keep its configuration.
    VmShutdown = Upstream Put "vm.shutdown",
        request None, response None, command "shutdown",
        failure "The VM could not shutdown";
    /// Restart the VM.
    VmReboot = Upstream Put "vm.reboot",
        request None, response None, command "reboot",
        failure "The VM could not reboot";
    /// Send a non-maskable interrupt to the VM's vCPUs.
    VmNmi = Upstream Put "vm.nmi",
        request None, response None, command "nmi",
        failure "The NMI could not be sent";
    /// Move the VM to another process; it keeps running.
    VmSendMigration = Upstream Put "vm.send-migration",
        request Some("VmSendMigrationData"), response None, command "send-migration",
        failure "The VM migration could not be sent";
    /// Wait for a VM from another process and continue it.
    VmReceiveMigration = Upstream Put "vm.receive-migration",
        request Some("VmReceiveMigrationData"), response None, command "receive-migration",
        failure "The VM migration could not be received";
    /// Cancel the migration that is being sent or received.
    VmCancelMigration = Ours Put "vm.cancel-migration",
        request None, response None, command "cancel-migration",
        failure "The VM migration could not be cancelled";
    /// Press the VM's power button.
    VmPowerButton = Upstream Put "vm.power-button",
        request None, response None, command "power-button",
        failure "Error triggering power button";
}

impl Endpoint {
    /// The endpoints at `path`, one per supported method: a wrong method and an unknown path are different errors.
    pub fn at_path(path: &str) -> impl Iterator<Item = Self> {
        let name = path.strip_prefix(API_PREFIX);
        Self::ALL
            .iter()
            .copied()
            .filter(move |endpoint| name == Some(endpoint.name()))
    }

    /// Its full path, `/api/v1/vm.info`.
    pub fn path(self) -> String {
        format!("{API_PREFIX}{}", self.name())
    }

    /// The status of success: 200 with a body, 204 without one. `vmm.shutdown` returns 200 without a body, as in
    /// upstream.
    pub const fn success_status(self) -> u16 {
        match (self, self.response()) {
            (Self::VmmShutdown, _) | (_, Some(_)) => 200,
            _ => 204,
        }
    }
}

impl Endpoint {
    /// Whether it adds a device. In a VM that is not running, a new device has no address yet, so the success status is
    /// 204.
    pub fn adds_device(self) -> bool {
        self.response() == Some("PciDeviceInfo")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoint_every_path_leads_back_to_it() {
        for &endpoint in Endpoint::ALL {
            let path = endpoint.path();
            let mut same = Endpoint::at_path(&path).filter(|at| at.method() == endpoint.method());
            assert_eq!((same.next(), same.next()), (Some(endpoint), None));
            assert!(endpoint.request().is_none() || endpoint.method() == Method::Put);
        }
    }

    #[test]
    fn endpoint_unknown_path_has_none() {
        for path in [
            "",
            "/",
            "/api/v1/",
            "/api/v1/vm.info/",
            "/api/v2/vm.info",
            "vm.info",
            "/api/v1/VM.INFO",
        ] {
            assert_eq!(Endpoint::at_path(path).count(), 0, "{path}");
        }
    }

    #[test]
    fn endpoint_success_status_follows_the_body() {
        assert_eq!(Endpoint::VmInfo.success_status(), 200);
        assert_eq!(Endpoint::VmBoot.success_status(), 204);
        assert_eq!(Endpoint::VmmShutdown.success_status(), 200);
    }
}
