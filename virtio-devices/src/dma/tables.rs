//! Endpoints, domains and mappings: what the guest has set up, without queues and threads.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use vm_memory::Permissions;

use super::eras::{EndedEra, Eras};
use super::host_calls::HostCall;
use super::mapping::{HostMappings, Mapping, Refusal};

/// Smallest unit of a mapping.
pub(crate) const GRANULE: u64 = 4 << 10;
/// Maximum number of mappings in all domains together, about 16 MiB of tables. Linux maps each DMA buffer once while
/// it is in flight, so a busy guest has some thousand.
pub const MAPPINGS_MAX: usize = 1 << 18;
/// Mappings that an unmapping removes before the worker checks for commands: less than a millisecond.
const UNMAPPED_MAX: usize = 1024;
/// Writes to these addresses are interrupts on x86. They are not translated, so the guest may not map them.
pub const MSI_RANGE: RangeInclusive<u64> = 0xfee0_0000..=0xfeef_ffff;

/// Why an access was not translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FaultReason {
    /// The endpoint is not attached to a domain, and bypass is off.
    Domain,
    /// No mapping allows the access.
    Mapping,
}

/// A part of a translated range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Guest address.
    pub(crate) address: u64,
    pub(crate) bytes: u64,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Domain {
    /// Input addresses are guest addresses.
    pub(crate) bypass: bool,
    /// By first input address. They do not overlap.
    pub(crate) mappings: BTreeMap<u64, Mapping>,
    /// Number of endpoints attached.
    endpoints: usize,
}

#[derive(Debug, Default)]
struct Attachment {
    /// The device in the endpoint's slot; `None` until it is plugged in after a restore.
    owner: Option<Owner>,
    domain: Option<u32>,
}

#[derive(Debug)]
struct Owner {
    key: u64,
    eras: Arc<Eras>,
    /// For a device of the host, which accesses memory without asking us.
    host: Option<Arc<dyn HostMappings>>,
}

impl Attachment {
    fn is_of(&self, key: u64) -> bool {
        self.owner.as_ref().is_some_and(|owner| owner.key == key)
    }

    fn host(&self) -> Option<&Arc<dyn HostMappings>> {
        self.owner.as_ref()?.host.as_ref()
    }
}

/// Everything that the guest can change.
#[derive(Debug)]
pub(crate) struct Tables {
    /// Last input address; the first is 0.
    input_last: u64,
    /// By endpoint id; one for each device behind the IOMMU, so the machine's slots bound them.
    endpoints: BTreeMap<u32, Attachment>,
    /// Each has an endpoint, so there are not more of them.
    domains: BTreeMap<u32, Domain>,
    /// Number of mappings in all domains.
    mappings: usize,
    owners: u64,
    /// The caller's next step.
    effects: Effects,
}

/// Consequences of changes of the tables.
#[derive(Debug, Default)]
pub(crate) struct Effects {
    /// The eras that ended because a device lost access to memory.
    pub(crate) ended: Vec<EndedEra>,
    /// For devices of the host.
    pub(crate) calls: Vec<HostCall>,
}

impl Tables {
    pub(crate) fn new(input_last: u64) -> Self {
        Self {
            input_last,
            endpoints: BTreeMap::new(),
            domains: BTreeMap::new(),
            mappings: 0,
            owners: 0,
            effects: Effects::default(),
        }
    }

    /// Adds the endpoint of a device and returns the device's key to it. A restored attachment stays, unless the device is
    /// one of the host, which was not saved; one of an earlier device in the same slot does not.
    pub(crate) fn plug(
        &mut self,
        endpoint: u32,
        eras: Arc<Eras>,
        host: Option<Arc<dyn HostMappings>>,
    ) -> u64 {
        self.owners += 1;
        let key = self.owners;
        let known = self.endpoints.get(&endpoint);
        if known.is_some_and(|known| known.owner.is_some() || host.is_some()) {
            self.leave(endpoint);
        }
        let attachment = self.endpoints.entry(endpoint).or_default();
        attachment.owner = Some(Owner { key, eras, host });
        key
    }

    /// Removes the endpoint of a device, unless its slot has a new device.
    pub(crate) fn unplug(&mut self, endpoint: u32, owner: u64) {
        let known = self.endpoints.get(&endpoint);
        if known.is_some_and(|known| known.is_of(owner)) {
            self.leave(endpoint);
            self.endpoints.remove(&endpoint);
        }
    }

