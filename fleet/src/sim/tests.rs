//! Tests the scenarios of this crate: their expectations are met, and each safety rule is needed.

use std::path::PathBuf;

use super::*;

fn scenarios() -> Vec<(PathBuf, Scenario)> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/scenarios");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
        .into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(&path).unwrap();
            let scenario = Scenario::from_toml(&text)
                .unwrap_or_else(|error| panic!("{}: {error:?}", path.display()));
            (path, scenario)
        })
        .collect()
}

/// Whether a scenario is small enough for a test; large fleets are run from the command line.
fn small(scenario: &Scenario) -> bool {
    scenario.hosts.count <= 64
}

#[test]
fn scenarios_hold_what_they_say() {
    for (path, mut scenario) in scenarios().into_iter().filter(|(_, s)| small(s)) {
        // Searches are run from the command line; a test runs only our manager.
        scenario.search = None;
        scenario.managers = vec![ManagerKind::Ours];
        let report = simulate(&scenario);
        assert!(report.faults.is_empty(), "{}: {report}", path.display());
    }
}

#[test]
fn scenario_without_the_rule_that_it_shows_fails() {
    let mut shown = 0;
    for (path, scenario) in scenarios() {
        if let Some(rule) = scenario.shows {
            shown += 1;
            let report = simulate(&scenario.without(rule));
            assert!(
                !report.faults.is_empty(),
                "{}: {rule:?} is not needed: {report}",
                path.display()
            );
        }
    }
    assert!(shown >= 6, "only {shown} scenarios show a rule");
}

#[test]
fn same_seed_gives_the_same_run() {
    // Its guests move randomly.
    let wanders = |scenario: &Scenario| scenario.name == "everyone";
    let (_, scenario) = scenarios().into_iter().find(|(_, s)| wanders(s)).unwrap();
    let mut other = scenario.clone();
    other.seed += 1;
    let told =
        |scenario: &Scenario| serde_json::to_string(&run(scenario, ManagerKind::Ours)).unwrap();
    assert_eq!(told(&scenario), told(&scenario));
    assert_ne!(told(&scenario), told(&other));
}

#[test]
fn scaled_scenario_keeps_the_proportions() {
    let (_, scenario) = scenarios()
        .into_iter()
        .find(|(_, s)| s.search.is_some())
        .unwrap();
    for total in [1, 7, 40, 41] {
        assert_eq!(scenario.scaled(total).guests_per_host(), total);
    }
}

#[test]
fn plot_has_a_line_for_each_manager_and_figure() {
    let (_, mut scenario) = scenarios().into_iter().find(|(_, s)| small(s)).unwrap();
    scenario.lasts = crate::config::Millis::seconds(60);
    let runs = [
        run(&scenario, ManagerKind::Ours),
        run(&scenario, ManagerKind::None),
    ];
    assert_eq!(svg("a < b", &runs).matches("<polyline").count(), 6);
}

/// Guests that stop responding when their balloon leaves them short of memory, on a host with too little memory for
/// all.
fn pressed_until_silent(guests: u32, host_gib: u32) -> Scenario {
    Scenario::from_toml(&format!(
        r#"
        name = "pressed until silent"
        seed = 7
        lasts = "120min"
        settle = "5min"
        [hosts]
        memory = "{host_gib}GiB"
        overhead = "512MiB"
        [[guests]]
        count = {guests}
        memory = "4GiB"
        character = "wedging"
        load = {{ shape = "steady", level = "55%" }}
        hot_cache = "30%"
        min = "25%"
        "#
    ))
    .unwrap()
}

#[test]
fn guests_that_fall_silent_teach_as_those_that_suffer() {
    for (guests, host_gib) in [(1, 4), (9, 33), (9, 35), (9, 38)] {
        let report = simulate(&pressed_until_silent(guests, host_gib));
        let limit_cycle = report
            .faults
            .iter()
            .any(|fault| matches!(fault, CheckFault::LimitCycle { .. }));
        assert!(!limit_cycle, "{guests} on {host_gib} GiB: {report}");
    }
}

#[test]
fn no_scenario_allows_more_turns_than_the_default() {
    let allowed = Check::default().reversals_per_hour_max;
    for (path, scenario) in scenarios() {
        assert!(
            scenario.check.reversals_per_hour_max <= allowed,
            "{}",
            path.display()
        );
    }
}
