//! The effect of the policy in the current guest, as far as known.

use device_facts::PolicySetting;

/// The policy and the driver's acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyStatus {
    /// The device has the feature.
    pub offered: bool,
    /// Number of changes; 0 before the first.
    pub generation: u32,
    /// The generation that the driver acknowledged last; 0 for none.
    pub acknowledged: u32,
    /// Ordered as [`PolicySetting::ALL`].
    pub settings: [SettingState; PolicySetting::COUNT],
}

impl PolicyStatus {
    /// Whether this guest follows `setting`; if not, the reason.
    #[must_use]
    pub fn of(&self, setting: PolicySetting) -> SettingState {
        self.settings[setting as usize]
    }
}

/// The latest request for a full report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReportNowStatus {
    /// Its number; 0 before the first.
    pub id: u32,
    /// The guest is working on it. Also false if its driver disappeared before completing it.
    pub pending: bool,
    /// The last number that the guest has completed; 0 for none.
    pub done_id: u32,
}

/// Whether a setting is in effect in the current guest; if not, the reason.
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
    /// No policy has been set, so the guest uses its own defaults.
    NotSet,
    /// The driver has received the policy and has not acknowledged it.
    NotAcknowledged,
    /// The driver has acknowledged the policy but does not support this setting.
    NotFollowed,
}

impl SettingState {
    /// The reason why the setting is not in effect; `None` if it is.
    #[must_use]
    pub const fn reason(self) -> Option<&'static str> {
        Some(match self {
            Self::InEffect => return None,
            Self::NotOffered => "the balloon is not configured with reporting_policy=on",
            Self::DriverNotReady => "no balloon driver is running",
            Self::GuestDeclined => {
                "the guest's driver does not accept VIRTIO_BALLOON_F_REPORTING_POLICY"
            }
            Self::NotSet => "no policy has been set; the guest uses its own defaults",
            Self::NotAcknowledged => "the guest has been notified and has not acknowledged it yet",
            Self::NotFollowed => "the guest's driver does not follow this setting",
        })
    }
}
