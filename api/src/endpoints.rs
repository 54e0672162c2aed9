//! The table of endpoints: the one list of what the API serves.
//!
//! The server's routes, the client's calls, the commands of `ch-remote` and the test of the OpenAPI file all come from
//! this table. The server matches on [`Endpoint`] without a catch-all arm, so a row added here does not compile until it
//! is served.

/// What every path starts with.
pub const API_PREFIX: &str = "/api/v1/";

/// The two methods the API knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// Reads.
    Get,
    /// Acts.
    Put,
}

impl Method {
    /// The method as it is written on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
        }
    }
}

macro_rules! endpoints {
    ($(
        $(#[$doc:meta])*
        $variant:ident = $method:ident $name:literal,
            request $request:expr, response $response:expr, command $command:literal;
    )*) => {
        /// One endpoint of the API.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Endpoint {
            $($(#[$doc])* $variant,)*
        }

        impl Endpoint {
            /// Every endpoint.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// How it is called.
            pub const fn method(self) -> Method {
                match self { $(Self::$variant => Method::$method,)* }
            }

            /// The last part of its path, `vm.info`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The schema of the body it needs; `None` when it refuses one.
            pub const fn request(self) -> Option<&'static str> {
                match self { $(Self::$variant => $request,)* }
            }

            /// The schema of the body it answers with; `None` when it answers without one.
            pub const fn response(self) -> Option<&'static str> {
                match self { $(Self::$variant => $response,)* }
            }

            /// The command of `ch-remote` that calls it.
            pub const fn command(self) -> &'static str {
                match self { $(Self::$variant => $command,)* }
            }
        }
    };
}

endpoints! {
    /// Is the VMM alive, and which one is it.
    VmmPing = Get "vmm.ping", request None, response Some("VmmPingResponse"), command "ping";
    /// Ends the VMM.
    VmmShutdown = Put "vmm.shutdown", request None, response None, command "shutdown-vmm";
    /// Stores a configuration.
    VmCreate = Put "vm.create", request Some("VmConfig"), response None, command "create";
    /// Boots the stored configuration.
    VmBoot = Put "vm.boot", request None, response None, command "boot";
    /// Ends the VM and forgets its configuration.
    VmDelete = Put "vm.delete", request None, response None, command "delete";
    /// The configuration and the state.
    VmInfo = Get "vm.info", request None, response Some("VmInfo"), command "info";
    /// Counters of the devices.
    VmCounters = Get "vm.counters", request None, response Some("VmCounters"), command "counters";
    /// Changes vCPUs, RAM or balloon.
    VmResize = Put "vm.resize", request Some("VmResize"), response None, command "resize";
    /// The guest's view of its memory.
    VmBalloonStats = Get "vm.balloon-stats",
        request None, response Some("BalloonStatsResponse"), command "balloon-stats";
    /// How much memory came back to the host.
    VmReclaimStats = Get "vm.reclaim-stats",
        request None, response Some("ReclaimStats"), command "reclaim-stats";
    /// What the operator wants to be told, and how the guest shall report.
    VmReclaimThresholds = Get "vm.reclaim-thresholds",
        request None, response Some("ReclaimThresholds"), command "reclaim-thresholds";
    /// Changes these; all of it or nothing.
    VmSetReclaimThresholds = Put "vm.reclaim-thresholds",
        request Some("ReclaimThresholdsChange"), response Some("ReclaimThresholds"),
        command "reclaim-thresholds";
    /// Starts or ends a run of free page hinting.
    VmBalloonHinting = Put "vm.balloon-hinting",
        request Some("VmBalloonHinting"), response None, command "balloon-hinting";
    /// Adds a disk, to a running VM too.
    VmAddDisk = Put "vm.add-disk",
        request Some("DiskConfig"), response Some("PciDeviceInfo"), command "add-disk";
    /// Adds a network interface, to a running VM too.
    VmAddNet = Put "vm.add-net",
        request Some("NetConfig"), response Some("PciDeviceInfo"), command "add-net";
    /// Adds the balloon, to a running VM too.
    VmAddBalloon = Put "vm.add-balloon",
        request Some("BalloonConfig"), response Some("PciDeviceInfo"), command "add-balloon";
    /// Removes a device, from a running VM when its guest has let go.
    VmRemoveDevice = Put "vm.remove-device",
        request Some("VmRemoveDevice"), response None, command "remove-device";
    /// Pauses or resumes free page reporting, or asks for a report of everything.
    VmBalloonReporting = Put "vm.balloon-reporting",
        request Some("VmBalloonReporting"), response Some("ReportingStatus"),
        command "balloon-reporting";
    /// Stops the vCPUs.
    VmPause = Put "vm.pause", request None, response None, command "pause";
    /// Lets the vCPUs go on.
    VmResume = Put "vm.resume", request None, response None, command "resume";
    /// Ends the VM and keeps its configuration.
    VmShutdown = Put "vm.shutdown", request None, response None, command "shutdown";
    /// Starts the VM anew.
    VmReboot = Put "vm.reboot", request None, response None, command "reboot";
    /// Presses the power button.
    VmPowerButton = Put "vm.power-button", request None, response None, command "power-button";
}

impl Endpoint {
    /// The endpoints at `path`, one for each method it takes: a wrong method is answered differently from an unknown
    /// path.
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

    /// The status of success: 200 with a body, 204 without one. `vmm.shutdown` has no body and still answers 200, as
    /// upstream's does.
    pub const fn success_status(self) -> u16 {
        match (self, self.response()) {
            (Self::VmmShutdown, _) | (_, Some(_)) => 200,
            _ => 204,
        }
    }
}

impl Endpoint {
    /// Whether it adds a device. A VM that does not run has no place for one yet, so there the answer of success is 204.
    pub const fn adds_device(self) -> bool {
        matches!(self, Self::VmAddDisk | Self::VmAddNet | Self::VmAddBalloon)
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
