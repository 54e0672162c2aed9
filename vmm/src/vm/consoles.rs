//! The serial port and the virtio console with the endpoints behind them.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use api::VmConfig;
use api::config::ConsoleOutputMode;
use virtio_devices::console::Console;

use super::chassis::Chassis;
use super::devices::{Devices, Plug};
use super::{ThreadStart, VmContext, VmError};
use crate::bus::BusDevice;
use crate::seccomp::ThreadKind;
use crate::serial::{
    Endpoint, EndpointMode, SERIAL_IRQ, SERIAL_PORTS, SerialError, SerialManager, Uart,
};

const SERIAL_ID: &str = "__serial";
const CONSOLE_ID: &str = "__console";

/// The open endpoints of one VM. They outlive its machines, so that a reboot
/// keeps the pseudo-terminal and the socket's client.
#[derive(Default)]
pub struct Consoles {
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    serial: Option<(EndpointMode, Arc<Endpoint>)>,
    console: Option<(EndpointMode, Arc<Endpoint>)>,
    /// Last: endpoints take themselves off its list when they go.
    manager: Option<SerialManager>,
}

impl fmt::Debug for Consoles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consoles").finish_non_exhaustive()
    }
}

/// What a configuration says of one console.
struct Wanted {
    id: &'static str,
    mode: ConsoleOutputMode,
    file: Option<PathBuf>,
    socket: Option<PathBuf>,
}

impl Consoles {
    /// Closes all endpoints: the VM is deleted.
    pub fn close(&self) {
        *self.lock() = Open::default();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serial(
        &self,
        wanted: &Wanted,
        thread_start: &ThreadStart,
    ) -> Result<Option<Arc<Endpoint>>, VmError> {
        let Open {
            serial, manager, ..
        } = &mut *self.lock();
        endpoint(serial, manager, wanted, thread_start)
    }

    fn console(
        &self,
        wanted: &Wanted,
        thread_start: &ThreadStart,
    ) -> Result<Option<Arc<Endpoint>>, VmError> {
        let Open {
            console, manager, ..
        } = &mut *self.lock();
        endpoint(console, manager, wanted, thread_start)
    }
}

/// The endpoint that is open already, if it is the wanted one, or a new one.
fn endpoint(
    slot: &mut Option<(EndpointMode, Arc<Endpoint>)>,
    manager: &mut Option<SerialManager>,
    wanted: &Wanted,
    thread_start: &ThreadStart,
) -> Result<Option<Arc<Endpoint>>, VmError> {
    let failed = |source| VmError::Console {
        id: wanted.id.to_owned(),
        source,
    };
    // The path of a pseudo-terminal is told, not asked for.
    let file = wanted.file.as_deref();
    let mode =
        EndpointMode::from_config(wanted.mode, file, wanted.socket.as_deref()).map_err(failed)?;
    let Some(mode) = mode else {
        *slot = None;
        return Ok(None);
    };
    if let Some((known, endpoint)) = slot
        && *known == mode
    {
        return Ok(Some(Arc::clone(endpoint)));
    }
    *slot = None;
    let manager = match manager {
        Some(manager) => manager,
        None => manager.insert(
            SerialManager::new(Arc::clone(thread_start))
                .map_err(|source| failed(SerialError::Manager(source)))?,
        ),
    };
    let endpoint = Endpoint::open(&mode, manager).map_err(failed)?;
    *slot = Some((mode, Arc::clone(&endpoint)));
    Ok(Some(endpoint))
}

/// Plugs in what is configured and tells the configuration the pseudo-terminals' paths.
pub(super) fn plug(
    config: &mut VmConfig,
    chassis: &Chassis,
    devices: &mut Devices<'_>,
    context: &VmContext,
) -> Result<(), VmError> {
    let VmContext {
        consoles,
        thread_start,
        ..
    } = context;
    let wanted = Wanted {
        id: SERIAL_ID,
        mode: config.serial.mode,
        file: config.serial.file.clone(),
        socket: config.serial.socket.clone(),
    };
    if let Some(endpoint) = consoles.serial(&wanted, thread_start)? {
        if let Some(path) = endpoint.pty_path() {
            config.serial.file = Some(path.to_path_buf());
        }
        let line = chassis
            .ioapic
            .line(SERIAL_IRQ)
            .expect("the I/O APIC has more pins than the serial port's");
        let uart = Uart::new(line, endpoint) as Arc<dyn BusDevice>;
        crate::legacy::insert(&chassis.ports, SERIAL_PORTS, uart).map_err(VmError::Bus)?;
    }
    let wanted = Wanted {
        id: CONSOLE_ID,
        mode: config.console.mode,
        file: config.console.file.clone(),
        socket: config.console.socket.clone(),
    };
    if let Some(endpoint) = consoles.console(&wanted, thread_start)? {
        if let Some(path) = endpoint.pty_path() {
            config.console.file = Some(path.to_path_buf());
        }
        plug_console(config, devices, &endpoint)?;
    }
    Ok(())
}

fn plug_console(
    config: &VmConfig,
    devices: &mut Devices<'_>,
    endpoint: &Endpoint,
) -> Result<(), VmError> {
    let id = config.console.id.as_deref().unwrap_or(CONSOLE_ID);
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| VmError::Device {
        id: id.to_owned(),
        source,
    };
    let streams = endpoint.console().map_err(|source| failed(source.into()))?;
    let console = Console::new(id, streams, None).map_err(|source| failed(source.into()))?;
    let plug = Plug {
        id,
        kind: ThreadKind::Console,
        slot: config.console.pci_device_id,
    };
    devices.plug(&plug, console, None)
}
