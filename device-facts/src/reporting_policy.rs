//! The reporting policy: how the host asks a guest to report its free memory.
//!
//! Each setting is one row. The device, the wire types, the options of `ch-remote`, the schemas and the bounds check
//! read it from here. `guest-patches/README.md` specifies what a setting means to the guest.

use std::fmt;

use serde::{Deserialize, Serialize};
use strum::{IntoStaticStr, VariantArray};

/// The unit of a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Unit {
    /// Power of two, in pages of 4 KiB.
    Order,
    /// A plain number.
    Count,
    /// Milliseconds.
    Ms,
    /// Bytes; options accept size suffixes.
    Bytes,
}

impl Unit {
    /// Name in help texts.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// One setting of the policy.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Identifier of the setting.
    pub id: PolicySetting,
    /// Name in the API, in options and in the header.
    pub name: &'static str,
    /// Bit in `guest_settings` by which the driver reports that it follows the setting.
    pub bit: u32,
    /// Offset in the configuration space, in bytes.
    pub offset: u64,
    /// Size in the configuration space, in bytes.
    pub bytes: u64,
    /// Unit of the value.
    pub unit: Unit,
    /// Value until another is set.
    pub default: u64,
    /// Smallest value.
    pub min: u64,
    /// Largest value.
    pub max: u64,
    /// Effect of the setting.
    pub meaning: &'static str,
    value: fn(&ReportingPolicy) -> u64,
    slot: fn(&mut ReportingPolicyChange) -> &mut Option<u64>,
}

impl Setting {
    /// The setting's value in `policy`.
    #[must_use]
    pub fn value(&self, policy: &ReportingPolicy) -> u64 {
        (self.value)(policy)
    }

    /// The setting's value in `policy` as shown to the guest. A policy is checked when it is set; a value that is out
    /// of bounds nevertheless is clamped.
    #[must_use]
    pub fn bounded(&self, policy: &ReportingPolicy) -> u64 {
        self.value(policy).clamp(self.min, self.max)
    }

    /// The setting's field in a change.
    pub fn slot<'a>(&self, change: &'a mut ReportingPolicyChange) -> &'a mut Option<u64> {
        (self.slot)(change)
    }
}

macro_rules! reporting_policy {
    (
        settings {
            $($setting:ident $name:ident {
                bit: $bit:literal, offset: $offset:literal, bytes: $bytes:literal, unit: $unit:ident,
                default: $default:literal, bounds: $min:literal..=$max:expr,
                $meaning:literal
            })+
        }
        requests { $($request:ident { bit: $request_bit:literal, $request_meaning:literal })+ }
    ) => {
        /// A feature that a driver does or does not follow: a setting of the policy or another request.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr, VariantArray)]
        #[strum(serialize_all = "snake_case", const_into_str)]
        pub enum PolicySetting {
            $(#[doc = $meaning] $setting,)+
            $(#[doc = $request_meaning] $request,)+
        }

        impl PolicySetting {
            /// Every variant, the settings of the policy first.
            pub const ALL: &'static [Self] = Self::VARIANTS;
            /// Length of [`PolicySetting::ALL`].
            pub const COUNT: usize = Self::ALL.len();
            /// The defined bits of `guest_settings`.
            pub const MASK: u32 = 0 $(| 1 << $bit)+ $(| 1 << $request_bit)+;

            /// Name in the API.
            #[must_use]
            pub const fn name(self) -> &'static str {
                self.into_str()
            }

            /// The variant's bit in `guest_settings`, as a mask.
            #[must_use]
            pub const fn mask(self) -> u32 {
                match self {
                    $(Self::$setting => 1 << $bit,)+
                    $(Self::$request => 1 << $request_bit,)+
                }
            }
        }

        // No two variants share a bit.
        const _: () = assert!(PolicySetting::MASK.count_ones() as usize == PolicySetting::COUNT);

        /// The host's settings for free page reporting in the guest.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        pub struct ReportingPolicy {
            $(#[doc = $meaning] pub $name: u64,)+
        }

        impl Default for ReportingPolicy {
            fn default() -> Self {
                Self { $($name: $default,)+ }
            }
        }

        /// Settings of the policy to change; absent ones stay unchanged.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        pub struct ReportingPolicyChange {
            $(
                #[doc = $meaning]
                #[serde(default, skip_serializing_if = "Option::is_none")]
                pub $name: Option<u64>,
            )+
        }

        impl From<ReportingPolicy> for ReportingPolicyChange {
            /// Sets every setting.
            fn from(policy: ReportingPolicy) -> Self {
                Self { $($name: Some(policy.$name),)+ }
            }
        }

        impl ReportingPolicyChange {
            /// The policy after this change.
            #[must_use]
            pub fn applied_to(self, policy: ReportingPolicy) -> ReportingPolicy {
                ReportingPolicy { $($name: self.$name.unwrap_or(policy.$name),)+ }
            }

            /// Merges both changes; where both set the same setting, `self` wins.
            #[must_use]
            pub fn or(self, other: Self) -> Self {
                Self { $($name: self.$name.or(other.$name),)+ }
            }
        }

        impl ReportingPolicy {
            /// Every setting.
            pub const TABLE: &'static [Setting] = &[
                $(Setting {
                    id: PolicySetting::$setting,
                    name: stringify!($name),
                    bit: $bit,
                    offset: $offset,
                    bytes: $bytes,
                    unit: Unit::$unit,
                    default: $default,
                    min: $min,
                    max: $max,
                    meaning: $meaning,
                    value: |policy| policy.$name,
                    slot: |change| &mut change.$name,
                },)+
            ];
            /// The names of the settings.
            pub const NAMES: &'static [&'static str] = &[$(stringify!($name)),+];
        }
    };
}

