//! Tests rules and their states on a simulated clock.

#![allow(clippy::unwrap_used)]

use api::{
    AlertChange, AlertDirection, AlertStatus, ReclaimThresholdsChange, ReportingPolicy,
    ReportingPolicyChange, VmCounters,
};
use device_facts::PolicySetting;
use proptest::prelude::*;
use serde_json::json;

use super::ThresholdError;
use super::config::ThresholdConfig;
use crate::alerts::{ALERTS_MAX, AlertError, AlertFault, Figure, NAME_LENGTH_MAX, Needs, Sources};
use crate::reporting_policy::GuestPolicy;

const FIGURE: &str = "_disk0/read_ops";

fn value_of(value: u64) -> Sources {
    let counters = [("read_ops".to_owned(), value)].into();
    Sources {
        counters: Some(VmCounters::from([("_disk0".to_owned(), counters)])),
        ..Sources::default()
    }
}

fn rule(name: &str, direction: AlertDirection, enter: u64, leave: u64) -> AlertChange {
    AlertChange {
        name: name.to_owned(),
        figure: Some(FIGURE.to_owned()),
        direction: Some(direction),
        enter: Some(enter),
        leave: Some(leave),
        duration_ms: None,
    }
}

fn alerts(alerts: Vec<AlertChange>) -> ReclaimThresholdsChange {
    ReclaimThresholdsChange {
        alerts,
        ..ReclaimThresholdsChange::default()
    }
}

fn config_of(alert: AlertChange) -> ThresholdConfig {
    let mut config = ThresholdConfig::default();
    config.change(&alerts(vec![alert]), 0).unwrap();
    config
}

fn only(config: &ThresholdConfig, now_ms: u64) -> AlertStatus {
    config.status(now_ms, GuestPolicy::NoMachine).alerts[0].clone()
}

fn fault(change: AlertChange) -> AlertFault {
    match ThresholdConfig::default().change(&alerts(vec![change]), 0) {
        Err(ThresholdError::Alerts(AlertError::Alert { fault, .. })) => fault,
        other => panic!("{other:?}"),
    }
}

#[test]
fn figure_of_every_number_in_the_statistics_is_known() {
    for name in [
        "resident_bytes",
        "swapped_bytes",
        "ballooned_bytes",
        "report/failed_bytes",
        "report/skipped_bytes/outside_ram",
        "inflate/last_batch/bytes",
        "hint/discarded_bytes",
        "hint/skipped_bytes/duplicate",
        "hinting/runs_completed",
        "report/latency_us/p99",
        "guest/stats/free_memory",
        "guest/age_ms",
    ] {
        let known = Figure::parse(name);
        assert!(matches!(known, Some(Figure::Reclaim(_))), "{name}");
    }
    assert!(matches!(
        Figure::parse(FIGURE),
        Some(Figure::Counter { .. })
    ));
}

#[test]
fn figure_of_anything_else_is_unknown() {
    for name in [
        "",
        "/",
        "resident",
        "resident_bytes/",
        "/resident_bytes",
        "resident_bytes/more",
        "backing",
        "reporting/active",
        "report",
        "report/faild_bytes",
        "report/skipped_bytes/no_such_reason",
        "_disk0/read/ops",
        &"x".repeat(NAME_LENGTH_MAX + 1),
    ] {
        assert_eq!(Figure::parse(name), None, "{name}");
    }
}

#[test]
fn figure_reads_what_it_names_and_zero_where_zeros_are_left_out() {
    let sources = Sources {
        reclaim: Some(
            json!({"resident_bytes": 5, "report": {"failed_bytes": 6, "skipped_bytes": {}}}),
        ),
        counters: None,
    };
    let read = |name| Figure::parse(name).unwrap().read(&sources);
    assert_eq!(read("resident_bytes"), Some(5));
    assert_eq!(read("report/failed_bytes"), Some(6));
    assert_eq!(read("report/skipped_bytes/outside_ram"), Some(0));
    assert_eq!(read("inflate/skipped_bytes/outside_ram"), None);
    assert_eq!(read("guest/stats/free_memory"), None);
    assert_eq!(read(FIGURE), None);
}

#[test]
fn needs_include_residency_only_for_what_is_measured() {
    let needs = |name: &str| {
        let change = AlertChange {
            figure: Some(name.to_owned()),
            ..rule("a", AlertDirection::Above, 1, 1)
        };
        config_of(change).needs()
    };
    let expected = |reclaim, residency, counters| Needs {
        reclaim,
        residency,
        counters,
    };
    assert_eq!(needs("report/failed_bytes"), expected(true, false, false));
    assert_eq!(needs("resident_bytes"), expected(true, true, false));
    assert_eq!(needs("repopulated_bytes"), expected(true, true, false));
    assert_eq!(needs(FIGURE), expected(false, false, true));
    assert!(!ThresholdConfig::default().has_alerts());
}

