//! Measures the time from a free in the guest until the memory is back on the host, and the time of its next use. The
//! variants are the path of return, the size of the freed blocks, and the backing of guest memory.
//!
//! `cargo xtask bench --kernel patched reclaim [-- --way … --backing … --block … --rounds N]`. A guest of 1 GiB touches
//! most of its memory, and returns every other block of one size to its kernel. It touches the same bytes again when no
//! more memory returns to the host.

mod bare;
mod plan;
mod residency_trace;
mod rounds;
mod table;

use std::env;
use std::io::{self, IsTerminal as _};

use anyhow::{Context, Result};
use integration_tests::huge_pages::ReservedHugePages;
use integration_tests::paths;
use serde_json::{Value, json};

use self::plan::{Backing, Combination, Plan};
use self::rounds::ReclaimGuest;
use self::table::Row;
use crate::options::Asked;

/// Its name on the command line.
pub(crate) const NAME: &str = "reclaim";

/// Pages of 2 MiB for a guest of 1 GiB.
const HUGE_PAGES: u64 = 512;

/// Measures every combination, prints the table and returns the figures. If no figure is selected, only one free is
/// measured, to check that it works.
pub(crate) fn run(asked: &Asked<'_>) -> Result<Value> {
    let patched = paths::guest_kernel_is_patched();
    let plan = match asked.by_name {
        Some(words) => Plan::parse(words, patched)?,
        None => Plan::short(),
    };
    let mut rows: Vec<Row> = Vec::new();
    let guests = plan.combinations.chunk_by(Combination::shares_guest);
    for combinations in guests {
        if let Err(error) = measure(combinations, plan.rounds, &mut rows) {
            // The measured figures took minutes, so they are shown although the run failed.
            rows.retain(|row| !row.rounds.is_empty());
            eprint!("{}", table::text(&rows));
            eprintln!("{}", figures(&plan, &rows));
            return Err(error);
        }
    }
    eprint!("{}", table::text(&rows));
    Ok(figures(&plan, &rows))
}

fn figures(plan: &Plan, rows: &[Row]) -> Value {
    let rows: Vec<Value> = rows.iter().map(Row::json).collect();
    json!({ "rounds": plan.rounds, "rows": rows })
}

/// Measures combinations that share a guest.
fn measure(combinations: &[Combination], rounds: usize, rows: &mut Vec<Row>) -> Result<()> {
    let backing = combinations[0].backing;
    let pool = match backing {
        Backing::Hugetlb => ReservedHugePages::new(HUGE_PAGES)?,
        _ => None,
    };
    if backing == Backing::Hugetlb && pool.is_none() {
        let skipped = |combination: &Combination| Row {
            combination: *combination,
            rounds: Vec::new(),
            bare_bytes_per_second: None,
        };
        rows.extend(combinations.iter().map(skipped));
        return Ok(());
    }
    let first = rows.len();
    for combination in combinations {
        progress(combination, "the bare system calls");
        rows.push(Row {
            combination: *combination,
            rounds: Vec::new(),
            bare_bytes_per_second: Some(bare::bytes_per_second(
                backing,
                combination.block,
                rounds,
            )?),
        });
    }
    progress(&combinations[0], "booting");
    let mut reclaim_guest = ReclaimGuest::boot(&combinations[0])?;
    for row in &mut rows[first..] {
        progress(&row.combination, "measuring");
        row.rounds = reclaim_guest
            .run(row.combination.block, rounds)
            .with_context(|| row.combination.to_string())?;
    }
    Ok(())
}

/// Shows progress, because a measurement takes minutes.
fn progress(combination: &Combination, what: &str) {
    let emulated = env::var_os("TESTBED_TERMINAL").is_some_and(|answer| answer == "yes");
    if emulated || io::stderr().is_terminal() {
        eprintln!("{combination}: {what}");
    }
}