    pub(crate) fn has_endpoint(&self, endpoint: u32) -> bool {
        self.endpoints.contains_key(&endpoint)
    }

    /// Detaches every endpoint, as a reset of the device does.
    pub(crate) fn clear(&mut self) {
        for attachment in self.endpoints.values_mut() {
            if attachment.domain.take().is_some() {
                self.effects.takes_all(attachment);
            }
        }
        self.domains.clear();
        self.mappings = 0;
    }

    /// Attaches an endpoint to a domain, which is created if there is none; detaches it from its former one. If the host
    /// does not accept the mappings of the domain, [`Tables::undo_attach`] must follow.
    pub(crate) fn attach(
        &mut self,
        domain: u32,
        endpoint: u32,
        bypass: bool,
    ) -> Result<(), Refusal> {
        let attachment = self.endpoints.get(&endpoint).ok_or(Refusal::NoEntry)?;
        let present = self.domains.get(&domain);
        if present.is_some_and(|present| present.bypass != bypass) {
            return Err(Refusal::Invalid);
        }
        if bypass && attachment.host().is_some() {
            return Err(Refusal::Unsupported);
        }
        if attachment.domain == Some(domain) {
            return Ok(());
        }
        self.leave(endpoint);
        let joined = self.domains.entry(domain).or_insert(Domain {
            bypass,
            ..Domain::default()
        });
        joined.endpoints += 1;
        let has_mappings = !joined.mappings.is_empty();
        if let Some(attachment) = self.endpoints.get_mut(&endpoint) {
            attachment.domain = Some(domain);
            self.effects.ends_era(attachment);
            let host = attachment.host().filter(|_| has_mappings);
            self.effects.calls.extend(host.map(|host| HostCall::Join {
                host: Arc::clone(host),
                endpoint,
                domain,
            }));
        }
        Ok(())
    }

    /// Detaches an endpoint that was attached just now, and whose device has none of the mappings.
    pub(crate) fn undo_attach(&mut self, domain: u32, endpoint: u32) {
        let known = self.endpoints.get(&endpoint);
        if known.is_some_and(|known| known.domain == Some(domain)) {
            self.leave(endpoint);
        }
    }

    pub(crate) fn detach(&mut self, domain: u32, endpoint: u32) -> Result<(), Refusal> {
        let attachment = self.endpoints.get(&endpoint).ok_or(Refusal::NoEntry)?;
        if attachment.domain != Some(domain) {
            return Err(Refusal::Invalid);
        }
        self.leave(endpoint);
        Ok(())
    }

    /// Maps `input` to guest addresses from `to` on. If a host does not accept it, [`Tables::undo_map`] must follow.
    pub(crate) fn map(
        &mut self,
        id: u32,
        input: RangeInclusive<u64>,
        to: u64,
        allows: Permissions,
    ) -> Result<(), Refusal> {
        let (first, last) = (*input.start(), *input.end());
        let domain = self.domains.get_mut(&id).ok_or(Refusal::NoEntry)?;
        if domain.bypass || input.is_empty() {
            return Err(Refusal::Invalid);
        }
        let wraps = to.checked_add(last - first).is_none();
        if !is_aligned(first, last)
            || !to.is_multiple_of(GRANULE)
            || wraps
            || last > self.input_last
        {
            return Err(Refusal::Range);
        }
        let before = domain.mappings.range(..=last).next_back();
        let overlaps = before.is_some_and(|(_, mapping)| mapping.last >= first);
        if overlaps || first <= *MSI_RANGE.end() && *MSI_RANGE.start() <= last {
            return Err(Refusal::Invalid);
        }
        if self.mappings >= MAPPINGS_MAX {
            return Err(Refusal::NoMemory);
        }
        let mapping = Mapping { last, to, allows };
        domain.mappings.insert(first, mapping);
        self.mappings += 1;
        let calls = hosts_of(&self.endpoints, id).map(|host| HostCall::Map {
            host: Arc::clone(host),
            first,
            mapping,
        });
        self.effects.calls.extend(calls);
        Ok(())
    }

