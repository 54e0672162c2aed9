//! A well-behaved back end, built with the library that virtiofsd uses. It responds to each request with a copy of the
//! request.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;

use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{
    ShutdownHandle, VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT,
};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::super::RING_FEATURES;

type Mem = GuestMemoryAtomic<GuestMemoryMmap>;
type Daemon = VhostUserDaemon<Arc<Mutex<Echo>>>;

/// Properties that it reports for the device.
#[derive(Debug, Clone)]
pub(super) struct About {
    pub(super) features: u64,
    pub(super) config: Vec<u8>,
    /// Supports memory regions one at a time, in addition to whole tables.
    pub(super) takes_single_regions: bool,
}

impl Default for About {
    fn default() -> Self {
        Self {
            features: RING_FEATURES,
            config: Vec::new(),
            takes_single_regions: true,
        }
    }
}

struct Echo {
    mem: Option<Mem>,
    queues: usize,
    about: About,
    /// Leaves requests in the rings.
    idle: Arc<AtomicBool>,
    /// The next request that it finds is never completed.
    forgetful: Arc<AtomicBool>,
}

impl Echo {
    fn serve(&self, vring: &VringRwLock) -> io::Result<()> {
        let Some(mem) = &self.mem else { return Ok(()) };
        let mem = mem.memory();
        let mut vring = vring.get_mut();
        // The ring was stopped after the kick. An error would end the library's thread.
        if !vring.get_queue().ready() {
            return Ok(());
        }
        let chains: Vec<_> = vring
            .get_queue_mut()
            .iter(mem.clone())
            .map_err(io::Error::other)?
            .collect();
        // Once: it may find the first of several requests alone, after a kick for an earlier one.
        let forgotten = !chains.is_empty() && self.forgetful.swap(false, Ordering::SeqCst);
        for chain in chains.into_iter().skip(usize::from(forgotten)) {
            let head = chain.head_index();
            let (mut request, mut written) = (Vec::new(), 0);
            for desc in chain {
                let mut bytes = vec![0; (desc.len() as usize).min(4096)];
                if !desc.is_write_only() {
                    // A request outside of memory gets an empty response.
                    if mem.read_slice(&mut bytes, desc.addr()).is_ok() {
                        request.extend(bytes);
                    }
                } else {
                    let count = request.len().min(bytes.len());
                    if mem.write_slice(&request[..count], desc.addr()).is_ok() {
                        written += count as u32;
                    }
                }
            }
            vring.add_used(head, written).map_err(io::Error::other)?;
        }
        vring.signal_used_queue()
    }
}

impl VhostUserBackendMut for Echo {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        self.queues
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        self.about.features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG;
        features.set(
            VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
            self.about.takes_single_regions,
        );
        features
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let (offset, size) = (offset as usize, size as usize);
        let config = self.about.config.get(offset..offset + size);
        config.unwrap_or_default().to_vec()
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn update_memory(&mut self, mem: Mem) -> io::Result<()> {
        self.mem = Some(mem);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &mut self,
        queue: u16,
        _events: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        match vrings.get(usize::from(queue)) {
            Some(vring) if !self.idle.load(Ordering::SeqCst) => self.serve(vring),
            _ => Ok(()),
        }
    }
}

/// A back end that serves one connection.
pub(super) struct BackEnd {
    shutdown: mpsc::Receiver<ShutdownHandle>,
    thread: Option<JoinHandle<()>>,
    pub(super) idle: Arc<AtomicBool>,
    pub(super) forgetful: Arc<AtomicBool>,
}

impl BackEnd {
    /// Listens on `path`.
    pub(super) fn start(path: &Path, queues: usize) -> Self {
        Self::start_as(path, queues, About::default())
    }

    /// Listens on `path`. The device has the properties in `about`.
    pub(super) fn start_as(path: &Path, queues: usize, about: About) -> Self {
        let mut listener = Listener::new(path, true).unwrap();
        Self::run(queues, about, move |daemon| {
            daemon.start(&mut listener).unwrap();
        })
    }

    fn run(queues: usize, about: About, start: impl FnOnce(&mut Daemon) + Send + 'static) -> Self {
        let idle = Arc::new(AtomicBool::new(false));
        let forgetful = Arc::new(AtomicBool::new(false));
        let echo = Arc::new(Mutex::new(Echo {
            mem: None,
            queues,
            about,
            idle: Arc::clone(&idle),
            forgetful: Arc::clone(&forgetful),
        }));
        let (sender, shutdown) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mem = GuestMemoryAtomic::new(GuestMemoryMmap::new());
            let mut daemon = VhostUserDaemon::new("echo".to_owned(), echo, mem).unwrap();
            // Drops the listener: it serves one connection.
            start(&mut daemon);
            sender.send(daemon.shutdown_handle().unwrap()).ok();
            daemon.wait().ok();
            // The library's threads hold the rings.
            for handler in daemon.get_epoll_handlers() {
                handler.send_exit_event();
            }
        });
        Self {
            shutdown,
            thread: Some(thread),
            idle,
            forgetful,
        }
    }

    /// The same, which connects to the front end.
    pub(super) fn connect_as(path: &Path, queues: usize, about: About) -> Self {
        let path = path.to_str().unwrap().to_owned();
        Self::run(queues, about, move |daemon| {
            daemon.start_client(&path).unwrap();
        })
    }

    /// Breaks the connection, as the end of its process would.
    pub(super) fn kill(mut self) {
        self.shutdown.recv().unwrap().shutdown();
        self.thread.take().unwrap().join().unwrap();
    }
}