#[test]
fn alert_enters_after_its_duration_and_leaves_at_once() {
    let mut config = config_of(AlertChange {
        duration_ms: Some(2000),
        ..rule("a", AlertDirection::Above, 10, 5)
    });
    let mut step = |now_ms, value| config.step(now_ms, &value_of(value));
    assert!(step(0, 11).is_empty());
    assert!(step(1000, 11).is_empty());
    // Back in the dead band: the duration restarts.
    assert!(step(1500, 10).is_empty());
    assert!(step(2000, 11).is_empty());
    assert!(step(3999, 11).is_empty());
    let entered = step(4000, 12);
    assert_eq!(
        (entered[0].entered, entered[0].value, entered[0].threshold),
        (true, 12, 10)
    );
    assert!(step(5000, 6).is_empty());
    let left = step(6000, 5);
    assert_eq!(
        (left[0].entered, left[0].value, left[0].threshold),
        (false, 5, 5)
    );
    let status = only(&config, 6500);
    assert_eq!(
        (status.active, status.since_ms, status.times_entered),
        (false, 500, 1)
    );
}

#[test]
fn alert_without_a_figure_neither_enters_nor_leaves() {
    let mut config = config_of(AlertChange {
        duration_ms: Some(1000),
        ..rule("a", AlertDirection::Below, 5, 10)
    });
    assert!(config.step(0, &value_of(1)).is_empty());
    assert!(config.step(1000, &Sources::default()).is_empty());
    assert!(config.step(1500, &value_of(1)).is_empty());
    assert_eq!(config.step(2500, &value_of(1)).len(), 1);
    assert!(config.step(3000, &Sources::default()).is_empty());
    let status = only(&config, 3000);
    assert_eq!((status.active, status.value), (true, None));
}

#[test]
fn alert_changed_in_its_values_keeps_its_state_and_on_another_figure_starts_anew() {
    let mut config = config_of(rule("a", AlertDirection::Above, 10, 5));
    config.step(0, &value_of(11));
    let lower = AlertChange {
        name: "a".to_owned(),
        leave: Some(6),
        ..AlertChange::default()
    };
    config.change(&alerts(vec![lower]), 1).unwrap();
    assert!(only(&config, 1).active);
    assert_eq!(
        (only(&config, 1).rule.enter, only(&config, 1).rule.leave),
        (10, 6)
    );
    let other = AlertChange {
        name: "a".to_owned(),
        figure: Some("_disk0/write_ops".to_owned()),
        ..AlertChange::default()
    };
    config.change(&alerts(vec![other]), 2).unwrap();
    assert_eq!(
        (only(&config, 2).active, only(&config, 2).times_entered),
        (false, 0)
    );
}

#[test]
fn alert_set_again_as_it_is_does_not_put_off_its_entry() {
    let change = AlertChange {
        duration_ms: Some(1500),
        ..rule("a", AlertDirection::Above, 10, 5)
    };
    let mut config = config_of(change.clone());
    assert!(config.step(0, &value_of(11)).is_empty());
    config.change(&alerts(vec![change]), 1000).unwrap();
    assert_eq!(config.step(1500, &value_of(11)).len(), 1);
}

#[test]
fn change_that_makes_no_sense_is_refused_by_name() {
    use AlertDirection::{Above, Below};
    let good = rule("a", Above, 2, 1);
    let faults = [
        (rule("", Above, 2, 1), AlertFault::Name),
        (
            rule(&"n".repeat(NAME_LENGTH_MAX + 1), Above, 2, 1),
            AlertFault::Name,
        ),
        (
            rule("a", Above, 1, 2),
            AlertFault::LeaveBeyondEnter {
                leave: 2,
                enter: 1,
                side: "above",
            },
        ),
        (
            rule("a", Below, 2, 1),
            AlertFault::LeaveBeyondEnter {
                leave: 1,
                enter: 2,
                side: "below",
            },
        ),
        (
            AlertChange {
                enter: None,
                ..good.clone()
            },
            AlertFault::Missing("enter"),
        ),
        (
            AlertChange {
                figure: None,
                ..good.clone()
            },
            AlertFault::Missing("figure"),
        ),
        (
            AlertChange {
                direction: None,
                ..good.clone()
            },
            AlertFault::Missing("direction"),
        ),
        (
            AlertChange {
                figure: Some("nothing".to_owned()),
                ..good.clone()
            },
            AlertFault::Figure("nothing".to_owned()),
        ),
        (
            AlertChange {
                duration_ms: Some(u64::MAX),
                ..good.clone()
            },
            AlertFault::Duration(u64::MAX),
        ),
    ];
    for (change, expected) in faults {
        assert_eq!(fault(change), expected);
    }
    let twice = alerts(vec![good.clone(), good]);
    assert!(ThresholdConfig::default().change(&twice, 0).is_err());
    let unknown = ReclaimThresholdsChange {
        remove_alerts: vec!["a".to_owned()],
        ..ReclaimThresholdsChange::default()
    };
    assert!(ThresholdConfig::default().change(&unknown, 0).is_err());
}

