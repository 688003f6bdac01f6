//! The longest time in which nothing ended although something could have. Pure.

use std::time::Duration;

/// From the moments at which tasks became due (confirmed, their delay over) and those at which they
/// ended, each counted from the beginning of the run.
pub(super) fn worst(mut due: Vec<Duration>, mut ended: Vec<Duration>) -> Duration {
    due.sort_unstable();
    ended.sort_unstable();
    let (mut worst, mut last) = (Duration::ZERO, Duration::ZERO);
    for (before, at) in ended.into_iter().enumerate() {
        // `before` tasks had ended until now. A confirm may be noted after the end of its task, so a
        // task counts as pending from the last end, or from the moment at which it became due.
        if let Some(pending) = due.get(before) {
            worst = worst.max(at.saturating_sub(last.max(*pending)));
        }
        last = at;
    }
    worst
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worst_of(due: &[u64], ended: &[u64]) -> u64 {
        let moments = |list: &[u64]| list.iter().copied().map(Duration::from_secs).collect();
        worst(moments(due), moments(ended)).as_secs()
    }

    #[test]
    fn waiting_for_work_is_no_stall_and_waiting_with_work_is() {
        assert_eq!(worst_of(&[0, 0, 0], &[1, 2, 9]), 7);
        assert_eq!(worst_of(&[0, 1, 8], &[1, 2, 9]), 1, "nothing was due between 2 and 8");
        assert_eq!(worst_of(&[5], &[4]), 0, "the confirm was noted late");
        assert_eq!(worst_of(&[], &[]), 0);
    }
}
