//! Reports an outcome as a table, a chart or JSON.

use std::fmt;

use chart::{Frame, Sheet};
use serde::Serialize;
use strum::VariantArray as _;

use crate::model::HostState;

use super::outcome::{CheckFault, Run, faults};
use super::scenario::{ManagerKind, Scenario};
use super::{Capacity, FleetOutcome, Point};

/// The results of a scenario.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The scenario.
    pub name: String,
    /// Description of what it shows.
    pub about: String,
    /// Its seed.
    pub seed: u64,
    /// Hosts.
    pub hosts: u32,
    /// Each manager with the scenario's guests.
    pub runs: Vec<Run>,
    /// The capacity of each manager, if the scenario has a search.
    pub capacities: Vec<Capacity>,
    /// Events between hosts, if the scenario has any.
    pub fleet: Option<FleetOutcome>,
    /// Expectations that our manager did not meet.
    pub faults: Vec<CheckFault>,
}

impl Report {
    pub(super) fn new(
        scenario: &Scenario,
        runs: Vec<Run>,
        capacities: Vec<Capacity>,
        fleet: Option<FleetOutcome>,
    ) -> Self {
        let check = &scenario.check;
        let mut found: Vec<CheckFault> = runs
            .iter()
            .filter(|run| run.manager == ManagerKind::Ours)
            .flat_map(|run| faults(&run.outcome, scenario.hosts.count, check))
            .collect();
        let gain = gain(&capacities);
        if let Some(gain) = gain.filter(|gain| *gain < check.more_guests_min.0) {
            found.push(CheckFault::Gain {
                found: gain,
                wanted: check.more_guests_min.0,
            });
        }
        Self {
            name: scenario.name.clone(),
            about: scenario.about.clone(),
            seed: scenario.seed,
            hosts: scenario.hosts.count,
            runs,
            capacities,
            fleet,
            faults: found,
        }
    }

    /// Additional guests that our manager carries compared with the best of the others, as a fraction of theirs.
    pub fn gain(&self) -> Option<f64> {
        gain(&self.capacities)
    }
}

fn gain(capacities: &[Capacity]) -> Option<f64> {
    let ours = capacities.iter().find(|c| c.manager == ManagerKind::Ours)?;
    let others = capacities.iter().filter(|c| c.manager != ManagerKind::Ours);
    let best = others.map(|c| c.guests).max().filter(|best| *best > 0)?;
    Some(f64::from(ours.guests) / f64::from(best) - 1.0)
}

fn row(f: &mut fmt::Formatter<'_>, run: &Run, guests: u32, hosts: u32) -> fmt::Result {
    let outcome = &run.outcome;
    let state =
        |state: HostState| 100.0 * outcome.state_s[state as usize] / outcome.seconds.max(1.0);
    let states = if run.manager == ManagerKind::Ours {
        HostState::VARIANTS
            .iter()
            .map(|&s| format!("{:.0}", state(s)))
            .collect::<Vec<_>>()
            .join("/")
    } else {
        "–".to_owned()
    };
    writeln!(
        f,
        "| {} | {} | {:.3} % | {:.3} % | {} | {:.1} | {:.1} | {:.0} % | {:.0} % | {} |",
        run.manager.name(),
        guests,
        100.0 * outcome.stalled(),
        100.0 * outcome.starved_s / outcome.guest_s.max(1.0),
        outcome.killed,
        outcome.requests as f64 * 3600.0 / outcome.guest_s.max(1.0),
        outcome.reversals_per_hour(hosts),
        100.0 * outcome.ballooned_peak,
        100.0 * outcome.used(),
        states,
    )
}

const HEAD: &str = "| manager | guests per host | guest time stalled | by the host | killed | requests per guest and hour | worst reversals per hour | ballooned, peak | host used, mean | green/yellow/orange/red % |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n";

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "## {} (seed {})\n", self.name, self.seed)?;
        if !self.about.is_empty() {
            writeln!(f, "{}\n", self.about)?;
        }
        f.write_str(HEAD)?;
        for run in &self.runs {
            row(f, run, run.guests, self.hosts)?;
        }
        if !self.capacities.is_empty() {
            writeln!(
                f,
                "\nMost guests on a host within the limit of stalls, none killed:\n"
            )?;
            f.write_str(HEAD)?;
            for capacity in &self.capacities {
                row(f, &capacity.run, capacity.guests, self.hosts)?;
            }
        }
        if let Some(gain) = self.gain() {
            writeln!(
                f,
                "\nMore guests than the best other manager: {:+.0} %",
                100.0 * gain
            )?;
        }
        if let Some(fleet) = &self.fleet {
            writeln!(
                f,
                "\n{} hosts with {} VMs; {} hosts died, {} VMs wanted a place, {} found one (the longest wait {} s), \
                 {} wait; agents refused {} times what had been published as fitting, {} times no host was a candidate.",
                fleet.hosts,
                fleet.vms,
                fleet.died,
                fleet.wanted,
                fleet.placed,
                fleet.waited_s_max,
                fleet.waiting,
                fleet.refused_by_agent,
                fleet.no_candidate,
            )?;
        }
        for fault in &self.faults {
            writeln!(f, "\nDOES NOT HOLD: {fault}")?;
        }
        Ok(())
    }
}

const WIDTH: f64 = 900.0;
const LEFT: f64 = 60.0;
const TOP: f64 = 70.0;
/// Height of a panel, and distance between panels.
const PANEL: f64 = 160.0;
const STEP: f64 = 210.0;
const COLOURS: [&str; 5] = ["#0b7285", "#c92a2a", "#e67700", "#5f3dc4", "#495057"];

type Figure = fn(&Point) -> f64;

const PANELS: [(&str, Figure); 3] = [
    ("resident, GiB", |point| point.resident_gib),
    ("in balloons, GiB", |point| point.ballooned_gib),
    ("stalled guests, %", |point| 100.0 * point.stalled),
];

/// A plot of the runs' first hosts: occupied memory, balloons, and stalled guests, one line per manager.
pub fn svg(title: &str, runs: &[Run]) -> String {
    let (width, height) = (LEFT + WIDTH + 20.0, TOP + STEP * PANELS.len() as f64);
    let mut sheet = Sheet::new(title, LEFT, width, height);
    let points = || runs.iter().flat_map(|run| &run.outcome.points);
    let last = points().map(|point| point.at_s).max().unwrap_or(1).max(1);
    for (number, (name, figure)) in PANELS.into_iter().enumerate() {
        let frame = Frame {
            left: LEFT,
            top: TOP + STEP * number as f64,
            width: WIDTH,
            height: PANEL,
            x_max: last as f64 / 60.0,
            y_max: points().map(figure).fold(1e-9, f64::max),
        };
        sheet.label(LEFT, frame.top - 6.0, name);
        let minutes = |minutes: f64| format!("{minutes:.0} min");
        sheet.axes(&frame, minutes, |value| format!("{value:.1}"));
        for (run, colour) in runs.iter().zip(COLOURS.iter().cycle()) {
            let points = run.outcome.points.iter();
            let line: Vec<_> = points.map(|p| (p.at_s as f64 / 60.0, figure(p))).collect();
            sheet.curve(&frame, &line, colour, 1.2);
        }
    }
    for (number, (run, colour)) in runs.iter().zip(COLOURS.iter().cycle()).enumerate() {
        sheet.legend(
            LEFT + number as f64 * 150.0,
            46.0,
            colour,
            run.manager.name(),
        );
    }
    sheet.svg()
}
