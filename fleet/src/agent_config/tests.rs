#![allow(clippy::unwrap_used)]
//! Tests settings files and drop-ins.

use std::fs;

use api::ReportingPolicy;
use tempfile::TempDir;

use super::*;
use crate::model::Bytes;

fn files(main: &str, drop_ins: &[(&str, &str)]) -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("agent.toml");
    fs::write(&file, main).unwrap();
    fs::create_dir(folder.path().join("agent.d")).unwrap();
    for (name, text) in drop_ins {
        fs::write(folder.path().join("agent.d").join(name), text).unwrap();
    }
    (folder, file)
}

#[test]
fn drop_ins_win_by_name_and_add_to_lists() {
    let (_folder, file) = files(
        "[host]\nreserve = '1GiB'\n[control]\nsample = '2s'\n[discovery]\nsockets = ['/a/*.sock']\n[policy.db]\nmin = '80%'\n",
        &[
            (
                "20-b.toml",
                "[host]\nreserve = '3GiB'\n[[vm]]\nname = 'x*'\npolicy = 'default'\n",
            ),
            (
                "10-a.toml",
                "[host]\nreserve = '2GiB'\n[discovery]\nsockets = ['/b/*.sock']\n[[vm]]\nname = 'pg-*'\npolicy = 'db'\n",
            ),
            ("ignored.bak", "nonsense"),
        ],
    );
    let loaded = load(&file, true).unwrap();
    let config = loaded.config;
    assert_eq!(loaded.files.len(), 3);
    assert_eq!(config.planning.reserve(Bytes::gib(64)), Bytes::gib(3));
    assert_eq!(config.planning.control.sample, Millis::seconds(2));
    assert_eq!(config.discovery.sockets, ["/a/*.sock", "/b/*.sock"]);
    assert_eq!(config.policy_name("pg-1"), "db");
    assert_eq!(config.policy_name("x1"), "default");
    assert_eq!(config.policy_name("db"), "db");
    assert_eq!(config.policy_name("other"), "default");
}

#[test]
fn shown_settings_read_back_the_same() {
    let (_folder, file) = files(
        "[agent]\nlisten = '127.0.0.1:9273'\n[store]\nendpoints = ['http://e1:2379']\nhost = 'h1'\n[reporting.calm]\nbytes_per_second_max = 67108864\n[policy.'a.b']\nfloor = '2048MiB'\n[[vm]]\nname='a'\npolicy='default'\n",
        &[],
    );
    let config = load(&file, true).unwrap().config;
    let shown = config.to_toml();
    for line in [
        "dead_band = \"16MiB\"",
        "bytes_per_second_max = \"64MiB\"",
        "floor = \"2GiB\"",
    ] {
        assert!(shown.contains(line), "{shown}");
    }
    let (_folder, file) = files(&shown, &[]);
    assert_eq!(load(&file, true).unwrap().config, config, "{shown}");
}

/// A policy whose first pair of settings is in the wrong order.
fn reversed_policy() -> String {
    let (low, high) = ReportingPolicy::ORDERED[0];
    let mut text = String::from("[reporting.calm]\n");
    for setting in ReportingPolicy::TABLE {
        let value = match setting.id {
            id if id == low => 6,
            id if id == high => 5,
            _ => setting.default,
        };
        text += &format!("{} = {value}\n", setting.name);
    }
    text
}

#[test]
fn fault_is_told_with_the_file_it_is_in() {
    for (text, word) in [
        ("[host\n", "10-bad.toml"),
        ("[agent]\nsokcet = '/x'\n", "sokcet"),
        ("[control]\nplam = '1s'\n", "plam"),
        ("[nonsense]\n", "nonsense"),
        ("[[vm]]\nname = 'a'\npolicy = 'gone'\n", "gone"),
        ("[discovery]\nsockets = ['x']\n", "must start with"),
        ("[control]\nsample = '1h'\n", "sample"),
        ("[store]\nendpoints = ['https://a:1']\n", "store.ca_file"),
        ("[store]\nendpoints = ['ftp://a:1']\n", "https://"),
        ("[agent]\ntls_key = '/x'\n", "tls_certificate"),
        ("[agent]\nstandby_dir = 'x'\n", "must begin with /"),
        ("[agent]\nstandby_dir = '/x\"'\n", "no quotes"),
        (
            "[agent]\nstate_dir = '/x/y'\nstandby_dir = '/x'\n",
            "must not contain agent.state_dir",
        ),
        ("[agent]\nwake_command = []\n", "agent.wake_command"),
        ("[agent]\nmove_address = '0.0.0.0'\n", "agent.move_address"),
        (
            "[agent]\nmove_address = '192.0.2.7'\n",
            "agent.move_command",
        ),
        ("[agent]\nmove_tls_dir = 'x'\n", "agent.move_tls_dir"),
        ("[agent]\nmove_port = 80\n", "agent.move_port"),
        (
            "[policy.a]\nidle_standby = '1min'\n",
            "policy.a.idle_standby",
        ),
        ("[store]\nprefix = 'x'\n", "not a prefix"),
        ("[[vm]]\nname = 'db-['\npolicy = 'default'\n", "db-["),
        ("[[vm]]\nname = ''\npolicy = 'default'\n", "empty"),
        (
            "[[vm]]\nname = 'a*'\npolicy = 'default'\n[[vm]]\nname = 'ab'\npolicy = 'default'\n",
            "never applies",
        ),
        ("[agent]\nscan = '0s'\n", "agent.scan must be 100ms"),
        ("[agent]\ntrigger_stall = '2s'\n", "trigger_window"),
        ("[control]\nplan = '18446744073709551615ms'\n", "plan"),
        (&reversed_policy(), "reporting.calm: "),
        ("[store]\nhost = 'a/b'\n", "not a host name"),
        ("[store]\nlease = '1s'\n", "store.lease"),
        ("[store]\ndeadline = '11s'\n", "store.deadline"),
    ] {
        let (_folder, file) = files("", &[("10-bad.toml", text)]);
        let error = load(&file, true).unwrap_err();
        let chain = api::error_line(&error);
        assert!(chain.contains(word), "{text}: {chain}");
    }
}

