//! Human-readable output: plain text, 80 columns wide where possible.

use std::io::{self, Write};

use fleet::agent::{
    JournalPage, MoveStatus, PoolStatus, ReservationStatus, ReserveAnswer, StandbyStatus, Status,
    StoreStatus, VmStatus,
};
use fleet::model::Bytes;
use fleet::standby::Phase;

/// The host in three lines, then the VMs.
pub(crate) fn status(out: &mut dyn Write, status: &Status) -> io::Result<()> {
    host(out, status)?;
    if let Some(store) = &status.store {
        self::store(out, store)?;
    }
    if !status.reservations.is_empty() {
        writeln!(out)?;
        reservations(out, &status.reservations)?;
    }
    if !status.standby.is_empty() {
        writeln!(out)?;
        standby(out, &status.standby)?;
    }
    if !status.moves.is_empty() {
        writeln!(out)?;
        moves(out, &status.moves)?;
    }
    writeln!(out)?;
    vms(out, &status.vms)
}

/// The host in three lines.
pub(crate) fn host(out: &mut dyn Write, status: &Status) -> io::Result<()> {
    let (host, ledger) = (&status.host, &status.host.ledger);
    let pressure = host.facts.pressure;
    writeln!(
        out,
        "{}  {} for {} s{}{}  {} VMs  available {:#} of {:#} usable ({:.0} %)",
        host.name,
        host.state.name().to_uppercase(),
        host.state_age_ms / 1000,
        if status.dry_run { "  DRY RUN" } else { "" },
        if status.reload_ok {
            ""
        } else {
            "  SETTINGS REFUSED"
        },
        status.vms.len(),
        ledger.available,
        ledger.usable,
        host.free * 100.0
    )?;
    writeln!(
        out,
        "configured {:#}  resident {:#}  ballooned {:#}  callable {:#}  burst {:#}  reserved {:#}  firm free {:#}",
        ledger.configured,
        ledger.resident,
        ledger.ballooned,
        ledger.callable_liability,
        ledger.burst,
        ledger.promised,
        ledger.firm_free
    )?;
    writeln!(
        out,
        "pressure some {:.1} % full {:.1} %  swap in {:#}/s out {:#}/s  short {:#}  wanted {:#}  pending {:#}  owed {:#}",
        pressure.some_avg10,
        pressure.full_avg10,
        host.facts.swap_in_per_s,
        host.facts.swap_out_per_s,
        host.shortage,
        host.wanted,
        host.pending,
        host.owed
    )?;
    if host.pool == PoolStatus::default() {
        return Ok(());
    }
    writeln!(
        out,
        "huge pages {:#}  free {:#}  held {:#}  reserved {:#}",
        host.pool.total, host.pool.free, host.pool.held, host.pool.promised
    )
}

/// The store in one line.
fn store(out: &mut dyn Write, store: &StoreStatus) -> io::Result<()> {
    let state = match (store.registered, &store.error) {
        (true, None) => "in sync".to_owned(),
        (_, Some(error)) => format!("OUT OF SYNC: {error}"),
        (false, None) => "joining".to_owned(),
    };
    writeln!(
        out,
        "store {state}  as {}  held for others {} ({:#})  leases lost {}",
        store.host, store.held, store.held_bytes, store.leases_lost
    )
}

/// One line per VM.
pub(crate) fn vms(out: &mut dyn Write, vms: &[VmStatus]) -> io::Result<()> {
    writeln!(out, "{VM_HEADER}")?;
    for vm in vms {
        writeln!(out, "{}", vm_line(vm))?;
    }
    Ok(())
}

/// Column names of [`vm_line`].
pub(crate) const VM_HEADER: &str =
    "VM           CL LV   CONF    RES    TGT    ACT  AVAIL  POP/S   AGE DECISION";

