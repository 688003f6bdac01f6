//! Moments by which something must be done.

use std::time::Duration;

use garenne_common::broker::BrokerError;
use tokio::time::{Instant, timeout_at};

/// How long it is until `by`, in tenths of a second: errors show it to people.
pub(crate) fn left(by: Instant) -> Duration {
    let tenths = by.saturating_duration_since(Instant::now()).as_millis().div_ceil(100);
    Duration::from_millis(100) * u32::try_from(tenths).unwrap_or(u32::MAX)
}

/// The result of `work`, or an error that says what did not come in time.
pub(crate) async fn until<T, E: From<BrokerError>>(
    by: Instant,
    what: &str,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    match timeout_at(by, work).await {
        Ok(result) => result,
        Err(_) => Err(BrokerError::Lost(format!("no {what} in time")).into()),
    }
}
