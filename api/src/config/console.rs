//! The serial port, the virtio console and the debug console.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::serde_rules::is_false;
use crate::options::{OptionError, OptionFault, Options, ValueError};

/// I/O port of the debug console.
pub const DEFAULT_DEBUG_CONSOLE_PORT: u16 = 0xe9;

/// Where a console's output goes and its input comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
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
    /// Nowhere; the device exists.
    Null,
}

/// The 16550 serial port (COM1).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct SerialConfig {
    /// Path with mode `File`; the pseudo-terminal's path with mode `Pty`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Where the output goes.
    pub mode: ConsoleOutputMode,
    /// Path of the socket with mode `Socket`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

impl Default for SerialConfig {
    fn default() -> Self {
        Self {
            file: None,
            mode: ConsoleOutputMode::Null,
            socket: None,
        }
    }
}

/// The virtio console.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct ConsoleConfig {
    /// Path with mode `File`; the pseudo-terminal's path with mode `Pty`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Where the output goes.
    pub mode: ConsoleOutputMode,
    /// Path of the socket with mode `Socket`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Put the device behind the virtual IOMMU.
    #[serde(default, skip_serializing_if = "is_false")]
    pub iommu: bool,
    /// Name of the device; `__console` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment the device is put on.
    #[serde(default)]
    pub pci_segment: u16,
    /// Slot on that segment; the next free one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
}

impl Default for ConsoleConfig {
    fn default() -> Self {
        Self {
            file: None,
            mode: ConsoleOutputMode::Tty,
            socket: None,
            iommu: false,
            id: None,
            pci_segment: 0,
            pci_device_id: None,
        }
    }
}

/// The debug console: bytes written to one I/O port.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct DebugConsoleConfig {
    /// Path with mode `File`; the pseudo-terminal's path with mode `Pty`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Where the output goes.
    pub mode: ConsoleOutputMode,
    /// The I/O port; 0xe9 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iobase: Option<u16>,
}

impl Default for DebugConsoleConfig {
    fn default() -> Self {
        Self {
            file: None,
            mode: ConsoleOutputMode::Off,
            iobase: Some(DEFAULT_DEBUG_CONSOLE_PORT),
        }
    }
}

/// Where the bytes go, as all three consoles write it.
struct Output {
    file: Option<PathBuf>,
    mode: ConsoleOutputMode,
    socket: Option<PathBuf>,
}

impl Output {
    /// Reads the one word or path that says where the bytes go.
    ///
    /// `flags` are the bare words that the option declared; a console without sockets does not declare `socket`.
    fn from_options(
        options: &Options,
        flags: &[(&'static str, ConsoleOutputMode)],
        socket: Option<&'static str>,
        alternatives: &'static str,
    ) -> Result<Self, OptionError> {
        let file = options.text("file").map(PathBuf::from);
        let socket = socket.and_then(|key| options.text(key)).map(PathBuf::from);
        let modes: Vec<_> = flags
            .iter()
            .filter(|(flag, _)| options.flag(flag))
            .map(|(_, mode)| *mode)
            .chain(file.as_ref().map(|_| ConsoleOutputMode::File))
            .chain(socket.as_ref().map(|_| ConsoleOutputMode::Socket))
            .collect();
        match modes[..] {
            [mode] => Ok(Self { file, mode, socket }),
            _ => Err(options.refuse(OptionFault::NotExactlyOne { keys: alternatives })),
        }
    }
}

const OUTPUT_FLAGS: &[(&str, ConsoleOutputMode)] = &[
    ("off", ConsoleOutputMode::Off),
    ("null", ConsoleOutputMode::Null),
    ("pty", ConsoleOutputMode::Pty),
    ("tty", ConsoleOutputMode::Tty),
];
const OUTPUT_ALTERNATIVES: &str = "off, null, pty, tty, file=<path>, socket=<path>";

impl SerialConfig {
    /// Syntax of `--serial`.
    pub const SYNTAX: &str = "Control serial port: \"off|null|pty|tty|file=<path>|socket=<path>\"";

    /// Reads the value of `--serial`.
    ///
    /// # Errors
    /// An unknown key, or not exactly one place for the output.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let options = Options::parse(
            "serial",
            text,
            &["file", "socket"],
            &["off", "null", "pty", "tty"],
        )?;
        let Output { file, mode, socket } =
            Output::from_options(&options, OUTPUT_FLAGS, Some("socket"), OUTPUT_ALTERNATIVES)?;
        Ok(Self { file, mode, socket })
    }
}

impl ConsoleConfig {
    /// Syntax of `--console`.
    pub const SYNTAX: &str = "Control (virtio) console: \"off|null|pty|tty|file=<path>|socket=<path>,iommu=on|off,\
        id=<device_id>,pci_segment=<segment_id>,pci_device_id=<pci_slot>\"";

    /// Reads the value of `--console`.
    ///
    /// # Errors
    /// An unknown key, a malformed value, or not exactly one place for the output.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let options = Options::parse(
            "console",
            text,
            &[
                "file",
                "socket",
                "iommu",
                "id",
                "pci_segment",
                "pci_device_id",
            ],
            &["off", "null", "pty", "tty"],
        )?;
        let Output { file, mode, socket } =
            Output::from_options(&options, OUTPUT_FLAGS, Some("socket"), OUTPUT_ALTERNATIVES)?;
        Ok(Self {
            file,
            mode,
            socket,
            iommu: options.toggle("iommu")?.unwrap_or(false),
            id: options.string("id"),
            pci_segment: options.parsed("pci_segment")?.unwrap_or(0),
            pci_device_id: options.parsed("pci_device_id")?,
        })
    }
}

impl DebugConsoleConfig {
    /// Syntax of `--debug-console`.
    pub const SYNTAX: &str = "Debug console: \"off|pty|tty|file=<path>,iobase=<port>\"";

    /// Reads the value of `--debug-console`. The port may be written in hexadecimal.
    ///
    /// # Errors
    /// An unknown key, a malformed value, or not exactly one place for the output.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let options = Options::parse(
            "debug-console",
            text,
            &["file", "iobase"],
            &["off", "pty", "tty"],
        )?;
        let flags: Vec<_> = OUTPUT_FLAGS
            .iter()
            .copied()
            .filter(|(flag, _)| *flag != "null")
            .collect();
        let Output { file, mode, .. } =
            Output::from_options(&options, &flags, None, "off, pty, tty, file=<path>")?;
        let iobase = options
            .read("iobase", parse_port)?
            .unwrap_or(DEFAULT_DEBUG_CONSOLE_PORT);
        Ok(Self {
            file,
            mode,
            iobase: Some(iobase),
        })
    }
}

fn parse_port(text: &str) -> Result<u16, ValueError> {
    let port = match text.strip_prefix("0x") {
        Some(digits) => u16::from_str_radix(digits, 16),
        None => text.parse(),
    };
    port.map_err(|_| ValueError::Integer(text.to_owned()))
}