/// A VM in 80 columns.
pub(crate) fn vm_line(vm: &VmStatus) -> String {
    let state = match (&vm.failure, &vm.interlock) {
        (Some(failure), _) if !vm.up => failure.clone(),
        (_, Some(interlock)) => interlock.clone(),
        _ if vm.stuck => "stuck".to_owned(),
        _ if !vm.trusted => "distrusted".to_owned(),
        _ => vm.reason.clone(),
    };
    format!(
        "{:<12} {:<2} L{} {:>#6} {:>#6} {:>#6} {:>#6} {:>6} {:>#6} {:>5} {}",
        clip(&vm.vm, 12),
        &format!("{:?}", vm.class)[..2],
        vm.level,
        vm.configured,
        vm.resident,
        vm.target,
        vm.actual,
        vm.guest_available
            .map_or_else(|| "-".to_owned(), |bytes| format!("{bytes:#}")),
        Bytes(vm.repopulated_per_s),
        vm.sample_age_ms
            .map_or_else(|| "-".to_owned(), |ms| format!("{:.1}", ms as f64 / 1e3)),
        state
    )
}

pub(crate) fn reservations(out: &mut dyn Write, held: &[ReservationStatus]) -> io::Result<()> {
    writeln!(
        out,
        "RESERVATION          VM               MEMORY  RESERVED  COUNTS PHASE"
    )?;
    for entry in held {
        let made = &entry.reservation;
        writeln!(
            out,
            "{:<20} {:<16} {:>#6} {:>#9} {:>#7} {}",
            made.id,
            clip(&made.vm, 16),
            made.configured,
            made.promised,
            entry.outstanding,
            made.phase.name()
        )?;
    }
    Ok(())
}

/// VMs in standby.
fn standby(out: &mut dyn Write, vms: &[StandbyStatus]) -> io::Result<()> {
    writeln!(out, "STANDBY              MEMORY   DISK PHASE")?;
    for vm in vms {
        writeln!(out, "{}", standby_line(vm))?;
    }
    Ok(())
}

/// Moves to and from this host.
fn moves(out: &mut dyn Write, moves: &[MoveStatus]) -> io::Result<()> {
    writeln!(
        out,
        "MOVE                 FROM             TO                 SENT PHASE"
    )?;
    for one in moves {
        let why = Some(&one.why).filter(|why| !why.is_empty());
        writeln!(
            out,
            "{:<20} {:<16} {:<16} {:>#6} {}{}",
            clip(&one.vm, 20),
            clip(&one.from, 16),
            clip(&one.to, 16),
            one.sent,
            one.phase,
            why.map_or_else(String::new, |why| format!(": {why}"))
        )?;
    }
    Ok(())
}

/// A VM in standby in one line.
fn standby_line(vm: &StandbyStatus) -> String {
    let phase = vm.phase.map_or("unknown", Phase::name);
    let fault = vm.fault.as_deref().map(|fault| format!(": {fault}"));
    format!(
        "{:<20} {:>#6} {:>#6} {phase}{}",
        clip(&vm.vm, 20),
        vm.memory,
        vm.disk,
        fault.unwrap_or_default()
    )
}

pub(crate) fn reserved(out: &mut dyn Write, answer: &ReserveAnswer) -> io::Result<()> {
    match &answer.reservation {
        Some(made) => writeln!(
            out,
            "{}: {} reserved for {}; {} can still be reserved",
            made.id, made.promised, made.vm, answer.firm_free_after
        ),
        None => writeln!(
            out,
            "it fits; {} could still be reserved after it",
            answer.firm_free_after
        ),
    }
}

pub(crate) fn events(out: &mut dyn Write, page: &JournalPage) -> io::Result<()> {
    for entry in &page.entries {
        writeln!(
            out,
            "{} {:<9} {:<16} {}",
            entry.unix_ms,
            entry.kind,
            clip(&entry.vm, 16),
            entry.text
        )?;
    }
    Ok(())
}

/// One sentence per VM.
pub(crate) fn explanations(out: &mut dyn Write, status: &Status) -> io::Result<()> {
    for vm in &status.vms {
        if vm.explanation.is_empty() {
            writeln!(
                out,
                "{}: not planned for, {}",
                vm.vm,
                vm.failure.as_deref().unwrap_or("not sampled yet")
            )?;
        } else {
            writeln!(out, "{}", vm.explanation)?;
        }
    }
    Ok(())
}

/// Every figure of an explanation, one per line.
pub(crate) fn figures(out: &mut dyn Write, explanation: &serde_json::Value) -> io::Result<()> {
    for (name, value) in explanation.as_object().into_iter().flatten() {
        writeln!(out, "  {name} = {value}")?;
    }
    Ok(())
}

pub(crate) fn clip(text: &str, chars: usize) -> String {
    text.chars().take(chars).collect()
}