/// One hour.
const DELAY_MS_MAX: u64 = 3_600_000;

// The defaults of block size and delay are those of Linux' page reporting; that of pending blocks is from the proposal
// it came from. A guest that is paused before any policy is set also sees these values: with zeros it would report
// without end.
reporting_policy! {
    settings {
        // `MAX_PAGE_ORDER` of include/linux/mmzone.h is the largest order of a free block on x86: 4 MiB.
        OrderMin order_min {
            bit: 0, offset: 0x14, bytes: 4, unit: Order, default: 9, bounds: 0..=10,
            "Order of the smallest block that is reported; a block has 4096 << order bytes. 0 for the guest's default"
        }
        // The number of 4 KiB blocks in 4 TiB. With more pending blocks nothing would ever be reported.
        PendingBlocks pending_blocks {
            bit: 1, offset: 0x18, bytes: 4, unit: Count, default: 16, bounds: 1..=1 << 30,
            "Free blocks that start a report"
        }
        DelayMsMax delay_ms_max {
            bit: 2, offset: 0x1c, bytes: 4, unit: Ms, default: 2000, bounds: 1..=DELAY_MS_MAX,
            "Time after which a report starts even if few blocks are pending, milliseconds"
        }
        // Must also be at most `delay_ms_max`; otherwise no block would be old enough in time.
        AgeMsMin age_ms_min {
            bit: 3, offset: 0x20, bytes: 4, unit: Ms, default: 0, bounds: 0..=DELAY_MS_MAX,
            "Blocks that have been free for a shorter time are not reported, milliseconds"
        }
        BytesPerSecondMax bytes_per_second_max {
            bit: 4, offset: 0x28, bytes: 8, unit: Bytes, default: 0, bounds: 0..=u64::MAX,
            "Maximum number of bytes reported per second; 0 for no limit"
        }
    }
    requests {
        Pause { bit: 5, "Stops on request, and reports when nothing is in flight" }
        ReportNow { bit: 6, "Reports everything immediately on request" }
        ReportAgain { bit: 7, "Then forgets earlier reports, if requested" }
    }
}

/// Why a policy is rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// A setting of the policy is out of bounds.
    #[error("{setting} of the reporting policy must be between {min} and {max}; got {value}")]
    OutOfBounds {
        /// Name of the setting.
        setting: &'static str,
        /// The requested value.
        value: u64,
        /// Smallest value.
        min: u64,
        /// Largest value.
        max: u64,
    },
    /// Two settings contradict each other.
    #[error("{low} of the reporting policy must be at most {high} ({high_value}); got {low_value}")]
    Reversed {
        /// The setting that must not exceed the other.
        low: &'static str,
        /// Value of `low`.
        low_value: u64,
        /// The other setting.
        high: &'static str,
        /// Value of `high`.
        high_value: u64,
    },
}

impl ReportingPolicy {
    /// Pairs of settings; the first must not exceed the second. If the age exceeded the delay, no block would be old
    /// enough in time.
    pub const ORDERED: &'static [(PolicySetting, PolicySetting)] =
        &[(PolicySetting::AgeMsMin, PolicySetting::DelayMsMax)];

    /// Checks the bounds of each setting, then the order of the pairs.
    ///
    /// # Errors
    /// The first invalid setting or pair.
    pub fn check(&self) -> Result<(), PolicyError> {
        for setting in Self::TABLE {
            let (min, max) = (setting.min, setting.max);
            let value = setting.value(self);
            if !(min..=max).contains(&value) {
                return Err(PolicyError::OutOfBounds {
                    setting: setting.name,
                    value,
                    min,
                    max,
                });
            }
        }
        self.check_order()
    }

