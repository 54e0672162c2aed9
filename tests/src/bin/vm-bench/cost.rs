//! Resources that a VMM's process has used so far: exits of its guest, and processor time.
//!
//! Counts and counted time are repeatable, whereas seconds are not.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use integration_tests::overhead::Overhead;
use serde_json::{Value, json};

use crate::compare::rounded;
use crate::subject::Subject;

/// KVM's statistics of each machine, in a folder `THREAD-FD`.
const KVM: &str = "/sys/kernel/debug/kvm";

/// Resources used since the process started.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cost {
    /// Exits of all vCPUs; `None` if the kernel does not show them.
    exits: Option<u64>,
    /// Time of the threads that run the guest, including the guest.
    vcpu_ns: u64,
    /// Time of all other threads.
    device_ns: u64,
}

impl Cost {
    /// Reads the resources of the VMM with this process id.
    ///
    /// # Errors
    /// The process has ended, or its kernel does not account for threads.
    pub(crate) fn so_far(pid: u32) -> Result<Self> {
        let mut cost = Self {
            exits: exits(pid),
            ..Self::default()
        };
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?.path();
            // A thread that ends in the meantime was short-lived.
            let (Ok(name), Ok(stat)) = (
                fs::read_to_string(task.join("comm")),
                fs::read_to_string(task.join("schedstat")),
            ) else {
                continue;
            };
            let ns: u64 = stat
                .split(' ')
                .next()
                .and_then(|word| word.parse().ok())
                .with_context(|| format!("{}: {stat:?}", task.display()))?;
            if name.starts_with("vcpu") {
                cost.vcpu_ns += ns;
            } else {
                cost.device_ns += ns;
            }
        }
        Ok(cost)
    }

    /// The difference from `earlier`.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        Self {
            exits: self
                .exits
                .zip(earlier.exits)
                .map(|(now, then)| now.saturating_sub(then)),
            vcpu_ns: self.vcpu_ns.saturating_sub(earlier.vcpu_ns),
            device_ns: self.device_ns.saturating_sub(earlier.device_ns),
        }
    }

    /// The resources per unit.
    pub(crate) fn each(&self, units: u64) -> Value {
        let us = |ns: u64| rounded(ns as f64 / 1000.0 / units as f64);
        json!({
            "exits": self.exits.map(|exits| rounded(exits as f64 / units as f64)),
            "vcpu_us": us(self.vcpu_ns),
            "device_us": us(self.device_ns),
        })
    }
}

/// Sum of all machines of the process. A folder is named after the thread that made the machine.
fn exits(pid: u32) -> Option<u64> {
    let task = Path::new("/proc").join(pid.to_string()).join("task");
    let mut sum = None;
    for folder in fs::read_dir(KVM).ok()?.flatten() {
        let name = folder.file_name();
        let name = name.to_string_lossy();
        let is_ours = name
            .split_once('-')
            .is_some_and(|(thread, _)| task.join(thread).exists());
        if is_ours {
            let text = fs::read_to_string(folder.path().join("exits")).ok()?;
            *sum.get_or_insert(0) += text.trim().parse::<u64>().ok()?;
        }
    }
    sum
}

/// Resident memory of a VMM outside of guest RAM.
pub(crate) fn overhead(subject: &Subject) -> Result<Value> {
    let mut found = Overhead::measure(Some(&subject.program))?;
    found
        .maps
        .sort_by_key(|map| std::cmp::Reverse(map.anonymous));
    let largest: Vec<Value> = found
        .maps
        .iter()
        .take(6)
        .map(|map| json!({ "name": map.name, "anonymous_bytes": map.anonymous }))
        .collect();
    Ok(json!({
        "resident_bytes": found.resident,
        "anonymous_bytes": found.anonymous,
        "largest_anonymous": largest,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cost_of_this_process_grows_with_its_work() {
        let before = Cost::so_far(std::process::id()).unwrap();
        let mut after = before;
        // Ends when the system has accounted for the work.
        while after.since(&before).device_ns == 0 {
            after = Cost::so_far(std::process::id()).unwrap();
        }
        assert_eq!(after.since(&before).exits, None);
    }
}
