//! What a policy consists of, and what the driver says of each part.

/// How the guest shall report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicySettings {
    /// Order of the smallest block that is reported (`4096 << order` bytes); 0 leaves it to the guest.
    pub order_min: u32,
    /// Pending blocks that start a report.
    pub pending_blocks: u32,
    /// After this time leftovers are reported, however few, ms.
    pub delay_ms_max: u32,
    /// Blocks free for a shorter time are left alone, ms.
    pub age_ms_min: u32,
    /// Most bytes reported in a second; 0 sets no bound.
    pub bytes_per_second_max: u64,
}

impl Default for PolicySettings {
    /// What a guest finds that is told something else (a pause) before a policy: the
    /// blocks and the delay of Linux' own page reporting, the pending blocks of the
    /// proposal that it came from. Zeros would ask for reports without end.
    fn default() -> Self {
        Self {
            order_min: 9,
            pending_blocks: 16,
            delay_ms_max: 2000,
            age_ms_min: 0,
            bytes_per_second_max: 0,
        }
    }
}

macro_rules! policy_settings {
    ($($(#[$doc:meta])* $bit:literal $variant:ident $name:literal,)+) => {
        /// Something of the policy that a driver follows or does not, by its bit in `guest_settings`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum PolicySetting {
            $($(#[$doc])* $variant = $bit,)+
        }

        impl PolicySetting {
            /// Every setting, in the order of its bit.
            pub const ALL: [Self; [$($bit),+].len()] = [$(Self::$variant),+];

            /// Name in the API.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }
    };
}

policy_settings! {
    /// Smallest block.
    0 OrderMin "order_min",
    /// Threshold.
    1 PendingBlocks "pending_blocks",
    /// Longest delay.
    2 DelayMsMax "delay_ms_max",
    /// Least age.
    3 AgeMsMin "age_ms_min",
    /// Rate.
    4 BytesPerSecondMax "bytes_per_second_max",
    /// Stops when asked to, and says when nothing is in flight.
    5 Pause "pause",
    /// Reports everything at once when asked to.
    6 ReportNow "report_now",
    /// Then forgets what it reported before, if asked to.
    7 ReportAgain "report_again",
}

impl PolicySetting {
    /// The bits that mean something.
    pub(super) const MASK: u32 = (1 << Self::ALL.len()) - 1;

    /// Its bit in `guest_settings`.
    #[must_use]
    pub const fn bit(self) -> u32 {
        1 << self as u32
    }
}

/// Whether a setting is in effect in the guest that runs now, and if not, why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SettingState {
    /// The driver follows it.
    InEffect,
    /// The device does not have the feature.
    NotOffered,
    /// No driver is running.
    DriverNotReady,
    /// The driver does not know the feature.
    GuestDeclined,
    /// Nothing has been set, so the guest does as it does by itself.
    NotSet,
    /// The driver has been told and has not answered.
    NotAcknowledged,
    /// The driver has answered that it does not do this.
    NotFollowed,
}

impl SettingState {
    /// Why it is not in effect; `None` when it is.
    #[must_use]
    pub const fn reason(self) -> Option<&'static str> {
        Some(match self {
            Self::InEffect => return None,
            Self::NotOffered => "the balloon is not configured with reporting_policy=on",
            Self::DriverNotReady => "no balloon driver is running",
            Self::GuestDeclined => {
                "the guest's driver does not take VIRTIO_BALLOON_F_REPORTING_POLICY"
            }
            Self::NotSet => "no policy has been set; the guest reports as it does by itself",
            Self::NotAcknowledged => "the guest has been told and has not acknowledged it yet",
            Self::NotFollowed => "the guest's driver does not follow this setting",
        })
    }
}
