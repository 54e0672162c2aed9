//! The serial port, the virtio console and the debug console.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::serde_rules::is_false;

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
