//! How memory comes back to the host: why some of it was skipped, and where a pause and a run of hinting stand.

use strum::{EnumCount, IntoStaticStr, VariantArray};

/// Why bytes that were asked for have not been discarded. The names are those of counters and answers.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, EnumCount, IntoStaticStr, VariantArray,
)]
#[strum(serialize_all = "snake_case", const_into_str)]
#[repr(usize)]
pub enum SkipReason {
    /// No RAM there.
    OutsideRam,
    /// Named before in the same batch.
    Duplicate,
    /// Part of a 4 KiB page that was not given up whole.
    Unaligned,
    /// Part of a backing page (hugetlb) that was not given up whole.
    BackingPageLarger,
    /// A private mapping of a file: dropping the page would bring the file's bytes back where the guest expects zeros.
    PrivateFile,
    /// A mapping this engine does not know how to discard safely.
    UnsupportedBacking,
    /// Discarding is switched off.
    Inhibited,
    /// The guest fills its free pages with a value other than zero and relies on finding it again.
    PagePoison,
    /// Hinted outside of a run: before the guest has acknowledged it, or after it was stopped.
    HintStale,
    /// Hinted in a run, but the guest may be using the block again by now.
    HintNotHeld,
    /// Reported while reporting is paused.
    ReportingPaused,
}

impl SkipReason {
    /// Number of reasons.
    pub const COUNT: usize = <Self as EnumCount>::COUNT;
    /// Every reason, in the order of its number.
    pub const ALL: &'static [Self] = Self::VARIANTS;

    /// Name in counters and answers.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.into_str()
    }
}

/// Where a pause of reporting stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PausePhase {
    /// Reports are taken.
    #[default]
    Running,
    /// Asked for and not confirmed; reports that are under way are still discarded.
    Pausing,
    /// The guest has said that it reports nothing, and none of its reports would be discarded.
    PausedByGuest,
    /// No report is discarded; the guest has not said that it sends none.
    PausedByDevice,
}

impl PausePhase {
    /// Whether nothing that is reported is discarded any more.
    #[must_use]
    pub const fn is_paused(self) -> bool {
        self.paused_by().is_some()
    }

    /// What the operator has asked for, in answers.
    #[must_use]
    pub const fn state(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::PausedByGuest | Self::PausedByDevice => "paused",
        }
    }

    /// Who holds the pause, in answers.
    #[must_use]
    pub const fn paused_by(self) -> Option<&'static str> {
        match self {
            Self::Running | Self::Pausing => None,
            Self::PausedByGuest => Some("guest"),
            Self::PausedByDevice => Some("device"),
        }
    }
}

/// Where a run of free page hinting stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum HintingPhase {
    /// No run.
    #[default]
    Idle,
    /// The host has asked, the guest has not begun.
    Requested,
    /// The guest sends what it has free, and it is discarded.
    Running,
    /// The host has stopped the run, the guest has not confirmed it. Nothing is discarded any more, but for the batch
    /// that may have been under way.
    Stopping,
}

impl HintingPhase {
    /// Every phase.
    pub const ALL: &'static [Self] = Self::VARIANTS;

    /// Name in answers.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.into_str()
    }
}
