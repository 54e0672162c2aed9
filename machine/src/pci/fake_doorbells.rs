//! A fake hypervisor that records doorbells.

use std::collections::BTreeSet;
use std::io;
use std::sync::Mutex;

use virtio_devices::Unpoisoned;
use vmm_sys_util::eventfd::EventFd;

use super::DoorbellBackend;

#[derive(Debug, Default)]
pub(crate) struct FakeDoorbells {
    pub(crate) addresses: Mutex<BTreeSet<u64>>,
}

impl DoorbellBackend for FakeDoorbells {
    fn register_doorbell(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        assert!(self.addresses.lock().unpoisoned().insert(address));
        Ok(())
    }

    fn unregister_doorbell(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        assert!(self.addresses.lock().unpoisoned().remove(&address));
        Ok(())
    }
}
