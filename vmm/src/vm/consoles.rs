//! The serial port and the virtio console with the endpoints behind them.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use api::VmConfig;
use api::config::ConsoleOutputMode;
use machine::serial::{Endpoint, EndpointMode, SerialError, SerialManager};
use machine::threads::{DeviceKind, ThreadStart};
use virtio_devices::Unpoisoned;
use virtio_devices::console::Console;

use super::devices::Made;
use super::{VmContext, VmError};
use crate::device_ids::{CONSOLE_ID, SERIAL_ID};

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
    /// Last, because endpoints remove themselves from its list when dropped.
    manager: Option<SerialManager>,
}

impl fmt::Debug for Consoles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consoles").finish_non_exhaustive()
    }
}

/// The configuration of one console.
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
        self.open.lock().unpoisoned()
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

/// The endpoint that is already open, if it matches the configuration, or a new one.
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
    // The path of a pseudo-terminal is an output, not an input.
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

/// Opens the other end of the serial port, if configured, and stores the pseudo-terminal's path in the configuration.
pub(super) fn open_serial(
    config: &mut VmConfig,
    context: &VmContext,
) -> Result<Option<Arc<Endpoint>>, VmError> {
    let wanted = Wanted {
        id: SERIAL_ID,
        mode: config.serial.mode,
        file: config.serial.file.clone(),
        socket: config.serial.socket.clone(),
    };
    let thread_start = context.start_of_machine_threads();
    let endpoint = context.consoles.serial(&wanted, &thread_start)?;
    if let Some(path) = endpoint.as_deref().and_then(Endpoint::pty_path) {
        config.serial.file = Some(path.to_path_buf());
    }
    Ok(endpoint)
}

/// Creates the console, if configured, and stores the pseudo-terminal's path in the configuration.
pub(super) fn open_console(
    config: &mut VmConfig,
    context: &VmContext,
) -> Result<Option<Made>, VmError> {
    let wanted = Wanted {
        id: CONSOLE_ID,
        mode: config.console.mode,
        file: config.console.file.clone(),
        socket: config.console.socket.clone(),
    };
    let thread_start = context.start_of_machine_threads();
    let Some(endpoint) = context.consoles.console(&wanted, &thread_start)? else {
        return Ok(None);
    };
    if let Some(path) = endpoint.pty_path() {
        config.console.file = Some(path.to_path_buf());
    }
    let id = config.console.id.as_deref().unwrap_or(CONSOLE_ID);
    let streams = endpoint
        .console()
        .map_err(|source| VmError::device(id, source))?;
    let console = Console::new(id, streams, None).map_err(|source| VmError::device(id, source))?;
    let slot = config.console.pci_device_id;
    Ok(Some(Made::new(id, DeviceKind::Console, slot, console)))
}
