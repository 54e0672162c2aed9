//! Limits changes of the published capacity: decreases at once, increases slowly, zero when the agent is silent.
//!
//! A scheduler that is told of every wave places a burst of VMs onto its crest. What falls is told at once; what rises by a
//! tenth a minute. Without change it is told once a minute, which also repairs what somebody else overwrote.

use std::time::{Duration, Instant};

use crate::offer::Offer;

/// Told at least this often.
const REPEAT: Duration = Duration::from_secs(60);
/// A rise of this part of the capacity is told before [`REPEAT`] is over, per cent.
const RISE_PERCENT: u64 = 10;
/// A fall of this part is told at once, per cent.
const FALL_PERCENT: u64 = 2;
/// Growth of the capacity, per cent a minute.
const GROWTH_PERCENT_PER_MINUTE: u64 = 10;
/// An agent that was silent for so long admits nobody.
const SILENT: Duration = Duration::from_secs(60);
/// What is said of an agent that was silent for so long is taken back.
const LOST: Duration = Duration::from_secs(15 * 60);

/// What was told last, and when.
#[derive(Debug)]
pub(crate) struct Pace {
    told: Option<(Offer, Instant)>,
    heard: Option<(Offer, Instant)>,
    begin: Instant,
}

impl Pace {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            told: None,
            heard: None,
            begin: now,
        }
    }

    /// What is to be told now, if anything. `heard` is what the agent says, `None` when it does not answer.
    pub(crate) fn next(&mut self, heard: Option<Offer>, now: Instant) -> Option<Offer> {
        if let Some(offer) = heard {
            self.heard = Some((offer, now));
        }
        let offer = self.current(now)?;
        let Some((told, at)) = &self.told else {
            return Some(offer);
        };
        let elapsed = now.saturating_duration_since(*at);
        let offer = slowed(offer, told, elapsed);
        let (before, after) = (told.capacity_mib(), offer.capacity_mib());
        let worth_telling = elapsed >= REPEAT
            || offer.state != told.state
            || before.saturating_sub(after) * 100 > before * FALL_PERCENT
            || after.saturating_sub(before) * 100 >= before.max(1) * RISE_PERCENT;
        worth_telling.then_some(offer)
    }

    /// It was told.
    pub(crate) fn told(&mut self, offer: Offer, now: Instant) {
        self.told = Some((offer, now));
    }

    fn current(&self, now: Instant) -> Option<Offer> {
        let since = self.heard.as_ref().map_or(self.begin, |(_, at)| *at);
        let silent = now.saturating_duration_since(since);
        match &self.heard {
            _ if silent >= LOST => Some(Offer::default()),
            Some((offer, _)) if silent >= SILENT => Some(offer.held()),
            Some((offer, _)) => Some(offer.clone()),
            // Not heard of yet: what an adapter before this one told stays until the agent was given time.
            None => None,
        }
    }
}

/// The offer as far as it may have grown since another one was told.
fn slowed(mut offer: Offer, told: &Offer, elapsed: Duration) -> Offer {
    let before = told.capacity_mib();
    if before == 0 {
        // Back from nothing: there is no wave to ride.
        return offer;
    }
    let seconds = elapsed.as_secs().min(3600);
    let most = before + before * GROWTH_PERCENT_PER_MINUTE * seconds / (60 * 100);
    // VMs that are here are here.
    offer.free_mib = offer.free_mib.min(most.saturating_sub(offer.in_use_mib));
    offer
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::offer::State;

    fn offer(in_use_mib: u64, free_mib: u64) -> Offer {
        Offer {
            state: State::Green,
            in_use_mib,
            free_mib,
            ..Offer::default()
        }
    }

    fn after(begin: Instant, seconds: u64) -> Instant {
        begin + Duration::from_secs(seconds)
    }

    fn told(begin: Instant) -> Pace {
        let mut pace = Pace::new(begin);
        let first = pace.next(Some(offer(1000, 1000)), begin).unwrap();
        assert_eq!(first, offer(1000, 1000));
        pace.told(first, begin);
        pace
    }

    #[test]
    fn fall_is_told_at_once_and_a_small_one_with_the_next_round() {
        let begin = Instant::now();
        let mut pace = told(begin);
        assert_eq!(pace.next(Some(offer(1000, 990)), after(begin, 1)), None);
        let fallen = offer(1000, 100);
        assert_eq!(
            pace.next(Some(fallen.clone()), after(begin, 2)),
            Some(fallen)
        );
    }

    #[test]
    fn rise_is_told_by_a_tenth_a_minute() {
        let begin = Instant::now();
        let mut pace = told(begin);
        assert_eq!(pace.next(Some(offer(1000, 9000)), after(begin, 10)), None);
        let risen = pace
            .next(Some(offer(1000, 9000)), after(begin, 60))
            .unwrap();
        assert_eq!(risen.capacity_mib(), 2200);
        // A VM that came is in it whatever the pace.
        let come = pace
            .next(Some(offer(5000, 1000)), after(begin, 60))
            .unwrap();
        assert_eq!((come.in_use_mib, come.free_mib), (5000, 0));
    }

    #[test]
    fn nothing_new_is_told_once_a_minute_and_another_state_at_once() {
        let begin = Instant::now();
        let mut pace = told(begin);
        assert_eq!(pace.next(Some(offer(1000, 1000)), after(begin, 59)), None);
        assert!(
            pace.next(Some(offer(1000, 1000)), after(begin, 60))
                .is_some()
        );
        let mut yellow = offer(1000, 1000);
        yellow.state = State::Yellow;
        assert_eq!(
            pace.next(Some(yellow.clone()), after(begin, 1)),
            Some(yellow)
        );
    }

    #[test]
    fn silent_agent_offers_nothing_new_and_a_lost_one_nothing() {
        let begin = Instant::now();
        let mut pace = told(begin);
        assert_eq!(pace.next(None, after(begin, 30)), None);
        let held = pace.next(None, after(begin, 61)).unwrap();
        assert_eq!(
            (held.state, held.in_use_mib, held.free_mib),
            (State::Unknown, 1000, 0)
        );
        pace.told(held, after(begin, 61));
        let lost = pace.next(None, after(begin, 901)).unwrap();
        assert_eq!(lost.capacity_mib(), 0);
        pace.told(lost, after(begin, 901));
        // It comes back as what it is.
        let back = pace
            .next(Some(offer(1000, 1000)), after(begin, 902))
            .unwrap();
        assert_eq!(back.capacity_mib(), 2000);
    }

    #[test]
    fn agent_that_was_never_heard_is_given_time() {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        assert_eq!(pace.next(None, after(begin, 899)), None);
        assert_eq!(
            pace.next(None, after(begin, 900)).unwrap().capacity_mib(),
            0
        );
    }
}
