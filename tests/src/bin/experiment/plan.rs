//! The parameters of an experiment, and the resulting machine.

use integration_tests::linux::Machine;
use serde::{Deserialize, Serialize};

/// How the guests return freed memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Reporting {
    /// Off.
    Off,
    /// An unmodified kernel's free page reporting.
    Mainline,
    /// The bitmap tracker of our patches.
    Bitmap,
}

impl Reporting {
    /// The word on the command line and in file names.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Mainline => "mainline",
            Self::Bitmap => "bitmap",
        }
    }

    /// Its parameters on the guest's kernel command line; `order` is that of the smallest reported block.
    pub(crate) fn command_line(self, order: Option<u32>) -> String {
        let tracker = match self {
            Self::Off | Self::Mainline => "",
            Self::Bitmap => "page_reporting.tracker=bitmap",
        };
        match order {
            Some(order) => format!("{tracker} page_reporting.page_reporting_order={order}"),
            None => tracker.to_owned(),
        }
    }

    /// A guest that reports this way; `memory` stores the option's text.
    pub(crate) fn machine<'a>(self, memory: &'a str, command_line: &'a str) -> Machine<'a> {
        Machine {
            kernel: match self {
                Self::Off | Self::Mainline => "vmlinux",
                Self::Bitmap => "patched/vmlinux",
            },
            memory,
            arguments: match self {
                Self::Off => &["--balloon", "size=0"],
                Self::Mainline | Self::Bitmap => &["--balloon", "size=0,free_page_reporting=on"],
            },
            command_line,
            ..Machine::default()
        }
    }
}

/// Guests one after another; each touches its memory, frees it, idles.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Overcommit {
    /// Memory of the host.
    pub(crate) host_bytes: u64,
    /// Memory of each guest.
    pub(crate) guest_bytes: u64,
    /// Memory that each touches and frees.
    pub(crate) touch_bytes: u64,
    /// Time between one guest's free and the next guest's start.
    pub(crate) settle_ms: u64,
    /// Guests after which the experiment ends.
    pub(crate) guests_max: usize,
    /// How they report.
    pub(crate) reporting: Reporting,
    /// Order of the smallest reported block (2^order pages); if absent, the kernel's default.
    pub(crate) order: Option<u32>,
    /// Fewer guests than this are a failure.
    pub(crate) expect: usize,
}

/// Guests that take turns in allocating most of their memory.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Burst {
    /// Memory of the host.
    pub(crate) host_bytes: u64,
    /// Memory of each guest.
    pub(crate) guest_bytes: u64,
    /// Memory that a turn allocates.
    pub(crate) burst_bytes: u64,
    /// Number of guests.
    pub(crate) guests: usize,
    /// How long a turn holds its memory.
    pub(crate) hold_ms: u64,
    /// Time for which an interval must be sustained.
    pub(crate) duration_ms: u64,
    /// Time between the starts of two turns; if absent, the shortest sustained interval is searched.
    pub(crate) interval_ms: Option<u64>,
    /// Seed of random arrivals with that mean interval; if absent, turns start at fixed intervals.
    pub(crate) seed: Option<u64>,
    /// How they report.
    pub(crate) reporting: Reporting,
    /// Order of the smallest reported block (2^order pages); if absent, the kernel's default.
    pub(crate) order: Option<u32>,
}