    /// Removes the mapping at `first`, which was made just now, and which no device of the host has.
    pub(crate) fn undo_map(&mut self, id: u32, first: u64) {
        let domain = self.domains.get_mut(&id);
        if domain.is_some_and(|domain| domain.mappings.remove(&first).is_some()) {
            self.mappings -= 1;
            self.end_eras(id);
        }
    }

    /// Removes the mappings in `input`; none, if one of them is only partly inside.
    #[cfg(any(test, feature = "test-utils"))]
    pub(crate) fn unmap(&mut self, id: u32, input: RangeInclusive<u64>) -> Result<(), Refusal> {
        while self.unmap_some(id, input.clone())? {}
        Ok(())
    }

    /// Removes the first mappings in `input`, and returns whether some are left: at most [`UNMAPPED_MAX`], or one if
    /// the host has them, because it needs a system call for each.
    pub(crate) fn unmap_some(
        &mut self,
        id: u32,
        input: RangeInclusive<u64>,
    ) -> Result<bool, Refusal> {
        let (first, last) = (*input.start(), *input.end());
        let domain = self.domains.get_mut(&id).ok_or(Refusal::NoEntry)?;
        if domain.bypass || input.is_empty() {
            return Err(Refusal::Invalid);
        }
        let before = domain.mappings.range(..first).next_back();
        let cuts_first = before.is_some_and(|(_, mapping)| mapping.last >= first);
        let end = domain.mappings.range(..=last).next_back();
        let cuts_last = end.is_some_and(|(_, mapping)| mapping.last > last);
        if !is_aligned(first, last) || cuts_first || cuts_last {
            return Err(Refusal::Range);
        }
        let is_hosted = hosts_of(&self.endpoints, id).next().is_some();
        let most = if is_hosted { 1 } else { UNMAPPED_MAX };
        // One by one: splitting the map would take time for all that stay. Each mapping that goes was one request, so
        // this is not more work than the guest has done.
        let removed = domain.mappings.range(input.clone()).map(|(at, _)| *at);
        let removed = removed.take(most);
        let removed: Vec<u64> = removed.collect();
        for at in &removed {
            domain.mappings.remove(at);
        }
        let is_left = domain.mappings.range(input).next().is_some();
        self.mappings -= removed.len();
        if !removed.is_empty() {
            if is_hosted {
                let removed: Arc<[u64]> = removed.into();
                let calls = hosts_of(&self.endpoints, id).map(|host| HostCall::Unmap {
                    host: Arc::clone(host),
                    firsts: Arc::clone(&removed),
                });
                self.effects.calls.extend(calls);
            }
            self.end_eras(id);
        }
        Ok(is_left)
    }

    /// Ends the eras of all endpoints in a domain.
    fn end_eras(&mut self, id: u32) {
        let endpoints = self.endpoints.values();
        let attached = endpoints.filter(|attachment| attachment.domain == Some(id));
        attached.for_each(|attachment| self.effects.ends_era(attachment));
    }

    /// Mappings of a domain from the input address `from` on, at most `most`; none if the endpoint is not in it.
    pub(super) fn mappings_of(
        &self,
        (endpoint, id): (u32, u32),
        from: u64,
        most: usize,
    ) -> Vec<(u64, Mapping)> {
        let attached = self.endpoints.get(&endpoint).and_then(|it| it.domain);
        let domain = attached.filter(|attached| *attached == id);
        let domain = domain.and_then(|id| self.domains.get(&id));
        let mappings = domain.map(|domain| domain.mappings.range(from..).take(most));
        let mappings = mappings.into_iter().flatten();
        mappings
            .map(|(first, mapping)| (*first, *mapping))
            .collect()
    }

