//! Events of free page reporting: paused, resumed, policy acknowledged, everything reported.
//!
//! Each operator action causes at most one event, so a guest cannot cause more events than there were actions.

use crate::events::EventKind;

/// Reporting at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ReportingFigures {
    /// The generation of the machine. The guest's status is reset with each new machine.
    pub(super) machine: u64,
    /// The holder of the pause, if reporting is paused.
    pub(super) paused_by: Option<String>,
    /// The id of the latest request to report everything, once it is complete.
    pub(super) report_now_done: u32,
    /// The generation of the policy the guest has acknowledged.
    pub(super) acknowledged: u32,
}

/// The events that have been reported.
#[derive(Debug, Default)]
pub(super) struct ReportingWatch {
    machine: u64,
    paused: bool,
    report_now_done: u32,
    acknowledged: u32,
}

impl ReportingWatch {
    /// Evaluates the current figures.
    pub(super) fn step(&mut self, figures: ReportingFigures) -> Vec<EventKind> {
        if figures.machine != self.machine {
            // A pause continues across a reboot.
            *self = Self {
                machine: figures.machine,
                paused: self.paused,
                ..Self::default()
            };
        }
        let mut events = Vec::new();
        let was_paused = std::mem::replace(&mut self.paused, figures.paused_by.is_some());
        match figures.paused_by {
            Some(by) if !was_paused => events.push(EventKind::ReportingPaused { by }),
            None if was_paused => events.push(EventKind::ReportingResumed),
            _ => {}
        }
        if figures.acknowledged > self.acknowledged {
            self.acknowledged = figures.acknowledged;
            let generation = figures.acknowledged;
            events.push(EventKind::PolicyAcknowledged { generation });
        }
        if figures.report_now_done > self.report_now_done {
            self.report_now_done = figures.report_now_done;
            let report_now_id = figures.report_now_done;
            events.push(EventKind::ReportNowDone { report_now_id });
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(machine: u64, paused_by: Option<&str>) -> ReportingFigures {
        ReportingFigures {
            machine,
            paused_by: paused_by.map(str::to_owned),
            ..ReportingFigures::default()
        }
    }

    fn names(events: &[EventKind]) -> Vec<&'static str> {
        events.iter().map(EventKind::name).collect()
    }

    #[test]
    fn pause_is_told_once_however_it_changes_hands_and_over_reboots() {
        let mut watch = ReportingWatch::default();
        assert_eq!(watch.step(figures(1, None)), []);
        let by = "guest".to_owned();
        let paused = EventKind::ReportingPaused { by };
        assert_eq!(watch.step(figures(1, Some("guest"))), [paused]);
        assert_eq!(watch.step(figures(1, Some("device"))), []);
        assert_eq!(watch.step(figures(2, Some("device"))), []);
        assert_eq!(names(&watch.step(figures(2, None))), ["reporting-resumed"]);
        assert_eq!(watch.step(figures(2, None)), []);
    }

    #[test]
    fn words_of_the_guest_are_told_once_until_they_grow() {
        let mut watch = ReportingWatch::default();
        let words = |machine, word| ReportingFigures {
            report_now_done: word,
            acknowledged: word,
            ..figures(machine, None)
        };
        let both = ["reporting-policy-acknowledged", "report-now-done"];
        assert_eq!(names(&watch.step(words(1, 2))), both);
        for again in [2, 1, 0, 2] {
            assert_eq!(watch.step(words(1, again)), []);
        }
        assert_eq!(names(&watch.step(words(1, 3))), both);
        assert_eq!(names(&watch.step(words(2, 1))), both);
    }
}