    /// Checks the order of the pairs of settings.
    ///
    /// # Errors
    /// The first pair that is reversed.
    pub fn check_order(&self) -> Result<(), PolicyError> {
        for (low, high) in Self::ORDERED {
            let (low_value, high_value) = (self.value(*low), self.value(*high));
            if low_value > high_value {
                return Err(PolicyError::Reversed {
                    low: low.name(),
                    low_value,
                    high: high.name(),
                    high_value,
                });
            }
        }
        Ok(())
    }

    /// Value of a setting; 0 for a variant that is not a setting of the policy.
    fn value(&self, setting: PolicySetting) -> u64 {
        let row = Self::TABLE.iter().find(|it| it.id == setting);
        row.map_or(0, |it| it.value(self))
    }

    /// Syntax of the settings as an option: `order_min=<order>,…`.
    #[must_use]
    pub fn syntax() -> String {
        let keys: Vec<_> = Self::TABLE
            .iter()
            .map(|it| format!("{}=<{}>", it.name, it.unit.name()))
            .collect();
        keys.join(",")
    }
}

impl fmt::Display for ReportingPolicy {
    /// The settings as an option.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, setting) in Self::TABLE.iter().enumerate() {
            let comma = if place == 0 { "" } else { "," };
            write!(f, "{comma}{}={}", setting.name, setting.value(self))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_reads_and_changes_its_own_field() {
        for setting in ReportingPolicy::TABLE {
            let mut change = ReportingPolicyChange::default();
            *setting.slot(&mut change) = Some(77);
            let json = serde_json::to_string(&change).expect("numbers");
            assert_eq!(json, format!("{{\"{}\":77}}", setting.name));
            let policy = change.applied_to(ReportingPolicy::default());
            for other in ReportingPolicy::TABLE {
                let expected = if other.id == setting.id {
                    77
                } else {
                    other.default
                };
                assert_eq!(other.value(&policy), expected, "{}", other.name);
            }
            assert_eq!(setting.name, setting.id.name());
            assert_eq!(1 << setting.bit, setting.id.mask());
        }
    }

    #[test]
    fn defaults_are_within_the_bounds_and_the_bounds_fit_their_fields() {
        for setting in ReportingPolicy::TABLE {
            let bounds = setting.min..=setting.max;
            assert!(bounds.contains(&setting.default), "{}", setting.name);
            let field_max = u64::MAX >> (64 - 8 * setting.bytes);
            assert!(setting.max <= field_max, "{}", setting.name);
        }
    }

    #[test]
    fn setting_out_of_its_bounds_is_refused_by_name() {
        for setting in ReportingPolicy::TABLE {
            let with = |value| {
                let mut change = ReportingPolicyChange::default();
                *setting.slot(&mut change) = Some(value);
                change.applied_to(ReportingPolicy::default())
            };
            let below = setting.min.checked_sub(1);
            for value in below.into_iter().chain(setting.max.checked_add(1)) {
                let refusal = PolicyError::OutOfBounds {
                    setting: setting.name,
                    value,
                    min: setting.min,
                    max: setting.max,
                };
                assert_eq!(with(value).check(), Err(refusal));
            }
        }
        assert_eq!(ReportingPolicy::default().check(), Ok(()));
    }

    #[test]
    fn age_above_the_delay_is_refused() {
        let policy = ReportingPolicy {
            delay_ms_max: 100,
            age_ms_min: 100,
            ..ReportingPolicy::default()
        };
        assert_eq!(policy.check(), Ok(()));
        let older = ReportingPolicy {
            age_ms_min: 101,
            ..policy
        };
        assert_eq!(
            older.check().map_err(|error| error.to_string()),
            Err(
                "age_ms_min of the reporting policy must be at most delay_ms_max (100); got 101"
                    .into()
            )
        );
    }

    #[test]
    fn change_over_a_change_wins_and_a_policy_sets_everything() {
        let policy = ReportingPolicy {
            age_ms_min: 5,
            ..ReportingPolicy::default()
        };
        let all = ReportingPolicyChange::from(policy);
        assert_eq!(all.applied_to(ReportingPolicy::default()), policy);
        let delay = ReportingPolicyChange {
            delay_ms_max: Some(1),
            ..ReportingPolicyChange::default()
        };
        assert_eq!(delay.or(all).delay_ms_max, Some(1));
        assert_eq!(delay.or(all).age_ms_min, Some(5));
        assert_eq!(all.or(delay), all);
    }

    #[test]
    fn syntax_and_text_name_every_setting_in_order() {
        assert_eq!(
            ReportingPolicy::syntax(),
            "order_min=<order>,pending_blocks=<count>,delay_ms_max=<ms>,age_ms_min=<ms>,bytes_per_second_max=<bytes>"
        );
        assert_eq!(
            ReportingPolicy::default().to_string(),
            "order_min=9,pending_blocks=16,delay_ms_max=2000,age_ms_min=0,bytes_per_second_max=0"
        );
    }
}
