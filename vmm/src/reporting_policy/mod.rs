//! The reporting policy and its status in the current guest. `device-facts` has the table of settings with their
//! bounds, and [`requests`] the requests to a balloon.

pub(crate) mod requests;

use api::{ReportingPolicy, ReportingPolicyStatus, SettingStatus};
use device_facts::PolicySetting;
use virtio_devices::balloon::reporting_policy::PolicyStatus;

/// The status of the policy in the guest.
#[derive(Clone, Copy, Debug)]
pub enum GuestPolicy {
    /// The VM is not running.
    NoMachine,
    /// The machine has no balloon.
    NoBalloon,
    /// The driver's answer.
    Balloon(PolicyStatus),
}

impl GuestPolicy {
    /// The reason why a setting is not in effect; `None` if it is.
    fn reason(self, setting: PolicySetting) -> Option<&'static str> {
        match self {
            Self::NoMachine => Some("the VM is not running"),
            Self::NoBalloon => Some("the machine has no balloon"),
            Self::Balloon(status) => status.of(setting).reason(),
        }
    }
}

/// The policy and its status in this guest, as the API shows them.
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

/// The reason that applies to all settings, in one sentence.
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

#[cfg(test)]
mod tests {
    use virtio_devices::balloon::reporting_policy::SettingState;

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
        // A key that is not a setting of the policy does not affect whether the policy is in effect.
        let mut settings = all;
        settings[PolicySetting::ReportNow as usize] = SettingState::NotFollowed;
        let status = seen(settings);
        assert!(status.in_effect && !status.settings["report_now"].in_effect);
    }

    #[test]
    fn policy_that_is_followed_in_part_names_what_is_not() {
        let mut settings = [SettingState::InEffect; PolicySetting::COUNT];
        let (first, second) = (&ReportingPolicy::TABLE[1], &ReportingPolicy::TABLE[3]);
        settings[second.id as usize] = SettingState::NotFollowed;
        settings[first.id as usize] = SettingState::NotFollowed;
        let status = seen(settings);
        assert!(!status.in_effect && status.settings["delay_ms_max"].in_effect);
        let reason = format!(
            "the guest's driver does not follow {}, {}",
            first.name, second.name
        );
        assert_eq!(status.reason, Some(reason));
        assert_eq!(
            status.settings[second.name].reason.as_deref(),
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
