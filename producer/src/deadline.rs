//! Deadlines of operations: the time that is left, and errors for what missed one.

use std::time::Duration;

use garenne_common::broker::BrokerError;
use tokio::time::{Instant, timeout_at};

/// The time until `by`, rounded up to tenths of a second because errors show it to people.
pub(crate) fn left(by: Instant) -> Duration {
    let tenths = by.saturating_duration_since(Instant::now()).as_millis().div_ceil(100);
    Duration::from_millis(100) * u32::try_from(tenths).unwrap_or(u32::MAX)
}

/// The result of `work`, or after `by` an error that names `what` timed out.
pub(crate) async fn until<T, E: From<BrokerError>>(
    by: Instant,
    what: &str,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    match timeout_at(by, work).await {
        Ok(result) => result,
        Err(_) => Err(BrokerError::Lost(format!("timed out waiting for {what}")).into()),
    }
}
