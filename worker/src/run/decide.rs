//! What becomes of the message of an attempt that has ended. Pure: outcome × attempt × retry policy.

use std::time::Duration;

use garenne_common::failpoints::Protection;
use garenne_common::topology::MAX_DELAY;
use garenne_common::{DeadReason, RetryPolicy};

use super::outcome::{Crash, Disposition, Outcome, Retryable, TaskError};

/// The disposition of attempt number `attempt` (the first is 1) that ended with `outcome`.
///
/// `jitter` in `0.0..=1.0` spreads retries over time; see [`RetryPolicy::delay_after`].
pub fn decide(outcome: Outcome, attempt: u32, policy: &RetryPolicy, jitter: f64) -> Disposition {
    let wait = || policy.delay_after(attempt, jitter);
    match outcome {
        Outcome::Succeeded(output) => Disposition::Complete(output),
        Outcome::Interrupted => Disposition::Requeue,
        Outcome::NotStarted(failure) => Disposition::Again { after: failure.after },
        Outcome::Cancelled => Disposition::Cancel { reason: "cancelled".to_owned() },
        Outcome::BadArguments(error) => {
            Disposition::DeadLetter { reason: DeadReason::Malformed, error }
        }
        Outcome::Failed(failure) => failed(&failure, attempt, policy, wait()),
        Outcome::TimedOut(limit) => {
            let error = format!("ran longer than its limit of {limit:?}");
            again(attempt, policy, wait(), DeadReason::TimedOut, error)
        }
        Outcome::Panicked(message) => {
            let error = format!("the handler panicked: {message}");
            again(attempt, policy, wait(), DeadReason::Panicked, error)
        }
        Outcome::Crashed(crash) => crashed(&crash, policy, jitter),
    }
}

/// The disposition of a task with a cancel request: a success stands, anything else is cancelled.
pub fn apply_cancellation(disposition: Disposition, reason: &str) -> Disposition {
    match disposition {
        Disposition::Complete(output) => Disposition::Complete(output),
        Disposition::Retry { .. }
        | Disposition::DeadLetter { .. }
        | Disposition::Again { .. }
        | Disposition::Requeue
        | Disposition::Cancel { .. } => Disposition::Cancel { reason: reason.to_owned() },
    }
}

/// Crashes have a budget of their own and cost no attempt.
fn crashed(crash: &Crash, policy: &RetryPolicy, jitter: f64) -> Disposition {
    let (count, budget) = (crash.record.count, crash.budget);
    if count < budget || !Protection::CrashBudget.is_enabled() {
        return Disposition::Again { after: policy.delay_after(count, jitter) };
    }
    let error = format!(
        "its process died {count} times (crash budget {budget}), last by {}:\n{}",
        crash.how, crash.record.log
    );
    Disposition::DeadLetter { reason: DeadReason::Crashed, error }
}

fn failed(failure: &TaskError, attempt: u32, policy: &RetryPolicy, wait: Duration) -> Disposition {
    let error = failure.message().to_owned();
    let wait = match failure.retryable() {
        Retryable::Never => return Disposition::DeadLetter { reason: DeadReason::Fatal, error },
        Retryable::ByPolicy => wait,
        // Limited to what the delay queues support: early is better than never.
        Retryable::After(wait) => wait.min(MAX_DELAY),
        // Unreachable through `execute`, which turns it into `Outcome::NotStarted`.
        Retryable::OutOfResources => return Disposition::Again { after: wait },
    };
    again(attempt, policy, wait, DeadReason::RetriesExhausted, error)
}

