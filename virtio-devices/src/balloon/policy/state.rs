//! What the two sides have written into the policy's part of the configuration space. Pure.

use ::state::{StateError, parts, require};
use serde::{Deserialize, Serialize};

use super::abi;
use super::settings::{PolicySetting, PolicySettings};

const SPACE_BYTES: usize = (abi::POLICY_END - abi::POLICY_OFFSET) as usize;

/// The words of both sides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Words {
    pub(super) generation: u32,
    pub(super) settings: PolicySettings,
    pub(super) flags: u32,
    pub(super) report_now_id: u32,
    guest_generation: u32,
    guest_settings: u32,
    pub(super) report_now_done: u32,
    /// What the driver has said of the generation it acknowledged last.
    pub(super) followed: Option<Followed>,
}

/// The words at one moment, and the driver's last answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct WordsState {
    pub generation: u32,
    pub order_min: u32,
    pub pending_blocks: u32,
    pub delay_ms_max: u32,
    pub age_ms_min: u32,
    pub bytes_per_second_max: u64,
    pub flags: u32,
    pub report_now_id: u32,
    pub guest_generation: u32,
    pub guest_settings: u32,
    pub report_now_done: u32,
    pub followed: Option<FollowedState>,
}

/// A driver's answer at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FollowedState {
    /// The generation it answers.
    pub generation: u32,
    /// Settings it follows, one bit each.
    pub settings: u32,
}

/// A driver's answer, taken when it wrote `guest_generation`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Followed {
    pub(super) generation: u32,
    settings: u32,
}

impl Followed {
    pub(super) fn follows(self, setting: PolicySetting) -> bool {
        self.settings & setting.bit() != 0
    }
}

/// What a write of the driver's was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::balloon) enum WordWrite {
    /// A word that makes sense.
    Taken,
    /// A word of the driver's with a value that makes none.
    Invalid,
    /// Not a word of the driver's, or not all of one.
    Ignored,
}

