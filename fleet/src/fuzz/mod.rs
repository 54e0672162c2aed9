//! Input of a hostile VMM, guest, store or client: entry point of the fuzz target `fleet`, and of ordinary tests with
//! random bytes.

use crate::cluster;
use crate::config::Config;
use crate::http;
use crate::model::{
    Bytes, FeatureLevel, GuestClaims, HostFacts, InForce, Inventory, Lessons, VmFacts, VmId,
    VmPolicy, VmSample,
};
use crate::planner::{PlannerMemory, plan};
use crate::sample;
use crate::store;

/// Rounds of plans; VMs in each.
const ROUNDS_MAX: u64 = 4;
const VMS: usize = 3;
const ROUND_MS: u64 = 5000;

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
                plans(|_, _| (configured, sample));
                true
            })
        }
        2 => store::reads_answer(rest),
        3 => cluster::reads_record(rest),
        4 => Config::from_toml(&String::from_utf8_lossy(rest)).is_ok(),
        _ => {
            let mut numbers = Numbers(rest);
            plans(|_, now_ms| numbers.vm(now_ms));
            true
        }
    }
}

/// Makes a few plans of VMs with these figures.
fn plans(mut said: impl FnMut(usize, u64) -> (Bytes, VmSample)) {
    let config = Config::default();
    let mut memory = PlannerMemory::default();
    for round in 1..=ROUNDS_MAX {
        let now_ms = round * ROUND_MS;
        let vms = (0..VMS).map(|index| {
            let (configured, sample) = said(index, now_ms);
            VmFacts {
                id: VmId::from(format!("vm{index}")),
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
            }
        });
        let inventory = Inventory {
            now_ms,
            host: HostFacts {
                at_ms: now_ms,
                total: Bytes::gib(32),
                available: Bytes::gib(round),
                ..HostFacts::default()
            },
            vms: vms.collect(),
            ..Inventory::default()
        };
        memory = plan(&inventory, &config, &memory).memory;
    }
}

/// Takes figures from the front of the bytes; zeros when they are exhausted.
struct Numbers<'a>(&'a [u8]);

impl Numbers<'_> {
    /// A number of any order of magnitude.
    fn next(&mut self) -> u64 {
        let mut take = || {
            let (byte, rest) = self.0.split_first().unwrap_or((&0, &[]));
            self.0 = rest;
            u64::from(*byte)
        };
        let shift = take() % 64;
        (take() << 8 | take()) << shift
    }

    fn vm(&mut self, now_ms: u64) -> (Bytes, VmSample) {
        let configured = Bytes(self.next());
        let sample = VmSample {
            at_ms: now_ms,
            balloon_target: Bytes(self.next()),
            ballooned: Bytes(self.next()),
            resident: Bytes(self.next()),
            swapped: Bytes(self.next()),
            obtainable: Bytes(self.next()),
            guest: Some(GuestClaims {
                at_ms: self.next(),
                free: Bytes(self.next()),
                available: Bytes(self.next()),
                alloc_stalls: Some(self.next()),
                major_faults: Some(self.next()),
                swap_in: Some(Bytes(self.next())),
                oom_kills: Some(self.next()),
            }),
            reclaim: None,
        };
        (configured, sample)
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