    /// The guest addresses of `bytes` bytes from `input` on, as at most `pieces_max` pieces; `None` if there are more.
    /// `bypass` applies to endpoints without a domain.
    pub(crate) fn translate(
        &self,
        (endpoint, owner): (u32, u64),
        (input, bytes): (u64, u64),
        access: Permissions,
        (bypass, pieces_max): (bool, usize),
    ) -> Result<Option<Vec<Piece>>, (FaultReason, u64)> {
        let whole = Piece {
            address: input,
            bytes,
        };
        let attachment = self.endpoints.get(&endpoint);
        let Some(attachment) = attachment.filter(|it| it.is_of(owner)) else {
            return Err((FaultReason::Domain, input));
        };
        let domain = match attachment.domain {
            Some(domain) => &self.domains[&domain],
            None if bypass => return Ok(Some(vec![whole])),
            None => return Err((FaultReason::Domain, input)),
        };
        if domain.bypass {
            return Ok(Some(vec![whole]));
        }
        let mut pieces = Vec::new();
        let (mut at, mut left) = (input, bytes);
        while left > 0 {
            let found = domain.mappings.range(..=at).next_back();
            let found = found.filter(|(_, found)| found.last >= at && found.allows.allow(access));
            let (first, mapping) = found.ok_or((FaultReason::Mapping, at))?;
            if pieces.len() == pieces_max {
                return Ok(None);
            }
            // The mapping may be all of the address space: its length is computed without the last byte.
            let bytes = (mapping.last - at).min(left - 1) + 1;
            pieces.push(Piece {
                address: mapping.to + (at - first),
                bytes,
            });
            left -= bytes;
            if left > 0 {
                let next = at.checked_add(bytes);
                at = next.ok_or((FaultReason::Mapping, mapping.last))?;
            }
        }
        Ok(Some(pieces))
    }

    /// Detaches the endpoint. A domain without endpoints ends, and its mappings with it.
    fn leave(&mut self, endpoint: u32) {
        let Some(attachment) = self.endpoints.get_mut(&endpoint) else {
            return;
        };
        let Some(left) = attachment.domain.take() else {
            return;
        };
        self.effects.takes_all(attachment);
        let Some(domain) = self.domains.get_mut(&left) else {
            return;
        };
        domain.endpoints -= 1;
        if domain.endpoints == 0 {
            self.mappings -= domain.mappings.len();
            self.domains.remove(&left);
        }
    }

    /// Addresses that an endpoint cannot map, without those of interrupts.
    pub(crate) fn reserved(&self, endpoint: u32) -> Vec<RangeInclusive<u64>> {
        let host = self.endpoints.get(&endpoint).and_then(Attachment::host);
        host.map_or_else(Vec::new, |host| host.reserved())
    }

    /// Bytes mapped in the IOMMU of the host, counted for each assigned device.
    pub(crate) fn host_mapped_bytes(&self) -> u64 {
        let hosts = self.endpoints.values().filter_map(Attachment::host);
        hosts.fold(0, |sum, host| sum.saturating_add(host.mapped_bytes()))
    }

    /// The attached endpoints and their domains.
    pub(crate) fn attachments(&self) -> impl Iterator<Item = (u32, u32)> {
        let endpoints = self.endpoints.iter();
        endpoints.filter_map(|(endpoint, it)| Some((*endpoint, it.domain?)))
    }

    pub(crate) fn domains(&self) -> &BTreeMap<u32, Domain> {
        &self.domains
    }

    /// Consequences of the changes since the last call.
    pub(crate) fn take_effects(&mut self) -> Effects {
        std::mem::take(&mut self.effects)
    }

    /// Number of mappings in all domains.
    pub(crate) fn mappings(&self) -> usize {
        self.mappings
    }

    /// Attaches an endpoint whose device is plugged in later.
    pub(crate) fn restore_attachment(&mut self, domain: u32, endpoint: u32, bypass: bool) {
        self.endpoints.entry(endpoint).or_default();
        // The caller has checked that the domain is the same for all of its endpoints.
        self.attach(domain, endpoint, bypass).ok();
    }
}

impl Effects {
    /// The endpoint has lost access to memory.
    fn ends_era(&mut self, attachment: &Attachment) {
        let owner = attachment.owner.iter();
        self.ended
            .extend(owner.filter_map(|owner| owner.eras.end()));
    }

    /// The endpoint has no domain any more.
    fn takes_all(&mut self, attachment: &Attachment) {
        self.ends_era(attachment);
        let host = attachment.host().map(Arc::clone);
        self.calls.extend(host.map(HostCall::Leave));
    }
}

/// The host's part of the endpoints in a domain.
fn hosts_of(
    endpoints: &BTreeMap<u32, Attachment>,
    domain: u32,
) -> impl Iterator<Item = &Arc<dyn HostMappings>> {
    let attached = endpoints
        .values()
        .filter(move |it| it.domain == Some(domain));
    attached.filter_map(Attachment::host)
}

fn is_aligned(first: u64, last: u64) -> bool {
    first.is_multiple_of(GRANULE) && last.wrapping_add(1).is_multiple_of(GRANULE)
}
