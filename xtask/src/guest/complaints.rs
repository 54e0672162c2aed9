//! Kernel messages on the console that indicate a fault.

/// Substrings of such lines, each the start of a report or all of it.
const WORDS: &[&str] = &[
    // lib/bug.c, arch/x86/kernel/dumpstack.c, kernel/panic.c
    "BUG: ",
    "WARNING: ",
    "kernel BUG at",
    "Oops",
    "Kernel panic",
    "general protection fault",
    // kernel/hung_task.c, kernel/rcu/tree_stall.h
    "INFO: task ",
    "INFO: rcu",
    "rcu_preempt self-detected stall",
    // kernel/locking/lockdep.c
    "INFO: possible ",
    "INFO: trying to register non-static key",
    // mm/page_alloc.c, mm/page_poison.c, mm/oom_kill.c, mm/kmemleak.c
    "Bad page state",
    "pagealloc: ",
    "Out of memory",
    "unreferenced object",
    // lib/list_debug.c, lib/debugobjects.c, lib/ubsan.c
    "list_add corruption",
    "list_del corruption",
    "ODEBUG: ",
    "UBSAN: ",
];

/// How a report of KCSAN starts (kernel/kcsan/report.c); a line of `=` ends it.
const RACE: &str = "BUG: KCSAN: ";
const RACE_END: &str = "==========";

/// Parts of the names of functions that the series adds or changes.
const OURS: &[&str] = &["page_reporting", "prb_", "prw_", "prs_", "virtballoon"];

/// Lines by which a kernel reports a fault.
pub(super) fn complaints(console: &str) -> Vec<&str> {
    console
        .lines()
        .filter(|line| WORDS.iter().any(|word| line.contains(word)))
        .collect()
}

/// Two unordered accesses to the same memory, at least one of them a write.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Race<'a> {
    /// The first line of the report.
    pub(super) title: &'a str,
    /// Whether code of the series is in one of the stacks. Mainline itself has races.
    pub(super) is_ours: bool,
    pub(super) lines: Vec<&'a str>,
}

/// The reports of KCSAN.
pub(super) fn races(console: &str) -> Vec<Race<'_>> {
    let mut lines = console.lines();
    let mut races = Vec::new();
    while let Some(title) = lines.by_ref().find(|line| line.contains(RACE)) {
        let rest: Vec<&str> = lines
            .by_ref()
            .take_while(|line| !line.contains(RACE_END))
            .collect();
        let is_ours = rest
            .iter()
            .chain([&title])
            .any(|line| OURS.iter().any(|part| line.contains(part)));
        races.push(Race {
            title,
            is_ours,
            lines: rest,
        });
    }
    races
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A first line in the format of each kind of report, with our own names.
    const REPORTS: &[&str] = &[
        "[    9.1] BUG: KASAN: slab-use-after-free in fetch_it+0x11/0x22",
        "[    9.1] BUG: KCSAN: data-race in fetch_it / store_it",
        "[    9.1] WARNING: possible circular locking dependency detected",
        "[    9.1] WARNING: possible recursive locking detected",
        "[    9.1] WARNING: inconsistent lock state",
        "[    9.1] WARNING: suspicious RCU usage",
        "[    9.1] [ BUG: Invalid wait context ]",
        "[    9.1] BUG: sleeping function called from invalid context at mm/it.c:7",
        "[    9.1] BUG: Bad page state in process it  pfn:12345",
        "[    9.1] list_add corruption. next->prev should be prev (1), but was 2. (next=3).",
        "[    9.1] kernel BUG at mm/it.c:7!",
        "[    9.1] INFO: task it:12 blocked for more than 300 seconds.",
        "[    9.1] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
        "[    9.1] pagealloc: memory corruption",
        "[    9.1] UBSAN: shift-out-of-bounds in mm/it.c:7:1",
        "[    9.1] ODEBUG: free active (active state 0) object: 1 object type: work_struct",
        "[    9.1] unreferenced object 0x1 (size 64):",
        "[    9.1] it invoked oom-killer: gfp_mask=0x1\n[    9.2] Out of memory: Killed process 7 (it)",
        "[    9.1] Kernel panic - not syncing: it",
    ];

    #[test]
    fn every_kind_of_report_is_a_complaint() {
        for report in REPORTS {
            assert_eq!(complaints(report).len(), 1, "{report}");
        }
    }

    #[test]
    fn words_of_a_good_boot_are_none() {
        let console = "[    0.1] kasan: KernelAddressSanitizer initialized\n\
            [    0.2] Lock dependency validator: Copyright (c) of its author\n\
            [    0.3] kcsan: enabled early\n\
            [    0.4] rcu: Preemptible hierarchical RCU implementation.\n\
            [    7.0] cma: cma_alloc: reserved: alloc failed, req-size: 256 pages, ret: -12\n\
            stress: offline done=3 refused=9\n";
        assert_eq!(complaints(console), Vec::<&str>::new());
    }

    #[test]
    fn race_is_ours_only_with_code_of_the_series_in_a_stack() {
        let report = |function: &str| {
            format!(
                "==================================================================\n\
                 BUG: KCSAN: data-race in fetch_it / store_it\n\
                 \n\
                 write to 0x1 of 8 bytes by task 7 on cpu 0:\n \
                 store_it+0x1/0x2\n {function}+0x3/0x4\n\
                 \n\
                 value changed: 0x0 -> 0x1\n\
                 ==================================================================\n"
            )
        };
        let console = report("prb_pass") + "in between\n" + &report("wander");
        let races = races(&console);
        let ours: Vec<bool> = races.iter().map(|race| race.is_ours).collect();
        assert_eq!(ours, [true, false]);
        assert!(races[0].lines.iter().any(|line| line.contains("prb_pass")));
    }
}