#[test]
fn change_above_the_bound_is_refused_and_removal_makes_room() {
    let many = |count: usize| {
        let alert = |number: usize| rule(&number.to_string(), AlertDirection::Above, 1, 0);
        alerts((0..count).map(alert).collect())
    };
    let mut config = ThresholdConfig::default();
    let error = config.change(&many(ALERTS_MAX + 1), 0).unwrap_err();
    assert_eq!(error, ThresholdError::Alerts(AlertError::TooManyAlerts));
    assert!(!config.has_alerts());
    config.change(&many(ALERTS_MAX), 0).unwrap();
    let mut another = alerts(vec![rule("new", AlertDirection::Above, 1, 0)]);
    assert!(config.change(&another, 0).is_err());
    another.remove_alerts.push("7".to_owned());
    config.change(&another, 0).unwrap();
    assert_eq!(
        config.status(0, GuestPolicy::NoMachine).alerts.len(),
        ALERTS_MAX
    );
    config.clear();
    assert!(!config.has_alerts());
}

#[test]
fn policy_is_changed_in_part_and_checked_as_a_whole() {
    let policy = |policy: ReportingPolicyChange| ReclaimThresholdsChange {
        reporting_policy: Some(policy),
        ..ReclaimThresholdsChange::default()
    };
    let nothing = ReportingPolicyChange::default();
    let mut config = ThresholdConfig::default();
    let shorter = ReportingPolicyChange {
        delay_ms_max: Some(100),
        ..nothing
    };
    config.change(&policy(shorter), 0).unwrap();
    let before = config.status(0, GuestPolicy::NoMachine).reporting_policy;
    assert_eq!(
        (before.policy.delay_ms_max, before.policy.pending_blocks),
        (100, 16)
    );
    assert!(!before.in_effect && before.reason.is_some());
    let with = |setting: PolicySetting, value| {
        let mut change = nothing;
        let row = ReportingPolicy::TABLE.iter().find(|it| it.id == setting);
        *row.unwrap().slot(&mut change) = Some(value);
        change
    };
    let (age, _) = ReportingPolicy::ORDERED[0];
    for bad in [
        with(PolicySetting::OrderMin, 11),
        with(PolicySetting::PendingBlocks, 0),
        with(PolicySetting::DelayMsMax, 0),
        with(age, 101),
    ] {
        assert!(config.change(&policy(bad), 0).is_err(), "{bad:?}");
        assert_eq!(
            config.status(0, GuestPolicy::NoMachine).reporting_policy,
            before
        );
    }
}

proptest! {
    /// For any sequence of figures: no crossing in the dead band; entries and exits alternate, each beyond its value;
    /// at most one per step; none before the figure has been beyond the value for the duration.
    #[test]
    fn alert_of_any_rule_on_any_figure_crosses_as_drawn(
        below in any::<bool>(),
        (leave, enter) in (0u64..20, 0u64..20).prop_map(|(a, b)| (a.min(b), a.max(b))),
        duration_ms in 0u64..4000,
        steps in prop::collection::vec((0u64..3000, prop::option::weighted(0.9, 0u64..21)), 1..100),
    ) {
        let (direction, leave, enter) = match below {
            true => (AlertDirection::Below, enter, leave),
            false => (AlertDirection::Above, leave, enter),
        };
        let mut config = config_of(AlertChange {
            duration_ms: Some(duration_ms),
            ..rule("a", direction, enter, leave)
        });
        let (mut now_ms, mut active, mut entered, mut beyond_since) = (0, false, 0, None);
        for (passed_ms, value) in steps {
            now_ms += passed_ms;
            let sources = value.map(value_of).unwrap_or_default();
            let crossed = config.step(now_ms, &sources);
            prop_assert!(crossed.len() <= 1);
            let is_beyond = value.is_some_and(|value| match below {
                true => value < enter,
                false => value > enter,
            });
            let is_safe = value.is_some_and(|value| match below {
                true => value >= leave,
                false => value <= leave,
            });
            beyond_since = is_beyond.then(|| beyond_since.unwrap_or(now_ms));
            let may_enter = !active && beyond_since.is_some_and(|since| now_ms - since >= duration_ms);
            prop_assert_eq!(crossed.len() == 1, may_enter || (active && is_safe));
            if let Some(transition) = crossed.first() {
                active = !active;
                entered += u64::from(active);
                beyond_since = None;
                prop_assert_eq!(transition.entered, active);
                prop_assert_eq!(Some(transition.value), value);
            }
            let status = only(&config, now_ms);
            prop_assert_eq!((status.active, status.times_entered), (active, entered));
        }
    }
}