/// Another attempt if the policy has one left, otherwise a dead letter.
fn again(
    attempt: u32,
    policy: &RetryPolicy,
    after: Duration,
    reason: DeadReason,
    error: String,
) -> Disposition {
    if policy.allows_another(attempt) {
        Disposition::Retry { after, error }
    } else {
        Disposition::DeadLetter { reason, error }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::outcome::{StartFailure, StartFailureKind};
    use garenne_common::wire::CrashRecord;
    use garenne_common::{Codec, Payload};

    const POLICY: RetryPolicy = RetryPolicy { max_attempts: 2, ..RetryPolicy::DEFAULT };

    fn dead(outcome: Outcome) -> Option<DeadReason> {
        dead_after(2, outcome)
    }

    fn dead_after(attempt: u32, outcome: Outcome) -> Option<DeadReason> {
        match decide(outcome, attempt, &POLICY, 1.0) {
            Disposition::DeadLetter { reason, .. } => Some(reason),
            Disposition::Complete(_)
            | Disposition::Retry { .. }
            | Disposition::Again { .. }
            | Disposition::Requeue
            | Disposition::Cancel { .. } => None,
        }
    }

    #[test]
    fn the_last_attempt_is_a_dead_letter_with_its_reason() {
        let limit = Duration::from_secs(1);
        let failed = Outcome::Failed(TaskError::retry("no"));
        assert_eq!(dead(failed), Some(DeadReason::RetriesExhausted));
        assert_eq!(dead(Outcome::TimedOut(limit)), Some(DeadReason::TimedOut));
        assert_eq!(dead(Outcome::Panicked("boo".to_owned())), Some(DeadReason::Panicked));
    }

    #[test]
    fn fatal_failures_are_not_retried() {
        let fatal = Outcome::Failed(TaskError::fatal("no"));
        for (outcome, expected) in [
            (fatal, DeadReason::Fatal),
            (Outcome::BadArguments("no".to_owned()), DeadReason::Malformed),
        ] {
            assert_eq!(dead_after(1, outcome), Some(expected));
        }
    }

    #[test]
    fn a_first_failure_waits_by_policy_or_as_the_handler_asks() {
        let retry = |outcome| match decide(outcome, 1, &POLICY, 1.0) {
            Disposition::Retry { after, .. } => Some(after),
            Disposition::Complete(_)
            | Disposition::Again { .. }
            | Disposition::DeadLetter { .. }
            | Disposition::Requeue
            | Disposition::Cancel { .. } => None,
        };
        assert_eq!(retry(Outcome::Failed(TaskError::retry("no"))), Some(Duration::from_secs(1)));
        let later = TaskError::retry_after(Duration::from_mins(1), "busy");
        assert_eq!(retry(Outcome::Failed(later)), Some(Duration::from_mins(1)));
    }

    #[test]
    fn a_cancelled_task_is_not_retried_and_a_success_stands() {
        let cancel = Disposition::Cancel { reason: "enough".to_owned() };
        let failed = Outcome::Failed(TaskError::retry("no"));
        for outcome in [failed, Outcome::Interrupted, Outcome::Cancelled] {
            assert_eq!(apply_cancellation(decide(outcome, 1, &POLICY, 0.0), "enough"), cancel);
        }
        let output = Payload::encode(Codec::Json, &1).unwrap();
        let complete = Disposition::Complete(output);
        assert_eq!(apply_cancellation(complete.clone(), "enough"), complete);
    }

    #[test]
    fn crashes_have_a_budget_of_their_own() {
        let crash = |count, budget| {
            let log = "at w: signal SIGABRT".to_owned();
            let record = CrashRecord { count, log };
            Outcome::Crashed(Crash { record, budget, how: "signal SIGABRT".to_owned() })
        };
        for attempt in [1, 99] {
            let again = decide(crash(2, 3), attempt, &POLICY, 1.0);
            assert_eq!(again, Disposition::Again { after: Duration::from_secs(2) });
            let Disposition::DeadLetter { reason, error } =
                decide(crash(3, 3), attempt, &POLICY, 1.0)
            else {
                panic!()
            };
            assert_eq!(reason, DeadReason::Crashed);
            assert!(error.contains("died 3 times") && error.contains("SIGABRT"), "{error}");
        }
    }

    #[test]
    fn start_failures_cost_no_attempt() {
        let failure = StartFailure::new(StartFailureKind::Command, "cannot start x".to_owned());
        let after = failure.after;
        let again = decide(Outcome::NotStarted(failure), 2, &POLICY, 1.0);
        assert_eq!(again, Disposition::Again { after });
        let short = Outcome::Failed(TaskError::out_of_resources("no file"));
        assert!(matches!(decide(short, 2, &POLICY, 1.0), Disposition::Again { .. }));
    }

    #[test]
    fn an_interruption_costs_no_attempt() {
        assert_eq!(decide(Outcome::Interrupted, 2, &POLICY, 0.0), Disposition::Requeue);
        let output = Payload::encode(Codec::Json, &1).unwrap();
        let outcome = Outcome::Succeeded(output.clone());
        assert_eq!(decide(outcome, 9, &POLICY, 0.0), Disposition::Complete(output));
    }
}
