//! Waiting for something to become true, with a deadline and a name for what was awaited.
//!
//! The only place that sleeps. A test never sleeps to let something happen; it waits until it has.
//! Deadlines are for what would hang: they are far longer than anything takes, and say nothing of speed.

use std::time::Duration;

use tokio::time::Instant;

/// The usual deadline: what a healthy system does at once is over by then on the busiest machine.
pub(crate) const SOON: Duration = Duration::from_mins(1);
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(150);

/// Asks again and again until there is an answer; panics with `what` after `deadline`.
pub(crate) async fn eventually<T>(
    deadline: Duration,
    what: &str,
    mut answer: impl AsyncFnMut() -> Option<T>,
) -> T {
    let end = Instant::now() + deadline;
    let mut pause = FIRST_PAUSE;
    loop {
        // The answer itself may hang on what is broken, so it has the same deadline.
        match tokio::time::timeout_at(end, answer()).await {
            Ok(Some(value)) => return value,
            Ok(None) if Instant::now() < end => tokio::time::sleep(pause).await,
            Ok(None) | Err(_) => panic!("not within {deadline:?}: {what}"),
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// [`eventually`] with the usual deadline.
pub(crate) async fn soon<T>(what: &str, answer: impl AsyncFnMut() -> Option<T>) -> T {
    eventually(SOON, what, answer).await
}

/// Lets time pass in which something forbidden could happen, such as a lease that lapses or a log that
/// is flooded, or before a fault that may come at any moment. Never a way to wait for something: on a
/// slow machine the time proves less, and the test must pass all the same.
pub(crate) async fn time_passes(at_least: Duration) {
    tokio::time::sleep(at_least).await;
}

/// Futures that should complete soon.
pub(crate) trait Soon: Future + Sized {
    /// Waits for at most the usual deadline; panics with `what` after it.
    async fn soon(self, what: &str) -> Self::Output {
        self.within(SOON, what).await
    }

    /// Waits for at most `deadline`; panics with `what` after it.
    async fn within(self, deadline: Duration, what: &str) -> Self::Output {
        let output = tokio::time::timeout(deadline, self).await;
        output.unwrap_or_else(|_| panic!("not within {deadline:?}: {what}"))
    }
}

impl<F: Future> Soon for F {}
