//! How often a failed task is tried again, and how long it waits before: pure arithmetic.
//!
//! What counts as a failure is the worker's decision; where the wait happens is the broker's
//! (delay queues). Crashes of a worker are not failures and never draw on this budget.

use std::time::Duration;

/// The retry policy of a task: a budget of attempts and an exponential back-off with jitter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RetryPolicy {
    /// Attempts in all, the first included; 1 means "never retry". At least 1.
    pub max_attempts: u32,
    /// The wait before the second attempt, before jitter.
    pub base: Duration,
    /// What each further wait is multiplied by. At least 1.
    pub factor: f64,
    /// No wait is longer than this.
    pub max: Duration,
}

impl RetryPolicy {
    /// Never retry.
    pub const NONE: Self = Self { max_attempts: 1, ..Self::DEFAULT };

    /// What a task gets that says nothing: 4 attempts, about 1, 2 and 4 seconds apart.
    pub const DEFAULT: Self = Self {
        max_attempts: 4,
        base: Duration::from_secs(1),
        factor: 2.0,
        max: Duration::from_mins(10),
    };

    /// The default policy with `retries` further attempts after the first.
    pub fn retries(retries: u32) -> Self {
        Self { max_attempts: retries.saturating_add(1), ..Self::DEFAULT }
    }

    /// Whether another attempt may follow attempt number `attempt` (the first is 1).
    pub fn allows_another(&self, attempt: u32) -> bool {
        attempt < self.max_attempts
    }

    /// The wait after failed attempt number `attempt`.
    ///
    /// `jitter` in `0.0..=1.0` spreads it over the upper half of the interval, so that tasks which
    /// failed together do not come back together, and yet none comes back at once.
    pub fn delay_after(&self, attempt: u32, jitter: f64) -> Duration {
        // Zero times infinity is no number.
        if self.base.is_zero() {
            return Duration::ZERO;
        }
        let exponent = i32::try_from(attempt.saturating_sub(1)).unwrap_or(i32::MAX);
        let full = self.base.as_secs_f64() * self.factor.max(1.0).powi(exponent);
        // `powi` may reach infinity; `min` brings it back before it becomes a Duration.
        let capped = full.min(self.max.as_secs_f64());
        let wait = capped * (0.5 + 0.5 * jitter.clamp(0.0, 1.0));
        // The largest Duration is no f64: rounded up it is too large for one.
        Duration::try_from_secs_f64(wait).unwrap_or(self.max)
    }
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self::DEFAULT
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn waits_double_up_to_the_cap() {
        let policy = RetryPolicy { max: Duration::from_secs(5), ..RetryPolicy::DEFAULT };
        let waits: Vec<u64> = (1..=5).map(|n| policy.delay_after(n, 1.0).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 5, 5]);
    }

    #[test]
    fn the_budget_counts_the_first_attempt() {
        let policy = RetryPolicy::retries(2);
        assert!(policy.allows_another(1) && policy.allows_another(2));
        assert!(!policy.allows_another(3));
        assert!(!RetryPolicy::NONE.allows_another(1));
        assert_eq!(RetryPolicy::retries(u32::MAX).max_attempts, u32::MAX);
    }

    #[test]
    fn absurd_policies_still_wait_for_a_time() {
        for factor in [f64::NAN, f64::INFINITY, -1.0, f64::MAX] {
            let (base, max) = (Duration::MAX, Duration::MAX);
            let policy = RetryPolicy { max_attempts: u32::MAX, base, factor, max };
            assert!(policy.delay_after(u32::MAX, 1.0) > Duration::from_hours(1), "{factor}");
            assert!(policy.delay_after(0, f64::NAN) > Duration::from_hours(1), "{factor}");
        }
    }

    proptest! {
        #[test]
        fn a_wait_stays_between_half_and_all_of_its_step(
            attempt in any::<u32>(), jitter in any::<f64>(), factor in 0.0..1e9_f64,
            base in 0..u64::from(u32::MAX), max in 0..u64::from(u32::MAX),
        ) {
            let (base, max) = (Duration::from_millis(base), Duration::from_millis(max));
            let policy = RetryPolicy { max_attempts: 9, base, factor, max };
            let wait = policy.delay_after(attempt, jitter);
            let jitter_is_number = !jitter.is_nan();
            prop_assume!(jitter_is_number);
            prop_assert!(wait <= max + Duration::from_micros(1));
            prop_assert!(wait + Duration::from_micros(1) >= base.min(max) / 2);
        }
    }
}
