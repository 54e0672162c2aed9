//! The policy's fields in the configuration space, as written by device and driver. Access to them has no side
//! effects.

use std::collections::BTreeMap;

use ::state::{StateError, parts, require};
use device_facts::policy_space::{
    GUEST_GENERATION, GUEST_SETTINGS, HOST_FLAGS, POLICY_END, POLICY_GENERATION, POLICY_OFFSET,
    REPORT_NOW_DONE, REPORT_NOW_ID, VIRTIO_BALLOON_REPORTING_AGAIN,
    VIRTIO_BALLOON_REPORTING_PAUSED,
};
use device_facts::{PolicySetting, ReportingPolicy, ReportingPolicyChange};
use serde::{Deserialize, Serialize};

const SPACE_BYTES: usize = (POLICY_END - POLICY_OFFSET) as usize;

/// The fields of both sides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Fields {
    pub(super) generation: u32,
    pub(super) policy: ReportingPolicy,
    pub(super) flags: u32,
    pub(super) report_now_id: u32,
    guest_generation: u32,
    guest_settings: u32,
    pub(super) report_now_done: u32,
    /// The driver's values for the generation that it acknowledged last.
    pub(super) followed: Option<Followed>,
}

/// The saved fields, and the driver's last acknowledgement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct WordsState {
    pub generation: u32,
    /// The settings of the policy by name; unknown names are rejected. An absent setting was unknown to the program
    /// that saved the state, so it was never set and has its default.
    #[serde(flatten)]
    pub settings: BTreeMap<String, u64>,
    pub flags: u32,
    pub report_now_id: u32,
    pub guest_generation: u32,
    pub guest_settings: u32,
    pub report_now_done: u32,
    pub followed: Option<FollowedState>,
}

/// A driver's saved acknowledgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FollowedState {
    /// The acknowledged generation.
    pub generation: u32,
    /// Settings it follows, one bit each.
    pub settings: u32,
}

/// A driver's acknowledgement, recorded when the driver wrote `guest_generation`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Followed {
    pub(super) generation: u32,
    settings: u32,
}

impl Followed {
    pub(super) fn follows(self, setting: PolicySetting) -> bool {
        self.settings & setting.mask() != 0
    }
}

/// The effect of a write by the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::balloon) enum FieldWrite {
    /// A valid value.
    Taken,
    /// An invalid value for a field of the driver.
    Invalid,
    /// Not a field of the driver, or only part of one.
    Ignored,
}

impl Fields {
    pub(super) fn state(&self) -> WordsState {
        WordsState {
            generation: self.generation,
            settings: (ReportingPolicy::TABLE.iter())
                .map(|setting| (setting.name.to_owned(), setting.bounded(&self.policy)))
                .collect(),
            flags: self.flags,
            report_now_id: self.report_now_id,
            guest_generation: self.guest_generation,
            guest_settings: self.guest_settings,
            report_now_done: self.report_now_done,
            followed: self.followed.map(|followed| FollowedState {
                generation: followed.generation,
                settings: followed.settings,
            }),
        }
    }

    /// Restores the fields of a saved state, if both sides can have written them.
    pub(super) fn from_state(state: &WordsState) -> Result<Self, StateError> {
        const FLAGS: u32 = VIRTIO_BALLOON_REPORTING_PAUSED | VIRTIO_BALLOON_REPORTING_AGAIN;
        let latest = state.generation;
        let followed = state.followed;
        let answer = |generation: u32, settings: u32| {
            generation <= latest && settings & !PolicySetting::MASK == 0
        };
        let possible = state.flags & !FLAGS == 0
            && answer(state.guest_generation, state.guest_settings)
            && followed.is_none_or(|it| answer(it.generation, it.settings))
            && state.report_now_done <= state.report_now_id;
        require(possible, parts::BALLOON, "words", || {
            format!("cannot be {state:x?}")
        })?;
        Ok(Self {
            generation: state.generation,
            policy: policy_from(&state.settings)?,
            flags: state.flags,
            report_now_id: state.report_now_id,
            guest_generation: state.guest_generation,
            guest_settings: state.guest_settings,
            report_now_done: state.report_now_done,
            followed: followed.map(|it| Followed {
                generation: it.generation,
                settings: it.settings,
            }),
        })
    }

    /// Changes the host's fields and increments the generation.
    pub(super) fn change(&mut self, policy: ReportingPolicy, flags: u32) {
        self.policy = policy;
        self.flags = flags;
        // Generation zero means that no policy was ever set.
        self.generation = self.generation.wrapping_add(1).max(1);
    }

