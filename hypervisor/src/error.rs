//! The error type of this crate: names the operation that the kernel refused, and the reason.

use std::io;
use std::path::PathBuf;

/// Shorthand for this crate's results.
pub type Result<T> = std::result::Result<T, Error>;

/// Reason why a KVM operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no KVM device on this host.
    #[error("{} does not exist: is the kvm module loaded and virtualization enabled?", path.display())]
    DeviceMissing {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The KVM device is there, but this process may not use it.
    #[error("No permission to open {}: is this user in the kvm group?", path.display())]
    DeviceNotPermitted {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The KVM device cannot be opened for another reason.
    #[error("Cannot open {}", path.display())]
    DeviceOpen {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The path names something that is not the KVM device.
    #[error("{} is not a KVM device", path.display())]
    NotKvm {
        /// The path that was tried.
        path: PathBuf,
    },
    /// The kernel implements another KVM API version.
    #[error("KVM API version {found} is not the supported version {expected}")]
    ApiVersion {
        /// The version the kernel reported.
        found: i32,
        /// The version this crate was written for.
        expected: i32,
    },
    /// The kernel's KVM lacks a capability that every guest needs.
    #[error("KVM on this host lacks the required capability {name}")]
    MissingCapability {
        /// The capability without its `KVM_CAP_` prefix.
        name: &'static str,
    },
    /// More interrupt routes than KVM accepts in one table.
    #[error("{count} interrupt routes exceed KVM's limit")]
    TooManyRoutes {
        /// Number of routes requested.
        count: usize,
    },
    /// KVM set some of the model specific registers and refused the next.
    #[error("KVM accepted only {done} of {count} model specific registers")]
    MsrsRefused {
        /// Number of registers set.
        done: usize,
        /// Number of registers given.
        count: usize,
    },
    /// A saved model specific register cannot be set and has another value on this host.
    #[error("KVM rejects {data:#x} for model specific register {index:#x}")]
    MsrRefused {
        /// The register.
        index: u32,
        /// The saved value.
        data: u64,
    },
    /// A system call on a KVM descriptor failed.
    #[error("{operation} failed")]
    Ioctl {
        /// The operation, by its name in the kernel's KVM documentation.
        operation: &'static str,
        #[source]
        source: io::Error,
    },
}

/// Wraps the error of one KVM call, for use in `map_err`.
pub(crate) fn ioctl(operation: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |error| Error::Ioctl {
        operation,
        source: error.into(),
    }
}
