//! One connection to a back end. Every call waits for the back end.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap};

use super::config::{self, ConfigError};
use super::profile::ConfigSize;
use super::rings::{Ring, Rings};
use crate::Unpoisoned;

/// Number of regions that every back end accepts in one message (`VHOST_MEMORY_BASELINE_NREGIONS`).
const REGIONS_OF_A_TABLE: usize = 8;

/// Configuration spaces consist of words.
const CONFIG_STEP_BYTES: usize = 4;

/// Reasons to close a connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error("{what} failed")]
    Call {
        what: &'static str,
        #[source]
        source: vhost::Error,
    },
    #[error("the back end lacks features {missing:#x}, which the guest's driver uses")]
    Features { missing: u64 },
    #[error("the back end does not share its configuration space (protocol feature CONFIG)")]
    NoConfig,
    #[error("the back end has no configuration space of {bytes} bytes")]
    NoConfigOfSize { bytes: usize },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("cannot duplicate the socket")]
    Duplicate(#[source] io::Error),
    #[error("the back end supports only {queues} queues; the device has {wanted}")]
    Queues { queues: u64, wanted: usize },
    #[error(
        "the back end has one pair of queues (no feature VIRTIO_NET_F_MQ); the device has {wanted} queues"
    )]
    OnePair { wanted: usize },
    #[error("the back end accepts {max} memory regions; the guest has {regions}")]
    Regions { max: u64, regions: usize },
    #[error("guest memory is not shared")]
    PrivateMemory(#[source] vhost::Error),
    #[error("the rings are not in guest RAM")]
    RingsOutsideRam,
}

/// Whether a ring belongs to one of the first `pairs` pairs.
fn is_used(ring: &Ring, pairs: u16) -> bool {
    ring.index / 2 < pairs
}

fn in_call(what: &'static str) -> impl FnOnce(vhost::Error) -> SessionError {
    move |source| SessionError::Call { what, source }
}

pub(super) struct Session {
    frontend: Frontend,
    /// The same connection, for messages that the crate does not support.
    stream: UnixStream,
    /// Features of the back end.
    features: u64,
    protocol: VhostUserProtocolFeatures,
    /// Guest addresses of the memory that is shared with the back end.
    shared: Vec<u64>,
}