    /// Clears the values of a driver that is gone.
    pub(super) fn forget_driver(&mut self) {
        self.guest_generation = 0;
        self.guest_settings = 0;
        self.report_now_done = 0;
        self.followed = None;
    }

    /// The bytes from [`POLICY_OFFSET`] on.
    pub(super) fn bytes(&self) -> [u8; SPACE_BYTES] {
        let mut space = [0; SPACE_BYTES];
        let mut put = |offset: u64, bytes: u64, value: u64| {
            let at = (offset - POLICY_OFFSET) as usize;
            let bytes = bytes as usize;
            space[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        };
        for (offset, value) in [
            (POLICY_GENERATION, self.generation),
            (HOST_FLAGS, self.flags),
            (REPORT_NOW_ID, self.report_now_id),
            (GUEST_GENERATION, self.guest_generation),
            (GUEST_SETTINGS, self.guest_settings),
            (REPORT_NOW_DONE, self.report_now_done),
        ] {
            put(offset, 4, value.into());
        }
        for setting in ReportingPolicy::TABLE {
            put(setting.offset, setting.bytes, setting.bounded(&self.policy));
        }
        space
    }

    /// Handles a write by the driver.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> FieldWrite {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return FieldWrite::Ignored;
        };
        let word = u32::from_le_bytes(bytes);
        match offset {
            GUEST_GENERATION => {
                // The driver cannot acknowledge generations that never existed. Zero is the value of a driver that
                // started before there was a policy.
                if word > self.generation {
                    return FieldWrite::Invalid;
                }
                self.guest_generation = word;
                self.followed = Some(Followed {
                    generation: word,
                    settings: self.guest_settings,
                });
                FieldWrite::Taken
            }
            GUEST_SETTINGS => {
                self.guest_settings = word & PolicySetting::MASK;
                match word == self.guest_settings {
                    true => FieldWrite::Taken,
                    false => FieldWrite::Invalid,
                }
            }
            REPORT_NOW_DONE => {
                if !(1..=self.report_now_id).contains(&word) {
                    return FieldWrite::Invalid;
                }
                self.report_now_done = word;
                FieldWrite::Taken
            }
            _ => FieldWrite::Ignored,
        }
    }
}

