//! The reporting policy: within which bounds, and what this guest makes of it.

use api::{ReportingPolicy, ReportingPolicyStatus, SettingStatus};
use device_facts::PolicySetting;
use virtio_devices::balloon::policy::PolicyStatus;

/// What the guest makes of the policy.
#[derive(Clone, Copy, Debug)]
pub enum GuestPolicy {
    /// The VM is not running.
    NoMachine,
    /// The machine has no balloon.
    NoBalloon,
    /// What its driver has answered.
    Balloon(PolicyStatus),
}

impl GuestPolicy {
    /// Why a setting is not in effect; `None` when it is.
    fn reason(self, setting: PolicySetting) -> Option<&'static str> {
        match self {
            Self::NoMachine => Some("the VM is not running"),
            Self::NoBalloon => Some("the machine has no balloon"),
            Self::Balloon(status) => status.of(setting).reason(),
        }
    }
}

/// Why a policy was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// A setting of the policy is out of bounds.
    #[error("{setting} of the reporting policy is {value}, which is not between {min} and {max}")]
    OutOfBounds {
        /// Which setting.
        setting: &'static str,
        /// What was asked for.
        value: u64,
        /// Least value.
        min: u64,
        /// Largest value.
        max: u64,
    },
    /// Nothing would ever be old enough in time.
    #[error(
        "age_ms_min of the reporting policy is {age_ms_min}, above its delay_ms_max of {delay_ms_max}"
    )]
    AgeAboveDelay {
        /// Least age of a block.
        age_ms_min: u64,
        /// Longest delay of a report.
        delay_ms_max: u64,
    },
}

/// The policy and this guest, as the API shows them.
pub(crate) fn status(policy: ReportingPolicy, guest: GuestPolicy) -> ReportingPolicyStatus {
    let settings = PolicySetting::ALL.iter().map(|setting| {
        let reason = guest.reason(*setting);
        let status = SettingStatus {
            in_effect: reason.is_none(),
            reason: reason.map(str::to_owned),
        };
        (setting.name().to_owned(), status)
    });
    ReportingPolicyStatus {
        policy,
        in_effect: ReportingPolicy::TABLE
            .iter()
            .all(|it| guest.reason(it.id).is_none()),
        reason: reason(guest),
        settings: settings.collect(),
    }
}

/// One sentence for all settings.
fn reason(guest: GuestPolicy) -> Option<String> {
    let missing: Vec<_> = ReportingPolicy::TABLE
        .iter()
        .filter_map(|setting| Some((setting.name, guest.reason(setting.id)?)))
        .collect();
    let (_, first) = missing.first()?;
    if missing.len() == ReportingPolicy::TABLE.len()
        && missing.iter().all(|(_, reason)| reason == first)
    {
        return Some((*first).to_owned());
    }
    let names: Vec<_> = missing.iter().map(|(name, _)| *name).collect();
    Some(format!(
        "the guest's driver does not follow {}",
        names.join(", ")
    ))
}

pub(crate) fn check(policy: ReportingPolicy) -> Result<(), PolicyError> {
    for setting in ReportingPolicy::TABLE {
        let (min, max) = (setting.min, setting.max);
        let value = setting.value(&policy);
        if !(min..=max).contains(&value) {
            return Err(PolicyError::OutOfBounds {
                setting: setting.name,
                value,
                min,
                max,
            });
        }
    }
    let ReportingPolicy {
        age_ms_min,
        delay_ms_max,
        ..
    } = policy;
    if age_ms_min > delay_ms_max {
        return Err(PolicyError::AgeAboveDelay {
            age_ms_min,
            delay_ms_max,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use virtio_devices::balloon::policy::SettingState;

    use super::*;

    fn seen(settings: [SettingState; PolicySetting::COUNT]) -> ReportingPolicyStatus {
        let guest = GuestPolicy::Balloon(PolicyStatus {
            offered: true,
            generation: 1,
            acknowledged: 1,
            settings,
        });
        status(ReportingPolicy::default(), guest)
    }

    #[test]
    fn policy_is_in_effect_when_each_of_its_settings_is() {
        let all = [SettingState::InEffect; PolicySetting::COUNT];
        let status = seen(all);
        assert_eq!((status.in_effect, &status.reason), (true, &None));
        assert_eq!(status.settings.len(), PolicySetting::COUNT);
        assert!(status.settings.values().all(|it| it.in_effect));
        // What is not a setting of the policy does not take it out of effect.
        let mut settings = all;
        settings[PolicySetting::ReportNow as usize] = SettingState::NotFollowed;
        let status = seen(settings);
        assert!(status.in_effect && !status.settings["report_now"].in_effect);
    }

    #[test]
    fn policy_that_is_followed_in_part_names_what_is_not() {
        let mut settings = [SettingState::InEffect; PolicySetting::COUNT];
        settings[PolicySetting::AgeMsMin as usize] = SettingState::NotFollowed;
        settings[PolicySetting::PendingBlocks as usize] = SettingState::NotFollowed;
        let status = seen(settings);
        assert!(!status.in_effect && status.settings["delay_ms_max"].in_effect);
        let reason = "the guest's driver does not follow pending_blocks, age_ms_min";
        assert_eq!(status.reason.as_deref(), Some(reason));
        assert_eq!(
            status.settings["age_ms_min"].reason.as_deref(),
            SettingState::NotFollowed.reason()
        );
    }

    #[test]
    fn policy_that_is_not_followed_at_all_has_one_reason() {
        let settings = [SettingState::NotAcknowledged; PolicySetting::COUNT];
        let reason = SettingState::NotAcknowledged.reason();
        assert_eq!(seen(settings).reason.as_deref(), reason);
    }
}
