//! Calls to the host's IOMMUs that a change of the tables requires. They are made after the change and without the lock
//! of the tables. The host may take seconds to provide, pin or release memory, and other devices must still be able to
//! translate.

use std::sync::Arc;

use super::mapping::{HostMappings, Mapping, Refusal};

/// Number of mappings of a domain that are read under one lock.
pub(super) const PIECE_MAX: usize = 1024;

/// Reads the next mappings, at most [`PIECE_MAX`], of the domain of an endpoint (endpoint, domain), from an input address
/// on; none if the endpoint is not in the domain any more.
pub(super) type ReadMappings<'a> = &'a dyn Fn((u32, u32), u64) -> Vec<(u64, Mapping)>;

/// Returns whether to stop for a command. Called after each call to the host of a request that makes many.
pub(crate) type StopsNow<'a> = &'a mut dyn FnMut() -> bool;

/// A call for the device of one endpoint.
#[derive(Debug)]
pub(crate) enum HostCall {
    /// Takes all memory away from it.
    Leave(Arc<dyn HostMappings>),
    /// Gives it all mappings of the domain that its endpoint has joined.
    Join {
        host: Arc<dyn HostMappings>,
        endpoint: u32,
        domain: u32,
    },
    /// Gives it one mapping.
    Map {
        host: Arc<dyn HostMappings>,
        first: u64,
        mapping: Mapping,
    },
    /// Takes the mappings with these first input addresses away from it.
    Unmap {
        host: Arc<dyn HostMappings>,
        firsts: Arc<[u64]>,
    },
}

impl HostCall {
    /// Makes the calls in order, and returns the first error. Calls that take memory away are all made. After an error,
    /// none that gives memory is made, and those that were made are undone.
    pub(super) fn make_all(
        calls: &[Self],
        read: ReadMappings<'_>,
        stops_now: StopsNow<'_>,
    ) -> Result<(), Refusal> {
        let mut result = Ok(());
        for (done, call) in calls.iter().enumerate() {
            if !call.gives_memory() {
                result = result.and(call.make(read, stops_now));
                continue;
            }
            result = result.and_then(|()| call.make(read, stops_now));
            if result.is_err() {
                // Ranges that the host keeps mapped stay pinned; the failure has been logged.
                calls[..done].iter().for_each(|call| {
                    call.undo().ok();
                });
                break;
            }
        }
        result
    }

    fn gives_memory(&self) -> bool {
        matches!(self, Self::Join { .. } | Self::Map { .. })
    }

    fn make(&self, read: ReadMappings<'_>, stops_now: StopsNow<'_>) -> Result<(), Refusal> {
        match self {
            Self::Leave(host) => host.unmap_all(),
            Self::Map {
                host,
                first,
                mapping,
            } => host.map(*first, mapping),
            Self::Unmap { host, firsts } => {
                let unmapped = firsts.iter().map(|first| host.unmap(*first));
                unmapped.fold(Ok(()), Result::and)
            }
            Self::Join {
                host,
                endpoint,
                domain,
            } => {
                let joined = join(read, &**host, (*endpoint, *domain), stops_now);
                // All or none.
                joined.or_else(|refusal| self.undo().and(Err(refusal)))
            }
        }
    }

    /// Undoes a call that gives memory.
    fn undo(&self) -> Result<(), Refusal> {
        match self {
            Self::Join { host, .. } => host.unmap_all(),
            Self::Map { host, first, .. } => host.unmap(*first),
            Self::Leave(_) | Self::Unmap { .. } => Ok(()),
        }
    }
}

/// Maps the contents of the domain. Only the caller changes its mappings, but the device may be unplugged in the
/// meantime.
fn join(
    read: ReadMappings<'_>,
    host: &dyn HostMappings,
    place: (u32, u32),
    stops_now: StopsNow<'_>,
) -> Result<(), Refusal> {
    let mut next = Some(0);
    while let Some(from) = next {
        let piece = read(place, from);
        for (first, mapping) in &piece {
            host.map(*first, mapping)?;
            if stops_now() {
                return Err(Refusal::Interrupted);
            }
        }
        let last = piece.last();
        next = last.and_then(|(_, mapping)| mapping.last.checked_add(1));
    }
    Ok(())
}