impl Session {
    /// Negotiates the protocol. `queues`: the maximum number for the device.
    pub(super) fn open(stream: UnixStream, queues: usize) -> Result<Self, SessionError> {
        let own = stream.try_clone().map_err(SessionError::Duplicate)?;
        let mut frontend = Frontend::from_stream(stream, queues as u64);
        let features = frontend.get_features().map_err(in_call("GET_FEATURES"))?;
        frontend.set_owner().map_err(in_call("SET_OWNER"))?;
        let mut protocol = VhostUserProtocolFeatures::empty();
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
            let wanted = VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::INFLIGHT_SHMFD
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
            let offered = frontend
                .get_protocol_features()
                .map_err(in_call("GET_PROTOCOL_FEATURES"))?;
            protocol = offered & wanted;
            frontend
                .set_protocol_features(protocol)
                .map_err(in_call("SET_PROTOCOL_FEATURES"))?;
        }
        if protocol.contains(VhostUserProtocolFeatures::MQ) {
            let most = frontend.get_queue_num().map_err(in_call("GET_QUEUE_NUM"))?;
            if most < queues as u64 {
                return Err(SessionError::Queues {
                    queues: most,
                    wanted: queues,
                });
            }
        }
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        Ok(Self {
            frontend,
            stream: own,
            features,
            protocol,
            shared: Vec::new(),
        })
    }

    /// The socket, to detect when it closes.
    pub(super) fn fd(&self) -> RawFd {
        self.frontend.as_raw_fd()
    }

    /// Features of the device that the back end offers.
    pub(super) fn features(&self) -> u64 {
        self.features & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    /// The configuration space.
    pub(super) fn config(&self, size: ConfigSize) -> Result<Vec<u8>, SessionError> {
        let has_config = self.has(VhostUserProtocolFeatures::CONFIG);
        match size {
            ConfigSize::Exactly(_) if !has_config => Err(SessionError::NoConfig),
            ConfigSize::Exactly(bytes) => {
                let found = config::read(&self.stream, bytes)?;
                found.ok_or(SessionError::NoConfigOfSize { bytes })
            }
            ConfigSize::UpTo(_) if !has_config => Ok(Vec::new()),
            ConfigSize::UpTo(most) => {
                // A back end reveals its size only by rejecting a larger one.
                for words in (1..=most / CONFIG_STEP_BYTES).rev() {
                    let bytes = words * CONFIG_STEP_BYTES;
                    if let Some(found) = config::read(&self.stream, bytes)? {
                        return Ok(found);
                    }
                }
                Ok(Vec::new())
            }
        }
    }

    fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol.contains(feature)
    }

    /// Passes the rings to the back end, which may use those of `pairs` pairs. `own`: features of the driver that concern
    /// the front end alone.
    pub(super) fn start(
        &mut self,
        rings: &Rings,
        own: u64,
        pairs: u16,
    ) -> Result<(), SessionError> {
        let features = rings.features & !own;
        let missing = features & !self.features;
        if missing != 0 {
            return Err(SessionError::Features { missing });
        }
        let protocol = self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.frontend
            .set_features(features | protocol)
            .map_err(in_call("SET_FEATURES"))?;
        let mem = rings.mem.memory();
        self.share_memory(&mem)?;
        let recorded = self.has(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
        rings.begin(recorded);
        if recorded {
            self.pass_inflight(rings)?;
        }
        for ring in &rings.rings {
            self.start_ring(ring, &mem)?;
        }
        // Without protocol features, starting a ring also enables it.
        if protocol != 0 {
            for ring in &rings.rings {
                self.enable(ring, is_used(ring, pairs))?;
            }
        }
        self.wait_until_handled()?;
        for ring in &rings.rings {
            // The guest may have signalled the doorbell for a back end that is gone.
            ring.doorbell.write(1).ok();
        }
        Ok(())
    }

    /// The driver uses another number of pairs than `before`.
    pub(super) fn set_pairs(
        &mut self,
        rings: &Rings,
        pairs: u16,
        before: u16,
    ) -> Result<(), SessionError> {
        let changed = |ring: &&Ring| is_used(ring, pairs) != is_used(ring, before);
        for ring in rings.rings.iter().filter(changed) {
            self.enable(ring, is_used(ring, pairs))?;
        }
        self.wait_until_handled()?;
        for ring in rings.rings.iter().filter(changed) {
            // What the guest has put into a ring that the back end did not use.
            ring.doorbell.write(1).ok();
        }
        Ok(())
    }

    /// Waits until the back end has handled all messages. Without acknowledgements, the response to any later message shows
    /// that. Back ends of rust-vmm lose a doorbell that is signalled before they have enabled its ring.
    fn wait_until_handled(&mut self) -> Result<(), SessionError> {
        if !self.has(VhostUserProtocolFeatures::REPLY_ACK) {
            self.frontend
                .get_features()
                .map_err(in_call("GET_FEATURES"))?;
        }
        Ok(())
    }

    fn enable(&mut self, ring: &Ring, enable: bool) -> Result<(), SessionError> {
        self.frontend
            .set_vring_enable(ring.index.into(), enable)
            .map_err(in_call("SET_VRING_ENABLE"))
    }

    /// Shares memory that the back end does not have yet. What virtio-mem plugs in later is part of guest RAM from the
    /// start; memory devices are not.
    fn share_memory(&mut self, mem: &GuestMemoryMmap<()>) -> Result<(), SessionError> {
        let regions = mem
            .iter()
            .map(VhostUserMemoryRegionInfo::from_guest_region)
            .collect::<Result<Vec<_>, _>>()
            .map_err(SessionError::PrivateMemory)?;
        let missing: Vec<_> = regions
            .iter()
            .filter(|region| !self.shared.contains(&region.guest_phys_addr))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let takes_single = self.has(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
        if regions.len() <= REGIONS_OF_A_TABLE && (self.shared.is_empty() || !takes_single) {
            self.frontend
                .set_mem_table(&regions)
                .map_err(in_call("SET_MEM_TABLE"))?;
        } else {
            let max = match takes_single {
                true => self
                    .frontend
                    .get_max_mem_slots()
                    .map_err(in_call("GET_MAX_MEM_SLOTS"))?,
                false => REGIONS_OF_A_TABLE as u64,
            };
            if max < regions.len() as u64 {
                return Err(SessionError::Regions {
                    max,
                    regions: regions.len(),
                });
            }
            for region in missing {
                self.frontend
                    .add_mem_region(region)
                    .map_err(in_call("ADD_MEM_REG"))?;
            }
        }
        self.shared = regions.iter().map(|it| it.guest_phys_addr).collect();
        Ok(())
    }

    fn pass_inflight(&mut self, rings: &Rings) -> Result<(), SessionError> {
        let mut inflight = rings.inflight.lock().unpoisoned();
        if inflight.is_none() {
            let queues = rings.rings.iter().map(|ring| ring.index + 1).max();
            let size = rings.rings.iter().map(Ring::size).max();
            let wanted = VhostUserInflight {
                num_queues: queues.unwrap_or(0),
                queue_size: size.unwrap_or(0),
                ..VhostUserInflight::default()
            };
            let (mut told, file) = self
                .frontend
                .get_inflight_fd(&wanted)
                .map_err(in_call("GET_INFLIGHT_FD"))?;
            // The back end chooses only the file.
            told.num_queues = wanted.num_queues;
            told.queue_size = wanted.queue_size;
            *inflight = Some((told, file));
        }
        match &*inflight {
            Some((told, file)) => self
                .frontend
                .set_inflight_fd(told, file.as_raw_fd())
                .map_err(in_call("SET_INFLIGHT_FD")),
            None => Ok(()),
        }
    }

    fn start_ring(&mut self, ring: &Ring, mem: &GuestMemoryMmap<()>) -> Result<(), SessionError> {
        let index = usize::from(ring.index);
        let addresses = ring.addresses(mem).ok_or(SessionError::RingsOutsideRam)?;
        let frontend = &mut self.frontend;
        frontend
            .set_vring_num(index, ring.size())
            .map_err(in_call("SET_VRING_NUM"))?;
        frontend
            .set_vring_addr(index, &addresses)
            .map_err(in_call("SET_VRING_ADDR"))?;
        frontend
            .set_vring_base(index, ring.next_avail())
            .map_err(in_call("SET_VRING_BASE"))?;
        frontend
            .set_vring_call(index, &ring.call)
            .map_err(in_call("SET_VRING_CALL"))?;
        frontend
            .set_vring_kick(index, &ring.doorbell)
            .map_err(in_call("SET_VRING_KICK"))
    }

    /// Takes the rings back. Returns the number of positions that the back end reported incorrectly.
    pub(super) fn stop(&mut self, rings: &Rings) -> Result<u64, SessionError> {
        let mem = rings.mem.memory();
        let mut wrong = 0;
        for ring in &rings.rings {
            let base = self
                .frontend
                .get_vring_base(ring.index.into())
                .map_err(in_call("GET_VRING_BASE"))?;
            wrong += u64::from(!ring.stopped_at(&mem, base));
        }
        Ok(wrong)
    }
}