#[test]
fn file_that_is_not_there_is_default_unless_required() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("agent.toml");
    assert_eq!(load(&file, false).unwrap().config, AgentConfig::default());
    assert!(load(&file, true).is_err());
}

#[test]
fn reserve_that_takes_the_machine_is_refused() {
    let (_folder, file) = files("[host]\nreserve = '15GiB'\n", &[]);
    let config = load(&file, true).unwrap().config;
    assert!(config.check_machine(Bytes::gib(64)).is_ok());
    assert!(config.check_machine(Bytes::gib(16)).is_ok());
    let refusal = config.check_machine(Bytes::gib(15)).unwrap_err();
    assert!(refusal.to_string().contains("host.reserve"), "{refusal}");
}

#[test]
fn misspelt_word_is_rejected_with_its_place_and_a_suggestion_at_the_end() {
    for (text, expected) in [
        (
            "[policy.default]\nflor = '1GiB'\n",
            [
                "`policy.default`: unknown field `flor`",
                "(did you mean \"floor\"?)",
            ],
        ),
        (
            "[policy.default]\nclass = 'hihg'\n",
            [
                "`policy.default.class`: unknown variant `hihg`",
                "(did you mean \"high\"?)",
            ],
        ),
        (
            "[agent]\nscna = '1s'\n",
            ["`agent`: unknown field `scna`", "(did you mean \"scan\"?)"],
        ),
        (
            "[agent]\nscan = 1\n",
            ["`agent.scan`: invalid type", "expected a string"],
        ),
        (
            "[reporting.calm]\nage_ms = 4\n",
            [
                "`reporting.calm`: unknown field `age_ms`",
                "(did you mean \"age_ms_min\"?)",
            ],
        ),
        (
            "[[vm]]\nname = 'a'\npolicy = 'databse'\n[policy.database]\nmin = '80%'\n",
            [
                "names undefined policy \"databse\"",
                "(did you mean \"database\"?)",
            ],
        ),
    ] {
        let (_folder, file) = files(text, &[]);
        let chain = api::error_chain(&load(&file, true).unwrap_err());
        let cause = &chain[1];
        assert!(cause.contains(expected[0]), "{chain:?}");
        assert!(cause.ends_with(expected[1]), "{chain:?}");
    }
}

#[test]
fn unknown_section_is_rejected_with_all_sections_and_a_suggestion() {
    for (text, suggestion) in [
        ("[agnt]\n", " (did you mean \"agent\"?)"),
        ("[stor]\n", " (did you mean \"store\"?)"),
        ("[[vms]]\nname = 'a'\n", " (did you mean \"vm\"?)"),
        ("[polcy.db]\nmin = '1GiB'\n", " (did you mean \"policy\"?)"),
        ("floor = '1GiB'\n", ""),
    ] {
        let (_folder, file) = files(text, &[]);
        let chain = api::error_chain(&load(&file, true).unwrap_err());
        let known = "; known are agent, discovery, store, vm, host, thresholds, reporting, control, admission, \
                     last_resort, policy";
        assert!(
            chain[1].ends_with(&format!("{known}{suggestion}")),
            "{chain:?}"
        );
    }
}

#[test]
fn every_section_is_known() {
    let mut config = AgentConfig::default();
    config.vms.push(VmRule {
        name: "a".to_owned(),
        policy: "default".to_owned(),
    });
    let table: toml::Table = config.to_toml().parse().unwrap();
    let mut sections: Vec<_> = table.keys().map(String::as_str).collect();
    let mut known = super::load::SECTIONS.to_vec();
    sections.sort_unstable();
    known.sort_unstable();
    assert_eq!(sections, known);
}

/// The control group that systemd creates for `slice`: each dash separates a slice from the one that contains it
/// (systemd.slice(5)).
fn control_group_of(slice: &str) -> String {
    let name = slice.strip_suffix(".slice").unwrap();
    let ends = name.match_indices('-').map(|(at, _)| at);
    let names = ends.chain([name.len()]).map(|end| &name[..end]);
    names.map(|name| format!("/{name}.slice")).collect()
}

#[test]
fn packaged_settings_name_the_control_group_of_the_packaged_slice() {
    let unit = include_str!("../../systemd/cloud-hypervisor@.service");
    let slice = unit.lines().find_map(|line| line.strip_prefix("Slice="));
    let group = control_group_of(slice.unwrap());
    assert_eq!(group, "/ch.slice/ch-fleet.slice");

    // The settings that are commented out are accepted too.
    let settings: String = include_str!("../../systemd/agent.toml")
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(setting) if setting.contains(" = ") || setting.starts_with('[') => setting,
            _ => line,
        })
        .flat_map(|line| [line, "\n"])
        .collect();
    let (_folder, file) = files(&settings, &[]);
    let config = load(&file, true).unwrap().config;
    assert_eq!(config.planning.host.cgroup, Some(group.clone()));

    let setting = format!("cgroup = \"{group}\"");
    for text in [
        include_str!("../../systemd/ch-fleet.slice"),
        include_str!("../../../docs/fleet.md"),
    ] {
        assert!(text.contains(&setting), "{text}");
    }
}
