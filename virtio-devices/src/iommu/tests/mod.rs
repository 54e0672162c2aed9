//! Tests the tables against a model, the device with a mock driver, devices behind it, and devices of the host.

mod behind;
mod device;
mod pinned;
mod tables;

use super::{Iommu, IommuHandle, IommuParams};

fn iommu(address_width_bits: u8) -> (Iommu, IommuHandle) {
    let params = IommuParams {
        id: "__iommu",
        address_width_bits,
    };
    Iommu::new(params).unwrap()
}

/// A request on the wire.
fn request(kind: u8, fields: &[&[u8]]) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, 0];
    fields.iter().for_each(|field| bytes.extend(*field));
    bytes
}

fn attach(domain: u32, endpoint: u32, flags: u32) -> Vec<u8> {
    let ids = [domain, endpoint, flags].map(u32::to_le_bytes);
    request(1, &[&ids[0], &ids[1], &ids[2], &[0; 4]])
}

fn detach(domain: u32, endpoint: u32) -> Vec<u8> {
    let ids = [domain, endpoint].map(u32::to_le_bytes);
    request(2, &[&ids[0], &ids[1], &[0; 8]])
}

/// Flags: 1 readable, 2 writable.
fn map(domain: u32, first: u64, last: u64, to: u64, flags: u32) -> Vec<u8> {
    let [first, last, to] = [first, last, to].map(u64::to_le_bytes);
    let [domain, flags] = [domain, flags].map(u32::to_le_bytes);
    request(3, &[&domain, &first, &last, &to, &flags])
}

fn unmap(domain: u32, first: u64, last: u64) -> Vec<u8> {
    let [first, last] = [first, last].map(u64::to_le_bytes);
    request(4, &[&domain.to_le_bytes(), &first, &last, &[0; 4]])
}

fn probe(endpoint: u32) -> Vec<u8> {
    request(5, &[&endpoint.to_le_bytes(), &[0; 64]])
}
