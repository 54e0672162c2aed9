//! The saved state: what the guest has set up. Faults that the driver has not read are not part of it.

use serde::{Deserialize, Serialize};
use state::{Bytes, Part, State, StateError, parts, require};
use vm_memory::Permissions;

use crate::dma::{Mapping, Tables};

const PART: Part = parts::IOMMU;
/// First and last input address, guest address, and permissions.
const MAPPING_BYTES: usize = 25;
/// The slots of all PCI segments.
const ENDPOINTS_MAX: usize = 96 * 32;

/// State of a virtual IOMMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IommuState {
    /// Endpoints without a domain access guest memory directly.
    pub bypass: bool,
    /// The domains with at least one endpoint.
    pub domains: Vec<DomainState>,
}

/// State of one domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DomainState {
    /// Its number.
    pub id: u32,
    /// Its endpoints access guest memory directly.
    pub bypass: bool,
    /// Its endpoints.
    pub endpoints: Vec<u32>,
    /// 25 bytes for each mapping, in order: first and last input address, guest address, and 1 for readable plus 2 for
    /// writable; numbers are little-endian.
    pub mappings: Bytes,
}

impl State for IommuState {
    const PART: Part = PART;
}

impl IommuState {
    pub(super) fn of(tables: &Tables, bypass: bool) -> Self {
        let domains = tables.domains().iter().map(|(id, domain)| DomainState {
            id: *id,
            bypass: domain.bypass,
            endpoints: tables
                .attachments()
                .filter(|(_, attached)| attached == id)
                .map(|(endpoint, _)| endpoint)
                .collect(),
            mappings: Bytes(domain.mappings.iter().flat_map(pack).collect()),
        });
        Self {
            bypass,
            domains: domains.collect(),
        }
    }

    /// Fills empty tables.
    pub(super) fn fill(&self, tables: &mut Tables) -> Result<(), StateError> {
        let mut seen = Vec::new();
        for domain in &self.domains {
            let named = |reason: &str| {
                let reason = format!("are impossible: domain {} {reason}", domain.id);
                StateError::invalid(PART, "domains", reason)
            };
            if tables.domains().contains_key(&domain.id) {
                return Err(named("is there twice"));
            }
            for endpoint in &domain.endpoints {
                if seen.contains(endpoint) || seen.len() == ENDPOINTS_MAX {
                    return Err(named("has an endpoint of another domain"));
                }
                seen.push(*endpoint);
                tables.restore_attachment(domain.id, *endpoint, domain.bypass);
            }
            let (mappings, rest) = domain.mappings.0.as_chunks::<MAPPING_BYTES>();
            if domain.endpoints.is_empty() || !rest.is_empty() {
                return Err(named("has no endpoint, or a part of a mapping"));
            }
            for mapping in mappings {
                let (first, mapping) = unpack(mapping).ok_or(named("has unknown permissions"))?;
                let Mapping { last, to, allows } = mapping;
                let restored = tables.map(domain.id, first..=last, to, allows);
                require(restored.is_ok(), PART, "domains", || {
                    format!("cannot map {first:#x} to {last:#x} in domain {}", domain.id)
                })?;
            }
        }
        Ok(())
    }
}

fn pack((first, mapping): (&u64, &Mapping)) -> [u8; MAPPING_BYTES] {
    let mut bytes = [0; MAPPING_BYTES];
    bytes[0..8].copy_from_slice(&first.to_le_bytes());
    bytes[8..16].copy_from_slice(&mapping.last.to_le_bytes());
    bytes[16..24].copy_from_slice(&mapping.to.to_le_bytes());
    bytes[24] = mapping.allows as u8;
    bytes
}

fn unpack(bytes: &[u8; MAPPING_BYTES]) -> Option<(u64, Mapping)> {
    let (numbers, permissions) = bytes.split_at(24);
    let (numbers, _) = numbers.as_chunks::<8>();
    let [first, last, to] = [0, 1, 2].map(|at: usize| u64::from_le_bytes(numbers[at]));
    let all = [
        Permissions::No,
        Permissions::Read,
        Permissions::Write,
        Permissions::ReadWrite,
    ];
    let allows = *all.get(usize::from(permissions[0]))?;
    Some((first, Mapping { last, to, allows }))
}
