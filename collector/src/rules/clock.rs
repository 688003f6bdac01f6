//! Decides whether the wall clock may be used to delete or end something. Pure: the times are parameters.
//!
//! A clock that jumps a month ahead would make everything in the store a month older at once. So its gain
//! over the monotonic clock is watched, and the gap since the last commit of an earlier process.

use std::time::{Duration, Instant};

use garenne_common::Timestamp;

/// Gain of the wall clock over the monotonic clock that does not count as a jump.
const TOLERANCE: Duration = Duration::from_mins(5);
/// How long the wall clock is not used after a jump: time for an operator to correct it.
const HOLD: Duration = Duration::from_hours(24);
/// If the last commit is older when a store is opened, the clock may be wrong.
const LONGEST_GAP: Duration = Duration::from_hours(24);

/// The wall clock and the monotonic clock at the same time.
#[derive(Debug)]
pub(crate) struct Clock {
    wall: Timestamp,
    monotonic: Instant,
    held_until: Option<Instant>,
}

impl Clock {
    pub(crate) fn new(wall: Timestamp, monotonic: Instant) -> Self {
        Self { wall, monotonic, held_until: None }
    }

    /// The gain of the wall clock since the last jump, if it is a jump.
    pub(crate) fn jumped(&mut self, wall: Timestamp, monotonic: Instant) -> Option<Duration> {
        let elapsed = monotonic.duration_since(self.monotonic);
        let gained = since(self.wall, wall).saturating_sub(elapsed);
        if gained <= TOLERANCE {
            return None;
        }
        *self = Self { wall, monotonic, held_until: Some(monotonic + HOLD) };
        Some(gained)
    }

    /// The time since the last commit of the store, if that is too long to trust the clock.
    pub(crate) fn opened(&mut self, last_commit: Option<Timestamp>) -> Option<Duration> {
        let gap = since(last_commit?, self.wall);
        if gap <= LONGEST_GAP {
            return None;
        }
        self.held_until = Some(self.monotonic + HOLD);
        Some(gap)
    }

    /// Whether the wall clock must not be used yet.
    pub(crate) fn is_held(&self, monotonic: Instant) -> bool {
        self.held_until.is_some_and(|until| monotonic < until)
    }
}

fn since(earlier: Timestamp, later: Timestamp) -> Duration {
    Duration::from_millis(later.as_millis().saturating_sub(earlier.as_millis()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_hours(24);

    fn at(offset: Duration) -> Timestamp {
        Timestamp::from_millis(1_000_000_000_000).plus(offset)
    }

    #[test]
    fn a_jump_ahead_holds_for_a_day_and_is_reported_once() {
        let start = Instant::now();
        let mut clock = Clock::new(at(Duration::ZERO), start);
        let minute = Duration::from_mins(1);
        assert_eq!(clock.jumped(at(minute), start + minute), None);
        assert!(!clock.is_held(start + minute));
        let jumped = clock.jumped(at(30 * DAY + 2 * minute), start + 2 * minute);
        assert_eq!(jumped, Some(30 * DAY));
        assert_eq!(clock.jumped(at(30 * DAY + 3 * minute), start + 3 * minute), None);
        assert!(clock.is_held(start + minute + DAY));
        assert!(!clock.is_held(start + 2 * minute + DAY));
    }

    #[test]
    fn small_jumps_add_up_and_a_step_back_is_not_a_jump() {
        let start = Instant::now();
        let mut clock = Clock::new(at(Duration::ZERO), start);
        let minute = Duration::from_mins(1);
        let jumps = (1..=3).map(|n| clock.jumped(at(n * 3 * minute), start + n * minute));
        assert_eq!(jumps.collect::<Vec<_>>(), [None, None, Some(6 * minute)]);
        let mut clock = Clock::new(at(DAY), start);
        assert_eq!(clock.jumped(at(Duration::ZERO), start + minute), None);
        assert_eq!(clock.jumped(at(DAY + minute), start + minute), None, "it was corrected");
    }

    #[test]
    fn a_store_without_a_commit_for_a_day_holds_and_an_empty_one_does_not() {
        let start = Instant::now();
        let mut clock = Clock::new(at(3 * DAY), start);
        assert_eq!(clock.opened(None), None);
        assert_eq!(clock.opened(Some(at(2 * DAY))), None);
        assert!(!clock.is_held(start));
        assert_eq!(clock.opened(Some(at(DAY))), Some(2 * DAY));
        assert!(clock.is_held(start) && !clock.is_held(start + DAY));
    }
}
