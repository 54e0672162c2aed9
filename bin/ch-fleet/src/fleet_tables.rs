//! Human-readable output about the fleet.

use std::collections::BTreeMap;
use std::io::{self, Write};

use fleet::admission::HostHeadroom;
use fleet::model::Bytes;
use fleet::placement::{Moves, StayReason};
use serde::Serialize;

use crate::args::DrainOptions;
use crate::tables::clip;

/// The note under every list of advice.
const ADVICE_ONLY: &str = "advice only: nothing is moved";
/// The note under the list if VMs are moved.
const PLAN: &str = "the hosts decide, so a VM may go to another one";

/// One host in the output of `fleet status`.
#[derive(Debug, Serialize)]
pub(crate) struct HostLine {
    pub(crate) host: String,
    /// Whether its lease is valid.
    pub(crate) there: bool,
    pub(crate) draining: bool,
    /// Its headroom, including requests since it published its figures.
    #[serde(rename = "books")]
    pub(crate) headroom: HostHeadroom,
    /// Age of its figures when it published them, ms.
    pub(crate) facts_age_ms: u64,
    pub(crate) version: String,
    pub(crate) generation: u64,
    pub(crate) vms: usize,
    /// Remote reservations, by their state on the host.
    pub(crate) lines: BTreeMap<&'static str, usize>,
}

/// The host chosen for a VM.
#[derive(Debug, Serialize)]
pub(crate) struct Choice {
    pub(crate) host: String,
    pub(crate) vm: String,
    pub(crate) promised: Bytes,
    /// The reservation; absent if nothing was reserved.
    pub(crate) id: Option<String>,
}

/// Target hosts for VMs.
#[derive(Debug, Serialize)]
pub(crate) struct Advice {
    pub(crate) note: &'static str,
    pub(crate) hosts: BTreeMap<String, Moves>,
}

impl Advice {
    pub(crate) fn of(hosts: BTreeMap<String, Moves>) -> Self {
        Self {
            note: ADVICE_ONLY,
            hosts,
        }
    }
}

/// One line per host.
pub(crate) fn hosts(out: &mut dyn Write, hosts: &[HostLine]) -> io::Result<()> {
    writeln!(
        out,
        "HOST                 STATE  VMS AVAIL USABLE RESERVED  FIRM ASKED  HELD NOTE"
    )?;
    for line in hosts {
        let ledger = &line.headroom.ledger;
        let count = |name: &str| line.lines.get(name).copied().unwrap_or(0);
        let note = match (line.there, line.draining) {
            (true, false) => "",
            (true, true) => "draining",
            (false, true) => "not there, draining",
            (false, false) => "not there",
        };
        let text = format!(
            "{:<20} {:<6} {:>3} {:>#5} {:>#6} {:>#8} {:>#5} {:>5} {:>5} {note}",
            clip(&line.host, 20),
            if line.there {
                line.headroom.state.name()
            } else {
                "-"
            },
            line.vms,
            ledger.available,
            ledger.usable,
            ledger.promised,
            ledger.firm_free,
            count("asked"),
            count("confirmed") + count("starting"),
        );
        writeln!(out, "{}", text.trim_end())?;
    }
    Ok(())
}

pub(crate) fn choice(out: &mut dyn Write, choice: &Choice) -> io::Result<()> {
    match &choice.id {
        Some(id) => writeln!(
            out,
            "{}: {} reserved for {} on {}",
            id, choice.promised, choice.vm, choice.host
        ),
        None => writeln!(
            out,
            "{} would take it with {}; nothing was reserved",
            choice.host, choice.promised
        ),
    }
}

pub(crate) fn drained(
    out: &mut dyn Write,
    host: &str,
    options: &DrainOptions,
    advice: &Advice,
) -> io::Result<()> {
    if options.undo {
        return writeln!(out, "{host} takes VMs again");
    }
    writeln!(out, "nothing new goes to {host}")?;
    moves(
        out,
        advice,
        if options.execute { PLAN } else { ADVICE_ONLY },
    )
}

pub(crate) fn advice(out: &mut dyn Write, advice: &Advice) -> io::Result<()> {
    if advice.hosts.is_empty() {
        return writeln!(
            out,
            "no host is so short of memory that VMs should leave it"
        );
    }
    moves(out, advice, ADVICE_ONLY)
}

fn moves(out: &mut dyn Write, advice: &Advice, note: &str) -> io::Result<()> {
    writeln!(
        out,
        "FROM                 VM                   TO                    BYTES"
    )?;
    for (host, found) in &advice.hosts {
        lines(out, host, found)?;
    }
    writeln!(out, "{note}")
}

fn lines(out: &mut dyn Write, host: &str, found: &Moves) -> io::Result<()> {
    let host = clip(host, 20);
    for one in &found.moves {
        writeln!(
            out,
            "{host:<20} {:<20} {:<20} {:>#6}",
            clip(one.vm.as_str(), 20),
            clip(&one.to, 20),
            one.bytes
        )?;
    }
    for (vm, why) in &found.stay {
        let why = match why {
            StayReason::Fixed(why) if why.is_empty() => "stays: it cannot be moved".to_owned(),
            StayReason::Fixed(why) => format!("stays: {why}"),
            StayReason::Rests(_) => "stays: it was moved not long ago".to_owned(),
            StayReason::NoHost => "stays: no other host has room".to_owned(),
        };
        writeln!(out, "{host:<20} {:<20} {why}", clip(vm.as_str(), 20))?;
    }
    Ok(())
}
