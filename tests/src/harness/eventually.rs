//! Waiting for something to become true, with a deadline and a name for what was awaited.
//!
//! The only place that sleeps. A test never sleeps to let something happen; it waits until it has.

use std::time::Duration;

use tokio::time::Instant;

/// What a healthy system does at once, with room for a busy machine.
const SOON: Duration = Duration::from_secs(20);
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