impl Words {
    pub(super) fn state(&self) -> WordsState {
        WordsState {
            generation: self.generation,
            order_min: self.settings.order_min,
            pending_blocks: self.settings.pending_blocks,
            delay_ms_max: self.settings.delay_ms_max,
            age_ms_min: self.settings.age_ms_min,
            bytes_per_second_max: self.settings.bytes_per_second_max,
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

    /// The words of a saved state, if both sides can have written them.
    pub(super) fn from_state(state: &WordsState) -> Result<Self, StateError> {
        const FLAGS: u32 =
            abi::VIRTIO_BALLOON_REPORTING_PAUSED | abi::VIRTIO_BALLOON_REPORTING_AGAIN;
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
            settings: PolicySettings {
                order_min: state.order_min,
                pending_blocks: state.pending_blocks,
                delay_ms_max: state.delay_ms_max,
                age_ms_min: state.age_ms_min,
                bytes_per_second_max: state.bytes_per_second_max,
            },
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

    /// Changes what the host says, under the next generation.
    pub(super) fn change(&mut self, settings: PolicySettings, flags: u32) {
        self.settings = settings;
        self.flags = flags;
        // Zero means that nothing was ever set.
        self.generation = self.generation.wrapping_add(1).max(1);
    }

    /// The driver is gone, and with it what it has told.
    pub(super) fn forget_driver(&mut self) {
        self.guest_generation = 0;
        self.guest_settings = 0;
        self.report_now_done = 0;
        self.followed = None;
    }

    /// The bytes from [`abi::POLICY_OFFSET`] on.
    pub(super) fn bytes(&self) -> [u8; SPACE_BYTES] {
        let mut space = [0; SPACE_BYTES];
        for (offset, word) in [
            (abi::POLICY_GENERATION, self.generation),
            (abi::ORDER_MIN, self.settings.order_min),
            (abi::PENDING_BLOCKS, self.settings.pending_blocks),
            (abi::DELAY_MS_MAX, self.settings.delay_ms_max),
            (abi::AGE_MS_MIN, self.settings.age_ms_min),
            (abi::HOST_FLAGS, self.flags),
            (abi::REPORT_NOW_ID, self.report_now_id),
            (abi::GUEST_GENERATION, self.guest_generation),
            (abi::GUEST_SETTINGS, self.guest_settings),
            (abi::REPORT_NOW_DONE, self.report_now_done),
        ] {
            let at = (offset - abi::POLICY_OFFSET) as usize;
            space[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        let at = (abi::BYTES_PER_SECOND_MAX - abi::POLICY_OFFSET) as usize;
        space[at..at + 8].copy_from_slice(&self.settings.bytes_per_second_max.to_le_bytes());
        space
    }

    /// The driver writes.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> WordWrite {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return WordWrite::Ignored;
        };
        let word = u32::from_le_bytes(bytes);
        match offset {
            abi::GUEST_GENERATION => {
                // Of generations there has not been the driver knows nothing. Zero is the
                // answer of one that starts before there is a policy.
                if word > self.generation {
                    return WordWrite::Invalid;
                }
                self.guest_generation = word;
                self.followed = Some(Followed {
                    generation: word,
                    settings: self.guest_settings,
                });
                WordWrite::Taken
            }
            abi::GUEST_SETTINGS => {
                self.guest_settings = word & PolicySetting::MASK;
                match word == self.guest_settings {
                    true => WordWrite::Taken,
                    false => WordWrite::Invalid,
                }
            }
            abi::REPORT_NOW_DONE => {
                if !(1..=self.report_now_id).contains(&word) {
                    return WordWrite::Invalid;
                }
                self.report_now_done = word;
                WordWrite::Taken
            }
            _ => WordWrite::Ignored,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn write(words: &mut Words, offset: u64, word: u32) -> WordWrite {
        words.write(offset, &word.to_le_bytes())
    }

    #[test]
    fn settings_count_when_their_generation_is_acknowledged() {
        let mut words = Words::default();
        words.change(PolicySettings::default(), 0);
        assert_eq!(
            write(&mut words, abi::GUEST_SETTINGS, 0x21),
            WordWrite::Taken
        );
        assert_eq!(words.followed, None);
        assert_eq!(
            write(&mut words, abi::GUEST_GENERATION, 1),
            WordWrite::Taken
        );
        let followed = words.followed.expect("acknowledged");
        assert!(followed.follows(PolicySetting::OrderMin));
        assert!(followed.follows(PolicySetting::Pause));
        assert!(!followed.follows(PolicySetting::ReportNow));
        // Another set of settings is none before it is acknowledged.
        write(&mut words, abi::GUEST_SETTINGS, 0);
        assert_eq!(words.followed, Some(followed));
    }

    #[test]
    fn answer_to_nothing_is_invalid() {
        let mut words = Words::default();
        assert_eq!(
            write(&mut words, abi::GUEST_GENERATION, 1),
            WordWrite::Invalid
        );
        assert_eq!(
            write(&mut words, abi::REPORT_NOW_DONE, 1),
            WordWrite::Invalid
        );
        assert_eq!(
            write(&mut words, abi::GUEST_SETTINGS, !0),
            WordWrite::Invalid
        );
        assert_eq!(words.bytes()[0x28], 0xff, "what is known of it is kept");
        words.guest_settings = 0;
        assert_eq!(words, Words::default());
    }

    #[test]
    fn driver_that_starts_before_a_policy_says_what_it_would_follow() {
        let mut words = Words::default();
        write(&mut words, abi::GUEST_SETTINGS, 0x40);
        let taken = write(&mut words, abi::GUEST_GENERATION, 0);
        assert_eq!(taken, WordWrite::Taken);
        let followed = words.followed.expect("answered");
        assert!(followed.follows(PolicySetting::ReportNow));
        assert!(!followed.follows(PolicySetting::ReportAgain));
    }

    #[test]
    fn generation_that_wraps_is_never_zero() {
        let mut words = Words {
            generation: u32::MAX,
            ..Words::default()
        };
        words.change(PolicySettings::default(), 0);
        assert_eq!(words.generation, 1);
    }

    #[test]
    fn every_field_has_a_place_of_its_own() {
        let words = Words {
            generation: 1,
            settings: PolicySettings {
                order_min: 2,
                pending_blocks: 3,
                delay_ms_max: 4,
                age_ms_min: 5,
                bytes_per_second_max: 7,
            },
            flags: 6,
            report_now_id: 8,
            guest_generation: 9,
            guest_settings: 10,
            report_now_done: 11,
            followed: None,
        };
        let bytes = words.bytes();
        for (value, field) in (1..).zip(abi::FIELDS) {
            let at = (field.offset - abi::POLICY_OFFSET) as usize;
            assert_eq!(bytes[at], value, "{field:?}");
            let rest = &bytes[at + 1..at + field.bytes as usize];
            assert!(rest.iter().all(|byte| *byte == 0), "{field:?}");
        }
    }

    proptest! {
        /// Whatever the driver writes and wherever, the host's words stay.
        #[test]
        fn words_of_the_host_are_its_own(
            writes in prop::collection::vec(
                (0_u64..0x80, prop::collection::vec(any::<u8>(), 0..9)), 0..64),
        ) {
            let mut words = Words::default();
            words.change(PolicySettings { order_min: 9, ..PolicySettings::default() }, 1);
            words.report_now_id = 3;
            let before = words;
            for (offset, data) in writes {
                let host = !(abi::GUEST_GENERATION..abi::POLICY_END).contains(&offset);
                let written = words.write(offset, &data);
                prop_assert!(!host || written == WordWrite::Ignored);
            }
            words.forget_driver();
            prop_assert_eq!(words, before);
        }
    }
}
