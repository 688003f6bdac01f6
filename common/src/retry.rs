//! The retry policy: how often a failed task is tried again, and after which delays.
//!
//! Pure arithmetic. The worker decides what counts as a failure, and the broker's delay queues hold
//! the task. Crashes of a worker are not failures and do not count against this policy.

use std::time::Duration;

/// The retry policy of a task: a number of attempts, and exponential back-off with jitter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RetryPolicy {
    /// Number of attempts, including the first; at least 1, which means no retry.
    pub max_attempts: u32,
    /// Delay before the second attempt, without jitter.
    pub base: Duration,
    /// Factor by which each further delay is multiplied. Less than 1 counts as 1.
    pub factor: f64,
    /// Longest delay.
    pub max: Duration,
}

impl RetryPolicy {
    /// A single attempt without retries.
    pub const NONE: Self = Self { max_attempts: 1, ..Self::DEFAULT };

    /// The default policy: 4 attempts, about 1, 2 and 4 seconds apart.
    pub const DEFAULT: Self = Self {
        max_attempts: 4,
        base: Duration::from_secs(1),
        factor: 2.0,
        max: Duration::from_mins(10),
    };

    /// The default policy with `retries` attempts after the first.
    pub fn retries(retries: u32) -> Self {
        Self { max_attempts: retries.saturating_add(1), ..Self::DEFAULT }
    }

    /// Whether another attempt may follow attempt number `attempt`; the first is 1.
    pub fn allows_another(&self, attempt: u32) -> bool {
        attempt < self.max_attempts
    }

    /// The delay after the failed attempt number `attempt`.
    ///
    /// `jitter` in `0.0..=1.0` spreads the delay over the upper half of the interval, so that tasks
    /// that failed at the same time are not retried at the same time, and none is retried at once.
    pub fn delay_after(&self, attempt: u32, jitter: f64) -> Duration {
        // Zero times infinity is NaN.
        if self.base.is_zero() {
            return Duration::ZERO;
        }
        let exponent = i32::try_from(attempt.saturating_sub(1)).unwrap_or(i32::MAX);
        let full = self.base.as_secs_f64() * self.factor.max(1.0).powi(exponent);
        // `powi` may reach infinity; `min` limits it before the conversion to a Duration.
        let capped = full.min(self.max.as_secs_f64());
        let wait = capped * (0.5 + 0.5 * jitter.clamp(0.0, 1.0));
        // The largest Duration has no exact f64; rounded up, it does not fit a Duration.
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
    fn the_number_of_attempts_includes_the_first() {
        let policy = RetryPolicy::retries(2);
        assert!(policy.allows_another(1) && policy.allows_another(2));
        assert!(!policy.allows_another(3));
        assert!(!RetryPolicy::NONE.allows_another(1));
        assert_eq!(RetryPolicy::retries(u32::MAX).max_attempts, u32::MAX);
    }

    #[test]
    fn extreme_policies_still_delay() {
        for factor in [f64::NAN, f64::INFINITY, -1.0, f64::MAX] {
            let (base, max) = (Duration::MAX, Duration::MAX);
            let policy = RetryPolicy { max_attempts: u32::MAX, base, factor, max };
            assert!(policy.delay_after(u32::MAX, 1.0) > Duration::from_hours(1), "{factor}");
            assert!(policy.delay_after(0, f64::NAN) > Duration::from_hours(1), "{factor}");
        }
    }

    proptest! {
        #[test]
        fn a_delay_is_between_half_and_all_of_its_interval(
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
