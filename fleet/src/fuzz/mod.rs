//! Entry point of the fuzz target `fleet`: passes hostile input from a VMM, guest, store or client to the code that reads
//! it. Ordinary tests call it with random bytes.

mod history;

use crate::cluster;
use crate::config::Config;
use crate::http;
use crate::model::{
    Bytes, FeatureLevel, HostFacts, InForce, Inventory, Lessons, VmFacts, VmId, VmPolicy, VmSample,
};
use crate::planner::{PlannerMemory, plan};
use crate::sample;
use crate::store;

/// Plans with the same figures.
const ROUNDS: u64 = 4;
const ROUND_MS: u64 = 5000;
/// Memory of a VM for which a configuration has a policy.
const CONFIGURED: Bytes = Bytes::gib(2);

/// Processes the bytes, the first of which selects their source. Returns whether the input was valid.
///
/// # Panics
/// The input revealed a bug.
pub fn run(bytes: &[u8]) -> bool {
    let (choice, rest) = bytes.split_first().unwrap_or((&0, &[]));
    match choice % 6 {
        0 => http::reads_request(rest),
        1 => {
            let mut parts = rest.splitn(2, |byte| *byte == 0);
            let mut text =
                || String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
            let (info, stats) = (text(), text());
            sample::figures(&info, &stats).is_some_and(|(configured, sample)| {
                plan_for(configured, sample);
                true
            })
        }
        2 => store::reads_answer(rest),
        3 => cluster::reads_record(rest),
        4 => reads_config(&String::from_utf8_lossy(rest)),
        _ => history::plans(rest) > 0,
    }
}

/// Whether the text is a configuration. The policy of a VM is then possible, and otherwise the error has a message.
fn reads_config(text: &str) -> bool {
    match Config::from_toml(text) {
        Ok(config) => {
            let policy = config.vm_policy("vm", CONFIGURED);
            assert!(policy.min <= policy.max && policy.max <= CONFIGURED);
            true
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}

/// Makes a few plans for a VM with these figures.
fn plan_for(configured: Bytes, sample: VmSample) {
    let config = Config::default();
    let mut memory = PlannerMemory::default();
    for round in 1..=ROUNDS {
        let now_ms = round * ROUND_MS;
        let inventory = Inventory {
            now_ms,
            host: HostFacts {
                at_ms: now_ms,
                total: Bytes::gib(32),
                available: Bytes::gib(round),
                ..HostFacts::default()
            },
            vms: vec![VmFacts {
                id: VmId::from("vm"),
                epoch: 1,
                level: FeatureLevel::L2,
                configured,
                has_balloon: true,
                policy: VmPolicy::halves(configured),
                interlock: None,
                in_force: InForce::default(),
                lessons: Lessons::default(),
                sample: Some(sample),
                missed_samples: 0,
            }],
            ..Inventory::default()
        };
        memory = plan(&inventory, &config, &memory).memory;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sound_words_are_understood() {
        let info = r#"{"config":{"memory":{"size":1073741824}},"state":"Running"}"#;
        for (choice, text) in [
            (0, "GET /v1/plan HTTP/1.1\r\n\r\n"),
            (1, info),
            (2, r#"{"header":{"revision":"3"},"succeeded":true}"#),
            (4, ""),
        ] {
            assert!(run(&[&[choice], text.as_bytes()].concat()), "{text}");
        }
    }

    proptest! {
        #[test]
        fn random_words_do_no_harm(
            choice in 0u8..6,
            bytes in proptest::collection::vec(any::<u8>(), 0..400),
        ) {
            run(&[&[choice], bytes.as_slice()].concat());
        }
    }
}
