//! Limits changes of the published capacity: decreases immediately, increases slowly, zero when the agent is silent.
//!
//! If every fluctuation were published, a scheduler would place a burst of VMs at each temporary maximum. A decrease is
//! therefore published immediately, an increase by at most a tenth per minute. An unchanged capacity is published once
//! per minute, which also repairs values that another client overwrote.

use std::time::{Duration, Instant};

use crate::offer::Offer;

/// Maximum time between two publications.
const REPEAT: Duration = Duration::from_secs(60);
/// Minimum increase that is published before [`REPEAT`] has passed, per cent of the capacity.
const RISE_PERCENT: u64 = 10;
/// Minimum decrease that is published immediately, per cent of the capacity.
const FALL_PERCENT: u64 = 2;
/// Maximum growth of the capacity, per cent per minute.
const GROWTH_PERCENT_PER_MINUTE: u64 = 10;
/// After this long without a response from the agent, no free memory is offered.
const SILENT: Duration = Duration::from_secs(60);
/// After this long without a response from the agent, the capacity is withdrawn.
const LOST: Duration = Duration::from_secs(15 * 60);

/// The latest published offer, and when it was published.
#[derive(Debug)]
pub(crate) struct Pace {
    published: Option<(Offer, Instant)>,
    heard: Option<(Offer, Instant)>,
    begin: Instant,
}

impl Pace {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            published: None,
            heard: None,
            begin: now,
        }
    }

    /// The offer to publish now, if any. `heard` is the agent's latest offer, `None` if the agent does not respond.
    pub(crate) fn next(&mut self, heard: Option<Offer>, now: Instant) -> Option<Offer> {
        if let Some(offer) = heard {
            self.heard = Some((offer, now));
        }
        let offer = self.current(now)?;
        let Some((published, at)) = &self.published else {
            return Some(offer);
        };
        let elapsed = now.saturating_duration_since(*at);
        let offer = slowed(offer, published, elapsed);
        let (before, after) = (published.capacity_mib(), offer.capacity_mib());
        let worth_publishing = elapsed >= REPEAT
            || offer.state != published.state
            || before.saturating_sub(after) * 100 > before * FALL_PERCENT
            || after.saturating_sub(before) * 100 >= before.max(1) * RISE_PERCENT;
        worth_publishing.then_some(offer)
    }

    /// Records that `offer` was published.
    pub(crate) fn note_published(&mut self, offer: Offer, now: Instant) {
        self.published = Some((offer, now));
    }

    fn current(&self, now: Instant) -> Option<Offer> {
        let since = self.heard.as_ref().map_or(self.begin, |(_, at)| *at);
        let silent = now.saturating_duration_since(since);
        match &self.heard {
            _ if silent >= LOST => Some(Offer::default()),
            Some((offer, _)) if silent >= SILENT => Some(offer.held()),
            Some((offer, _)) => Some(offer.clone()),
            // No response since the start: the values that a previous adapter published stay until the agent had time
            // to respond.
            None => None,
        }
    }
}

/// Limits the offer to the allowed growth since `published` was published.
fn slowed(mut offer: Offer, published: &Offer, elapsed: Duration) -> Offer {
    let before = published.capacity_mib();
    if before == 0 {
        // The previous capacity was 0, so there is no fluctuation to smooth.
        return offer;
    }
    let seconds = elapsed.as_secs().min(3600);
    let most = before + before * GROWTH_PERCENT_PER_MINUTE * seconds / (60 * 100);
    // VMs that are present always count.
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

    fn published(begin: Instant) -> Pace {
        let mut pace = Pace::new(begin);
        let first = pace.next(Some(offer(1000, 1000)), begin).unwrap();
        assert_eq!(first, offer(1000, 1000));
        pace.note_published(first, begin);
        pace
    }

    #[test]
    fn fall_is_published_at_once_and_a_small_one_with_the_next_round() {
        let begin = Instant::now();
        let mut pace = published(begin);
        assert_eq!(pace.next(Some(offer(1000, 990)), after(begin, 1)), None);
        let fallen = offer(1000, 100);
        assert_eq!(
            pace.next(Some(fallen.clone()), after(begin, 2)),
            Some(fallen)
        );
    }

    #[test]
    fn rise_is_published_by_a_tenth_a_minute() {
        let begin = Instant::now();
        let mut pace = published(begin);
        assert_eq!(pace.next(Some(offer(1000, 9000)), after(begin, 10)), None);
        let risen = pace
            .next(Some(offer(1000, 9000)), after(begin, 60))
            .unwrap();
        assert_eq!(risen.capacity_mib(), 2200);
        // A new VM counts immediately, regardless of the limit.
        let come = pace
            .next(Some(offer(5000, 1000)), after(begin, 60))
            .unwrap();
        assert_eq!((come.in_use_mib, come.free_mib), (5000, 0));
    }

    #[test]
    fn nothing_new_is_published_once_a_minute_and_another_state_at_once() {
        let begin = Instant::now();
        let mut pace = published(begin);
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
        let mut pace = published(begin);
        assert_eq!(pace.next(None, after(begin, 30)), None);
        let held = pace.next(None, after(begin, 61)).unwrap();
        assert_eq!(
            (held.state, held.in_use_mib, held.free_mib),
            (State::Unknown, 1000, 0)
        );
        pace.note_published(held, after(begin, 61));
        let lost = pace.next(None, after(begin, 901)).unwrap();
        assert_eq!(lost.capacity_mib(), 0);
        pace.note_published(lost, after(begin, 901));
        // After a withdrawal, the full capacity is published immediately.
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
