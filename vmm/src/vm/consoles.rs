//! The serial port, the virtio console and the debug console, and their endpoints.

use std::sync::Arc;

use api::VmConfig;
use api::config::{ConsoleOutputMode, DEFAULT_DEBUG_CONSOLE_PORT};
use machine::serial::{Endpoint, EndpointMode, Output, SerialError, SerialManager};
use machine::threads::DeviceKind;
use virtio_devices::console::Console;

use super::VmError;
use super::context::{Known, Open, VmContext};
use super::devices::{Made, place};
use crate::device_ids::{CONSOLE_ID, DEBUG_CONSOLE_ID, SERIAL_ID};

/// One of the devices with an endpoint.
struct Device {
    id: &'static str,
    slot: fn(&mut Open) -> &mut Known,
}

const SERIAL: Device = Device {
    id: SERIAL_ID,
    slot: |open| &mut open.serial,
};
const CONSOLE: Device = Device {
    id: CONSOLE_ID,
    slot: |open| &mut open.console,
};
const DEBUG_CONSOLE: Device = Device {
    id: DEBUG_CONSOLE_ID,
    slot: |open| &mut open.debug_console,
};

impl Device {
    fn error(&self, source: SerialError) -> VmError {
        VmError::Console {
            id: self.id.to_owned(),
            source,
        }
    }

    /// The endpoint of this device that is already open, if it matches the configuration, or a new one.
    fn open(
        &self,
        mode: Result<Option<EndpointMode>, SerialError>,
        context: &VmContext,
    ) -> Result<Option<Arc<Endpoint>>, VmError> {
        let open = &mut *context.consoles.lock();
        let known = (self.slot)(open).take();
        let Some(mode) = mode.map_err(|source| self.error(source))? else {
            return Ok(None);
        };
        let endpoint = match known.filter(|(known, _)| *known == mode) {
            Some((_, endpoint)) => endpoint,
            None => {
                let manager = match &mut open.manager {
                    Some(manager) => manager,
                    manager => manager.insert(
                        SerialManager::new(context.start_of_machine_threads())
                            .map_err(|source| self.error(SerialError::Manager(source)))?,
                    ),
                };
                Endpoint::open(&mode, manager).map_err(|source| self.error(source))?
            }
        };
        *(self.slot)(open) = Some((mode, Arc::clone(&endpoint)));
        Ok(Some(endpoint))
    }
}

/// The mode of a device when another device receives the terminal's input.
fn without_input(mode: Option<EndpointMode>) -> Option<EndpointMode> {
    mode.map(|mode| match mode {
        EndpointMode::Tty => EndpointMode::TtyOutput,
        mode => mode,
    })
}

/// Opens the endpoint of the serial port, if configured, and stores the pseudo-terminal's path in the configuration.
pub(super) fn open_serial(
    config: &mut VmConfig,
    context: &VmContext,
) -> Result<Option<Arc<Endpoint>>, VmError> {
    let serial = &mut config.serial;
    // The path of a pseudo-terminal is an output, not an input.
    let mode = EndpointMode::from_config(
        serial.mode,
        serial.file.as_deref(),
        serial.file_bytes_max,
        serial.socket.as_deref(),
    );
    let endpoint = SERIAL.open(mode, context)?;
    if let Some(path) = endpoint.as_deref().and_then(Endpoint::pty_path) {
        serial.file = Some(path.to_path_buf());
    }
    Ok(endpoint)
}

/// Creates the console, if configured, and stores the pseudo-terminal's path in the configuration.
pub(super) fn open_console(
    config: &mut VmConfig,
    context: &VmContext,
) -> Result<Option<Made>, VmError> {
    let shares_terminal = config.serial.mode == ConsoleOutputMode::Tty;
    let console = &mut config.console;
    let mut mode = EndpointMode::from_config(
        console.mode,
        console.file.as_deref(),
        console.file_bytes_max,
        console.socket.as_deref(),
    );
    if shares_terminal {
        if console.mode == ConsoleOutputMode::Tty {
            log::warn!(
                "Serial port and console share the terminal: both write to it, and the serial port receives its input"
            );
        }
        mode = mode.map(without_input);
    }
    let Some(endpoint) = CONSOLE.open(mode, context)? else {
        return Ok(None);
    };
    if let Some(path) = endpoint.pty_path() {
        console.file = Some(path.to_path_buf());
    }
    let id = console.id.as_deref().unwrap_or(CONSOLE_ID);
    let streams = endpoint
        .console()
        .map_err(|source| VmError::device(id, source))?;
    let device = Console::new(id, streams, None).map_err(|source| VmError::device(id, source))?;
    let place = place!(console);
    Ok(Some(Made {
        output: Some(endpoint.output()),
        is_behind_iommu: console.iommu,
        ..Made::new(id, DeviceKind::Console, place, device)
    }))
}

/// The debug console's port and output.
pub(super) struct DebugConsole {
    pub(super) port: u16,
    pub(super) output: Output,
}

/// Opens the endpoint of the debug console, if configured, and stores the pseudo-terminal's path in the configuration.
pub(super) fn open_debug_console(
    config: &mut VmConfig,
    context: &VmContext,
) -> Result<Option<DebugConsole>, VmError> {
    let debug = &mut config.debug_console;
    let mode = EndpointMode::from_config(
        debug.mode,
        debug.file.as_deref(),
        debug.file_bytes_max,
        None,
    );
    let endpoint = DEBUG_CONSOLE.open(mode.map(without_input), context)?;
    if let Some(path) = endpoint.as_deref().and_then(Endpoint::pty_path) {
        debug.file = Some(path.to_path_buf());
    }
    let port = debug.iobase.unwrap_or(DEFAULT_DEBUG_CONSOLE_PORT);
    Ok(endpoint.map(|endpoint| DebugConsole {
        port,
        output: endpoint.output(),
    }))
}
