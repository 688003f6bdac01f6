//! Limits of a worker on what a task may ask for, so that one message cannot keep it busy for ever. Pure.

use std::time::Duration;

use garenne_common::DeadReason;
use garenne_common::config::WorkerConfig;

use super::outcome::Disposition;

/// Number of attempts that follow the task's retry policy alone: quick retries are the usual remedy for
/// transient failures.
const QUICK_ATTEMPTS: u32 = 10;

/// Limits of retries that apply to all tasks of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryLimits {
    /// The highest attempt number.
    pub max_attempts: u32,
    /// The minimum delay after the tenth attempt and later ones.
    pub min_retry_delay: Duration,
    /// How long after the start of its first attempt a task may be retried.
    pub max_task_age: Duration,
}

impl RetryLimits {
    /// The limits in the configuration.
    pub fn of(config: &WorkerConfig) -> Self {
        let WorkerConfig { max_attempts, min_retry_delay, max_task_age, .. } = *config;
        Self { max_attempts, min_retry_delay, max_task_age }
    }

    /// Applies the limits to the disposition of attempt number `attempt`. `age` returns the time since
    /// the first attempt started; it is called for retries only.
    pub fn apply(
        &self,
        disposition: Disposition,
        attempt: u32,
        age: impl FnOnce() -> Duration,
    ) -> Disposition {
        match disposition {
            Disposition::Retry { after, error } => self.limit_retry(after, error, attempt, age()),
            // Crashes have a budget in the worker already; the others end the task or return it unchanged.
            Disposition::Complete(_)
            | Disposition::Again { .. }
            | Disposition::DeadLetter { .. }
            | Disposition::Requeue
            | Disposition::Cancel { .. } => disposition,
        }
    }

    fn limit_retry(
        &self,
        after: Duration,
        error: String,
        attempt: u32,
        age: Duration,
    ) -> Disposition {
        let (max_attempts, max_task_age) = (self.max_attempts, self.max_task_age);
        let floor = if attempt < QUICK_ATTEMPTS { Duration::ZERO } else { self.min_retry_delay };
        let after = after.max(floor);
        let limit = if attempt >= max_attempts {
            format!("worker.max_attempts is {max_attempts}")
        } else if age.saturating_add(after) > max_task_age {
            format!(
                "worker.max_task_age is {max_task_age:?}, and its first attempt began {age:?} ago"
            )
        } else {
            return Disposition::Retry { after, error };
        };
        let error = format!("not retried after attempt {attempt}, since {limit}: {error}");
        Disposition::DeadLetter { reason: DeadReason::RetriesExhausted, error }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: RetryLimits = RetryLimits {
        max_attempts: 20,
        min_retry_delay: Duration::from_secs(2),
        max_task_age: Duration::from_mins(1),
    };

    fn retry(after: Duration, attempt: u32, age: Duration) -> Disposition {
        let error = "no".to_owned();
        LIMITS.apply(Disposition::Retry { after, error }, attempt, || age)
    }

    #[test]
    fn early_retries_are_unchanged_and_later_ones_slow_down() {
        for (attempt, asked, got) in [(1, 0, 0), (9, 1, 1), (10, 0, 2), (19, 1, 2), (19, 3, 3)] {
            let after = Duration::from_secs(got);
            let expected = Disposition::Retry { after, error: "no".to_owned() };
            assert_eq!(retry(Duration::from_secs(asked), attempt, Duration::ZERO), expected);
        }
    }

    #[test]
    fn a_dead_letter_names_the_limit() {
        let (zero, old) = (Duration::ZERO, Duration::from_secs(59));
        for (disposition, limit) in [
            (retry(zero, 20, zero), "worker.max_attempts is 20"),
            (retry(zero, u32::MAX, Duration::MAX), "worker.max_attempts is 20"),
            (retry(Duration::from_secs(2), 1, old), "worker.max_task_age is 60s"),
            (retry(Duration::MAX, 1, zero), "worker.max_task_age is 60s"),
            // The minimum delay of the worker counts.
            (retry(zero, 10, old), "worker.max_task_age is 60s"),
        ] {
            let Disposition::DeadLetter { reason, error } = disposition else { panic!() };
            assert_eq!(reason, DeadReason::RetriesExhausted);
            assert!(error.contains(limit) && error.ends_with(": no"), "{error}");
        }
        assert!(matches!(retry(zero, 9, old), Disposition::Retry { .. }));
    }

    #[test]
    fn other_dispositions_are_unchanged() {
        let disposition = Disposition::Again { after: Duration::ZERO };
        assert_eq!(LIMITS.apply(disposition.clone(), 99, || unreachable!()), disposition);
    }
}