/// The policy of a saved state.
fn policy_from(settings: &BTreeMap<String, u64>) -> Result<ReportingPolicy, StateError> {
    let mut change = ReportingPolicyChange::default();
    for (name, value) in settings {
        let setting = (ReportingPolicy::TABLE.iter())
            .find(|it| it.name == name && (it.min..=it.max).contains(value));
        let Some(setting) = setting else {
            return Err(StateError::invalid(
                parts::BALLOON,
                "words",
                format!("cannot have {name} {value}"),
            ));
        };
        *setting.slot(&mut change) = Some(*value);
    }
    Ok(change.applied_to(ReportingPolicy::default()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use device_facts::policy_space;
    use proptest::prelude::*;

    use super::*;

    fn write(fields: &mut Fields, offset: u64, word: u32) -> FieldWrite {
        fields.write(offset, &word.to_le_bytes())
    }

    #[test]
    fn settings_count_when_their_generation_is_acknowledged() {
        let mut fields = Fields::default();
        fields.change(ReportingPolicy::default(), 0);
        assert_eq!(write(&mut fields, GUEST_SETTINGS, 0x21), FieldWrite::Taken);
        assert_eq!(fields.followed, None);
        assert_eq!(write(&mut fields, GUEST_GENERATION, 1), FieldWrite::Taken);
        let followed = fields.followed.expect("acknowledged");
        assert!(followed.follows(PolicySetting::OrderMin));
        assert!(followed.follows(PolicySetting::Pause));
        assert!(!followed.follows(PolicySetting::ReportNow));
        // A different set of settings has no effect before it is acknowledged.
        write(&mut fields, GUEST_SETTINGS, 0);
        assert_eq!(fields.followed, Some(followed));
    }

    #[test]
    fn answer_to_nothing_is_invalid() {
        let mut fields = Fields::default();
        assert_eq!(write(&mut fields, GUEST_GENERATION, 1), FieldWrite::Invalid);
        assert_eq!(write(&mut fields, REPORT_NOW_DONE, 1), FieldWrite::Invalid);
        assert_eq!(write(&mut fields, GUEST_SETTINGS, !0), FieldWrite::Invalid);
        assert_eq!(fields.bytes()[0x28], 0xff, "what is known of it is kept");
        fields.guest_settings = 0;
        assert_eq!(fields, Fields::default());
    }

    #[test]
    fn driver_that_starts_before_a_policy_says_what_it_would_follow() {
        let mut fields = Fields::default();
        write(&mut fields, GUEST_SETTINGS, 0x40);
        let taken = write(&mut fields, GUEST_GENERATION, 0);
        assert_eq!(taken, FieldWrite::Taken);
        let followed = fields.followed.expect("answered");
        assert!(followed.follows(PolicySetting::ReportNow));
        assert!(!followed.follows(PolicySetting::ReportAgain));
    }

    #[test]
    fn generation_that_wraps_is_never_zero() {
        let mut fields = Fields {
            generation: u32::MAX,
            ..Fields::default()
        };
        fields.change(ReportingPolicy::default(), 0);
        assert_eq!(fields.generation, 1);
    }

    #[test]
    fn every_field_has_a_place_of_its_own() {
        let mut change = ReportingPolicyChange::default();
        let mut expected = BTreeMap::from([
            ("policy_generation", 101),
            ("host_flags", 102),
            ("report_now_id", 103),
            ("guest_generation", 104),
            ("guest_settings", 105),
            ("report_now_done", 106),
        ]);
        for (value, setting) in (2..).zip(ReportingPolicy::TABLE) {
            *setting.slot(&mut change) = Some(value);
            expected.insert(setting.name, value);
        }
        let fields = Fields {
            generation: 101,
            policy: change.applied_to(ReportingPolicy::default()),
            flags: 102,
            report_now_id: 103,
            guest_generation: 104,
            guest_settings: 105,
            report_now_done: 106,
            followed: None,
        };
        let bytes = fields.bytes();
        for field in policy_space::fields() {
            let at = (field.offset - POLICY_OFFSET) as usize;
            let found = &bytes[at..at + field.bytes as usize];
            let value = expected[field.name].to_le_bytes();
            assert_eq!(found, &value[..found.len()], "{field:?}");
        }
    }

    #[test]
    fn settings_of_a_saved_state_are_restored_by_name() {
        let mut change = ReportingPolicyChange::default();
        for setting in ReportingPolicy::TABLE {
            *setting.slot(&mut change) = Some(setting.min + 1);
        }
        let mut fields = Fields::default();
        fields.change(change.applied_to(ReportingPolicy::default()), 0);
        let state = fields.state();
        assert_eq!(state.settings.len(), ReportingPolicy::TABLE.len());
        assert_eq!(Fields::from_state(&state).unwrap(), fields);
        for setting in ReportingPolicy::TABLE {
            // A state from before the setting was introduced.
            let mut older = state.clone();
            older.settings.remove(setting.name);
            let policy = Fields::from_state(&older).unwrap().policy;
            for other in ReportingPolicy::TABLE {
                let expected = match other.id == setting.id {
                    true => other.default,
                    false => other.min + 1,
                };
                assert_eq!(other.value(&policy), expected, "{}", other.name);
            }
        }
    }

    #[test]
    fn saved_state_with_an_unknown_or_impossible_setting_is_refused_by_name() {
        for (name, value) in [("colour", 1), ("order_min", 11), ("pending_blocks", 0)] {
            let mut state = Fields::default().state();
            state.settings.insert(name.to_owned(), value);
            let refusal = Fields::from_state(&state).unwrap_err().to_string();
            assert!(refusal.contains(&format!("{name} {value}")), "{refusal}");
        }
    }

    #[test]
    fn setting_beyond_its_field_is_as_much_as_is_allowed() {
        let mut fields = Fields::default();
        let everything = ReportingPolicy::TABLE.iter().fold(
            ReportingPolicyChange::default(),
            |mut change, setting| {
                *setting.slot(&mut change) = Some(u64::MAX);
                change
            },
        );
        fields.change(everything.applied_to(ReportingPolicy::default()), 0);
        let bytes = fields.bytes();
        for setting in ReportingPolicy::TABLE {
            let at = (setting.offset - POLICY_OFFSET) as usize;
            let found = &bytes[at..at + setting.bytes as usize];
            assert_eq!(found, &setting.max.to_le_bytes()[..found.len()]);
        }
    }

    proptest! {
        /// The driver's writes never change the host's fields.
        #[test]
        fn fields_of_the_host_are_its_own(
            writes in prop::collection::vec(
                (0_u64..0x80, prop::collection::vec(any::<u8>(), 0..9)), 0..64),
        ) {
            let mut fields = Fields::default();
            fields.change(ReportingPolicy::default(), 1);
            fields.report_now_id = 3;
            let before = fields;
            for (offset, data) in writes {
                let host = !(GUEST_GENERATION..POLICY_END).contains(&offset);
                let written = fields.write(offset, &data);
                prop_assert!(!host || written == FieldWrite::Ignored);
            }
            fields.forget_driver();
            prop_assert_eq!(fields, before);
        }
    }
}
