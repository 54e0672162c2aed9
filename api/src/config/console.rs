//! The serial port, the virtio console and the debug console.

use std::path::PathBuf;

use api_macros::section;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::options::{KeyGroup, Keys, OptionError, OptionFault, Options, ValueError, parse_bytes};

/// I/O port of the debug console.
pub const DEFAULT_DEBUG_CONSOLE_PORT: u16 = 0xe9;

/// Destination of a console's output and source of its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(rename = "ConsoleMode")]
pub enum ConsoleOutputMode {
    /// The device does not exist.
    Off,
    /// A new pseudo-terminal, named in `file` once it is open.
    Pty,
    /// The terminal of the VMM.
    Tty,
    /// A file, output only.
    File,
    /// A UNIX socket that one client at a time connects to.
    Socket,
    /// Output is discarded; the device exists.
    Null,
}

/// The 16550 serial port (COM1).
#[section(option = "serial", about = "Configure the serial port:")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SerialConfig {
    /// Path with mode `File`; the pseudo-terminal's path with mode `Pty`.
    #[key(hidden)]
    pub file: Option<PathBuf>,
    /// Where the output goes.
    #[key(group = OUTPUT, required, default = ConsoleOutputMode::Null)]
    pub mode: ConsoleOutputMode,
    /// Path of the socket with mode `Socket`.
    #[key(hidden)]
    pub socket: Option<PathBuf>,
    /// Size up to which `file` grows, bytes. Further output is dropped and counted (`tx_dropped_bytes`). By default, the
    /// guest can fill the file system.
    #[key("<size>", read = parse_bytes)]
    pub file_bytes_max: Option<u64>,
}

/// The virtio console.
#[section(option = "console", about = "Configure the virtio console:")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsoleConfig {
    /// Path with mode `File`; the pseudo-terminal's path with mode `Pty`.
    #[key(hidden)]
    pub file: Option<PathBuf>,
    /// Where the output goes.
    #[key(group = OUTPUT, required, default = ConsoleOutputMode::Tty)]
    pub mode: ConsoleOutputMode,
    /// Path of the socket with mode `Socket`.
    #[key(hidden)]
    pub socket: Option<PathBuf>,
    /// Size up to which `file` grows, bytes. Further output is dropped and counted (`tx_dropped_bytes`). By default, the
    /// guest can fill the file system.
    #[key("<size>", read = parse_bytes)]
    pub file_bytes_max: Option<u64>,
    /// Put the device behind the virtual IOMMU.
    #[key(omit_false)]
    pub iommu: bool,
    /// Name of the device; `__console` when absent.
    #[key("<device_id>")]
    pub id: Option<String>,
    /// PCI segment of the device.
    #[key("<segment_id>")]
    pub pci_segment: u16,
    /// PCI slot on the segment; the next free one when absent.
    #[key("<pci_slot>")]
    pub pci_device_id: Option<u8>,
}

/// The debug console: bytes written to one I/O port.
#[section(option = "debug-console", about = "Debug console:")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DebugConsoleConfig {
    /// Path with mode `File`; the pseudo-terminal's path with mode `Pty`.
    #[key(hidden)]
    pub file: Option<PathBuf>,
    /// Where the output goes. Mode `Socket` is unsupported.
    #[key(group = DEBUG_OUTPUT, required, default = ConsoleOutputMode::Off)]
    pub mode: ConsoleOutputMode,
    /// Size up to which `file` grows, bytes. Further output is dropped and counted (`tx_dropped_bytes`). By default, the
    /// guest can fill the file system.
    #[key("<size>", read = parse_bytes)]
    pub file_bytes_max: Option<u64>,
    /// The I/O port; 0xe9 when absent. The command line also accepts hexadecimal numbers.
    #[key("<port>", read = parse_port, default = Some(DEFAULT_DEBUG_CONSOLE_PORT))]
    pub iobase: Option<u16>,
}

/// The words and keys that select the output; exactly one must be given. Those with `=` are fields of the section.
struct Output(&'static [(&'static str, ConsoleOutputMode)]);

const OUTPUT: Output = Output(&[
    ("off", ConsoleOutputMode::Off),
    ("null", ConsoleOutputMode::Null),
    ("pty", ConsoleOutputMode::Pty),
    ("tty", ConsoleOutputMode::Tty),
    ("file=<path>", ConsoleOutputMode::File),
    ("socket=<path>", ConsoleOutputMode::Socket),
]);
const DEBUG_OUTPUT: Output = Output(&[
    ("off", ConsoleOutputMode::Off),
    ("null", ConsoleOutputMode::Null),
    ("pty", ConsoleOutputMode::Pty),
    ("tty", ConsoleOutputMode::Tty),
    ("file=<path>", ConsoleOutputMode::File),
]);

impl Output {
    fn alternatives(&self) -> Vec<&'static str> {
        self.0.iter().map(|(alternative, _)| *alternative).collect()
    }
}

impl KeyGroup<ConsoleOutputMode> for Output {
    fn declare(&self, keys: &mut Keys) {
        keys.alternatives(&self.alternatives());
    }

    fn read(&self, options: &Options) -> Result<ConsoleOutputMode, OptionError> {
        let mut given = self.0.iter().filter(|(it, _)| match it.split_once('=') {
            Some((key, _)) => options.text(key).is_some(),
            None => options.flag(it),
        });
        match (given.next(), given.next()) {
            (Some((_, mode)), None) => Ok(*mode),
            _ => Err(options.refuse(OptionFault::NotExactlyOne {
                keys: self.alternatives().join(", "),
            })),
        }
    }
}

fn parse_port(text: &str) -> Result<u16, ValueError> {
    let port = match text.strip_prefix("0x") {
        Some(digits) => u16::from_str_radix(digits, 16),
        None => text.parse(),
    };
    port.map_err(|_| ValueError::Integer(text.to_owned()))
}
