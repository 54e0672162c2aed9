//! Unsolicited events of the balloon: its target ([`target`]) and free page reporting ([`reporting`]). The only side
//! effect is reading the machine.

mod reporting;
mod target;

use api::{ReclaimStats, VmState};

use self::reporting::{ReportingFigures, ReportingWatch};
use self::target::{BalloonFigures, BalloonWatch};
use crate::events::EventKind;
use crate::reporting_policy::GuestPolicy;
use crate::view::MachineView;

/// The events that have been reported.
#[derive(Debug, Default)]
pub(crate) struct BalloonEvents {
    target: Option<BalloonWatch>,
    reporting: ReportingWatch,
}

impl BalloonEvents {
    /// The events since the last evaluation.
    pub(crate) fn step(
        &mut self,
        now_ms: u64,
        machine: &MachineView,
        stats: &ReclaimStats,
    ) -> Vec<EventKind> {
        let figures = balloon_figures(machine, stats);
        let target = self
            .target
            .get_or_insert_with(|| BalloonWatch::new(now_ms, figures));
        let mut events = target.step(now_ms, figures);
        events.extend(self.reporting.step(reporting_figures(machine, stats)));
        events
    }
}

fn balloon_figures(machine: &MachineView, stats: &ReclaimStats) -> BalloonFigures {
    BalloonFigures {
        machine: machine.generation,
        running: machine.state == VmState::Running,
        target_bytes: stats.balloon_target_bytes,
        actual_bytes: stats.ballooned_bytes,
        failed_bytes: [&stats.report, &stats.inflate, &stats.hint]
            .into_iter()
            .fold(0, |sum, path| sum.saturating_add(path.failed_bytes)),
    }
}

fn reporting_figures(machine: &MachineView, stats: &ReclaimStats) -> ReportingFigures {
    let wish = stats.reporting.report_now;
    ReportingFigures {
        machine: machine.generation,
        paused_by: stats.reporting.paused_by.clone(),
        // Only for the latest request: a guest may write the id of an older one any number of times.
        report_now_done: if wish.done_id == wish.id { wish.id } else { 0 },
        acknowledged: match machine.observer.reporting_policy() {
            GuestPolicy::Balloon(status) => status.acknowledged,
            GuestPolicy::NoMachine | GuestPolicy::NoBalloon => 0,
        },
    }
}
