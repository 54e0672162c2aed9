//! Facts of memory reclaim: why requested bytes were skipped, and the phases of a reporting pause and of a hinting run.

use strum::{EnumCount, IntoStaticStr, VariantArray};

/// Why requested bytes were not discarded. The names are used in counters and replies.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, EnumCount, IntoStaticStr, VariantArray,
)]
#[strum(serialize_all = "snake_case", const_into_str)]
#[repr(usize)]
pub enum SkipReason {
    /// The range is not RAM.
    OutsideRam,
    /// Already named in the same batch.
    Duplicate,
    /// Part of a 4 KiB page that was not released as a whole.
    Unaligned,
    /// Part of a backing page (hugetlb) that was not released as a whole.
    BackingPageLarger,
    /// A private file mapping: a discarded page would read as the file's content where the guest expects zeros.
    PrivateFile,
    /// The engine has no safe way to discard this kind of mapping.
    UnsupportedBacking,
    /// Discarding is switched off.
    Inhibited,
    /// The guest fills its free pages with a non-zero value and relies on reading it back.
    PagePoison,
    /// Hinted outside of a run: before the guest acknowledged it, or after it was stopped.
    HintStale,
    /// Hinted in a run, but the guest may already be using the block again.
    HintNotHeld,
    /// Reported while reporting is paused.
    ReportingPaused,
    /// An assigned device can access it: the guest has mapped it through the virtual IOMMU.
    DmaMapped,
}

impl SkipReason {
    /// Number of reasons.
    pub const COUNT: usize = <Self as EnumCount>::COUNT;
    /// Every reason, in numerical order.
    pub const ALL: &'static [Self] = Self::VARIANTS;

    /// Name in counters and replies.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.into_str()
    }
}

/// Phase of a reporting pause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PausePhase {
    /// Reports are accepted.
    #[default]
    Running,
    /// Requested but not confirmed; reports in flight are still discarded.
    Pausing,
    /// The guest has confirmed that it sends no reports. Any report would not be discarded.
    PausedByGuest,
    /// No report is discarded; the guest has not confirmed that it sends none.
    PausedByDevice,
}

impl PausePhase {
    /// Whether reported memory is no longer discarded.
    #[must_use]
    pub const fn is_paused(self) -> bool {
        self.paused_by().is_some()
    }

    /// The state the operator requested, in replies.
    #[must_use]
    pub const fn state(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::PausedByGuest | Self::PausedByDevice => "paused",
        }
    }

    /// Who holds the pause, in replies.
    #[must_use]
    pub const fn paused_by(self) -> Option<&'static str> {
        match self {
            Self::Running | Self::Pausing => None,
            Self::PausedByGuest => Some("guest"),
            Self::PausedByDevice => Some("device"),
        }
    }
}

/// Phase of a free page hinting run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum HintingPhase {
    /// No run.
    #[default]
    Idle,
    /// The host has requested a run; the guest has not begun.
    Requested,
    /// The guest sends its free blocks, and the device discards them.
    Running,
    /// The host has stopped the run; the guest has not confirmed it. Nothing is discarded any more except a batch that
    /// was already in progress.
    Stopping,
}

impl HintingPhase {
    /// Every phase.
    pub const ALL: &'static [Self] = Self::VARIANTS;

    /// Name in replies.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.into_str()
    }
}
