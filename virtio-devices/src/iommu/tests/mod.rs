//! Tests the tables against a model, the device with a mock driver, devices behind it, and devices of the host.

mod behind;
mod device;
mod pinned;
mod tables;

use super::{Iommu, IommuHandle, IommuParams};
use crate::device::{QueueHandler, VirtioDevice};
use crate::testing::{HandlerHarness, Segment};

/// The queue half under a mock driver.
type Harness = HandlerHarness<Box<dyn QueueHandler>>;

fn iommu(address_width_bits: u8) -> (Iommu, IommuHandle) {
    let params = IommuParams {
        id: "__iommu",
        address_width_bits,
    };
    Iommu::new(params).unwrap()
}

/// Starts the device with all its features.
fn start(device: &mut Iommu) -> Harness {
    let handler = device.take_handlers().remove(0);
    device.ack_features(device.features());
    let mut harness = HandlerHarness::new(handler, device.features());
    harness.add_queues(2);
    harness.activate().unwrap();
    harness
}

/// Sends a request. The bytes that the device returns; none if it does not know the request.
fn send(harness: &mut Harness, bytes: &[u8], writable: u32) -> Vec<u8> {
    let segments = [Segment::Readable(bytes), Segment::Writable(writable)];
    let (chain, used) = harness.request(0, &segments).unwrap();
    let mut result = harness.queue(0).read_buffer(chain.buffers[1]);
    result.truncate(used.unwrap().len as usize);
    result
}

/// Sends a request that has a status alone as its result.
fn status(harness: &mut Harness, bytes: &[u8]) -> u8 {
    let result = send(harness, bytes, 4);
    assert_eq!(result[1..], [0; 3]);
    result[0]
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
